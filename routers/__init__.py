"""Routers (input to logits) and balance rules. A new one is a file here and a line in its table."""

from __future__ import annotations

from molora.routers.balance import BALANCES
from molora.routers.bias import BiasedRouter, update_biases
from molora.routers.fixed import FixedRouter
from molora.routers.hidden import HiddenRouter
from molora.routers.linear import LinearRouter

__all__ = [
    "BALANCES",
    "ROUTERS",
    "BiasedRouter",
    "FixedRouter",
    "HiddenRouter",
    "LinearRouter",
    "update_biases",
]

ROUTERS: dict[str, type[LinearRouter] | type[HiddenRouter] | type[FixedRouter]] = {
    "linear": LinearRouter,
    "hidden": HiddenRouter,
    "fixed": FixedRouter,
}
