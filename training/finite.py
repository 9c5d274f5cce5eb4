"""Where a forward first went wrong: the module whose output holds NaN or infinity while its inputs do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

__all__ = ["NonFiniteError", "first_nonfinite", "nonfinite_gradient"]


class NonFiniteError(FloatingPointError):
    """Training reached a loss or gradient that is NaN or infinite; raised before the optimizer used it."""


def _bad(value: Any) -> bool:
    return any(
        isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all())
        for t in tree_flatten(value)[0]
    )


@torch.no_grad()
def first_nonfinite(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Run ``model`` again on ``inputs`` and name the first module whose output is not finite; empty if none is.

    Hooks run from the inside out, so it is the smallest such module. The forward runs in the model's present mode, with
    other dropout. Every process has to call it where parameters are sharded.
    """
    found: list[str] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and _bad(output) and not _bad((args, kwargs)):
                weights = [n for n, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
                found.append(
                    f"{name} ({type(module).__name__})" + (f", in its {', '.join(weights)}" if weights else "")
                )

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def nonfinite_gradient(model: nn.Module) -> str:
    """The name of the first parameter whose gradient is not finite; empty if there is none, or none can be seen."""
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            return name
    return ""
