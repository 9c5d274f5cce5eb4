"""The steps of :mod:`molora.kernels.rank.launch` in plain PyTorch: the same names and results, any float dtype.

The operators run these on a CPU, and they say what each Triton kernel computes. Sums of half-precision products are
left to the matrix library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora.kernels.gates import DENSE, TOP_K, Gates

__all__ = ["contract", "contract_gated", "contract_gated_backward", "expand", "gate_parts", "outer"]
__all__ += ["partial_products", "slot_gates"]


def picks(gates: Gates) -> Tensor:
    """(T, SLOTS, R): the scale in the ranks of each slot's expert, 0 elsewhere; nothing in an empty slot."""
    if gates.form == TOP_K or gates.ids is not None:
        assert gates.ids is not None
        mine = gates.ids.unsqueeze(-1) == gates.expert
    else:
        experts = torch.arange(gates.slots, device=gates.expert.device)
        mine = (experts.unsqueeze(-1) == gates.expert).unsqueeze(0)
    return mine * gates.scale


def factors(gates: Gates) -> Tensor:
    """(T, R), or (R,) without weights: what each rank is multiplied with."""
    if gates.weights is None:
        return gates.scale
    weights = gates.weights.to(torch.promote_types(gates.weights.dtype, torch.float32))
    if gates.form == DENSE:
        return weights[:, gates.expert] * gates.scale
    picked_TKR = picks(gates)
    return torch.where(picked_TKR == 0, 0, picked_TKR * weights.unsqueeze(-1)).sum(1)


def contract(x_NK: Tensor, m_RK: Tensor) -> Tensor:
    """``x m^T``."""
    return x_NK @ m_RK.t()


def partial_products(x_NK: Tensor, m_RK: Tensor) -> Tensor:
    """``x m^T`` as a single part, (1, N, R)."""
    return contract(x_NK, m_RK).unsqueeze(0)


def gate_parts(parts_SNR: Tensor, out_NR: Tensor, gated_NR: Tensor, h_NR: Tensor | None, gates: Gates) -> None:
    """Forward (no ``h``): ``out = p``, ``gated = p g``; backward: ``out = p g``, ``gated = h g``, p the parts' sum."""
    total_NR, g_NR = parts_SNR.sum(0), factors(gates)
    out_NR.copy_(total_NR if h_NR is None else total_NR * g_NR)
    gated_NR.copy_((total_NR if h_NR is None else h_NR) * g_NR)


def contract_gated(x_NK: Tensor, m_RK: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """``h = x m^T`` and ``h g``."""
    h_NR = contract(x_NK, m_RK)
    return h_NR, (h_NR * factors(gates)).to(h_NR.dtype)


def contract_gated_backward(
    grad_NK: Tensor, m_RK: Tensor, h_NR: Tensor, gates: Gates, with_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``d g``, ``h g`` and ``dw[t, j] = sum of scale d h`` over the ranks of slot j, with ``d = grad m^T``."""
    d_NR, g_NR = contract(grad_NK, m_RK), factors(gates)
    wide = torch.promote_types(d_NR.dtype, torch.float32)
    dw_NK = ((d_NR.to(wide) * h_NR).unsqueeze(1) * picks(gates)).sum(-1) if with_weights else None
    return (d_NR * g_NR).to(d_NR.dtype), (h_NR * g_NR).to(h_NR.dtype), dw_NK


def expand(
    h_NR: Tensor, b_OR: Tensor, base_TO: Tensor | None, dtype: torch.dtype, share: int = 1, out: Tensor | None = None
) -> Tensor:
    """``base[n // share] + (h b^T)[n]``; ``out`` may be the base."""
    y_NO = h_NR @ b_OR.t()
    if base_TO is not None:
        y_NO = y_NO + (base_TO.repeat_interleave(share, 0) if share > 1 else base_TO)
    return y_NO.to(dtype) if out is None else out.copy_(y_NO)


def outer(wide_TM: Tensor, rank_TR: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """``wide^T rank`` (M, R), or its transpose."""
    return (rank_TR.t() @ wide_TM if transposed else wide_TM.t() @ rank_TR).to(dtype)


def slot_gates(
    token_TR: Tensor | None, slot_TKR: Tensor | None, gates: Gates, with_weights: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``sum_j slot g_j``, ``token g_j``, and ``dw``; see the Triton launcher."""
    picked_TKR = picks(gates)
    g_TKR = picked_TKR
    if gates.weights is not None:
        g_TKR = torch.where(picked_TKR == 0, 0, picked_TKR * gates.weights.unsqueeze(-1))
    token_out = None if slot_TKR is None else (slot_TKR * g_TKR).sum(1).to(slot_TKR.dtype)
    slot_out = None if token_TR is None else (token_TR.unsqueeze(1) * g_TKR).to(token_TR.dtype)
    dw_TK = None
    if with_weights:
        assert token_TR is not None
        assert slot_TKR is not None
        wide = torch.promote_types(token_TR.dtype, torch.float32)
        dw_TK = (token_TR.to(wide).unsqueeze(1) * slot_TKR * picked_TKR).sum(-1)
    return token_out, slot_out, dw_TK
