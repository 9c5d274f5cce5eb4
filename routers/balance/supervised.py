"""The supervised gate loss of MeteoRA."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from molora.config import BalanceConfig
from molora.routers.balance.base import Rule, Seen

__all__ = ["Supervised"]


class Supervised(Rule):
    """Cross entropy of the router to the task's expert (MeteoRA, arXiv 2405.13053, sec. 3.3); -100 = no label."""

    measures_balance = needs_tasks = teaches = True

    @classmethod
    def observe(cls, config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """The mean over a row's labelled tokens, (B, 1); None when the batch has no task ids."""
        if seen.task_BS is None:
            return None
        logits_BSE = seen.routing.logits.view(*seen.valid_BS.shape, -1)
        task_BS = seen.task_BS.masked_fill(~seen.valid_BS, -100)
        if config.shift:
            logits_BSE, task_BS = logits_BSE[:, :-1], task_BS[:, 1:]
        ce_BS = functional.cross_entropy(logits_BSE.transpose(1, 2), task_BS, ignore_index=-100, reduction="none")
        return (ce_BS.sum(1, keepdim=True) / (task_BS != -100).sum(1, keepdim=True).clamp_min(1),)

    @classmethod
    def rows(cls, config: BalanceConfig, num_experts: int, ce: Tensor) -> Tensor:
        """Values (...,) of ce (..., 1)."""
        return ce.squeeze(-1)

    @classmethod
    def tiny(cls) -> BalanceConfig:
        """A coefficient that shows."""
        return BalanceConfig(kind="supervised", coef=0.1)
