"""The middle of a feed-forward block of experts in plain PyTorch: what ``glu.py`` computes, in any float dtype.

One pass over the slots, each as wide as the tokens: nothing of size (T, K, F) is made here, either. Products are taken
in the dtype of U, everything between them in float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from molora.activations import activate

__all__ = ["Glu", "Grads", "backward", "forward"]


class Glu(NamedTuple):
    """The operands of ``mix_glu``; see :func:`molora.kernels.glu.ops.mix_glu`."""

    U: Tensor
    V: Tensor
    H1: Tensor | None
    H3: Tensor | None
    B1: Tensor | None
    B3: Tensor | None
    A2: Tensor | None
    weights: Tensor
    ids: Tensor
    expert: Tensor
    scale1: Tensor
    scale3: Tensor
    scale2: Tensor
    num_experts: int
    act: str


class Grads(NamedTuple):
    """The gradients in the order of the operands; None where nobody asked."""

    U: Tensor | None
    V: Tensor | None
    H1: Tensor | None
    H3: Tensor | None
    B1: Tensor | None
    B3: Tensor | None
    A2: Tensor | None
    weights: Tensor | None


class _Slot(NamedTuple):
    """One slot of every token, in float32 at least: used (T, 1), weight (T, 1), mine (T, R), u and v (T, F)."""

    used: Tensor
    weight: Tensor
    mine: Tensor
    gated1: Tensor | None
    gated3: Tensor | None
    u: Tensor
    v: Tensor


def forward(g: Glu) -> tuple[Tensor, Tensor]:
    """``hbar`` (T, F) and ``H2`` (T, R), or (T, 0) without A2, both in the dtype of U."""
    wide, narrow = _wide(g.U), g.U.dtype
    hbar_TF = torch.zeros_like(g.U, dtype=wide, memory_format=torch.contiguous_format)
    H2_TR = g.U.new_zeros(g.U.shape[0], 0 if g.A2 is None else g.A2.shape[0], dtype=wide)
    for j in range(g.ids.shape[1]):
        s = _slot(g, j)
        h_TF = activate(g.act, s.u).mul_(s.v).mul_(s.weight).masked_fill_(~s.used, 0)
        hbar_TF += h_TF
        if g.A2 is not None:
            H2_TR += (h_TF.to(narrow) @ g.A2.to(narrow).t()).masked_fill_(~s.mine, 0) * g.scale2
    return hbar_TF.to(narrow), H2_TR.to(narrow)


def backward(g: Glu, dhbar_TF: Tensor, dH2_TR: Tensor, needs: list[bool]) -> Grads:
    """The gradients that ``needs`` asks for, in the order and the dtypes of the operands."""
    wide, narrow = _wide(g.U), g.U.dtype
    given = g[:8]
    sums = [
        torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) if n and x is not None else None
        for x, n in zip(given, needs, strict=True)
    ]
    dU, dV, dH1, dH3, dB1, dB3, dA2, dw = sums
    for j in range(g.ids.shape[1]):
        s = _slot(g, j)
        gated2 = _gated(dH2_TR, g.scale2, s.mine) if g.A2 is not None else None
        q_TF = _plus(dhbar_TF, gated2, None if g.A2 is None else g.A2.t())
        act_TF = activate(g.act, s.u)
        h_TF = act_TF * s.v
        if dw is not None:
            dw[:, j] = (q_TF * h_TF).masked_fill_(~s.used, 0).sum(1)
        if dA2 is not None and gated2 is not None:
            dA2 += gated2.t() @ (h_TF * s.weight).masked_fill_(~s.used, 0).to(narrow)
        q_TF = q_TF * s.weight
        du_TF = _through(g.act, q_TF * s.v, s.u).masked_fill_(~s.used, 0)
        dv_TF = (q_TF * act_TF).masked_fill_(~s.used, 0)
        sides = (du_TF, dU, dH1, dB1, g.B1, s.gated1, g.scale1), (dv_TF, dV, dH3, dB3, g.B3, s.gated3, g.scale3)
        for d_TF, d_base, dH, dB, B, gated, scale in sides:
            if d_base is not None:
                d_base += d_TF
            if dH is not None and B is not None:
                dH += (d_TF.to(narrow) @ B.to(narrow)).masked_fill_(~s.mine, 0) * scale
            if dB is not None and gated is not None:
                dB += d_TF.to(narrow).t() @ gated
    return Grads(*(None if d is None or x is None else d.to(x.dtype) for d, x in zip(sums, given, strict=True)))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _slot(g: Glu, j: int) -> _Slot:
    id_T1 = g.ids[:, j : j + 1]
    used = (id_T1 >= 0) & (id_T1 < g.num_experts)
    mine = used & (id_T1 == g.expert)
    weight = g.weights[:, j : j + 1].to(_wide(g.U)).masked_fill(~used, 0)
    gated1, gated3 = _gated(g.H1, g.scale1, mine), _gated(g.H3, g.scale3, mine)
    return _Slot(used, weight, mine, gated1, gated3, _plus(g.U, gated1, g.B1), _plus(g.V, gated3, g.B3))


def _gated(H_TR: Tensor | None, scale_R: Tensor, mine_TR: Tensor) -> Tensor | None:
    return None if H_TR is None else (H_TR * scale_R).to(H_TR.dtype).masked_fill_(~mine_TR, 0)


def _plus(base_TF: Tensor, gated_TR: Tensor | None, B_FR: Tensor | None) -> Tensor:
    base_TF = base_TF.to(_wide(base_TF))
    return base_TF if gated_TR is None or B_FR is None else base_TF + gated_TR @ B_FR.to(gated_TR.dtype).t()


def _through(act: str, grad: Tensor, u: Tensor) -> Tensor:
    """``grad * act'(u)``."""
    if act == "silu":
        return torch.ops.aten.silu_backward(grad, u)  # type: ignore[no-any-return]
    if act == "relu":
        return torch.ops.aten.threshold_backward(grad, u, 0)  # type: ignore[no-any-return]
    approximate = "tanh" if act == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, u, approximate=approximate)  # type: ignore[no-any-return]
