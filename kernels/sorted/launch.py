"""From tensors to grids for the sorted and the gather kernels: tiles by shapes alone, nothing read back.

Rank space is (T, K, r) here: by token and slot, r the largest rank of an expert, 0 in ranks that an expert lacks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from molora.kernels.rank.launch import INTERPRETED
from molora.kernels.sorted import programs as grouped
from molora.kernels.sorted.order import Groups, most_tiles, tile_ends
from molora.kernels.tiles import Tile, ceil_div, splits, tile, walk

__all__ = ["GATHER_EXPAND", "GATHER_SHRINK", "gather", "mix", "mix_backward"]

# For a few tokens, whatever the ranks: few of them to a program, so that even one token fills some of the GPU.
GATHER_SHRINK = Tile(1, 4, 1024, 4, 1)
GATHER_EXPAND = Tile(1, 128, 16, 4, 1)


class _Tiles(NamedTuple):
    """The rows of each slot cut into tiles of ``block``; at most ``most`` of them."""

    end_KE: Tensor
    block: int
    most: int


def mix(
    base_TO: Tensor | None, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, weights_TK: Tensor | None, groups: Groups
) -> tuple[Tensor, Tensor]:
    """``y[t] = base[t] + sum_j g[t, j] B_e h[t, j]`` (T, O) and ``h[t, j] = A_e x[t]`` (T, K, r).

    y has the dtype of the base (of x without one) and is rounded to it once a slot; h has the dtype of x.
    """
    tiles = _tiles(x_TI, groups)
    h_TKr, gated_TKr, _ = _shrink(x_TI, A_RI, weights_TK, groups, tiles)
    dtype = x_TI.dtype if base_TO is None else base_TO.dtype
    return _expand(gated_TKr, B_OR, base_TO, dtype, groups, tiles), h_TKr


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
    """dx, dA, dB (in ``dtypes``) and dweights (T, K) float32, as far as ``needs`` asks for them."""
    need_x, need_A, need_B, need_w = needs
    tiles = _tiles(x_TI, groups)
    dh_TKr, gated_TKr, dw_TK = _shrink(grad_TO, B_OR.t(), weights_TK, groups, tiles, h_TKr.contiguous(), need_w)
    dx_TI = _expand(dh_TKr, A_RI.t(), None, x_TI.dtype, groups, tiles) if need_x else None
    dA_RI = _outer(x_TI, dh_TKr, dtypes[0], groups, transposed=True) if need_A else None
    dB_OR = _outer(grad_TO, gated_TKr, dtypes[1], groups) if need_B else None
    return dx_TI, dA_RI, dB_OR, dw_TK


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
    """The same y without an order: one program for each token, slot and few ranks, then for each strip of a row."""
    (rows, slots), (width, total_rank), experts = ids_TK.shape, B_OR.shape, start_E.shape[0] - 1
    even = total_rank == experts * max_rank
    ids_TK = ids_TK.contiguous()
    h_TKr = x_TI.new_empty(rows, slots, max_rank, dtype=torch.float32)
    y_TO = base_TO.new_empty(rows, width)
    if not y_TO.numel():
        return y_TO
    s, e = GATHER_SHRINK, GATHER_EXPAND
    with torch.cuda.device_of(x_TI):
        grouped.gather_shrink_kernel[(rows * slots, ceil_div(max_rank, s.cols))](
            *(x_TI, A_RI, h_TKr, ids_TK, start_E, x_TI.shape[1], experts, *x_TI.stride(), *A_RI.stride()),
            *(slots, max_rank, even, s.cols, s.depth),
            num_warps=s.warps,
        )
        grouped.gather_expand_kernel[(rows, ceil_div(width, e.cols))](
            *(h_TKr, B_OR, base_TO, y_TO, weights_TK, ids_TK, scale_R, start_E, width, experts),
            *(*B_OR.stride(), *base_TO.stride(), *weights_TK.stride()),
            *(slots, max_rank, even, e.cols, e.depth),
            num_warps=e.warps,
        )
    return y_TO


def _tile(kernel: str, like: Tensor, groups: Groups) -> Tile:
    """Chosen by twice the rows of an average group: half-empty tiles of 64 rows cost less than many of 16."""
    return tile(kernel, 2 * like.shape[0] // max(groups.num_experts, 1), groups.max_rank, like.element_size())


def _tiles(x_TI: Tensor, groups: Groups) -> _Tiles:
    """One cut for all products: the rows of ``grouped_expand``'s tile, which ``grouped_shrink`` takes over."""
    block = _tile("grouped_expand", x_TI, groups).rows
    most = most_tiles(x_TI.shape[0], groups.num_experts, block)
    return _Tiles(tile_ends(groups.order.end_KE, block), block, most)


def _shrink(
    x_TK: Tensor,
    m_RK: Tensor,
    weights_TK: Tensor | None,
    groups: Groups,
    tiles: _Tiles,
    h_TKr: Tensor | None = None,
    with_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Forward: ``h`` and ``h g``. With ``h``, and ``d`` the product: ``d g``, ``h g`` and, asked for, dweights."""
    rows, width = x_TK.shape
    out_TKr = x_TK.new_empty(rows, groups.slots, groups.max_rank)
    gated_TKr = torch.empty_like(out_TKr)
    dw_TK = x_TK.new_empty(rows, groups.slots, dtype=torch.float32) if with_weights else None
    if not rows:
        return out_TKr, gated_TKr, dw_TK
    t = _tile("grouped_shrink", x_TK, groups)
    w_strides = (0, 0) if weights_TK is None else weights_TK.stride()
    with torch.cuda.device_of(x_TK):
        grouped.grouped_shrink_kernel[(tiles.most, groups.slots)](
            *(x_TK, m_RK, out_TKr, gated_TKr, h_TKr, dw_TK, weights_TK, groups.scale_R),
            *(*groups.order, tiles.end_KE, groups.start_E, rows, width, groups.num_experts),
            *(*x_TK.stride(), *m_RK.stride(), *w_strides),
            *(groups.slots, groups.max_rank, groups.even, INTERPRETED),
            *(tiles.block, t.cols, t.depth, _experts_block(groups)),
            num_warps=t.warps,
            num_stages=t.stages,
        )
    return out_TKr, gated_TKr, dw_TK


def _expand(
    h_TKr: Tensor, b_OR: Tensor, base_TO: Tensor | None, dtype: torch.dtype, groups: Groups, tiles: _Tiles
) -> Tensor:
    """``base[t] + sum_j B_e h[t, j]``: one pass for each slot, each adding to what the one before has written."""
    rows, width = h_TKr.shape[0], b_OR.shape[0]
    y_TO = h_TKr.new_empty(rows, width, dtype=dtype)
    if not y_TO.numel():
        return y_TO
    t = _tile("grouped_expand", h_TKr, groups)
    strips = ceil_div(width, t.cols)
    visits = walk(tiles.most, strips)
    grid = (tiles.most * ceil_div(strips, visits),)
    with torch.cuda.device_of(h_TKr):
        for slot in range(groups.slots):
            given = base_TO if slot == 0 else y_TO
            grouped.grouped_expand_kernel[grid](
                *(h_TKr, b_OR, given, y_TO, *groups.order, tiles.end_KE, groups.start_E),
                *(rows, width, groups.num_experts, slot, visits),
                *(*b_OR.stride(), *((0, 0) if given is None else given.stride())),
                *(groups.slots, groups.max_rank, groups.even, slot == 0, INTERPRETED),
                *(tiles.block, t.cols, t.depth, _experts_block(groups)),
                num_warps=t.warps,
                num_stages=t.stages,
            )
    return y_TO


def _outer(wide_TM: Tensor, rank_TKr: Tensor, dtype: torch.dtype, groups: Groups, transposed: bool = False) -> Tensor:
    """``sum of wide[t] rank[t, j]^T`` over each expert's rows: (M, R), or its transpose, summed in float32 in order."""
    (rows, width), total_rank = wide_TM.shape, groups.scale_R.shape[0]
    shape = (total_rank, width) if transposed else (width, total_rank)
    if rows == 0 or 0 in shape:
        return wide_TM.new_zeros(shape, dtype=dtype)
    t = _tile("grouped_outer", wide_TM, groups)
    strips = ceil_div(width, t.rows)
    parts = splits(strips * groups.num_experts, ceil_div(rows, groups.num_experts * t.depth), 8)
    out = wide_TM.new_empty(parts, *shape, dtype=torch.float32 if parts > 1 else dtype)
    wide_stride, rank_stride = (out.stride(2), out.stride(1)) if transposed else (out.stride(1), out.stride(2))
    order = groups.order
    with torch.cuda.device_of(wide_TM):
        grouped.grouped_outer_kernel[(strips, groups.num_experts, parts)](
            *(wide_TM, rank_TKr, out, order.token_KT, order.end_KE, groups.start_E),
            *(rows, width, groups.num_experts, parts),
            *(*wide_TM.stride(), out.stride(0), wide_stride, rank_stride),
            *(groups.slots, groups.max_rank, groups.even, INTERPRETED, t.rows, t.cols, t.depth),
            num_warps=t.warps,
            num_stages=t.stages,
        )
    return out[0] if parts == 1 else out.sum(0).to(dtype)


def _experts_block(groups: Groups) -> int:
    return int(triton.next_power_of_2(groups.num_experts + 1))
