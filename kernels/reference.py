"""The meaning of the mixture: a loop over tokens and experts, and the same sum as three matrix products.

    y[t] = base[t] + sum_e w[t, e] * s[e] * B_e (A_e x[t])

With the experts' ranks side by side this is ``y = base + ((x A^T) * g) B^T``. Below a total rank of a few hundred the
products with zero weights cost nothing on a machine that is bound by memory, so this is the CPU path and the
baseline that other kernels have to beat. Dimension letters: ``molora/routing.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from molora.activations import activate
from molora.routing import as_dtype

__all__ = ["Half", "Layout", "add_product", "contract_slots", "expand_slots", "gates_of", "mix_glu"]
__all__ += ["mix_slots", "rank_mix_concat", "rank_mix_loop"]


class Layout(NamedTuple):
    """How the packed ranks belong to experts.

    ``ranks``: rank per expert. ``scales``: factor per expert. ``expert_R``: (R,) int64, the expert of each rank.
    ``scale_R``: (R,) float32. ``gate_ER`` (E, R) and ``slot_gate_ER`` (E + 1, R): see :func:`gates_of`; made anew
    when they are None. ``start_E``: (E + 1,) int64, where each expert's ranks begin, and R; made anew when it is None.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    expert_R: Tensor
    scale_R: Tensor
    gate_ER: Tensor | None = None
    slot_gate_ER: Tensor | None = None
    start_E: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank of every expert, or None when they differ."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None

    @property
    def scale(self) -> float | None:
        """The factor of every expert, or None when they differ."""
        return self.scales[0] if len(set(self.scales)) == 1 else None


def rank_mix_loop(
    base_TO: Tensor, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, weights_TE: Tensor | None, layout: Layout
) -> Tensor:
    """The formula, token by token and expert by expert. Any float dtype (the tests use float64); slow on purpose.

    ``weights_TE`` None means weight 1 for every expert. Returns (T, O).
    """
    rows = []
    for t in range(x_TI.shape[0]):
        y_O, start = base_TO[t], 0
        for e, (r, s) in enumerate(zip(layout.ranks, layout.scales, strict=True)):
            A_rI, B_Or = A_RI[start : start + r], B_OR[:, start : start + r]
            w = 1.0 if weights_TE is None else weights_TE[t, e]
            y_O = y_O + w * s * (B_Or @ (A_rI @ x_TI[t]))
            start += r
        rows.append(y_O)
    return torch.stack(rows) if rows else base_TO.clone()


def gate_ranks(u_TR: Tensor, weights_TE: Tensor, layout: Layout) -> Tensor:
    """Multiply each rank by its expert's weight and scale; any leading dimensions. One rounding to u's dtype."""
    if layout.expert_R.shape[0] == len(layout.ranks) and layout.rank == 1:
        gates_TR = weights_TE * layout.scale_R
    else:
        gate_ER = layout.gate_ER if layout.gate_ER is not None else gates_of(layout)[:-1]
        gates_TR = weights_TE @ as_dtype(gate_ER, weights_TE.dtype)
    return u_TR * as_dtype(gates_TR, u_TR.dtype)


def gates_of(layout: Layout) -> Tensor:
    """(E + 1, R) float32: the scale in the columns of an expert's ranks, 0 elsewhere and in the last row.

    ``weights @`` its first E rows is g; row e is what a slot that chose expert e multiplies the ranks with, and the
    last row is that of an empty slot.
    """
    experts_E1 = torch.arange(len(layout.ranks) + 1, device=layout.expert_R.device).unsqueeze(-1)
    return (layout.expert_R == experts_E1) * layout.scale_R


class _Gates:
    """(T, K, R) float32, one row of :func:`gates_of` for each slot; the linears of a block mostly share them."""

    def __init__(self, rows_N: Tensor, slots: int) -> None:
        self.rows_N, self.slots = rows_N, slots
        self._last: tuple[Layout, Tensor] | None = None

    def of(self, layout: Layout) -> Tensor:
        if self._last is not None and self._last[0][:2] == layout[:2]:
            return self._last[1]
        table = layout.slot_gate_ER if layout.slot_gate_ER is not None else gates_of(layout)
        gates_TKR = table.index_select(0, self.rows_N).view(-1, self.slots, table.shape[1])
        self._last = layout, gates_TKR
        return gates_TKR


def rank_mix_concat(
    base_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    weights_TE: Tensor | None,
    layout: Layout,
    overwrite: bool = False,
) -> Tensor:
    """``base + ((x A^T) * g) B^T``: same arguments, shapes and value as :func:`rank_mix_loop`; one rounding into y.

    All of x, A and B in one dtype (autocast may lower it); the result has the dtype of the base. With ``overwrite`` it
    is written into the base, which must be nobody else's and of that same dtype.
    """
    if A_RI.shape[0] == 0:
        return base_TO
    h_TR = torch.nn.functional.linear(x_TI, A_RI)
    if weights_TE is not None:
        h_TR = gate_ranks(h_TR, weights_TE, layout)
        return add_product(base_TO, h_TR, B_OR, overwrite=overwrite)
    if (scale := layout.scale) is None:
        h_TR, scale = h_TR * as_dtype(layout.scale_R, h_TR.dtype), 1.0
    return add_product(base_TO, h_TR, B_OR, scale, overwrite)


def add_product(base_TO: Tensor, h_TR: Tensor, B_OR: Tensor, scale: float = 1.0, overwrite: bool = False) -> Tensor:
    """``base + scale h B^T`` in the dtype of the base, into the base with ``overwrite``."""
    if overwrite:
        return base_TO.addmm_(h_TR, B_OR.t(), alpha=scale)
    return torch.addmm(base_TO, h_TR, B_OR.t(), alpha=scale).to(base_TO.dtype)


def expand_slots(
    base_TF: Tensor, x_TD: Tensor, A_RD: Tensor, B_FR: Tensor, rows_N: Tensor, slots: int, layout: Layout
) -> Tensor:
    """One row per chosen expert: ``y[t, k] = base[t] + s B_e A_e x[t]`` with e the expert of slot k. Returns (T, K, F).

    ``rows_N``: the expert of each of the T * K ``slots``, E for an empty one. The base product is done once per token.
    """
    return _slots_of(Half(base_TF, False, torch.nn.functional.linear(x_TD, A_RD), B_FR, layout), _Gates(rows_N, slots))


def contract_slots(
    base_TD: Tensor,
    h_TKF: Tensor,
    weights_TK: Tensor,
    A_RF: Tensor,
    B_DR: Tensor,
    rows_N: Tensor,
    layout: Layout,
    overwrite: bool = False,
) -> Tensor:
    """The experts of the down projection: ``base[t] + sum_k w[t, k] s B_e A_e h[t, k]``. Returns (T, D).

    ``rows_N``: as in :func:`expand_slots`; ``overwrite``: as in :func:`rank_mix_concat`.
    """
    u_TKR = torch.nn.functional.linear(h_TKF, A_RF)
    gates_TKR = _Gates(rows_N, h_TKF.shape[1]).of(layout) * weights_TK.unsqueeze(-1)
    return add_product(base_TD, (u_TKR * as_dtype(gates_TKR, u_TKR.dtype)).sum(1), B_DR, overwrite=overwrite)


class Half(NamedTuple):
    """What one up-side linear gives to a gated unit: the frozen product (T, F), and its experts' two factors.

    ``h_TR`` = x A^T, before gates; None, like ``B_FR`` and ``layout``, for a linear without experts. ``gated``: whether
    the activation is on this one.
    """

    base_TF: Tensor
    gated: bool
    h_TR: Tensor | None = None
    B_FR: Tensor | None = None
    layout: Layout | None = None


def mix_glu(
    u: Half,
    v: Half,
    A_RF: Tensor | None,
    layout: Layout | None,
    weights_TK: Tensor,
    rows_N: Tensor,
    act: str,
) -> tuple[Tensor, Tensor | None]:
    """``h_k = act(u_k) v_k``, and of it ``sum_k w_k h_k`` (T, F) and ``sum_k w_k s M_k (h_k A^T)`` (T, R); no gradient.

    ``u_k = base + s (h M_k) B^T`` with M_k the ranks of slot k's expert. The second is None without ``A_RF``, the A of
    the down linear, whose layout is ``layout``. ``rows_N``: as in :func:`expand_slots`.
    """
    slots = weights_TK.shape[1]
    gates = _Gates(rows_N, slots)
    h_TKF = activate(act, _slots_of(u, gates), inplace=True)
    h_TKF *= _slots_of(v, gates)
    hbar_TF = _mix(h_TKF, as_dtype(weights_TK, h_TKF.dtype))
    if A_RF is None or layout is None:
        return hbar_TF, None
    gates_TKR = as_dtype(gates.of(layout) * weights_TK.unsqueeze(-1), h_TKF.dtype)
    return hbar_TF, (torch.nn.functional.linear(h_TKF, as_dtype(A_RF, h_TKF.dtype)) * gates_TKR).sum(1)


def _slots_of(half: Half, gates: _Gates) -> Tensor:
    if half.h_TR is None or half.B_FR is None or half.layout is None:
        return half.base_TF.unsqueeze(1).repeat(1, gates.slots, 1)
    h_TKR = half.h_TR.unsqueeze(1) * as_dtype(gates.of(half.layout), half.h_TR.dtype)
    out_TKF: Tensor = as_dtype(torch.nn.functional.linear(h_TKR, half.B_FR), half.base_TF.dtype)
    out_TKF += half.base_TF.unsqueeze(1)
    return out_TKF


def _mix(h_TKF: Tensor, weights_TK: Tensor) -> Tensor:
    if h_TKF.dtype == torch.float32 and h_TKF.is_cpu:  # a third faster; in half precision four times slower
        return torch.bmm(weights_TK.unsqueeze(1), h_TKF).squeeze(1)
    slots, weights = h_TKF.unbind(1), weights_TK.unsqueeze(-1).unbind(1)
    y_TF = slots[0] * weights[0]
    for h_TF, w_T1 in zip(slots[1:], weights[1:], strict=True):
        y_TF.addcmul_(h_TF, w_T1)
    return y_TF


class _MixSlots(torch.autograd.Function):
    """One pass over the slots each way; the product (T, K, F) of the obvious form is never made forward."""

    @staticmethod
    def forward(ctx: Any, h_TKF: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(h_TKF, weights_TK)
        return _mix(h_TKF, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        h_TKF, weights_TK = ctx.saved_tensors
        grad_T1F = grad_TF.unsqueeze(1)
        return grad_T1F * weights_TK.unsqueeze(-1), (h_TKF * grad_T1F).sum(-1)


def mix_slots(h_TKF: Tensor, weights_TK: Tensor) -> Tensor:
    """``sum_k w[t, k] h[t, k]``, (T, F), both in one dtype; half the time of a product and a sum."""
    if not torch.is_grad_enabled():
        return _mix(h_TKF, weights_TK)
    return cast(Tensor, _MixSlots.apply(h_TKF, weights_TK))  # type: ignore[no-untyped-call]
