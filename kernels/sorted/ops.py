"""Mixtures by sorted rows as operators of PyTorch and as functions with checked arguments.

The same sums as ``rank_mix``, where all ranks side by side are too many to multiply most of them by zero:
:func:`sorted_mix` for a routing, :func:`grouped_lora` for rows that lie sorted by expert already (a base that is
itself a mixture of experts), :func:`gather_mix` for decoding a few tokens. Dimension letters: ``molora/routing.py``.

Functional, without host synchronisation on a GPU, deterministic. Products are taken in the dtype of x, the parameters
cast inside; gradients of the parameters leave the float32 sums in the parameters' own dtype. ``torch.autocast``
lowers x. Gradients of gradients are not defined and raise.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels.checks import expect, lowered
from molora.kernels.rank.ops import INTERPRETED
from molora.kernels.sorted import eager as grouped_eager
from molora.kernels.sorted.order import Groups, Order, order_of_ends, order_of_ids

__all__ = ["MAX_EXPERT_RANK", "gather_mix", "gather_mix_op", "grouped_lora", "sorted_mix", "sorted_mix_op"]

MAX_EXPERT_RANK = 128  # ranks of one expert that a program of the sorted kernels holds at once


def _steps(x: Tensor) -> ModuleType:
    """The computation on the device of ``x``."""
    if x.is_cuda or INTERPRETED:
        from molora.kernels.sorted import launch as grouped_launch

        return grouped_launch
    return grouped_eager


@torch.library.custom_op("molora::sorted_mix", mutates_args=())
def sorted_mix_op(
    base: Tensor | None,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    ends: Tensor | None,
    start: Tensor,
    scale: Tensor,
    max_rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ids`` (T, K), or ``ends`` (E,) of sorted rows -> y (T, O), h (T, K, r), and the order: (K, T) and (K, E + 1).

    The order of sorted rows has no tokens; an empty tensor stands for them.
    """
    if ids is not None:
        order = order_of_ids(ids, start.shape[0] - 1)
    else:
        assert ends is not None
        order = order_of_ends(ends, x.shape[0])
    groups = Groups(order, start, scale, max_rank)
    y, h = _steps(x).mix(base, x, A.to(x.dtype), B.to(x.dtype), weights, groups)
    return y, h, _no_tokens(x) if order.token_KT is None else order.token_KT, order.end_KE


def _no_tokens(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int32)


@sorted_mix_op.register_fake
def _(
    base: Tensor | None, x: Tensor, A: Tensor, B: Tensor, _: Any, ids: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, start, _, max_rank = rest
    rows, slots = (x.shape[0], 1) if ids is None else ids.shape
    y = x.new_empty(rows, B.shape[0], dtype=x.dtype if base is None else base.dtype)
    token = _no_tokens(x) if ids is None else x.new_empty(slots, rows, dtype=torch.int32)
    return y, x.new_empty(rows, slots, max_rank), token, x.new_empty(slots, start.shape[0], dtype=torch.int32)


@torch.library.custom_op("molora::sorted_mix_backward", mutates_args=())
def sorted_mix_backward_op(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor | None,
    start: Tensor,
    scale: Tensor,
    h: Tensor,
    token: Tensor,
    end: Tensor,
    max_rank: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dweights as far as ``needs`` (in this order) asks for them; empty tensors for the rest."""
    groups = Groups(Order(token if token.ndim == 2 else None, end), start, scale, max_rank)
    parameters = A.to(x.dtype), B.to(x.dtype)
    found = _steps(x).mix_backward(grad.to(x.dtype), x, *parameters, weights, h, groups, needs, (A.dtype, B.dtype))
    dx, dA, dB = (x.new_empty(0, dtype=t.dtype) if g is None else g for g, t in zip(found[:3], (x, A, B), strict=True))
    return dx, dA, dB, x.new_empty(0) if weights is None or found[3] is None else found[3].to(weights.dtype)


@sorted_mix_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, weights: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-1]
    likes = (x, A, B, x if weights is None else weights)
    wanted = (*needs[:3], needs[3] and weights is not None)
    dx, dA, dB, dw = (t.new_empty(t.shape if n else 0) for t, n in zip(likes, wanted, strict=True))
    return dx, dA, dB, dw if wanted[3] else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, A, B, weights, _, _, start, scale, ctx.max_rank = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, A, B, weights, start, scale, *output[1:])


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    need_base, *needs = ctx.needs_input_grad[:5]
    found = sorted_mix_backward_op(grad, *ctx.saved_tensors, ctx.max_rank, needs)
    return (grad if need_base else None, *(g if n else None for g, n in zip(found, needs, strict=True)), *(None,) * 5)


sorted_mix_op.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("molora::gather_mix", mutates_args=())
def gather_mix_op(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor,
    ids: Tensor,
    start: Tensor,
    scale: Tensor,
    max_rank: int,
) -> Tensor:
    """base (T, O) -> y (T, O) in its dtype; without a gradient."""
    y: Tensor = _steps(x).gather(base, x, A, B, weights, ids, start, scale, max_rank)
    return y


@gather_mix_op.register_fake
def _(base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(base.shape)


def sorted_mix(
    base_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    *,
    start_E: Tensor,
    scale_R: Tensor,
    max_rank: int,
) -> Tensor:
    """``y[t] = base[t] + sum_j w[t, j] B_e (s_e * A_e x[t])`` with ``e = ids[t, j]``: ``rank_mix`` for many ranks.

    Expert e owns the ranks ``start[e]:start[e + 1]`` of A (R, I), B (O, R) and of the factors ``scale_R`` (R,)
    float32; ``start_E`` (E + 1,) integers on the device, from 0 to R. ``max_rank`` is the largest rank of an expert,
    at most ``MAX_EXPERT_RANK``. An id below 0 or from E on marks an empty slot, whatever its weight is; an expert may
    stand in several slots of a token. Differentiable in base, x, A, B and the weights.

    Returns (T, O) in the dtype of ``base_TO``, rounded to it once for every slot, in the order of the slots.

    Raises:
        ConfigError: shapes that do not fit, tensors on several devices, a dtype or rank that the kernels do not take.
    """
    what = "sorted_mix"
    _check(what, x_TI, A_RI, B_OR, start_E, scale_R, max_rank)
    _check_slots(what, base_TO, x_TI, B_OR, weights_TK, ids_TK)
    if A_RI.shape[0] == 0 or ids_TK.shape[1] == 0:
        return base_TO
    x_TI = lowered(x_TI)
    y_TO: Tensor = sorted_mix_op(base_TO, x_TI, A_RI, B_OR, weights_TK, ids_TK, None, start_E, scale_R, max_rank)[0]
    return y_TO


def grouped_lora(
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    ends_E: Tensor,
    scale_R: Tensor,
    base_TO: Tensor | None = None,
    *,
    start_E: Tensor | None = None,
    max_rank: int | None = None,
) -> Tensor:
    """``y[t] = base[t] + B_e (s_e * A_e x[t])`` for rows sorted by expert: e owns the rows ``ends[e - 1]:ends[e]``.

    ``ends_E`` (E,) integers, ascending; rows from the last of them on get the base alone, or 0 without one. A (R, I),
    B (O, R) and ``scale_R`` (R,) float32 hold the experts one after the other. All have R / E ranks, unless
    ``start_E`` and ``max_rank`` say otherwise; see :func:`sorted_mix`. Differentiable in x, A, B and the base.

    Returns (T, O) in the dtype of the base, or of x without one, rounded once.

    Raises:
        ConfigError: as :func:`sorted_mix`; or R is no multiple of E and no ``start_E`` is given.
    """
    what, (ranks, experts) = "grouped_lora", (A_RI.shape[0], ends_E.numel())
    if (start_E is None) != (max_rank is None):
        raise ConfigError(f"{what}: got one of start and max_rank, expected both or neither")
    if start_E is None or max_rank is None:
        if ranks % max(experts, 1):
            raise ConfigError(f"{what}: got {ranks} ranks for {experts} experts, expected a multiple; or give start")
        max_rank = ranks // max(experts, 1)
        start_E = torch.arange(experts + 1, device=x_TI.device, dtype=torch.int32) * max_rank
    _check(what, x_TI, A_RI, B_OR, start_E, scale_R, max_rank)
    _expect(what, "ends", ends_E, (start_E.shape[0] - 1,), x_TI, floating=False)
    if base_TO is not None:
        _expect(what, "base", base_TO, (x_TI.shape[0], B_OR.shape[0]), x_TI)
    x_TI = lowered(x_TI)
    if ranks == 0:
        return x_TI.new_zeros(x_TI.shape[0], B_OR.shape[0]) if base_TO is None else base_TO
    y_TO: Tensor = sorted_mix_op(base_TO, x_TI, A_RI, B_OR, None, None, ends_E, start_E, scale_R, max_rank)[0]
    return y_TO


def gather_mix(
    base_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    *,
    start_E: Tensor,
    scale_R: Tensor,
    max_rank: int,
) -> Tensor:
    """:func:`sorted_mix` for decoding: reads the chosen experts alone, row by row, so that few tokens cost little.

    It pays while ``4 T K < E``. For inference only. Sums are in float32, the parameters in their own dtype; y is
    rounded once to the dtype of ``base_TO``. Experts may have any rank.

    Raises:
        ConfigError: as :func:`sorted_mix`; or an argument wants a gradient.
    """
    what = "gather_mix"
    given = (base_TO, x_TI, A_RI, B_OR, weights_TK)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ConfigError(f"{what}: an argument wants a gradient, expected inference; use torch.no_grad or sorted_mix")
    _check(what, x_TI, A_RI, B_OR, start_E, scale_R, max_rank, most=None)
    _check_slots(what, base_TO, x_TI, B_OR, weights_TK, ids_TK)
    if A_RI.shape[0] == 0 or ids_TK.shape[1] == 0:
        return base_TO
    x_TI = lowered(x_TI)
    y_TO: Tensor = gather_mix_op(base_TO, x_TI, A_RI, B_OR, weights_TK, ids_TK, start_E, scale_R, max_rank)
    return y_TO


def _expect(what: str, name: str, got: Tensor, shape: tuple[int, ...], x: Tensor, floating: bool = True) -> None:
    expect(what, name, got, shape, x.device)
    if (got.dtype.is_floating_point, got.dtype.is_complex, got.dtype == torch.bool) != (floating, False, False):
        raise ConfigError(
            f"{what}: got {name} of {got.dtype}, expected {'a float' if floating else 'an integer'} dtype"
        )


def _check(
    what: str,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    start: Tensor,
    scale: Tensor,
    max_rank: int,
    most: int | None = MAX_EXPERT_RANK,
) -> None:
    for name, t, axes in (("x", x, 2), ("A", A, 2), ("B", B, 2), ("start", start, 1)):
        if t.ndim != axes:
            raise ConfigError(f"{what}: got {name} of {t.ndim} dimensions, expected {axes}")
    allowed = (torch.float32, torch.bfloat16, torch.float16) if x.is_cuda else (x.dtype,)
    if x.dtype not in allowed:
        raise ConfigError(f"{what}: got x of {x.dtype}, expected float32, bfloat16 or float16; cast it")
    ranks, experts = A.shape[0], start.shape[0] - 1
    _expect(what, "x", x, (x.shape[0], x.shape[1]), x)
    _expect(what, "A", A, (ranks, x.shape[1]), x)
    _expect(what, "B", B, (B.shape[0], ranks), x)
    _expect(what, "scale", scale, (ranks,), x)
    _expect(what, "start", start, (experts + 1,), x, floating=False)
    if experts < 0:
        raise ConfigError(f"{what}: got an empty start, expected E + 1 numbers, the first of them 0")
    if most is not None and max_rank > most:
        raise ConfigError(f"{what}: got experts of {max_rank} ranks, expected at most {most}; use rank_mix")
    if not max_rank <= ranks <= max_rank * experts:
        raise ConfigError(f"{what}: got {ranks} ranks for {experts} experts of at most {max_rank}; check start")


def _check_slots(what: str, base: Tensor, x: Tensor, B: Tensor, weights: Tensor, ids: Tensor) -> None:
    _expect(what, "base", base, (x.shape[0], B.shape[0]), x)
    if ids.ndim != 2:
        raise ConfigError(f"{what}: got ids of {ids.ndim} dimensions, expected (T, K)")
    _expect(what, "ids", ids, (x.shape[0], ids.shape[1]), x, floating=False)
    _expect(what, "weights", weights, (x.shape[0], ids.shape[1]), x)
