"""Routers (input to logits), gates (logits to weights) and balance rules.

A new one is a file here and a line in its table.
"""

from __future__ import annotations

from molora.routers.balance import BALANCES
from molora.routers.base import Router
from molora.routers.bias import BiasedRouter, update_biases
from molora.routers.fixed import FixedRouter
from molora.routers.gates import GATES
from molora.routers.hidden import HiddenRouter
from molora.routers.linear import LinearRouter

__all__ = [
    "BALANCES",
    "GATES",
    "ROUTERS",
    "BiasedRouter",
    "FixedRouter",
    "HiddenRouter",
    "LinearRouter",
    "Router",
    "update_biases",
]

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "hidden": HiddenRouter,
    "fixed": FixedRouter,
}
