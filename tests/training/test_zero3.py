"""ZeRO-3: a base that is cut before ``convert`` sees it gives the same files, losses and texts as a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.layers.mixture import HEAD
from molora.training import Trainer, TrainingArguments
from tests.support import tiny, zero3_uses
from tests.support.folders import contents
from tests.support.programs import program
from tests.support.tolerances import close
from tests.support.training_runs import SETTINGS, data
from tests.support.traits import traits

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def uses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero3")
    zero3_uses.model_folder(folder)
    (folder / "printed").write_text(program("tests.support.zero3_uses", folder))
    return folder


def read(uses: Path, name: str) -> dict[str, Any]:
    path = uses / f"{name}.pt"
    assert path.exists(), (uses / "printed").read_text()[-3000:]
    result: dict[str, Any] = torch.load(path)
    assert "error" not in result, result["error"]
    return result


def whole(recipe: str) -> Any:
    """The same mixture on a base that was never cut."""
    model = molora.convert(tiny.base_model("llama"), zero3_uses.config(recipe))
    return tiny.arm(model).eval()


@pytest.mark.parametrize("recipe", tiny.RECIPES)
def test_the_saved_adapter_is_byte_for_byte_that_of_one_process(recipe: str, uses: Path, tmp_path: Path) -> None:
    """Conversion under zero.Init, import of adapters there, gathering and saving, against a plain process."""
    assert read(uses, f"convert-{recipe}")["stage"] == 3
    model = whole(recipe)
    model.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    assert contents(uses / recipe / "saved")[name] == contents(tmp_path)[name]
    assert read(uses, f"convert-{recipe}")["counts"] == model.get_nb_trainable_parameters()
    loaded = molora.load(tiny.base_model("llama"), uses / recipe / "saved").eval()
    inputs = tiny.batch("llama")
    assert torch.equal(tiny.output(loaded, inputs), tiny.output(model, inputs))
    assert hasattr(loaded, HEAD) == traits(recipe).model_wide


def test_experts_start_at_parts_of_weights_that_are_cut(uses: Path) -> None:
    """The same start as on a whole base; a step leaves what takes it back, also through saving."""
    pytest.importorskip("peft", reason="the start is PEFT's code")
    model = molora.convert(tiny.base_model("llama"), "mixlora", **zero3_uses.taken_back())
    state, found = model.state_dict(), read(uses, "start")
    assert all(torch.equal(t, state[n]) for n, t in found["before"].items())
    saved = molora.load(tiny.base_model("llama"), uses / "start" / "saved").state_dict()
    assert all(torch.equal(t, saved[n]) for n, t in found["after"].items())
    same = {n for n, t in found["after"].items() if torch.equal(t, state[n])}
    assert {n for n in same if ".bank." in n} == {n for n in state if ".frozen_" in n} != set()


def test_a_penalty_on_parameters_in_pieces_has_its_gradient(uses: Path, tmp_path: Path) -> None:
    model = molora.convert(tiny.base_model("llama"), zero3_uses.penalised())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    one = {**SETTINGS, **zero3_uses.PENALTY, "per_device_train_batch_size": 4}
    Trainer(model, TrainingArguments(output_dir=str(tmp_path), **one), train_dataset=data(model)).train()
    after, found = model.state_dict(), read(uses, "penalty")["after"]
    for name, t in found.items():
        close(t, after[name], "same_math_fp32")
    moved = max(float((t - before[n]).abs().max()) for n, t in found.items() if n.endswith("lora_A"))
    assert moved > 0.01


def test_an_adapter_is_loaded_onto_a_cut_base_and_evaluated(uses: Path) -> None:
    """Four rows a step on two processes; and five rows, which do not divide: no process waits for the other."""
    model = molora.load(tiny.base_model("llama"), uses / "mixlora" / "saved").eval()
    values = []
    for rows in (data(model)[:4], data(model)[4:]):
        with torch.no_grad():
            values.append(model(**{k: torch.tensor([row[k] for row in rows]) for k in rows[0]}).loss)
    found = read(uses, "load")
    close(torch.tensor(found["eval_even"]), torch.stack(values).mean(), "same_math_fp32")
    assert 0.5 * found["eval_even"] < found["eval_uneven"] < 2 * found["eval_even"]
    assert found["state"].keys() == {n for n in model.state_dict() if ".bank." in n or ".router." in n}


@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
@pytest.mark.parametrize("process", [0, 1])
def test_generation_with_synced_gpus_at_unequal_lengths(recipe: str, process: int, uses: Path) -> None:
    ids = torch.tensor([zero3_uses.PROMPTS[process]])
    wanted = whole(recipe).generate(ids, max_new_tokens=(4, 9)[process], do_sample=False)
    assert read(uses, "generate")[recipe][process] == wanted.tolist()
