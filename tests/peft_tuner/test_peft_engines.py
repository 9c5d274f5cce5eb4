"""transformers' Trainer with a PeftModel, alone and under DeepSpeed on two processes: it saves the adapter, whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import molora
from molora.adapter.folder import load_tensors, read_adapter
from tests.support import peft_uses, tiny, zero3_uses
from tests.support.programs import program
from tests.support.tolerances import close

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    zero3_uses.model_folder(folder)
    (folder / "printed").write_text(program("tests.support.peft_uses", folder))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process without an engine, with all eight rows of a step at once."""
    folder = tmp_path_factory.mktemp("alone")
    for recipe in peft_uses.RECIPES:
        peft_uses.train(recipe, folder / recipe, per_device_train_batch_size=8)
    return folder


@pytest.mark.parametrize(("name", "recipe", "stage", "cut"), [pytest.param(*c, id=c[0]) for c in peft_uses.cases()])
def test_two_processes_save_the_adapter_of_one(name: str, recipe: str, stage: int, cut: bool, two: Path, alone: Path):
    """Every tensor of it, also the frozen experts that the engine holds in pieces, and nothing of the base."""
    path = two / f"{name}.json"
    assert path.exists(), (two / "printed").read_text()[-3000:]
    result = json.loads(path.read_text())
    assert "error" not in result, result["error"]
    assert result["stage"] == stage
    wanted = load_tensors(read_adapter(alone / recipe / "saved"))
    for folder in (two / name / "saved", two / name / "checkpoint-2"):
        found = load_tensors(read_adapter(folder))
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            close(tensor, wanted[key], "additive")
    assert not any(n.startswith(("model", "pytorch_model")) for n in result["files"])


@pytest.mark.parametrize("recipe", peft_uses.RECIPES)
def test_a_peft_model_trains_as_the_converted_model_does(recipe: str, alone: Path):
    """By hand, two steps of plain SGD on the model that ``convert`` makes."""
    model = tiny.arm(molora.convert(tiny.base_model("llama"), peft_uses.config(recipe))).train()
    rows = peft_uses.data(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    N = sum(label != -100 for row in rows for label in row["labels"][1:])
    for rate in (0.1, 0.05):  # linear, down to zero after the second step
        optimizer.param_groups[0]["lr"] = rate
        model(**{k: torch.tensor([row[k] for row in rows]) for k in rows[0]}, num_items_in_batch=N).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = load_tensors(read_adapter(alone / recipe / "saved"))
    own = dict(model.named_parameters())
    for key, tensor in saved.items():
        if key in own:
            close(tensor, own[key].detach(), "additive")
