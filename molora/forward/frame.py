"""One forward in its frame, which is opened from the arguments that the model was called with, and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from molora import context
from molora.context import Frame, editor_of, tape_of
from molora.errors import ConfigError
from molora.forward.aux_loss import add_aux_loss
from molora.forward.scaling_pass import two_passes
from molora.layers.mixture import HEAD, Mixture

__all__ = ["REST", "arguments_of", "open_frame", "run_in_frame"]

REST = "*"  # stands for the positional arguments that a forward takes without a name
MASKS = {"attention_mask": ("input_ids", "inputs_embeds"), "decoder_attention_mask": ("decoder_input_ids",)}


def arguments_of(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as the base's forward would bind them; ``names``: of those that may be positional.

    Raises:
        TypeError: for too many positional arguments, or one given twice.
    """
    if (len(args) > len(names) and REST not in names) or any(n in kwargs for n in names[: len(args)]):
        raise TypeError(f"forward: got {len(args)} positional arguments besides {sorted(kwargs)}, expected {names}")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _main_input(model: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    first = arguments.get(getattr(model, "main_input_name", ""))
    if isinstance(first, Tensor):
        return first
    return next((v for v in arguments.values() if isinstance(v, Tensor) and v.ndim >= 2), None)


def _masks(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The 2-D masks by argument name, as booleans; a ready-made 4-D attention bias says nothing about padding."""
    out = {}
    for name, inputs in MASKS.items():
        mask = arguments.get(name)
        if not isinstance(mask, Tensor) or mask.ndim == 4:
            continue
        tokens = next((arguments[i] for i in inputs if isinstance(arguments.get(i), Tensor)), None)
        if mask.ndim != 2 or (
            tokens is not None and (mask.shape[0] != tokens.shape[0] or mask.shape[1] < tokens.shape[1])
        ):
            wanted = "two dimensions" if tokens is None else f"{tuple(tokens.shape[:2])}, or more columns with a cache"
            raise ConfigError(
                f"{name}: got shape {tuple(mask.shape)}, expected {wanted}: 1 for a real token, 0 for padding"
            )
        out[name] = mask != 0
    return out


def _task_ids(task_ids: Tensor | None, rows: int, experts: int) -> Tensor | None:
    if task_ids is None:
        return None
    if task_ids.ndim not in (1, 2) or task_ids.shape[0] != rows or task_ids.is_floating_point():
        raise ConfigError(
            f"task_ids: got {task_ids.dtype} of shape {tuple(task_ids.shape)}, expected integers of shape ({rows},) or "
            f"({rows}, tokens): the index of the row's or token's adapter, -100 for none"
        )
    if task_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = task_ids[(task_ids != -100) & ((task_ids < 0) | (task_ids >= experts))]
        if bad.numel():
            raise ConfigError(
                f"task_ids: got {int(bad[0])}, expected an index from 0 to {experts - 1}, or -100 for none"
            )
    return task_ids


def open_frame(model: nn.Module, mixture: Mixture, arguments: dict[str, Any], task_ids: Tensor | None) -> Frame:
    """The :class:`Frame` of this call: masks by stream, rows, task ids, tape, editor, a list for balance losses.

    Raises:
        ConfigError: for an empty batch, a mask that does not fit, task ids of a wrong shape or range, or routing that
            is edited while gradients are recorded.
    """
    editor = editor_of(mixture.owner)
    if editor is not None and torch.is_grad_enabled():
        raise ConfigError(
            "the routing is edited while gradients are recorded, but losses and recomputes would be those of another "
            "routing; run the model under torch.no_grad()"
        )
    main = _main_input(model, arguments)
    if main is not None and main.numel() == 0:
        raise ConfigError(
            f"the batch is empty: got an input of shape {tuple(main.shape)}, expected at least one row and token"
        )
    rows = 1 if main is None else main.shape[0]
    collects = model.training and any(p.balance for p in mixture.config.placements)
    return Frame(
        masks=_masks(arguments),
        rows=rows,
        observations=[] if collects else None,
        task_ids=_task_ids(task_ids, rows, mixture.sites[0].num_experts),
        tape=tape_of(mixture.owner),
        editor=editor,
    )


def run_in_frame(
    model: Any,
    inner: Callable[..., Any],
    arguments: dict[str, Any],
    task_ids: Tensor | None = None,
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    finish: Callable[..., Any] = add_aux_loss,
) -> Any:
    """``inner(model, **arguments)`` in a frame, after the scaling pass where the router is model-wide, then the losses.

    ``inner``: the base's forward, or one of the same signature around its backbone. ``given``: the arguments as the
    caller gave them, for a forward that takes some without a name. ``finish`` makes the result of
    model, mixture, outputs, frame and arguments, as :func:`molora.forward.aux_loss.add_aux_loss` does.
    """
    mixture: Mixture = model._molora
    frame = open_frame(model, mixture, arguments, task_ids)
    head = getattr(model, HEAD, None)
    args, kwargs = given or ((), arguments)
    with context.use(frame):
        outputs = inner(model, *args, **kwargs) if head is None else two_passes(model, inner, head, arguments, frame)
    return finish(model, mixture, outputs, frame, arguments)
