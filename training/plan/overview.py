"""The plan of a run: its sites, parameters by kind, memory, traffic and steps; made on a model without storage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from molora.training.plan.costs import Memory, expert_parallel_bytes, memory, traffic
from molora.training.plan.counts import (
    Kind,
    SiteGroup,
    activation_widths,
    dispatched,
    kinds_of,
    site_groups,
    weights_of,
)

__all__ = ["Batch", "Plan", "plan", "steps_of"]


@dataclass(frozen=True)
class Batch:
    """How rows become an optimizer step: rows of up to ``length`` tokens, ``micro`` at a time on each GPU."""

    micro: int
    accumulation: int
    gpus: int
    length: int

    @property
    def rows(self) -> int:
        """Rows of a step, over all GPUs."""
        return self.micro * self.accumulation * self.gpus

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one GPU, padding included."""
        return self.micro * self.length


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it starts. Bytes are per GPU, traffic is per optimizer step.

    ``expert_parallel``: what a GPU would send for its tokens with the experts spread over GPUs. ``rows`` and
    ``steps``: None when the data are not known.
    """

    model: str
    recipe: str
    sites: tuple[SiteGroup, ...]
    kinds: tuple[Kind, ...]
    batch: Batch
    checkpointing: bool
    memory: tuple[Memory, ...]
    traffic: tuple[tuple[str, int], ...]
    expert_parallel: int
    rows: int | None
    steps: int | None


def plan(
    model: nn.Module,
    batch: Batch,
    *,
    checkpointing: bool = False,
    cast: bool = False,
    rows: int | None = None,
    epochs: float = 1.0,
    max_steps: int = -1,
) -> Plan:
    """The plan of training a converted ``model``; only shapes and dtypes are read, so it may be on the meta device.

    ``cast``: the trainer's bf16 or fp16 flag, with which ZeRO-1 and 2 cast the adapters, too.
    """
    weights, widths, groups = weights_of(model), activation_widths(model), site_groups(model)
    spread = min(batch.gpus, max(max(g.experts) for g in groups))  # an expert is not split
    return Plan(
        model=type(model).__name__,
        recipe=model._molora.config.recipe,  # type: ignore[union-attr, arg-type]
        sites=groups,
        kinds=kinds_of(model),
        batch=batch,
        checkpointing=checkpointing,
        memory=memory(weights, batch.gpus, widths.bytes(batch.tokens, checkpointing), cast),
        traffic=traffic(weights, batch.gpus, batch.accumulation, cast),
        expert_parallel=expert_parallel_bytes(dispatched(model), batch.tokens, batch.accumulation, widths.item, spread),
        rows=rows,
        steps=steps_of(rows, batch, epochs, max_steps),
    )


def steps_of(rows: int | None, batch: Batch, epochs: float, max_steps: int) -> int | None:
    """Optimizer steps as transformers' Trainer counts them; None when neither rows nor ``max_steps`` are known."""
    if max_steps > 0:
        return max_steps
    if rows is None:
        return None
    micro_steps = math.ceil(rows / (batch.micro * batch.gpus))
    return math.ceil(epochs * max(math.ceil(micro_steps / batch.accumulation), 1))
