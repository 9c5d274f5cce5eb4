"""The Switch loss."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.config import BalanceConfig
from molora.routers.balance.base import Rule, Seen, picks, row_mean

__all__ = ["Switch"]


class Switch(Rule):
    """``E sum_e f_e P_e`` (Switch Transformers, arXiv 2101.03961, eq. 4): 1 at balance, E at collapse."""

    shared, measures_balance, teaches = (0,), True, True

    @classmethod
    def observe(cls, config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """f and P per row, (B, E) each."""
        valid_BS = seen.valid_BS if config.mask_padding else torch.ones_like(seen.valid_BS)
        with torch.no_grad():
            f_BE = row_mean(picks(seen.routing, config.count), valid_BS)
            if config.count == "picks":
                f_BE = f_BE / f_BE.sum(-1, keepdim=True).clamp_min(torch.finfo(f_BE.dtype).tiny)
        return f_BE, row_mean(seen.routing.probs, valid_BS)

    @classmethod
    def rows(cls, config: BalanceConfig, num_experts: int, f: Tensor, p: Tensor) -> Tensor:
        """Values (...,) of f and p (..., E)."""
        return (f * p).sum(-1) * (num_experts if config.factor == "experts" else 1)

    @classmethod
    def tiny(cls) -> BalanceConfig:
        """A coefficient that shows."""
        return BalanceConfig(coef=0.1)
