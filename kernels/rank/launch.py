"""From tensors to grids: each function allocates its results, picks a tile by shapes alone and launches one kernel.

Everything here is two-dimensional: N rows (tokens, or tokens x slots), R ranks, and a wide dimension. Nothing reads
the device's memory on the host.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from molora.kernels.gates import ALWAYS, Gates
from molora.kernels.rank import programs as concat
from molora.kernels.tiles import FUSED_RANK, Tile, ceil_div, splits, tile, walk

__all__ = ["INTERPRETED", "contract", "contract_gated", "contract_gated_backward", "expand", "gate_parts"]
__all__ += ["outer", "partial_products", "slot_gates"]

# The interpreter adds and multiplies bfloat16 as if it were an integer; there every dot is done in float32.
INTERPRETED = bool(triton.knobs.runtime.interpret)

H_ONLY, H_GATED, BACKWARD = 0, 1, 2
REACH = 2**31 // 512  # the kernels count within a tile, of at most so many rows, in 32 bits


def near(t: Tensor) -> Tensor:
    """``t``, copied where its rows or columns lie so far apart that an offset within a tile would not fit."""
    return t if max(t.stride()) < REACH else t.contiguous()


def contract(x_NK: Tensor, m_RK: Tensor) -> Tensor:
    """``x m^T`` (N, R) in the dtype of x, summed in float32."""
    return _sums(partial_products(x_NK, m_RK, x_NK.dtype), x_NK.dtype)


def contract_gated(x_NK: Tensor, m_RK: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """``h = x m^T`` and ``h * g``, both (N, R) in the dtype of x."""
    h_NR, gated_NR = _pair(x_NK, m_RK)
    if _in_one(x_NK, m_RK):
        _launch_contract(x_NK, m_RK, h_NR, H_GATED, 1, gates, gated_NR)
    elif h_NR.numel():
        gate_parts(partial_products(x_NK, m_RK), h_NR, gated_NR, None, gates)
    return h_NR, gated_NR


def contract_gated_backward(
    grad_NK: Tensor, m_RK: Tensor, h_NR: Tensor, gates: Gates, with_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With ``d = grad m^T``: ``d * g`` (the gradient of h), ``h * g``, and the gradient of the weights when asked for.

    ``dw[t, j] = sum of scale[c] d[t, c] h[t, c]`` over the ranks of slot j's expert: float32, (N, K) or (N, E).
    """
    dh_NR, gated_NR = _pair(grad_NK, m_RK)
    rows, total_rank = dh_NR.shape
    dw_NK = grad_NK.new_empty(rows, gates.slots, dtype=torch.float32) if with_weights else None
    if _in_one(grad_NK, m_RK):
        _launch_contract(grad_NK, m_RK, dh_NR, BACKWARD, 1, gates, gated_NR, h_NR, dw_NK)
    elif dh_NR.numel():
        parts_SNR = partial_products(grad_NK, m_RK)
        gate_parts(parts_SNR, dh_NR, gated_NR, h_NR, gates)
        if dw_NK is not None:
            t = tile("gate", rows, total_rank, 4)
            _, ids, expert, scale, *_ = gates.arguments()
            with torch.cuda.device_of(h_NR):
                concat.weight_grad_kernel[(ceil_div(rows, t.rows), gates.slots)](
                    *(parts_SNR, h_NR, dw_NK, ids, expert, scale, rows, total_rank),
                    *(parts_SNR.shape[0], parts_SNR.stride(0)),
                    *(gates.slots, gates.form, t.rows, t.cols),
                    num_warps=t.warps,
                )
    return dh_NR, gated_NR, dw_NK


def expand(
    h_NR: Tensor, b_OR: Tensor, base_TO: Tensor | None, dtype: torch.dtype, share: int = 1, out: Tensor | None = None
) -> Tensor:
    """``base[n // share] + (h b^T)[n]`` (N, O), added in float32 and rounded once to ``dtype``.

    ``out`` may be the base itself (``share`` 1): each element is read and then written by the same program.
    """
    rows, total_rank = h_NR.shape
    width = b_OR.shape[0]
    y_NO = h_NR.new_empty(rows, width, dtype=dtype) if out is None else out
    if not y_NO.numel():
        return y_NO
    t = tile("expand", rows, total_rank, h_NR.element_size())
    row_tiles, strips = ceil_div(rows, t.rows), ceil_div(width, t.cols)
    visits = walk(row_tiles, strips)
    b_OR, base_TO = near(b_OR), None if base_TO is None else near(base_TO)
    strides = (0, 0) if base_TO is None else base_TO.stride()
    with torch.cuda.device_of(h_NR):
        concat.expand_kernel[(strips, ceil_div(row_tiles, visits))](
            *(h_NR.contiguous(), b_OR, base_TO, y_NO, rows, total_rank, width),
            *(*b_OR.stride(), *strides, visits),
            *(share, INTERPRETED, total_rank <= t.depth, t.rows, t.cols, t.depth),
            num_warps=t.warps,
            num_stages=t.stages,
        )
    return y_NO


def outer(wide_TM: Tensor, rank_TR: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """``wide^T rank`` (M, R), or its transpose (R, M), summed in float32 over the rows in a fixed order."""
    (rows, width), total_rank = wide_TM.shape, rank_TR.shape[1]
    shape = (total_rank, width) if transposed else (width, total_rank)
    if rows == 0 or 0 in shape:
        return wide_TM.new_zeros(shape, dtype=dtype)
    wide_TM, rank_TR = near(wide_TM), near(rank_TR)
    t = tile("outer", rows, total_rank, wide_TM.element_size())
    grid = ceil_div(width, t.rows), ceil_div(total_rank, t.cols)
    parts = splits(grid[0] * grid[1], ceil_div(rows, t.depth), 16)
    slice_t = ceil_div(ceil_div(rows, t.depth), parts) * t.depth
    parts = ceil_div(rows, slice_t)
    out = wide_TM.new_empty(parts, *shape, dtype=torch.float32 if parts > 1 else dtype)
    wide_stride, rank_stride = (out.stride(2), out.stride(1)) if transposed else (out.stride(1), out.stride(2))
    with torch.cuda.device_of(wide_TM):
        concat.outer_kernel[(*grid, parts)](
            *(wide_TM, rank_TR, out, rows, width, total_rank),
            *(*wide_TM.stride(), *rank_TR.stride(), out.stride(0), wide_stride, rank_stride, slice_t),
            *(INTERPRETED, t.rows, t.cols, t.depth),
            num_warps=t.warps,
            num_stages=t.stages,
        )
    return _sums(out, dtype)


def slot_gates(
    token_TR: Tensor | None, slot_TKR: Tensor | None, gates: Gates, with_weights: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gate between tokens and their slots; ``gates.ids`` (T, K), ``gates.weights`` (T, K) or None for 1.

    Returns ``sum_j slot[t, j] g[t, j]`` (T, R) if there are slots, ``token[t] g[t, j]`` (T, K, R) if there are tokens,
    and with both ``dw[t, j] = sum_c scale token slot`` over the ranks of the slot's expert when asked for.
    """
    some = token_TR if token_TR is not None else slot_TKR
    assert some is not None
    assert gates.ids is not None
    (rows, slots), total_rank = gates.ids.shape, some.shape[-1]
    token_out_TR = None if slot_TKR is None else some.new_empty(rows, total_rank)
    slot_out_TKR = None if token_TR is None else some.new_empty(rows, slots, total_rank)
    dw_TK = some.new_empty(rows, slots, dtype=torch.float32) if with_weights else None
    if rows and slots:
        block = max(16, triton.next_power_of_2(total_rank))
        t = tile("gate", rows, total_rank, 4) if block <= 128 else Tile(max(1, 2048 // block), block, 0, 4, 1)
        with torch.cuda.device_of(some):
            concat.slot_gate_kernel[(ceil_div(rows, t.rows),)](
                *(token_TR, slot_TKR, token_out_TR, slot_out_TKR, dw_TK),
                *(*gates.arguments(), rows, total_rank, slots, t.rows, block),
                num_warps=t.warps,
            )
    elif token_out_TR is not None:
        token_out_TR.zero_()
    return token_out_TR, slot_out_TKR, dw_TK


def _sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts added in their order, in ``dtype``."""
    return parts[0].to(dtype) if parts.shape[0] == 1 else parts.sum(0).to(dtype)


def _pair(x_NK: Tensor, m_RK: Tensor) -> tuple[Tensor, Tensor]:
    shape = x_NK.shape[0], m_RK.shape[0]
    return x_NK.new_empty(shape), x_NK.new_empty(shape)


def _cut(x_NK: Tensor, m_RK: Tensor) -> tuple[Tile, int, int]:
    """Tile, number of parts and length of a part of the sum over K."""
    (rows, width), total_rank = x_NK.shape, m_RK.shape[0]
    t = tile("contract", rows, total_rank, x_NK.element_size())
    steps = ceil_div(width, t.depth)
    parts = splits(ceil_div(rows, t.rows) * ceil_div(total_rank, t.cols), steps, 32 if rows < 128 else 8)
    slice_k = ceil_div(steps, parts) * t.depth
    return t, ceil_div(width, slice_k), slice_k


def _in_one(x_NK: Tensor, m_RK: Tensor) -> bool:
    """Whether one program holds the whole sum and all ranks of its rows, so that the gate can follow in it."""
    rows, total_rank = x_NK.shape[0], m_RK.shape[0]
    return rows > 0 and total_rank <= FUSED_RANK and _cut(x_NK, m_RK)[1] == 1


def partial_products(x_NK: Tensor, m_RK: Tensor, one: torch.dtype = torch.float32) -> Tensor:
    """(SPLIT, N, R): float32, or ``one`` where there is a single part."""
    parts = _cut(x_NK, m_RK)[1]
    shape = parts, x_NK.shape[0], m_RK.shape[0]
    out_SNR = x_NK.new_empty(shape, dtype=one if parts == 1 else torch.float32)
    if out_SNR.numel():
        _launch_contract(x_NK, m_RK, out_SNR, H_ONLY, parts)
    return out_SNR


def _launch_contract(
    x_NK: Tensor,
    m_RK: Tensor,
    out: Tensor,
    mode: int,
    parts: int,
    gates: Gates | None = None,
    gated_NR: Tensor | None = None,
    h_NR: Tensor | None = None,
    dw_NK: Tensor | None = None,
) -> None:
    x_NK, m_RK = near(x_NK), near(m_RK)
    t, _, slice_k = _cut(x_NK, m_RK)
    (rows, width), total_rank = x_NK.shape, m_RK.shape[0]
    slots, form = (gates.slots, gates.form) if gates else (1, ALWAYS)
    who = gates.arguments() if gates else (None, None, None, None, 0, 0)
    with torch.cuda.device_of(x_NK):
        concat.contract_kernel[(ceil_div(rows, t.rows), ceil_div(total_rank, t.cols), parts)](
            *(x_NK, m_RK, out, gated_NR, h_NR, dw_NK, *who),
            *(rows, total_rank, width, *x_NK.stride(), *m_RK.stride(), slice_k),
            *(slots, form, mode, INTERPRETED, t.rows, t.cols, t.depth),
            num_warps=t.warps,
            num_stages=t.stages,
        )


def gate_parts(parts_SNR: Tensor, out_NR: Tensor, gated_NR: Tensor, h_NR: Tensor | None, gates: Gates) -> None:
    """Write, from parts (SPLIT, N, R) of h: ``h`` and ``h g``; given ``h``, from parts of d: ``d g`` and ``h g``."""
    rows, total_rank = out_NR.shape
    t = tile("gate", rows, total_rank, 4)
    with torch.cuda.device_of(out_NR):
        concat.gate_kernel[(ceil_div(rows, t.rows), ceil_div(total_rank, t.cols))](
            *(parts_SNR, out_NR, gated_NR, h_NR, *gates.arguments()),
            *(rows, total_rank, parts_SNR.shape[0], *parts_SNR.stride()[:2]),
            *(gates.slots, gates.form, h_NR is not None, t.rows, t.cols),
            num_warps=t.warps,
        )
