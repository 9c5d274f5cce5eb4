"""Where records come from: every kind of file gives the same records, and every mistake is named where it is."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from molora.data.records import Record, source
from molora.data.sources import read_source
from molora.errors import ConfigError
from tests.support.tiny_text import jsonl

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]
LINES: list[dict[str, Any]] = [{"text": "été", "group": "g"}, {"messages": TURNS}]
RECORDS = [Record(text="été", group="g"), Record(messages=tuple(TURNS))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(value: Any, *needs: str) -> list[Record]:
    return read_source(source(value), needs)


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    parquet.write_table(pa.Table.from_pylist(rows, schema=None), path)
    return str(path)


# -------------------------------------------------------------------------------------------------------------- files


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "d.jsonl", LINES)
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    rows = [{"text": None, "messages": None, "group": None, **line} for line in LINES]
    (tmp_path / "hub").mkdir()
    table(tmp_path / "hub" / "train.parquet", rows)
    for value in (plain, tmp_path / "d.json.gz", table(tmp_path / "d.parquet", rows), f"hf:{tmp_path / 'hub'}"):
        assert read(str(value)) == RECORDS


def test_a_text_file_has_a_record_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n  \r\n\nthree\n")
    records = read(str(tmp_path / "t.txt"))
    assert [r.text for r in records] == ["one\ntwo", "three"]
    assert [r.where.rpartition(":")[2] for r in records] == ["1", "6"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "f" / "b").mkdir(parents=True)
    jsonl(tmp_path / "f" / "c.jsonl", [{"text": "third"}])
    (tmp_path / "f" / "b" / "x.txt").write_text("second")
    table(tmp_path / "f" / "a.parquet", [{"text": "first"}])
    (tmp_path / "f" / "notes.md").write_text("no data")
    (tmp_path / "f" / ".old.txt").write_text("hidden")
    assert [r.text for r in read(str(tmp_path / "f"))] == ["first", "second", "third"]


def test_columns_have_the_names_that_they_are_given(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"body": "a", "text": "b", "topic": 3, "doc": "x", "messages": 4}])
    value = {"path": str(path), "text_column": "body", "label_column": "topic", "group_column": "doc"}
    assert read(value, "label") == [Record(text="a", label=3, group="x")]
    assert read({"path": str(path), "text_column": "body"}) == [Record(text="a")]


def test_a_data_set_by_config_and_split_with_named_classes(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    made.to_parquet(tmp_path / "test.parquet")
    assert [r.label for r in read(f"hf:{tmp_path}:default:test", "label")] == ["yes", "no"]
    assert [r.text for r in read(f"hf:{tmp_path}::test[:1]")] == ["a"]


# ------------------------------------------------------------------------------------------------------------- images


def test_images_are_paths_beside_the_file_or_bytes_in_it(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "a.png").write_bytes(b"a")
    turns = {"messages": TURNS}
    path = jsonl(tmp_path / "d.jsonl", [{"image": "i/a.png", **turns}, turns])
    one, none = read(str(path), "image")
    assert (one.image, one.group, none.image) == (str(tmp_path / "i/a.png"), "i/a.png", "")
    rows = [{"image": {"bytes": b"a", "path": None}, **turns}, {"image": {"bytes": b"b", "path": "x"}, **turns}]
    first, second = read(table(tmp_path / "d.parquet", rows), "image")
    assert (first.image, second.image) == (b"a", b"b")
    assert first.group != second.group
    assert read(str(path))[0].image == ""  # a model without eyes does not look for files


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("line", "needs", "said"),
    [
        ({"text": "a", "label": 0.5}, "label", "'label': got 0.5, expected a string or a whole number"),
        ({"text": "a", "kind": "b"}, "label", "no 'label', which a classifier learns; there is 'text', 'kind'"),
        ({"messages": TURNS, "image": "none.png"}, "image", "none.png does not exist; paths are relative to the file"),
        ({"messages": TURNS, "image": 4}, "image", "'image': got int, expected the path"),
    ],
)
def test_a_bad_label_or_image_is_named_with_its_line(
    tmp_path: Path, line: dict[str, Any], needs: str, said: str
) -> None:
    path = jsonl(tmp_path / "d.jsonl", [line])
    with pytest.raises(ConfigError) as caught:
        read(str(path), needs)
    assert f"{path}:1: " in str(caught.value)
    assert said in str(caught.value)


def test_an_unknown_column_is_told_once_with_those_that_there_are(tmp_path: Path) -> None:
    lines = [{"body": "a", "id": 1}, {"body": "b"}]
    for path in (str(jsonl(tmp_path / "d.jsonl", lines)), table(tmp_path / "d.parquet", lines)):
        with pytest.raises(ConfigError) as caught:
            read({"path": path, "text_column": "bodi"})
        assert str(caught.value) == f"{path}: no column 'bodi'; there is 'body', 'id'; did you mean 'body'?"


def test_a_column_that_some_lines_lack_is_named_with_the_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"body": "a"}, {"text": "b"}])
    with pytest.raises(ConfigError, match=r"d.jsonl:2: got 'text', expected 'body'$"):
        read({"path": str(path), "text_column": "body"})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.parquet", b"PAR1 not", "is not a readable Parquet file"),
        ("d.jsonl.gz", b"not gzip", "cannot be unpacked"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "cannot be unpacked"),
        ("d.txt", b"good\n\nbad \xff", "d.txt:3: not UTF-8 text"),
        ("d.txt", b"\n\n", "has no records"),
        ("f/notes.md", b"", "holds no file that ends with .jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read(str(path if path.suffix != ".md" else path.parent))


def test_an_empty_table_and_a_bad_row_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="row 2: 'text': got ' '"):
        read(table(tmp_path / "d.parquet", [{"text": "a"}, {"text": " "}]))
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    with pytest.raises(ConfigError, match=r"e.parquet has no records"):
        read(str(tmp_path / "e.parquet"))


@pytest.mark.parametrize("name", ["hf:nobody/nothing-of-this-name", "hf:{}:other", "hf:{}::nosplit"])
def test_a_data_set_that_cannot_be_had(tmp_path: Path, name: str) -> None:
    (tmp_path / "hub").mkdir()
    table(tmp_path / "hub" / "train.parquet", [{"text": "a"}])
    with pytest.raises(ConfigError) as caught:
        read(name.format(tmp_path / "hub"))
    assert str(caught.value).startswith(f"{name.format(tmp_path / 'hub')} cannot be loaded: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "value"), [("datasets", "hf:x"), ("pyarrow.parquet", "d.parquet")])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, value: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("d.parquet").touch()
    with pytest.raises(ConfigError, match=r"pip install 'molora\[train\]'"):
        read(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "got 3, expected a path"),
        ({"text_column": "a"}, "expected a path in it"),
        ({"path": "x", "txt_column": "a"}, "unknown entry 'txt_column'; did you mean 'text_column'"),
        ({"path": "x", "text_column": 4}, "text_column: got 4, expected a string"),
    ],
)
def test_a_source_that_says_too_little(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        source(value)
