"""PEFT models of every recipe under DeepSpeed, as a program for two processes, with transformers' own Trainer.

Each case trains, saves and leaves a file; test_peft_engines.py compares them with one process and no engine.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch import distributed

import molora
from molora.config import MoloraConfig
from molora.training.engine import sharded
from tests.support import behaviours, tiny
from tests.support.several import deepspeed_config
from tests.support.training_runs import SETTINGS, SMOOTH, data
from tests.support.traits import still
from tests.support.zero3_uses import cut_base

RECIPES = tuple(tiny.RECIPES)


def config(recipe: str) -> MoloraConfig:
    """The small version of ``recipe``; loss-free biases move in whole steps, so rounding could show."""
    return still(behaviours.config(recipe, "llama"))


def peft_model(recipe: str, base: Any) -> Any:
    """An armed mixture in a PeftModel."""
    model = get_peft_model(base, molora.peft_config(config(recipe)))
    tiny.arm(model.get_base_model())
    return model


def train(recipe: str, where: Path, stage: int = 0, cut: bool = False, **arguments: Any) -> Any:
    """Two steps over the same eight rows; saves as the Trainer does, once as a checkpoint and once on demand."""
    engine = {"deepspeed": deepspeed_config(stage)} if stage else {}
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "sequential"}
    settings = tf.TrainingArguments(output_dir=str(where), **{**SETTINGS, **SMOOTH, **steps, **engine, **arguments})
    if cut and not distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    base = cut_base(where.parent) if cut else tiny.base_model("llama")
    model = peft_model(recipe, base)
    rows = data(model.get_base_model())
    it = tf.Trainer(model, settings, train_dataset=rows)
    it.train()
    it.save_model(str(where / "saved"))
    return it


def cases() -> list[tuple[str, str, int, bool]]:
    """(name, recipe, stage, whether the base was loaded in pieces)."""
    whole = [(f"zero3-{r}", r, 3, False) for r in RECIPES]
    whole += [(f"zero2-{r}", r, 2, False) for r in ("mixlora", "smora", "xlora")]
    return [*whole, ("cut-mixlora", "mixlora", 3, True), ("cut-xlora", "xlora", 3, True)]


def main(where: Path) -> None:
    """Every case, each with its result or its error."""
    torch.set_num_threads(1)
    first = os.environ["RANK"] == "0"
    for name, recipe, stage, cut in cases():
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            it = train(recipe, where / name, stage, cut, per_device_train_batch_size=4)
            result = {"stage": sharded.stage(it.model_wrapped), "files": sorted(os.listdir(where / name / "saved"))}
        except Exception:
            result = {"error": traceback.format_exc()}
        if first:
            (where / f"{name}.json").write_text(json.dumps(result))
        if first or "error" in result:
            print(json.dumps({"done": name, "error": result.get("error", "")[-900:]}), flush=True)
    distributed.barrier()
    os._exit(0)  # the backends' teardown aborts once in a while, when all is done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
