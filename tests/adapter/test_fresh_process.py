"""Save, then load in another process with another seed: the same bits, for every recipe; and the same bytes again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import molora
from molora.adapter.names import PREFIX
from tests.support.places import ROOT
from tests.support.tiny import RECIPES, base_model, batch, converted, output

LIMIT_S = 240  # for one process that imports torch and loads every recipe
LOAD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
import molora
from tests.support.tiny import base_model, batch, output

torch.set_num_threads(1)
torch.manual_seed(12345)
torch.rand(1000)
root, wrong = Path(sys.argv[1]), []
for recipe in sys.argv[2:]:
    model = molora.load(base_model("llama"), root / recipe)
    expected = load_file(root / f"{recipe}.safetensors")["logits"]
    if not torch.equal(output(model, batch("llama")), expected):
        wrong.append(recipe)
print(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for recipe in RECIPES:
        model = converted(recipe, "llama", root)
        model.save_pretrained(folder / recipe)
        save_file({"logits": output(model, batch("llama")).contiguous()}, folder / f"{recipe}.safetensors")
    return folder


@pytest.mark.slow
def test_another_process_gives_the_same_bits(saved: Path):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(saved), *RECIPES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_keys_are_what_trains_and_what_was_imported(recipe: str, saved: Path, root: Path):
    model = converted(recipe, "llama", root)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    experts = {n for n, _ in model.named_parameters() if ".bank.lora_" in n}
    biases = {n for n, _ in model.named_buffers() if n.endswith("select_bias")}
    with safe_open(saved / recipe / "adapter_model.safetensors", "pt") as f:
        names = {name.removeprefix(PREFIX) for name in f.keys()}  # noqa: SIM118 the file is no mapping
    assert names == trained | experts | biases
    assert "base_layer" not in " ".join(names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loaded_adapter_saves_to_the_same_bytes(recipe: str, saved: Path, tmp_path: Path):
    model = molora.load(base_model("llama"), saved / recipe)
    model.save_pretrained(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved / recipe / name).read_bytes()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
