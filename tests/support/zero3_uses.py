"""What people do with a model that ZeRO-3 cut in pieces, as a program for two processes.

The base is loaded under ``zero.Init``, so that its parameters are cut before ``convert`` sees them. Each use leaves a
file; test_zero3.py compares them with a model that was never cut.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers as tf
from accelerate.state import AcceleratorState
from torch import distributed

import molora
from molora.config import MoloraConfig
from molora.config.options import PenaltyConfig
from molora.training import Trainer, TrainingArguments
from molora.training.engine import sharded
from tests.support import behaviours, tiny
from tests.support.several import deepspeed_config
from tests.support.training_runs import SETTINGS, data
from tests.support.traits import still

RECIPES = tuple(tiny.RECIPES)
PROMPTS = ([5, 9, 12], [7, 8, 33])  # one a process; they stop at different lengths


def config(recipe: str) -> MoloraConfig:
    """The small version of ``recipe``; a bias that moves without a learning rate stands still."""
    return still(behaviours.config(recipe, "llama"))


def model_folder(where: Path) -> Path:
    """The tiny Llama as transformers saves it."""
    folder = where / "llama"
    if not folder.exists():
        tiny.base_model("llama").save_pretrained(folder)
    return folder


def settings(where: Path, **more: Any) -> TrainingArguments:
    """Arguments whose construction tells transformers that ZeRO-3 is on, as in any script."""
    AcceleratorState._reset_state(reset_partial_state=True)
    stage = {"deepspeed": deepspeed_config(3)}
    made = TrainingArguments(output_dir=str(where), **{**SETTINGS, "per_device_train_batch_size": 2, **stage, **more})
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)  # on a CPU transformers leaves it to the engine
    return made


def cut_base(where: Path) -> Any:
    """The base under zero.Init; asserts that it really is in pieces."""
    base = tf.AutoModelForCausalLM.from_pretrained(where / "llama", dtype=torch.float32)
    weight = base.model.layers[0].mlp.up_proj.weight
    assert hasattr(weight, "ds_id")
    assert weight.numel() == 0, "the base was not cut, so this shows nothing"
    return base


def convert(where: Path, recipe: str) -> dict[str, Any]:
    """Convert the cut base (importing adapters where the recipe has them); a step of rate 0; save by the Trainer."""
    arguments = settings(where / recipe, max_steps=1, learning_rate=0.0, optim="sgd")
    model = molora.convert(cut_base(where), config(recipe))
    tiny.arm(model)
    it = Trainer(model, arguments, train_dataset=data(model))
    it.train()
    it.save_model(str(where / recipe / "saved"))
    return {"stage": sharded.stage(it.model_wrapped), "counts": model.get_nb_trainable_parameters()}


def taken_back() -> dict[str, Any]:
    """Options of a mixture whose experts start at parts of the weights, which therefore have to be gathered."""
    return behaviours.options("mixlora", "llama") | {"r": 2, "init_lora_weights": "pissa"}


def start(where: Path) -> dict[str, Any]:
    """Such a mixture on the cut base; a step that moves A and B; saved by the Trainer, and what the engine trains."""
    arguments = settings(where / "start", max_steps=1, learning_rate=0.1, optim="sgd", weight_decay=0.1)
    model = molora.convert(cut_base(where), "mixlora", **taken_back())
    before = {n: t.clone() for n, t in sharded.adapter_state(model).items()}
    it = Trainer(model, arguments, train_dataset=data(model))
    it.train()
    it.save_model(str(where / "start" / "saved"))
    return {"before": before, "after": sharded.adapter_state(model)}


PENALTY = {"max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}


def penalised() -> Any:
    """A mixture whose experts are pushed apart."""
    plain = molora.recipes.mola(r=2, num_experts=3)
    rules = (PenaltyConfig(kind="orthogonal", coef=5.0),)
    return plain.replace(placements=tuple(p.replace(penalties=rules) for p in plain.placements))


def penalty(where: Path) -> dict[str, Any]:
    """Two steps of it, which need the gradient of parameters that are in pieces when the loss is made."""
    arguments = settings(where / "penalty", **PENALTY)
    model = molora.convert(cut_base(where), penalised())
    it = Trainer(model, arguments, train_dataset=data(model))
    it.train()
    return {"after": sharded.adapter_state(model)}


def load(where: Path) -> dict[str, Any]:
    """An adapter folder onto the cut base; loss of one evaluation with unequal rows on the two processes."""
    arguments = settings(where / "load", per_device_eval_batch_size=2, max_steps=1, learning_rate=0.0, optim="sgd")
    model = molora.load(cut_base(where), where / "mixlora" / "saved", trainable=True)
    it = Trainer(model, arguments, train_dataset=data(model), eval_dataset=data(model)[:5])
    it.train()
    even = it.evaluate(data(model))["eval_loss"]
    return {"eval_uneven": it.evaluate()["eval_loss"], "eval_even": even, "state": sharded.adapter_state(model)}


def generate(where: Path) -> dict[str, Any]:
    """Each process its own prompt and length; without ``synced_gpus`` the shorter one would leave the other waiting."""
    out: dict[str, Any] = {}
    for recipe in ("mixlora", "xlora"):
        arguments = settings(where / "generate", max_steps=1, learning_rate=0.0, optim="sgd")
        model = tiny.arm(molora.convert(cut_base(where), config(recipe)))
        it = Trainer(model, arguments, train_dataset=data(model))
        it.train()
        rank = distributed.get_rank()
        ids = torch.tensor([PROMPTS[rank]])
        made = model.eval().generate(ids, max_new_tokens=(4, 9)[rank], do_sample=False, synced_gpus=True)
        both: list[Any] = [None, None]
        distributed.all_gather_object(both, made.tolist())
        out[recipe] = both
    return out


def main(where: Path) -> None:
    """Every use, each with its result or its error."""
    torch.set_num_threads(1)
    first = os.environ["RANK"] == "0"
    uses: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"convert-{r}": (lambda r=r: convert(where, r)) for r in RECIPES},  # type: ignore[misc]
        "start": lambda: start(where),
        "penalty": lambda: penalty(where),
        "load": lambda: load(where),
        "generate": lambda: generate(where),
    }
    for name, use in uses.items():
        try:
            result = use()
        except Exception:
            result = {"error": traceback.format_exc()}
        if first:
            torch.save(result, where / f"{name}.pt")
        if first or "error" in result:
            print(json.dumps({"done": name, "error": result.get("error", "")[-600:]}), flush=True)
    distributed.barrier()
    os._exit(0)  # the backends' teardown aborts once in a while, when all is done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
