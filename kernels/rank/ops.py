"""The mixtures as operators of PyTorch: schema, shapes for the compiler, the computation, and its gradient.

Functional (nothing is written in place), without host synchronisation, deterministic. On CUDA they run the Triton
kernels, on a CPU plain PyTorch, or the same Triton kernels where ``TRITON_INTERPRET=1`` is set. The backward passes
are operators of their own, so that ``torch.compile`` sees both directions as single calls.

Products are taken in the dtype of x, the parameters cast inside; their gradients leave the float32 sums in the
parameters' own dtype without a rounding between. Gradients of gradients are not defined and raise.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from molora.kernels.gates import Gates
from molora.kernels.rank import eager

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

__all__ = ["INTERPRETED", "empty", "rank_mix_linear_op", "rank_mix_op", "steps_for"]


def steps_for(x: Tensor) -> ModuleType:
    """The computation on the device of ``x``."""
    if x.is_cuda or INTERPRETED:
        from molora.kernels.rank import launch

        return launch
    return eager


def empty(x: Tensor) -> Tensor:
    """What stands for a gradient that nobody asked for."""
    return x.new_empty(0)


# --- rank_mix: y = base + ((x A^T) * g) B^T


@torch.library.custom_op("molora::rank_mix", mutates_args=())
def rank_mix_op(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    expert: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """base (T, O), x (T, I), A (R, I), B (O, R) -> y (T, O) in the dtype of base, and h = x A^T (T, R)."""
    steps = steps_for(x)
    h_TR, gated_TR = steps.contract_gated(x, A.to(x.dtype), Gates(weights, ids, expert, scale))
    return steps.expand(gated_TR, B.to(x.dtype), base, base.dtype), h_TR


@rank_mix_op.register_fake
def _(base: Tensor, x: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("molora::rank_mix_backward", mutates_args=())
def rank_mix_backward_op(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    expert: Tensor,
    scale: Tensor,
    h: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dweights as far as ``needs`` (in this order) asks for them; empty tensors for the rest."""
    steps, (need_x, need_A, need_B, need_w) = steps_for(x), needs
    grad = grad.to(x.dtype)
    gates = Gates(weights, ids, expert, scale)
    dh_TR, gated_TR, dw = steps.contract_gated_backward(grad, B.to(x.dtype).t(), h, gates, need_w)
    dx = steps.expand(dh_TR, A.to(x.dtype).t(), None, x.dtype) if need_x else empty(x)
    dA = steps.outer(x, dh_TR, A.dtype, transposed=True) if need_A else empty(A)
    dB = steps.outer(grad, gated_TR, B.dtype) if need_B else empty(B)
    return dx, dA, dB, empty(x) if dw is None or weights is None else dw.to(weights.dtype)


@rank_mix_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, weights: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    likes = (x, A, B, x if weights is None else weights)
    dx, dA, dB, dw = (t.new_empty(t.shape) if n else empty(t) for t, n in zip(likes, rest[-1], strict=True))
    return dx, dA, dB, dw if rest[-1][3] else empty(x)


def _save_rank_mix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    base, x, A, B, weights, ids, expert, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, A, B, weights, ids, expert, scale, output[1])


def _rank_mix_gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    need_base, *needs = ctx.needs_input_grad[:5]
    dx, dA, dB, dw = rank_mix_backward_op(grad, *ctx.saved_tensors, needs)
    found = [g if n else None for g, n in zip((dx, dA, dB, dw), needs, strict=True)]
    return (grad if need_base else None, *found, None, None, None)


rank_mix_op.register_autograd(_rank_mix_gradient, setup_context=_save_rank_mix)


# --- rank_mix_linear: several frozen linears with one input: y_i = x W_i^T + b_i + ((x A_i^T) * g_i) B_i^T
#
# A list that holds None gets no gradient at all from PyTorch: in the lists an empty vector stands for nothing.


def _gates(i: int, weights: list[Tensor], ids: list[Tensor], expert: list[Tensor], scale: list[Tensor]) -> Gates:
    return Gates(_given(weights[i], 2), _given(ids[i], 2), expert[i], scale[i])


def _given(t: Tensor, dimensions: int) -> Tensor | None:
    return t if t.ndim == dimensions and (dimensions == 2 or t.numel()) else None


@torch.library.custom_op("molora::rank_mix_linear", mutates_args=())
def rank_mix_linear_op(
    x: Tensor,
    W: list[Tensor],
    bias: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    weights: list[Tensor],
    ids: list[Tensor],
    expert: list[Tensor],
    scale: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """x (T, I), W_i (O_i, I), A_i (R_i, I), B_i (O_i, R_i) -> y_i (T, O_i), h_i (T, R_i), all in the dtype of x."""
    steps = steps_for(x)
    ys, hs = [], []
    parts = steps.partial_products(x, torch.cat(A).to(x.dtype)) if len(A) > 1 else None
    start = 0
    for i, (W_OI, A_RI, B_OR) in enumerate(zip(W, A, B, strict=True)):
        gates, ranks = _gates(i, weights, ids, expert, scale), A_RI.shape[0]
        if parts is None:
            h_TR, gated_TR = steps.contract_gated(x, A_RI.to(x.dtype), gates)
        else:
            h_TR, gated_TR = x.new_empty(x.shape[0], ranks), x.new_empty(x.shape[0], ranks)
            steps.gate_parts(parts[..., start : start + ranks], h_TR, gated_TR, None, gates)
            start += ranks
        base_TO = torch.nn.functional.linear(x, W_OI, _given(bias[i], 1))
        ys.append(steps.expand(gated_TR, B_OR.to(x.dtype), base_TO, x.dtype, out=base_TO))
        hs.append(h_TR)
    return ys, hs


@rank_mix_linear_op.register_fake
def _(x: Tensor, W: list[Tensor], bias: Any, A: list[Tensor], *_: Any) -> tuple[list[Tensor], list[Tensor]]:
    T = x.shape[0]
    return [x.new_empty(T, w.shape[0]) for w in W], [x.new_empty(T, a.shape[0]) for a in A]


@torch.library.custom_op("molora::rank_mix_linear_backward", mutates_args=())
def rank_mix_linear_backward_op(
    grads: list[Tensor],
    x: Tensor,
    W: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    weights: list[Tensor],
    ids: list[Tensor],
    expert: list[Tensor],
    scale: list[Tensor],
    h: list[Tensor],
    need_x: bool,
    need_A: list[bool],
    need_B: list[bool],
    need_w: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dx, and dA, dB, dweights of each linear. dx is summed in one buffer: no adds between, whatever the number is."""
    steps = steps_for(x)
    dhs, dBs, dws = [], [], []
    dx = empty(x)
    for i, (grad, B_OR) in enumerate(zip(grads, B, strict=True)):
        gates = _gates(i, weights, ids, expert, scale)
        dh_TR, gated_TR, dw = steps.contract_gated_backward(
            grad, B_OR.to(x.dtype).t(), h[i], gates, need_w[i] and gates.weights is not None
        )
        dhs.append(dh_TR)
        dBs.append(steps.outer(grad, gated_TR, B_OR.dtype) if need_B[i] else empty(B_OR))
        dws.append(empty(weights[i]) if dw is None else dw.to(weights[i].dtype))
        if need_x:
            dx = grad @ W[i] if i == 0 else dx.addmm_(grad, W[i])
    dh_all_TR = torch.cat(dhs, 1) if len(dhs) > 1 else dhs[0]
    if need_x:
        dx = steps.expand(dh_all_TR, torch.cat(A).to(x.dtype).t(), dx, x.dtype, out=dx)
    if any(need_A):
        parts = steps.outer(x, dh_all_TR, torch.float32, transposed=True).split([a.shape[0] for a in A])
        dAs = [p.to(a.dtype, copy=True) if n else empty(a) for p, a, n in zip(parts, A, need_A, strict=True)]
    else:
        dAs = [empty(a) for a in A]
    return dx, dAs, dBs, dws


@rank_mix_linear_backward_op.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    W: Any,
    A: list[Tensor],
    B: list[Tensor],
    weights: list[Tensor],
    ids: Any,
    expert: Any,
    scale: Any,
    h: Any,
    need_x: bool,
    need_A: list[bool],
    need_B: list[bool],
    need_w: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    def like(t: Tensor, need: bool) -> Tensor:
        return t.new_empty(t.shape) if need else empty(t)

    lists = (A, need_A), (B, need_B), (weights, need_w)
    dA, dB, dw = ([like(t, n) for t, n in zip(ts, ns, strict=True)] for ts, ns in lists)
    return like(x, need_x), dA, dB, dw


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    x, W, _, A, B, weights, ids, expert, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1])
    ctx.count = len(W)
    ctx.save_for_backward(x, *W, *A, *B, *weights, *ids, *expert, *scale, *output[1])


def _linear_gradient(ctx: Any, grads: list[Tensor], _: Any) -> tuple[Any, ...]:
    n = ctx.count
    x, *rest = ctx.saved_tensors
    W, A, B, weights, ids, expert, scale, h = (list(rest[i * n : (i + 1) * n]) for i in range(8))
    given = [x.new_zeros(x.shape[0], w.shape[0]) if g is None else g for g, w in zip(grads, W, strict=True)]
    need_x, _, _, *asked = ctx.needs_input_grad[:6]
    asked = [list(each) for each in asked]
    dx, *lists = rank_mix_linear_backward_op(given, x, W, A, B, weights, ids, expert, scale, h, need_x, *asked)
    dA, dB, dw = ([g if k else None for g, k in zip(gs, ks, strict=True)] for gs, ks in zip(lists, asked, strict=True))
    nothing = [None] * n
    return dx if need_x else None, nothing, nothing, dA, dB, dw, nothing, nothing, nothing


rank_mix_linear_op.register_autograd(_linear_gradient, setup_context=_save_linear)
