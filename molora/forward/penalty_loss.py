"""The penalties of a forward's loss: a value for each linear, once whatever the tokens."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from molora import processes
from molora.layers.mixture import Mixture
from molora.penalties import PENALTIES

__all__ = ["penalty_loss"]


def penalty_loss(mixture: Mixture) -> Tensor | None:
    """Sum of coef * value over the linears whose placement has penalties; None where no placement has any.

    It is the same in every micro-batch and process, so the loss takes the micro-batch's share of it.
    """
    total: Tensor | None = None
    for m in mixture.penalised:
        for options in m.placement.penalties:
            if not options.coef:
                continue
            value = options.coef * _value(options, m.bank, m.router)
            total = value if total is None else total + value.to(total.device)
    return total


def _value(options: Any, bank: Any, router: nn.Module | None) -> Tensor:
    entry = PENALTIES[options.kind]
    if not bank.in_pieces:
        return entry.value(options, bank, router)
    # The parameters are whole only within the block, and the backward pass comes later: keep gradients, not them.
    own = [*bank.parameters(), *(() if router is None else router.parameters())]
    trained = [p for p in own if p.requires_grad]
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for p in own:
            stack.enter_context(processes.whole(p))
        value = entry.value(options, bank, router)
        gradients = torch.autograd.grad(value, trained, allow_unused=True) if value.requires_grad else ()
        value = value.detach()
        for p, gradient in zip(trained, gradients, strict=False):
            if gradient is not None:
                product = (p * gradient).sum()
                value = value + (product - product.detach())
    return value
