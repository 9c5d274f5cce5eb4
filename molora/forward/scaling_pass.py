"""The first pass of a model-wide router, and the second KV cache that makes cached generation exact.

The gates of a position depend on the scaling pass's hidden state there, which a causal model never changes later. So
both passes may keep their keys and values, each its own: the scaling pass's layers are appended to the caller's cache
(``layers[:L]`` real, ``layers[L:]`` scaling) and each pass sees its half. Reordering, cropping, repeating and resetting
then reach both by themselves.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from molora import context
from molora.context import Frame
from molora.errors import ConfigError
from molora.routers import HiddenRouter
from molora.routing import Routing

__all__ = ["two_passes"]

MARK = "_molora_real_layers"


def cache_among(values: Iterable[Any]) -> Any:
    """The cache among a call's arguments or results, whatever it is called there; None without one."""
    return next((v for v in values if isinstance(v, Cache)), None)


@contextlib.contextmanager
def paired_cache(cache: Any) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Split the caller's cache; yields (show the scaling half, show the real half); joins them again at the end.

    Raises:
        ConfigError: for a cache with content that was not made by this mechanism: its scaling half is unknown.
    """
    if cache is None:
        yield (lambda: None), (lambda: None)
        return
    real, scaling = _halves(cache)

    def show_scaling() -> None:
        cache.layers = scaling

    def show_real() -> None:
        cache.layers = real

    try:
        yield show_scaling, show_real
    finally:
        cache.layers = [*real, *scaling]
        setattr(cache, MARK, len(real))


def _halves(cache: Any) -> tuple[list[Any], list[Any]]:
    if not hasattr(cache, "layers"):
        raise ConfigError(
            f"past_key_values: got a {type(cache).__name__}, expected a transformers Cache with layers that can hold a "
            "second half for the scaling pass; use the default cache, or use_cache=False"
        )
    mark = getattr(cache, MARK, None)
    if mark is None:
        if _tokens(cache.layers) or any(any(getattr(x, "has_previous_state", {}).values()) for x in cache.layers):
            raise ConfigError(
                f"past_key_values: got a cache with {_tokens(cache.layers) or 'some'} tokens that another model or the "
                "base filled; the scaling pass has no keys for them. Start from an empty cache, or from one that this "
                "model returned"
            )
        return list(cache.layers), copy.deepcopy(list(cache.layers))
    real, scaling = list(cache.layers[:mark]), list(cache.layers[mark:])
    if torch.compiler.is_compiling():  # each length would be compiled anew
        return real, scaling
    lengths = sorted({_tokens(real), _tokens(scaling)})
    if len(lengths) > 1:
        raise ConfigError(
            f"past_key_values: its two halves hold {lengths} tokens (a forward was cut off, or ran with the adapter "
            "off); start from an empty cache"
        )
    return real, scaling


def _tokens(layers: list[Any]) -> int:
    """Tokens that attention has kept; a recurrent layer does not count them."""
    return next((int(x.get_seq_length()) for x in layers if hasattr(x, "get_seq_length")), 0)


def join_new_caches(real: Any, scaling: Any) -> None:
    """Append the scaling pass's new cache to the real pass's, when both were made inside the model."""
    if real is not None and scaling is not None and hasattr(real, "layers") and getattr(real, MARK, None) is None:
        setattr(real, MARK, len(real.layers))
        real.layers = [*real.layers, *scaling.layers]


def refuse_other_stores(arguments: Mapping[str, Any]) -> None:
    """ConfigError for an object that attention writes its keys into and that is no cache with layers (paged ones)."""
    for name, value in arguments.items():
        if hasattr(value, "update") and not isinstance(value, Mapping | Set):
            raise ConfigError(
                f"{name}: got a {type(value).__name__}, which keeps keys and values outside of a transformers Cache, "
                "and the scaling pass would need a second one; generate without continuous batching and paged attention"
            )


def kept_in_modules(model: nn.Module, cache: Any, made: Any) -> dict[tuple[int, str], Tensor]:
    """Tensors that modules keep as plain attributes between the passes of a call that begins a cache."""
    if (cache is None and made is None) or hasattr(cache, MARK) or torch.compiler.is_compiling():
        return {}
    return {(id(m), k): v for m in model.modules() for k, v in vars(m).items() if isinstance(v, Tensor)}


def refuse_kept_state(model: nn.Module, kept: dict[tuple[int, str], Tensor]) -> None:
    """ConfigError where the second pass left another state in a module than the first: one of the two would be lost."""
    for path, module in model.named_modules() if kept else ():
        for name, value in vars(module).items():
            before = kept.get((id(module), name))
            if before is None or value is before or not isinstance(value, Tensor):
                continue
            if value.shape != before.shape or not torch.equal(value, before):
                raise ConfigError(
                    f"{path}.{name}: the base keeps a state in its modules, outside of the cache, and the scaling pass "
                    "would need a second one; call the model with use_cache=False"
                )


def scaling_pass(
    model: nn.Module, forward: Callable[..., Any], head: HiddenRouter, arguments: dict[str, Any], frame: Frame
) -> tuple[tuple[Routing, ...], Any]:
    """Run the backbone (never the LM head) without gradient, experts at the constant pass value; gates of every site.

    Returns the gates (with gradient to the head) and the cache that the backbone made, or None.
    """
    backbone, call = _backbone(model, forward)
    names = inspect.signature(backbone.forward).parameters
    outer = inspect.signature(forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    passed = {
        k: v
        for k, v in arguments.items()
        if k in names or (open_ended and k not in outer and k not in ("num_items_in_batch", "output_hidden_states"))
    }
    for k in ("output_hidden_states", "output_attentions"):
        if k in passed:
            passed[k] = False
    with (
        torch.no_grad(),
        context.use(replace(frame, gates=None, pass_value=head.config.scaling_pass_value, tape=None, editor=None)),
    ):
        out = call(**{**passed, "return_dict": True})
    states = [k for k in out if isinstance(arguments.get(k), list | tuple)]
    if states:
        raise ConfigError(
            f"{states[0]}: got a recurrent state of the base's own kind, and the scaling pass would need a second one; "
            "call the model without it (use_cache=False in generate)"
        )
    hidden_BSD: Tensor | None = getattr(out, "last_hidden_state", None)
    if hidden_BSD is None:
        raise ConfigError(
            f"{type(backbone).__name__} returns {', '.join(out)}, and no last_hidden_state that a model-wide router "
            "could read; use a recipe with a router per module"
        )
    return head.gates(hidden_BSD.detach()), cache_among(out.values())


def _backbone(model: nn.Module, forward: Callable[..., Any]) -> tuple[nn.Module, Callable[..., Any]]:
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if isinstance(inner, nn.Module) and inner is not model:
        return inner, inner
    return model, lambda **kwargs: forward(model, **kwargs)


def two_passes(model: Any, inner: Callable[..., Any], head: Any, arguments: dict[str, Any], frame: Frame) -> Any:
    """A forward with a model-wide router: the scaling pass makes the gates that the real pass uses; a cache each."""
    cache = cache_among(arguments.values()) or arguments.get("past_key_values")
    refuse_other_stores({k: v for k, v in arguments.items() if v is not cache})
    with paired_cache(cache) as (show_scaling, show_real):
        show_scaling()
        frame.gates, made = scaling_pass(model, inner, head, arguments, frame)
        show_real()
        kept = kept_in_modules(model, cache, made)
        outputs = inner(model, **arguments)
        refuse_kept_state(model, kept)
    if cache is None:
        join_new_caches(cache_among(outputs.values() if isinstance(outputs, dict) else outputs), made)
    return outputs
