"""Several processes train one model: the line that says which engine does it, whole parameters for saving, the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import distributed, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["EngineLine", "describe_engine", "end_processes", "gathered"]


def describe_engine(wrapped: nn.Module, arguments: TrainingArguments) -> str:
    """One line on who trains, read off the wrapped model itself: engine, processes, rows of a step."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    micro, steps = arguments.train_batch_size, arguments.gradient_accumulation_steps
    name = "DDP" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else "PyTorch"
    engine: Any = wrapped
    if hasattr(engine, "zero_optimization_stage"):
        name = f"DeepSpeed ZeRO-{int(engine.zero_optimization_stage())}"
        micro, steps = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    processes = f"{world} processes" if world > 1 else "1 process"
    rows = f"{micro} rows x {steps} accumulated x {processes} = {micro * steps * world} rows a step"
    types = sorted({str(p.dtype).removeprefix("torch.") for p in wrapped.parameters() if p.requires_grad})
    return f"engine: {name}, {processes}; {rows}; trained in {', '.join(types)}"


class EngineLine(TrainerCallback):
    """Prints, once and from the first process, who trains."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The engine is there, and no step is done."""
        if state.is_world_process_zero:
            print(describe_engine(self.trainer.model_wrapped, args), flush=True)  # noqa: T201 its purpose


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the block, trainable parameters that ZeRO-3 sharded are whole; every process must enter."""
    sharded = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def end_processes() -> None:
    """Leave the process group, if there is one, when all processes are done."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
