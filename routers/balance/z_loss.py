"""The z-loss."""

from __future__ import annotations

from torch import Tensor

from molora.config import BalanceConfig
from molora.routers.balance.base import Rule, Seen, row_mean

__all__ = ["ZLoss"]


class ZLoss(Rule):
    """``mean_t (logsumexp logits_t)^2`` (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small."""

    @classmethod
    def observe(cls, config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """The row means, (B, 1)."""
        z_T1 = seen.routing.logits.logsumexp(-1, keepdim=True).square()
        return (row_mean(z_T1, seen.valid_BS),)

    @classmethod
    def rows(cls, config: BalanceConfig, num_experts: int, z: Tensor) -> Tensor:
        """Values (...,) of z (..., 1)."""
        return z.squeeze(-1)

    @classmethod
    def tiny(cls) -> BalanceConfig:
        """A coefficient that shows."""
        return BalanceConfig(kind="z", coef=0.1)
