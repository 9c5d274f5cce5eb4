"""Activation checkpointing: the recompute of a layer needs the frame that its forward had."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from molora import context
from molora.errors import ConfigError
from molora.layers.routed import RoutedModule
from molora.surgery.install import sites_of

__all__ = ["bind", "needs_context", "rebind", "unbind"]

FUNC = "_gradient_checkpointing_func"


def _is_fed(m: RoutedModule) -> bool:
    return m.placement.router.scope == "model" or bool(m.placement.balance and m.router is not None)


def needs_context(model: nn.Module) -> bool:
    """Whether any site takes part in a balance rule or reads model-wide gates."""
    return any(_is_fed(m) for _, m in sites_of(model).values())


def bind(model: nn.Module, func: Callable[..., Any]) -> Callable[..., Any]:
    """The checkpointing function with our ``context_fn`` (composed with the caller's) and ``use_reentrant=False``.

    Raises:
        ConfigError: for re-entrant checkpointing, or another library's, where the context would be lost: the
            balance loss would be a constant without gradient, model-wide gates would be gone.
    """
    inner = func.func if isinstance(func, functools.partial) else func
    given = func.keywords if isinstance(func, functools.partial) else {}
    if inner is not checkpoint or given.get("use_reentrant"):
        if not needs_context(model):
            return func
        what = "use_reentrant=True" if inner is checkpoint else f"{getattr(inner, '__module__', inner)}"
        raise ConfigError(
            f"activation checkpointing with {what}: the routers' context and the balance loss's gradient are lost in "
            "the recompute; pass gradient_checkpointing_kwargs={'use_reentrant': False}, or nothing"
        )
    first = given.get("context_fn", noop_context_fn)
    context_fn = functools.partial(context.both_contexts, first)
    bound = functools.partial(checkpoint, **{**given, "use_reentrant": False, "context_fn": context_fn})
    bound.molora_original = func  # type: ignore[attr-defined]
    return bound


def rebind(model: nn.Module) -> None:
    """Bind a checkpointing that was switched on before the conversion."""
    functions = [(m, getattr(m, FUNC)) for m in model.modules() if hasattr(m, FUNC)]
    bound = [(m, bind(model, f)) for m, f in functions]
    for m, f in bound:
        setattr(m, FUNC, f)


def unbind(model: nn.Module) -> None:
    """Give every layer the checkpointing function that its caller asked for."""
    for m in model.modules():
        original = getattr(getattr(m, FUNC, None), "molora_original", None)
        if original is not None:
            setattr(m, FUNC, original)
