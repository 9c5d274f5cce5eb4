"""The steps of :mod:`molora.kernels.sorted.launch` in plain PyTorch, expert by expert, for tensors on a CPU.

The same names, arguments and results, in any float dtype. Groups are walked with a loop on the host: their sizes are
in its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from molora.kernels.sorted.order import Groups

__all__ = ["gather", "mix", "mix_backward"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _walk(groups: Groups) -> Iterator[tuple[int, Tensor, slice]]:
    """Slot, tokens and ranks of every group that has both."""
    order, starts = groups.order, groups.start_E.tolist()
    rows = torch.arange(int(order.end_KE[0, -1]))
    for slot, ends in enumerate(order.end_KE.tolist()):
        tokens = rows if order.token_KT is None else order.token_KT[slot]
        for e, (lo, hi) in enumerate(zip([0, *ends[:-2]], ends[:-1], strict=True)):
            if hi > lo and starts[e + 1] > starts[e]:
                yield slot, tokens[lo:hi], slice(starts[e], starts[e + 1])


def _gate(weights_TK: Tensor | None, token: Tensor, slot: int, scale_r: Tensor) -> Tensor:
    """(rows or 1, r): the factor of each rank."""
    return scale_r.unsqueeze(0) if weights_TK is None else weights_TK[token, slot].unsqueeze(1) * scale_r


def mix(
    base_TO: Tensor | None, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, weights_TK: Tensor | None, groups: Groups
) -> tuple[Tensor, Tensor]:
    """``y[t] = base[t] + sum_j g[t, j] B_e h[t, j]`` and ``h[t, j] = A_e x[t]``."""
    rows = x_TI.shape[0]
    h_TKr = x_TI.new_zeros(rows, groups.slots, groups.max_rank)
    y_TO = (
        x_TI.new_zeros(rows, B_OR.shape[0]) if base_TO is None else base_TO.clone(memory_format=torch.contiguous_format)
    )
    for slot, token, ranks in _walk(groups):
        u = x_TI[token] @ A_RI[ranks].t()
        h_TKr[token, slot, : u.shape[1]] = u
        gated = (u * _gate(weights_TK, token, slot, groups.scale_R[ranks])).to(u.dtype)
        y_TO[token] = (y_TO[token] + gated @ B_OR[:, ranks].t()).to(y_TO.dtype)
    return y_TO, h_TKr


def mix_backward(
    grad_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    weights_TK: Tensor | None,
    h_TKr: Tensor,
    groups: Groups,
    needs: list[bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB in ``dtypes``, and dweights, as far as ``needs`` asks for them."""
    need_x, need_A, need_B, need_w = needs
    wide = _wide(x_TI.dtype)
    dx_TI = torch.zeros_like(x_TI, memory_format=torch.contiguous_format) if need_x else None
    dA_RI = x_TI.new_zeros(A_RI.shape, dtype=wide) if need_A else None
    dB_OR = x_TI.new_zeros(B_OR.shape, dtype=wide) if need_B else None
    dw_TK = x_TI.new_zeros(h_TKr.shape[:2], dtype=wide) if need_w else None
    for slot, token, ranks in _walk(groups):
        scale, x, grad = groups.scale_R[ranks], x_TI[token], grad_TO[token]
        gate = _gate(weights_TK, token, slot, scale)
        h = h_TKr[token, slot, : scale.shape[0]]
        d = grad @ B_OR[:, ranks]
        dh = (d * gate).to(d.dtype)
        if dx_TI is not None:
            dx_TI[token] += dh @ A_RI[ranks]
        if dA_RI is not None:
            dA_RI[ranks] += dh.t() @ x
        if dB_OR is not None:
            dB_OR[:, ranks] += grad.t() @ (h * gate).to(h.dtype)
        if dw_TK is not None:
            dw_TK[token, slot] = (d.to(wide) * h * scale).sum(1)
    return (
        dx_TI,
        None if dA_RI is None else dA_RI.to(dtypes[0]),
        None if dB_OR is None else dB_OR.to(dtypes[1]),
        dw_TK,
    )


def gather(
    base_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    start_E: Tensor,
    scale_R: Tensor,
    max_rank: int,
) -> Tensor:
    """The same y, token by token and slot by slot, all in float32 or wider, rounded once."""
    wide, starts = _wide(x_TI.dtype), start_E.tolist()
    y_TO = base_TO.to(torch.promote_types(wide, base_TO.dtype), copy=True)
    for t, ids in enumerate(ids_TK.tolist()):
        for j, e in enumerate(ids):
            if 0 <= e < len(starts) - 1:
                ranks = slice(starts[e], starts[e + 1])
                h = (A_RI[ranks].to(wide) @ x_TI[t].to(wide)) * scale_R[ranks]
                y_TO[t] += weights_TK[t, j] * (B_OR[:, ranks].to(wide) @ h)
    return y_TO.to(base_TO.dtype).contiguous()
