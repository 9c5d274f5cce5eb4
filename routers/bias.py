"""Loss-free balancing: a bias per expert that steers the choice, moved against the load once an optimizer step.

A plain training loop gives a model no sign that an optimizer step happened, so one hook on torch's optimizers, set
when the first biased router is built, finds the routers whose parameters were just stepped.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from molora import processes
from molora.routers.base import Router

__all__ = ["BiasedRouter", "update_biases"]

_biased: weakref.WeakSet[BiasedRouter] = weakref.WeakSet()
_numbers = itertools.count()  # processes that build the same model give its routers the same order


class BiasedRouter(Router):
    """A router that may carry ``select_bias`` (E,), a buffer and never a parameter (arXiv 2408.15664, sec. 3.1)."""

    steerable = True
    select_bias: Tensor | None
    load_counts: Tensor | None
    number = 0

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.bias_rate = num_experts, 0.0
        self.register_buffer("select_bias", None)
        self.register_buffer("load_counts", None, persistent=False)

    def add_select_bias(self, rate: float, device: torch.device | None = None) -> None:
        """Start with a zero bias that moves by ``rate`` an optimizer step."""
        self.bias_rate = rate
        self.select_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)
        self.load_counts = torch.zeros(self.num_experts, dtype=torch.float32, device=device)
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.select_bias is not None:
            _watch(self)

    def update_bias(self) -> None:
        """``b += rate * sign(mean(c) - c)`` with c the picks since the last update, summed over all processes."""
        _update([self])


@torch.no_grad()
def _update(routers: Iterable[BiasedRouter]) -> None:
    """All routers with one collective: their counts lie side by side, in an order that is the same in all processes."""
    found = [(r, r.select_bias, r.load_counts) for r in routers if r.select_bias is not None]
    counts = [c for _, _, c in found if c is not None]
    if not counts:
        return
    device = counts[0].device  # a model may be spread over several
    summed = processes.total(torch.cat([c.to(device) for c in counts])).split([len(c) for c in counts])
    for (router, bias_E, count_E), c_E in zip(found, summed, strict=True):
        bias_E += (router.bias_rate * torch.sign(c_E.mean() - c_E)).to(bias_E.device)
        assert count_E is not None
        count_E.zero_()


def _watch(router: BiasedRouter) -> None:
    if not _Hook.registered:
        register_optimizer_step_post_hook(_after_step)
        _Hook.registered = True
    router.number = next(_numbers)
    _biased.add(router)


class _Hook:
    registered = False


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _biased:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _update(
        router
        for router in sorted(_biased, key=lambda r: r.number)
        if any(id(p) in stepped for p in router.parameters())
    )


def update_biases(model: nn.Module) -> None:
    """Update every loss-free bias of ``model`` now; for engines whose optimizer steps flattened copies."""
    _update(m for m in model.modules() if isinstance(m, BiasedRouter))
