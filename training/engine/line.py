"""The line that says which engine trains, with how many processes and rows."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molora import processes

__all__ = ["EngineLine", "describe_engine"]


def describe_engine(wrapped: nn.Module, arguments: TrainingArguments) -> str:
    """One line on who trains, read off the wrapped model itself: engine, processes, rows of a step."""
    world = processes.count()
    micro, steps = arguments.train_batch_size, arguments.gradient_accumulation_steps
    name = "DDP" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else "PyTorch"
    engine: Any = wrapped
    if hasattr(engine, "zero_optimization_stage"):
        name = f"DeepSpeed ZeRO-{int(engine.zero_optimization_stage())}"
        micro, steps = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    started = f"{world} processes" if world > 1 else "1 process"
    rows = f"{micro} rows x {steps} accumulated x {started} = {micro * steps * world} rows a step"
    types = sorted({str(p.dtype).removeprefix("torch.") for p in wrapped.parameters() if p.requires_grad})
    return f"engine: {name}, {started}; {rows}; trained in {', '.join(types)}"


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
