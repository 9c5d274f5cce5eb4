"""Training with several processes, as a program: every recipe under every engine, in one launch.

Started by ``torchrun -m tests.several FOLDER``; nearly all of a launch is imports, so one launch runs all cases. Each
case leaves a file with what it logged and what it trained; test_several.py compares them with one process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed

from molora.training import sharded
from tests import tiny
from tests.training_runs import SMOOTH, build, data, logged, trainer

ENGINES = ("ddp", "zero1", "zero2", "zero3")
VARIANTS = ("mixed", "apart", "padding")
KEYS = ("loss", "aux_loss", "routing_entropy", "routing_max_violation", "routing_token_entropy", "routing_min_load")
ROWS = 8
ARGUMENTS: dict[str, Any] = {**SMOOTH, "train_sampling_strategy": "sequential"}


def rows_of(variant: str, model: Any) -> list[dict[str, Any]]:
    """The eight rows of a step, the first four for the first process, when there are two.

    ``apart``: rows of one token each, so that every process sees two or three experts of a site and not those that the
    other sees. ``padding``: the second process gets nothing but padding.
    """
    rows = data(model)
    if variant == "apart":
        for i, row in enumerate(rows):
            row["input_ids"] = [3 + i // 4] * len(row["input_ids"])
            row["attention_mask"] = [1] * len(row["input_ids"])
            row["labels"] = list(row["input_ids"])
    if variant == "padding":
        for row in rows[4:]:
            row["attention_mask"] = [0] * len(row["input_ids"])
            row["labels"] = [-100] * len(row["input_ids"])
    return rows


def train(recipe: str, variant: str, folder: Path, engine: str = "", **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Three steps over the same eight rows: the trainer, and what it logged and trained."""
    model = build(recipe, **arguments.pop("options", {}))
    config = {"deepspeed": deepspeed_config(int(engine[-1]))} if engine.startswith("zero") else {}
    it = trainer(model, folder, **{**ARGUMENTS, **config, **arguments})
    it.train_dataset = rows_of(variant, model)
    it.train()
    return it, {"logged": {k: logged(it, k) for k in KEYS}, "state": whole_state(it)}


def whole_state(it: Any) -> dict[str, Tensor]:
    """What was trained, gathered."""
    names = {n for n, p in it.model.named_parameters() if p.requires_grad}
    tensors = sharded.adapter_state(it.model) if it.is_deepspeed_enabled else it.model.state_dict()
    return {n: t.detach().clone() for n, t in tensors.items() if n in names or "select_bias" in n}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """The least that DeepSpeed wants; its sizes are the Trainer's."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100  # so that the small parameters of the tests are cut, too
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    return {**sizes, "gradient_clipping": "auto", "zero_optimization": zero, "zero_allow_untested_optimizer": True}


def engine_of(it: Any) -> str:
    """What really trained, asked of the objects themselves."""
    kind = type(it.model_wrapped).__name__
    return f"{kind} {sharded.stage(it.model_wrapped)}" if kind == "DeepSpeedEngine" else kind


def main(folder: Path) -> None:
    """Every case, in the order of ENGINES; DDP comes first because DeepSpeed leaves its mark on the environment."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    first = int(os.environ["RANK"]) == 0
    for engine in ENGINES:
        for recipe in tiny.RECIPES:
            for variant in VARIANTS:
                AcceleratorState._reset_state(reset_partial_state=True)
                name = f"{engine}-{recipe}-{variant}"
                try:
                    it, result = train(recipe, variant, folder / name, engine, per_device_train_batch_size=4)
                    result["engine"] = engine_of(it)
                except Exception:
                    result = {"error": traceback.format_exc()}
                    if not first:
                        print(result["error"], file=sys.stderr)
                if first:
                    torch.save(result, folder / f"{name}.pt")
                    print(json.dumps({"done": name, "error": result.get("error", "")[-300:]}), flush=True)
    distributed.barrier()
    os._exit(0)  # the backends' teardown aborts once in a while, when all is done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
