"""The two ends of a feed-forward block of experts as operators: out to one row per slot, and back to one per token.

    expand_slots:    y[t, k] = base[t] + s B_e A_e x[t]             e = ids[t, k]
    contract_slots:  y[t]    = sum_k w[t, k] s B_e A_e h[t, k]

As :mod:`molora.kernels.rank.ops` in every other way. An empty slot (id below 0, or of no expert) gets the base alone in
the first and adds nothing in the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molora.kernels.gates import Gates
from molora.kernels.rank.ops import empty, steps_for

__all__ = ["contract_slots_op", "expand_slots_op"]


@torch.library.custom_op("molora::expand_slots", mutates_args=())
def expand_slots_op(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, ids: Tensor, expert: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """base (T, F), x (T, D), A (R, D), B (F, R), ids (T, K) -> y (T, K, F) in the dtype of base, u = x A^T (T, R)."""
    steps, (T, K) = steps_for(x), ids.shape
    u_TR = steps.contract(x, A.to(x.dtype))
    _, gated_TKR, _ = steps.slot_gates(u_TR, None, Gates(None, ids, expert, scale))
    y = steps.expand(gated_TKR.flatten(0, 1), B.to(x.dtype), base, base.dtype, share=K)
    return y.view(T, K, B.shape[0]), u_TR


@expand_slots_op.register_fake
def _(base: Tensor, x: Tensor, A: Tensor, B: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, K = ids.shape
    return base.new_empty(T, K, B.shape[0]), x.new_empty(T, A.shape[0])


@torch.library.custom_op("molora::expand_slots_backward", mutates_args=())
def expand_slots_backward_op(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    ids: Tensor,
    expert: Tensor,
    scale: Tensor,
    u: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA, dB as far as ``needs`` asks for them."""
    steps, (need_x, need_A, need_B), (T, K) = steps_for(x), needs, ids.shape
    grad_NF = grad.to(x.dtype).reshape(T * K, B.shape[0])
    d_TKR = steps.contract(grad_NF, B.to(x.dtype).t()).view(T, K, A.shape[0])
    du_TR, gated_TKR, _ = steps.slot_gates(u, d_TKR, Gates(None, ids, expert, scale))
    dx = steps.expand(du_TR, A.to(x.dtype).t(), None, x.dtype) if need_x else empty(x)
    dA = steps.outer(x, du_TR, A.dtype, transposed=True) if need_A else empty(A)
    dB = steps.outer(grad_NF, gated_TKR.flatten(0, 1), B.dtype) if need_B else empty(B)
    return dx, dA, dB


@expand_slots_backward_op.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dA, dB = (t.new_empty(t.shape) if need else empty(t) for t, need in zip((x, A, B), rest[-1], strict=True))
    return dx, dA, dB


def _save_expand(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[1:], output[1])


def _expand_gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    need_base, *needs = ctx.needs_input_grad[:4]
    found = expand_slots_backward_op(grad, *ctx.saved_tensors, needs)
    base = grad.sum(1) if need_base else None
    return (base, *(g if n else None for g, n in zip(found, needs, strict=True)), None, None, None)


expand_slots_op.register_autograd(_expand_gradient, setup_context=_save_expand)


@torch.library.custom_op("molora::contract_slots", mutates_args=())
def contract_slots_op(
    base: Tensor, h: Tensor, weights: Tensor, A: Tensor, B: Tensor, ids: Tensor, expert: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """base (T, D), h (T, K, F), weights and ids (T, K), A (R, F), B (D, R) -> y (T, D) in the dtype of base,
    u = h A^T (T, K, R).
    """
    steps = steps_for(h)
    u_TKR = steps.contract(h.flatten(0, 1), A.to(h.dtype)).view(*ids.shape, A.shape[0])
    gated_TR, _, _ = steps.slot_gates(None, u_TKR, Gates(weights, ids, expert, scale))
    return steps.expand(gated_TR, B.to(h.dtype), base, base.dtype), u_TKR


@contract_slots_op.register_fake
def _(base: Tensor, h: Tensor, weights: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), h.new_empty(*weights.shape, A.shape[0])


@torch.library.custom_op("molora::contract_slots_backward", mutates_args=())
def contract_slots_backward_op(
    grad: Tensor,
    h: Tensor,
    weights: Tensor,
    A: Tensor,
    B: Tensor,
    ids: Tensor,
    expert: Tensor,
    scale: Tensor,
    u: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dh, dweights, dA, dB as far as ``needs`` asks for them."""
    steps, (need_h, need_w, need_A, need_B) = steps_for(h), needs
    grad = grad.to(h.dtype)
    d_TR = steps.contract(grad, B.to(h.dtype).t())
    gated_TR, du_TKR, dw = steps.slot_gates(d_TR, u, Gates(weights, ids, expert, scale), need_w)
    du_NR, h_NF = du_TKR.flatten(0, 1), h.flatten(0, 1)
    dh = steps.expand(du_NR, A.to(h.dtype).t(), None, h.dtype).view(h.shape) if need_h else empty(h)
    dA = steps.outer(h_NF, du_NR, A.dtype, transposed=True) if need_A else empty(A)
    dB = steps.outer(grad, gated_TR, B.dtype) if need_B else empty(B)
    return dh, empty(h) if dw is None else dw.to(weights.dtype), dA, dB


@contract_slots_backward_op.register_fake
def _(
    grad: Tensor, h: Tensor, weights: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    likes = (h, weights, A, B)
    dh, dw, dA, dB = (t.new_empty(t.shape) if n else empty(t) for t, n in zip(likes, rest[-1], strict=True))
    return dh, dw if rest[-1][1] else empty(h), dA, dB


def _save_contract(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[1:], output[1])


def _contract_gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    need_base, *needs = ctx.needs_input_grad[:5]
    found = contract_slots_backward_op(grad, *ctx.saved_tensors, needs)
    base = grad if need_base else None
    return (base, *(g if n else None for g, n in zip(found, needs, strict=True)), None, None, None)


contract_slots_op.register_autograd(_contract_gradient, setup_context=_save_contract)
