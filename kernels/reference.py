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

__all__ = ["Layout", "contract_slots", "expand_slots", "mix_slots", "rank_mix_concat", "rank_mix_loop"]


class Layout(NamedTuple):
    """How the packed ranks belong to experts.

    ``ranks``: rank per expert. ``scales``: factor per expert. ``expert_R``: (R,) int64, the expert of each rank.
    ``scale_R``: (R,) float32. ``gate_ER``: see :func:`gates_of`; made anew when it is None.
    ``start_E``: (E + 1,) int64, where each expert's ranks begin, and R; made anew when it is None.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    expert_R: Tensor
    scale_R: Tensor
    gate_ER: Tensor | None = None
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
    if layout.rank == 1:
        gates_TR = weights_TE * layout.scale_R
    else:
        gate_ER = (
            layout.gate_ER if layout.gate_ER is not None else gates_of(layout.expert_R, layout.scale_R, layout.ranks)
        )
        gates_TR = weights_TE @ (gate_ER if gate_ER.dtype == weights_TE.dtype else gate_ER.to(weights_TE.dtype))
    return u_TR * (gates_TR if gates_TR.dtype == u_TR.dtype else gates_TR.to(u_TR.dtype))


def gates_of(expert_R: Tensor, scale_R: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """(E, R) float32: the scale in the columns of an expert's ranks, 0 elsewhere; ``weights @`` it is g."""
    return (expert_R == torch.arange(len(ranks), device=expert_R.device).unsqueeze(-1)) * scale_R


def rank_mix_concat(
    base_TO: Tensor, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, weights_TE: Tensor | None, layout: Layout
) -> Tensor:
    """``base + ((x A^T) * g) B^T``: same arguments, shapes and value as :func:`rank_mix_loop`; one rounding into y.

    All of x, A and B in one dtype (autocast may lower it); the result has the dtype of the base.
    """
    if A_RI.shape[0] == 0:
        return base_TO
    h_TR = torch.nn.functional.linear(x_TI, A_RI)
    if weights_TE is not None:
        h_TR = gate_ranks(h_TR, weights_TE, layout)
    elif layout.scale is None:
        h_TR = h_TR * layout.scale_R.to(h_TR.dtype)
    scale = layout.scale if weights_TE is None and layout.scale is not None else 1.0
    return torch.addmm(base_TO, h_TR, B_OR.t(), alpha=scale).to(base_TO.dtype)


def expand_slots(
    base_TF: Tensor, x_TD: Tensor, A_RD: Tensor, B_FR: Tensor, picks_TKE: Tensor, layout: Layout
) -> Tensor:
    """One row per chosen expert: ``y[t, k] = base[t] + s B_e A_e x[t]`` with e the expert of slot k. Returns (T, K, F).

    ``picks_TKE``: one-hot choices, all zero for an empty slot. The base product is done once per token.
    """
    h_TKR = gate_ranks((x_TD @ A_RD.t()).unsqueeze(1), picks_TKE, layout)
    out_TKF: Tensor = (h_TKR.flatten(0, 1) @ B_FR.t()).unflatten(0, picks_TKE.shape[:2])
    out_TKF = out_TKF.to(base_TF.dtype)
    out_TKF += base_TF.unsqueeze(1)
    return out_TKF


def contract_slots(
    h_TKF: Tensor, weights_TK: Tensor, A_RF: Tensor, B_DR: Tensor, picks_TKE: Tensor, layout: Layout
) -> Tensor:
    """The adapters' share of the down projection: ``sum_k w[t, k] s B_e A_e h[t, k]``. Returns (T, D)."""
    gates_TKE = picks_TKE * weights_TK.unsqueeze(-1)
    u_TKR = (h_TKF.flatten(0, 1) @ A_RF.t()).unflatten(0, h_TKF.shape[:2])
    return gate_ranks(u_TKR, gates_TKE, layout).sum(1) @ B_DR.t()


class _MixSlots(torch.autograd.Function):
    """One pass over the slots each way; the product (T, K, F) of the obvious form is never made forward."""

    @staticmethod
    def forward(ctx: Any, h_TKF: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(h_TKF, weights_TK)
        slots, weights = h_TKF.unbind(1), weights_TK.unsqueeze(-1).unbind(1)
        y_TF = slots[0] * weights[0]
        for h_TF, w_T1 in zip(slots[1:], weights[1:], strict=True):
            y_TF.addcmul_(h_TF, w_T1)
        return y_TF

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        h_TKF, weights_TK = ctx.saved_tensors
        grad_T1F = grad_TF.unsqueeze(1)
        return grad_T1F * weights_TK.unsqueeze(-1), (h_TKF * grad_T1F).sum(-1)


def mix_slots(h_TKF: Tensor, weights_TK: Tensor) -> Tensor:
    """``sum_k w[t, k] h[t, k]``, (T, F), both in one dtype; half the time of a product and a sum."""
    return cast(Tensor, _MixSlots.apply(h_TKF, weights_TK))  # type: ignore[no-untyped-call]
