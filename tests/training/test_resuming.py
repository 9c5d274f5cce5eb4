"""Training that was cut and resumed is training that was not; a Trainer that dies leaves a whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from tests.support import resuming, tiny
from tests.support.behaviours import assert_same
from tests.support.programs import program
from tests.support.tolerances import close

pytestmark = pytest.mark.dist
KILLS = 20
MODES = ("every step", "random", "full disk")


def halves(folder: Path, processes: int) -> Path:
    """Both halves of every case, each half in processes of its own."""
    printed = [program("tests.support.resuming", half, folder, processes=processes) for half in ("begin", "go on")]
    (folder / "printed").write_text("\n".join(printed))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return halves(tmp_path_factory.mktemp("alone"), processes=0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return halves(tmp_path_factory.mktemp("two"), processes=2)


def read(folder: Path, case: str, half: str) -> dict[str, Any]:
    path = folder / f"{case}-{half}.pt"
    assert path.exists(), (folder / "printed").read_text()[-3000:]
    result: dict[str, Any] = torch.load(path)
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize("recipe", tiny.RECIPES)
def test_one_process_resumes_bit_for_bit(recipe: str, alone: Path) -> None:
    """With dropout, a cosine schedule and AdamW, in the middle of an epoch, in a new process with another seed."""
    whole, resumed = read(alone, f"alone-{recipe}", "begin"), read(alone, f"alone-{recipe}", "go on")
    assert whole["loss"].numel() == resuming.STEPS
    assert torch.equal(resumed["loss"], whole["loss"])  # the first half's are in the checkpoint's log
    assert_same(resumed["state"], whole["state"])


@pytest.mark.parametrize(("engine", "recipe"), resuming.cases(alone=False))
def test_two_processes_resume_bit_for_bit(engine: str, recipe: str, two: Path) -> None:
    whole, resumed = read(two, f"{engine}-{recipe}", "begin"), read(two, f"{engine}-{recipe}", "go on")
    assert torch.equal(resumed["loss"], whole["loss"])  # a sum of two processes has one order
    assert_same(resumed["state"], whole["state"])


@pytest.mark.parametrize("engine", resuming.ENGINES)
def test_checkpoints_hold_the_adapter_and_load_in_a_plain_process(engine: str, two: Path) -> None:
    """Not the base, whatever the engine; and what a plain process loads is what the engine trained."""
    folder = two / f"{engine}-mixlora" / "cut" / f"checkpoint-{resuming.CUT}"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "molora_manifest.json"} <= names
    assert not {n for n in names if n.startswith(("model", "pytorch_model"))}
    model = molora.load(tiny.base_model("llama"), folder, trainable=True)
    trained = torch.load(two / f"{engine}-mixlora-begin.pt")["half"]
    for name, t in trained.items():
        assert torch.equal(dict(model.named_parameters())[name], t), name


@pytest.fixture(scope="module")
def universal(two: Path) -> Path:
    (two / "printed").write_text(program("tests.support.resuming", "alone", two, processes=1))
    return two


@pytest.mark.parametrize("engine", [e for e, _ in resuming.UNIVERSAL])
def test_one_process_goes_on_with_the_universal_checkpoint_of_two(engine: str, universal: Path) -> None:
    """Weights and AdamW's moments arrive: the losses, and every weight, are those of two processes without a cut."""
    whole, alone = read(universal, f"{engine}-mixlora", "begin"), read(universal, f"{engine}-mixlora", "alone")
    assert alone["processes"] == 1
    close(alone["loss"], whole["loss"], "additive")
    for name, t in whole["state"].items():
        close(alone["state"][name], t, "additive")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("crashes")
    printed = program("tests.support.checkpoint_crashes", folder, str(KILLS), processes=0)
    path = folder / "faults.json"
    assert path.exists(), printed[-3000:]
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("mode", MODES)
def test_a_trainer_that_dies_leaves_a_whole_checkpoint(mode: str, faults: dict[str, str]) -> None:
    assert faults[mode] == ""
