"""Loss-free balancing: a bias against the load."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.config import BalanceConfig
from molora.routers.balance.base import Rule, Seen, picks

__all__ = ["Bias"]


class Bias(Rule):
    """Loss-free balancing: no loss, only counts for :meth:`molora.routers.bias.BiasedRouter.update_bias`."""

    at_router = steers = True

    @classmethod
    def observe(cls, config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """Add the picks of this forward to the router's counts, once: a checkpoint's recompute does not count."""
        if seen.router is not None and seen.router.load_counts is not None and not seen.recompute:
            with torch.no_grad():
                picks_TE = picks(seen.routing, "picks")
                if config.mask_padding:
                    picks_TE = picks_TE * seen.valid_BS.reshape(-1, 1)
                seen.router.load_counts += picks_TE.sum(0)
        return None

    @classmethod
    def rows(cls, config: BalanceConfig, num_experts: int, *tensors: Tensor) -> Tensor:
        """Never called: the rule leaves no observation."""
        raise AssertionError("the bias rule has no loss")

    @classmethod
    def tiny(cls) -> BalanceConfig:
        """A rate that shows."""
        return BalanceConfig(kind="bias", coef=0.0, rate=0.01)
