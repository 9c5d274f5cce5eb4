"""The file that an evaluation leaves: parts that are added, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.errors import ConfigError
from molora.eval.document import FILE, add_sections, plain, read_document

PROVENANCE = {"adapter": {"sha256": "a"}, "settings": {"seed": 0}}
ROUTING = {"sites": [], "domains": {}, "load": {}, "samples": [], "vocabulary": []}


def test_parts_are_added_to_one_file_and_a_part_made_again_replaces_itself(tmp_path: Path) -> None:
    path = tmp_path / "new" / FILE
    add_sections(path, "run", PROVENANCE, {"routing": ROUTING}, {"7": "seven", "12": "twelve"})
    add_sections(path, "run", PROVENANCE, {"scores": {"schema": 1}}, {})
    document = add_sections(path, "renamed", PROVENANCE, {"scores": {"schema": 1, "perplexity": {}}}, {"9": "nine"})
    assert read_document(path) == read_document(path.parent) == document
    assert list(document) == ["schema", "name", "provenance", "routing", "scores", "tokens"]
    assert document["name"] == "renamed"
    assert document["scores"] == {"schema": 1, "perplexity": {}}
    assert list(document["tokens"].items()) == [("7", "seven"), ("9", "nine"), ("12", "twelve")]
    assert [p.name for p in path.parent.iterdir()] == [FILE]


def test_the_evaluation_of_another_adapter_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / FILE
    add_sections(path, "run", PROVENANCE, {}, {})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="holds another evaluation, they differ in settings; give another --out"):
        add_sections(path, "run", PROVENANCE | {"settings": {"seed": 1}}, {}, {})
    assert path.read_bytes() == before


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot be read as JSON"),
    "something else": ({"loss": 1}, "is no evaluation: got no schema number and provenance"),
    "a list": ([1], "is no evaluation"),
    "a newer one": ({"schema": 2, "provenance": {}}, "got schema 2, expected at most 1: .* newer molora; update"),
    "a torn part": (
        {"schema": 1, "provenance": {}, "routing": {"sites": []}},
        "is not whole: routing: got no 'domains'",
    ),
    "a part of another kind": ({"schema": 1, "provenance": {}, "ablation": 3}, "ablation: got int, expected an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_evaluation_is_one_clear_error(name: str, tmp_path: Path) -> None:
    value, message = BAD[name]
    path = tmp_path / FILE
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(ConfigError, match=message) as e:
        read_document(path)
    assert str(path) in str(e.value)
    assert "molora" in str(e.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.json does not exist; write one with `molora eval routing"):
        read_document(tmp_path)


def test_values_are_plain_and_short() -> None:
    value = {"a": torch.tensor([1 / 3, 2.0]), 1: (0.1234567, None, True, "x")}
    assert plain(value) == {"a": [0.333333, 2.0], "1": [0.123457, None, True, "x"]}
