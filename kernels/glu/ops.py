"""The middle of a feed-forward block of experts as one operator, and the function that callers use.

As :mod:`molora.kernels.rank.ops` in every way: functional, no host synchronisation, deterministic, the backward pass an
operator of its own. float64 runs in plain PyTorch on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molora.activations import ACTIVATIONS
from molora.errors import ConfigError, nearest
from molora.kernels.glu import eager as glu_eager
from molora.kernels.glu.eager import Glu, Grads
from molora.kernels.rank import eager
from molora.kernels.rank.ops import empty, steps_for

__all__ = ["MAX_GLU_RANK", "mix_glu", "mix_glu_backward_op", "mix_glu_op"]

MAX_GLU_RANK = 128  # total rank whose sums fit the registers of one program beside the tiles of U and V
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mix_glu(
    U_TF: Tensor,
    V_TF: Tensor,
    H1_TR: Tensor | None,
    H3_TR: Tensor | None,
    B1_FR: Tensor | None,
    B3_FR: Tensor | None,
    A2_RF: Tensor | None,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expert_R: Tensor,
    scale1_R: Tensor,
    scale3_R: Tensor,
    scale2_R: Tensor,
    num_experts: int,
    act: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The middle of a feed-forward block whose K chosen experts share the frozen products, without a slot axis.

        u_j = U + (H1 * M_j * scale1) B1^T        v_j = V + (H3 * M_j * scale3) B3^T        h_j = act(u_j) * v_j
        hbar = sum_j w_j h_j                      H2 = sum_j w_j scale2 * M_j * (h_j A2^T)
        M_j[t, c] = 1 where ids[t, j] == expert[c], else 0

    The block's output is then ``hbar W2^T + H2 B2^T``: each frozen projection sees every token once, whatever K is.

    ``U`` = x W1^T and ``V`` = x W3^T (T, F), the frozen products (gate and up). ``H1`` = x A1^T and ``H3`` = x A3^T
    (T, R), in the dtype of U. ``B1``, ``B3`` (F, R) and ``A2`` (R, F) in any float dtype; R, the ranks of all experts
    side by side, at most 128. A linear without experts: None for ``H1`` and ``B1``, for ``H3`` and ``B3``, or for
    ``A2``. ``weights`` (T, K) float32, any strides. ``ids`` (T, K) integers: below 0, or ``num_experts`` and above,
    marks an empty slot, which adds nothing to either result, whatever its weight is (NaN too). ``expert`` (R,)
    integers, the expert of each rank, one map for the three linears; ``scale1``, ``scale3``, ``scale2`` (R,) float32.
    ``act``: "silu", "gelu" (the error function), "gelu_tanh" or "relu".

    Returns hbar (T, F) and H2 (T, R), or (T, 0) without A2, in the dtype of U; products in that dtype, sums, act and
    weights in float32. Differentiable in U, V, H1, H3, B1, B3, A2 and weights; backward computes u_j, v_j and h_j
    again, so that no (T, K, F) tensor exists in either direction. T = 0 gives empty results and zero gradients.

    Raises:
        ConfigError: shapes or dtypes that do not fit, tensors on several devices, an unknown ``act``, or R above 128
            (the slot operators ``expand_slots`` and ``contract_slots`` take any rank).
    """
    given = Glu(
        *(U_TF, V_TF, H1_TR, H3_TR, B1_FR, B3_FR, A2_RF, weights_TK, ids_TK),
        *(expert_R, scale1_R, scale3_R, scale2_R, num_experts, act),
    )
    _check(given)
    hbar_TF, H2_TR = mix_glu_op(*given)
    return hbar_TF, H2_TR


def _check(g: Glu) -> None:
    if g.U.ndim != 2 or g.ids.ndim != 2 or g.expert.ndim != 1:
        raise ConfigError(
            f"mix_glu: got U {tuple(g.U.shape)}, ids {tuple(g.ids.shape)} and expert {tuple(g.expert.shape)}, "
            "expected (T, F), (T, K) and (R,); flatten the tokens"
        )
    if g.act not in ACTIVATIONS:
        raise ConfigError(
            f"mix_glu: got act {g.act!r}, expected one of {', '.join(ACTIVATIONS)}{nearest(g.act, ACTIVATIONS)}"
        )
    (T, F), K, R = g.U.shape, g.ids.shape[1], g.expert.shape[0]
    if R > MAX_GLU_RANK:
        raise ConfigError(
            f"mix_glu: got {R} ranks side by side, expected at most {MAX_GLU_RANK}; use expand_slots and contract_slots"
        )
    for name, H, B in (("1", g.H1, g.B1), ("3", g.H3, g.B3)):
        if (H is None) != (B is None):
            raise ConfigError(f"mix_glu: got one of H{name} and B{name}, expected both, or None for both")
    shapes = ((T, F), (T, F), (T, R), (T, R), (F, R), (F, R), (R, F), (T, K), (T, K), (R,), (R,), (R,), (R,))
    for name, x, shape in zip(Glu._fields, g[:13], shapes, strict=False):
        if not isinstance(x, Tensor):
            continue
        if tuple(x.shape) != shape:
            raise ConfigError(f"mix_glu: got {name} of shape {tuple(x.shape)}, expected {shape}")
        if x.device != g.U.device:
            raise ConfigError(f"mix_glu: got {name} on {x.device}, expected {g.U.device}, where U is; move it there")
        if name in ("ids", "expert"):
            if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
                raise ConfigError(f"mix_glu: got {name} of {x.dtype}, expected integers")
        elif x.dtype not in DTYPES:
            raise ConfigError(f"mix_glu: got {name} of {x.dtype}, expected float32, bfloat16 or float16; cast it")
        if name in ("V", "H1", "H3") and x.dtype != g.U.dtype:
            raise ConfigError(f"mix_glu: got {name} of {x.dtype}, expected {g.U.dtype}, the dtype of U; cast it")


def _plain(U: Tensor) -> bool:
    return U.dtype == torch.float64 or steps_for(U) is eager


def _forward_for(U: Tensor) -> Callable[[Glu], tuple[Tensor, Tensor]]:
    if _plain(U):
        return glu_eager.forward
    from molora.kernels.glu import launch as glu_launch

    return glu_launch.forward


def _backward_for(U: Tensor) -> Callable[[Glu, Tensor, Tensor, list[bool]], Grads]:
    if _plain(U):
        return glu_eager.backward
    from molora.kernels.glu import launch as glu_launch

    return glu_launch.backward


@torch.library.custom_op("molora::mix_glu", mutates_args=())
def mix_glu_op(
    U: Tensor,
    V: Tensor,
    H1: Tensor | None,
    H3: Tensor | None,
    B1: Tensor | None,
    B3: Tensor | None,
    A2: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    expert: Tensor,
    scale1: Tensor,
    scale3: Tensor,
    scale2: Tensor,
    num_experts: int,
    act: str,
) -> tuple[Tensor, Tensor]:
    """hbar (T, F) and H2 (T, R), or (T, 0) without A2; see :func:`mix_glu`, which checks the arguments."""
    g = Glu(U, V, H1, H3, B1, B3, A2, weights, ids, expert, scale1, scale3, scale2, num_experts, act)
    with torch.autocast(U.device.type, enabled=False):  # else every product below would be cast once more
        return _forward_for(U)(g)


@mix_glu_op.register_fake
def _(U: Tensor, V: Any, H1: Any, H3: Any, B1: Any, B3: Any, A2: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return U.new_empty(U.shape), U.new_empty(U.shape[0], 0 if A2 is None else A2.shape[0])


@torch.library.custom_op("molora::mix_glu_backward", mutates_args=())
def mix_glu_backward_op(
    d_hbar: Tensor,
    d_H2: Tensor,
    U: Tensor,
    V: Tensor,
    H1: Tensor | None,
    H3: Tensor | None,
    B1: Tensor | None,
    B3: Tensor | None,
    A2: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    expert: Tensor,
    scale1: Tensor,
    scale3: Tensor,
    scale2: Tensor,
    num_experts: int,
    act: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dU, dV, dH1, dH3, dB1, dB3, dA2, dweights as far as ``needs`` asks for them; empty tensors for the rest."""
    g = Glu(U, V, H1, H3, B1, B3, A2, weights, ids, expert, scale1, scale3, scale2, num_experts, act)
    with torch.autocast(U.device.type, enabled=False):
        found = _backward_for(U)(g, d_hbar.to(U.dtype), d_H2.to(U.dtype), needs)
    return _eight(empty(U) if d is None else d for d in found)


@mix_glu_backward_op.register_fake
def _(
    d_hbar: Tensor, d_H2: Tensor, U: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    likes, needs = (U, *rest[:7]), rest[-1]
    return _eight(
        x.new_empty(x.shape) if need and x is not None else empty(U) for x, need in zip(likes, needs, strict=True)
    )


def _eight(found: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dU, dV, dH1, dH3, dB1, dB3, dA2, dw = found
    return dU, dV, dH1, dH3, dB1, dB3, dA2, dw


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:13])
    ctx.num_experts, ctx.act = inputs[13:]


def _gradient(ctx: Any, d_hbar: Tensor, d_H2: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    needs = [bool(n) and x is not None for n, x in zip(ctx.needs_input_grad[:8], saved[:8], strict=True)]
    found = mix_glu_backward_op(d_hbar, d_H2, *saved, ctx.num_experts, ctx.act, needs)
    return (*(d if n else None for d, n in zip(found, needs, strict=True)), *(None,) * 7)


mix_glu_op.register_autograd(_gradient, setup_context=_save)
