"""Training with several processes, as a program: every recipe under every engine, in one launch.

Started by ``torchrun -m tests.support.several FOLDER``; nearly all of a launch is imports, so one runs all cases.
Each case leaves a file with what it logged and what it trained; test_several.py compares them with one process.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.ops
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from molora.training.engine import sharded
from molora.training.finite import NonFiniteError
from tests.support import tiny
from tests.support.training_runs import SMOOTH, build, data, logged, trainer
from tests.training.test_hf_trainer import STRONG

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
    # Nothing is compiled: the build of this operator takes a minute, and one that was killed leaves a lock behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100  # so that the small parameters of the tests are cut, too
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    return {**sizes, "gradient_clipping": "auto", "zero_optimization": zero, "zero_allow_untested_optimizer": True}


def engine_of(it: Any) -> str:
    """What really trained, asked of the objects themselves."""
    kind = type(it.model_wrapped).__name__
    return f"{kind} {sharded.stage(it.model_wrapped)}" if kind == "DeepSpeedEngine" else kind


def fully_sharded(recipe: str) -> dict[str, Any]:
    """A plain loop over torch's FSDP2, ``fully_shard``, with half of the rows on each process."""
    model = build(recipe).train()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = rows_of("mixed", model)
    first = 4 * distributed.get_rank()
    losses = plain_loop(model, rows[first : first + 4], rows, processes=2)
    state = {n: p.full_tensor().detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "state": state}


def plain_loop(model: Any, own: list[dict[str, Any]], rows: list[dict[str, Any]], processes: int = 1) -> list[float]:
    """Three steps of SGD by hand. FSDP and DDP average the gradients, so the loss counts once for each process."""
    N = sum(label != -100 for row in rows for label in row["labels"][1:])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        batch = {k: torch.tensor([row[k] for row in own]) for k in own[0]}
        loss = model(**batch, num_items_in_batch=N).loss
        (loss * processes).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def batch_scope(recipe: str, folder: Path) -> dict[str, Any]:
    """The published pooling, whose f is taken over the tokens of both processes."""
    options = {"balance_scope": "batch"}
    it, result = train(recipe, "mixed", folder, "ddp", per_device_train_batch_size=4, options=options)
    return result


def not_finite(folder: Path) -> dict[str, Any]:
    """A base that is broken in the second process only: both have to stop, and say why."""

    class Poison(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if distributed.get_rank() == 1:  # not before: DDP gives all processes the weights of the first
                model.model.embed_tokens.weight.data.fill_(torch.inf)

    it = trainer(build("mola"), folder, **ARGUMENTS, per_device_train_batch_size=4)
    it.add_callback(Poison())
    said: list[Any] = [None, None]
    try:
        it.train()
        own = "nothing"
    except NonFiniteError as e:
        own = str(e)
    distributed.all_gather_object(said, own)
    return {"said": said}


def cases(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every case by name. DDP comes first, because DeepSpeed leaves its mark on the environment."""
    out: dict[str, Callable[[], dict[str, Any]]] = {}

    def under(engine: str, recipe: str, variant: str) -> dict[str, Any]:
        name = f"{engine}-{recipe}-{variant}"
        it, result = train(recipe, variant, folder / name, engine, per_device_train_batch_size=4)
        return result | {"engine": engine_of(it)}

    for recipe in STRONG:
        out[f"batch-{recipe}"] = functools.partial(batch_scope, recipe, folder / f"batch-{recipe}")
    out["not-finite"] = functools.partial(not_finite, folder / "not-finite")
    for recipe in tiny.RECIPES:
        out[f"fsdp2-{recipe}"] = functools.partial(fully_sharded, recipe)
    for engine in ENGINES:
        for recipe in tiny.RECIPES:
            for variant in VARIANTS:
                out[f"{engine}-{recipe}-{variant}"] = functools.partial(under, engine, recipe, variant)
    return out


def main(folder: Path) -> None:
    """Every case, each with its result or its error."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    first = int(os.environ["RANK"]) == 0
    for name, case in cases(folder).items():
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            result = case()
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
