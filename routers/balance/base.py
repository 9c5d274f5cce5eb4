"""What every balance rule is: what it may look at, its duties, and the defaults of most of them."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from molora.config import BalanceConfig
from molora.config.options import BalanceOptions
from molora.routers.bias import BiasedRouter
from molora.routing import Routing

__all__ = ["Rule", "Seen", "picks", "row_mean"]


class Seen(NamedTuple):
    """What a rule may look at: the routing, real tokens (B, S) bool, task ids (B, S) or None, and the router."""

    routing: Routing
    valid_BS: Tensor
    task_BS: Tensor | None
    router: BiasedRouter | None
    recompute: bool


def picks(routing: Routing, count: str) -> Tensor:
    """How often each token picked each expert, (T, E) float32: its first choice (dropped or not), or all."""
    ids_TK = routing.ids
    if ids_TK is None or count == "argmax":
        ids_TK = routing.logits.argmax(-1, keepdim=True)
    zeros_TE = torch.zeros_like(routing.logits)
    return zeros_TE.scatter_add(1, ids_TK.clamp_min(0), (ids_TK >= 0).to(zeros_TE.dtype))


def row_mean(values_TE: Tensor, valid_BS: Tensor) -> Tensor:
    """Mean over the valid tokens of each row: (T, ...) to (B, ...); 0 for a row without any."""
    share_BS = valid_BS / valid_BS.sum(1, keepdim=True).clamp_min(1)
    # A padded row of a base model may hold NaN, which a weight of 0 would keep.
    clean_BSE = torch.where(valid_BS.unsqueeze(-1), values_TE.view(*valid_BS.shape, -1), 0)
    return torch.bmm(share_BS.unsqueeze(1), clean_BSE).squeeze(1)


class Rule:
    """An entry of ``BALANCES``. ``observe`` turns routings into small tensors, ``rows`` those into one value a row.

    Class attributes: ``options``, the class of its options; ``at_router``: observed at its router in the forward, not
    at the end; ``shared``: places of the tensors that scope ``batch`` takes over all processes, without a gradient;
    ``measures_balance``: its mean is part of the model's ``aux_loss``; ``needs_tasks``: it learns from task ids;
    ``steers``: it moves a bias of the router; ``teaches``: it shows the router which expert to choose.
    """

    options: ClassVar[type[BalanceOptions]] = BalanceConfig
    at_router: ClassVar[bool] = False
    shared: ClassVar[tuple[int, ...]] = ()
    measures_balance: ClassVar[bool] = False
    needs_tasks: ClassVar[bool] = False
    steers: ClassVar[bool] = False
    teaches: ClassVar[bool] = False

    @classmethod
    def observe(cls, config: Any, seen: Seen) -> tuple[Tensor, ...] | None:
        """Tensors of B rows, (B, ...) each, from T = B * S tokens; None when there is nothing to observe."""
        raise NotImplementedError(f"{cls.__name__}.observe")

    @classmethod
    def rows(cls, config: Any, num_experts: int, *tensors: Any) -> Tensor:
        """Values (...,) of the observed tensors (..., n), which may be averaged over routers or rows before."""
        raise NotImplementedError(f"{cls.__name__}.rows")

    @classmethod
    def tiny(cls) -> BalanceOptions:
        """Options of a smallest rule of this kind."""
        return cls.options()
