"""The README is true: its examples run, its tables and its tree name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from molora.recipes import RECIPES
from tests.support.places import ROOT
from tests.support.tiny import base_model, write_adapter

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base_model("llama").save_pretrained(tmp_path / "path/to/model")
    for i, name in enumerate(("math", "code")):
        write_adapter(tmp_path / "loras" / name, "llama", r=4, seed=i)
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for number, code in enumerate(EXAMPLES, 1):
        exec(compile(code, f"README.md example {number}", "exec"), space)
    assert (tmp_path / "my-adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "expert-0/adapter_config.json").is_file()
    assert len(EXAMPLES) >= 5


def test_the_method_table_is_the_table_of_recipes():
    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert rows == list(RECIPES)


def test_the_first_example_is_ten_lines():
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) == 10


def test_the_tree_names_what_is_there():
    tree = README.split("## The house")[1].split("```")[1]
    top = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert all((ROOT / name).exists() for name in top), top
    for part in re.split(r"\n(?=\S)", tree.strip()):  # a folder, and what stands in it
        folder, _, rest = part.partition("\n")
        for name in re.findall(r"[a-z_]+\.py|[a-z_]+/", rest):
            assert (ROOT / folder.split()[0] / name).exists(), name


def test_make_targets_that_the_readme_names_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (demo|test|\w+)\b(?=\s*#|`)", README)) <= set(targets)
