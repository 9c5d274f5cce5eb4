"""A balance rule that needs task ids: the task's expert has to lead by a margin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molora.config.options import BalanceOptions
from molora.routers import BALANCES
from molora.routers.balance import Rule, Seen


@dataclass(frozen=True, kw_only=True)
class MarginConfig(BalanceOptions):
    """``margin``: by how much the task's expert has to lead in probability."""

    kind: str = "task_margin"
    coef: float = 0.1
    margin: float = 0.3


class TaskMargin(Rule):
    """``mean_t relu(margin + max_{e != task} p_e - p_task)`` over the tokens that have a task."""

    options = MarginConfig
    needs_tasks = teaches = True

    @classmethod
    def observe(cls, config: MarginConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """The mean of each row, (B, 1); None without task ids."""
        if seen.task_BS is None:
            return None
        known_BS = seen.valid_BS & (seen.task_BS >= 0)
        probs_BSE = seen.routing.probs.view(*known_BS.shape, -1)
        own_BS1 = seen.task_BS.clamp_min(0).unsqueeze(-1)
        task_BS = probs_BSE.gather(-1, own_BS1).squeeze(-1)
        other_BS = probs_BSE.scatter(-1, own_BS1, -1.0).amax(-1)
        short_BS = torch.where(known_BS, (config.margin + other_BS - task_BS).relu(), 0)
        return (short_BS.sum(1, keepdim=True) / known_BS.sum(1, keepdim=True).clamp_min(1),)

    @classmethod
    def rows(cls, config: MarginConfig, num_experts: int, short: Tensor) -> Tensor:
        """Values (...,) of the row means (..., 1)."""
        return short.squeeze(-1)


BALANCES["task_margin"] = TaskMargin
