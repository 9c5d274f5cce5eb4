"""From tensors to the grids of ``glu.py``: allocation, tiles by shapes alone, and the ordered sums of the parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molora.kernels.gates import Gates
from molora.kernels.glu import programs as glu
from molora.kernels.glu.eager import Glu, Grads
from molora.kernels.rank.launch import INTERPRETED, slot_gates
from molora.kernels.tiles import Tile, ceil_div, rank_block, splits, tile

__all__ = ["MAX_UNROLL", "backward", "forward"]

MAX_UNROLL = 2  # slots whose code the forward kernel repeats; a loop over more of them needs fewer registers


def forward(g: Glu) -> tuple[Tensor, Tensor]:
    """``hbar`` (T, F) and ``H2`` (T, R), or (T, 0) without A2, both in the dtype of U."""
    g = _ready(g)
    (T, F), R = g.U.shape, g.expert.shape[0]
    hbar_TF = g.U.new_empty(T, F)
    if not hbar_TF.numel():
        return hbar_TF, g.U.new_zeros(T, 0 if g.A2 is None else R)
    t, block = _tile("glu", g)
    parts, slice_f = _cut(F, t.cols, ceil_div(T, t.rows))
    h2 = None if g.A2 is None else _parts(g.U, g.U.dtype, parts, T, R)
    unroll = g.ids.shape[1] if g.ids.shape[1] <= MAX_UNROLL and g.U.element_size() == 2 else 1
    with torch.cuda.device_of(g.U):
        glu.glu_kernel[(ceil_div(T, t.rows), parts)](
            *(*_operands(g), g.expert, g.scale2, hbar_TF, h2, T, F, R, g.num_experts),
            *(g.U.stride(0), g.V.stride(0), *g.weights.stride(), slice_f),
            *(g.ids.shape[1], unroll, g.act, INTERPRETED, t.rows, t.cols, block),
            num_warps=t.warps,
            num_stages=t.stages,
        )
    return hbar_TF, g.U.new_empty(T, 0) if h2 is None else _total(h2, g.U.dtype)


def backward(g: Glu, dhbar_TF: Tensor, dH2_TR: Tensor, needs: list[bool]) -> Grads:
    """The gradients that ``needs`` asks for, in the order and the dtypes of the operands."""
    wanted = [n and x is not None for x, n in zip(g[:8], needs, strict=True)]
    dtypes = [None if x is None else x.dtype for x in g[:8]]
    if not g.U.numel():
        zeros = (torch.zeros_like(x) if x is not None and n else None for x, n in zip(g[:8], wanted, strict=True))
        return Grads(*zeros)
    g = _ready(g)
    dhbar_TF = _rows(dhbar_TF)
    first = (*_operands(g), dhbar_TF, None if g.A2 is None else _gated(dH2_TR, g, g.scale2))
    strides = (g.U.stride(0), g.V.stride(0), dhbar_TF.stride(0), *g.weights.stride())
    per_token = [*wanted[:4], wanted[7]]
    *tokens, dw = _backward_rows(g, first, strides, per_token) if any(per_token) else [None] * 5
    columns = _backward_columns(g, first, strides, wanted[4:7], dtypes[4:7]) if any(wanted[4:7]) else [None] * 3
    found = [*tokens, *columns, dw]
    return Grads(*(None if d is None or k is None else _total(d, k) for d, k in zip(found, dtypes, strict=True)))


def _backward_rows(g: Glu, first: tuple[Any, ...], strides: tuple[int, ...], wanted: list[bool]) -> list[Tensor | None]:
    """Parts of dU, dV, dH1, dH3 and dweights, (PARTS, ...) each."""
    (T, F), R, K = g.U.shape, g.expert.shape[0], g.ids.shape[1]
    t, block = _tile("glu_rows", g)
    parts, slice_f = _cut(F, t.cols, ceil_div(T, t.rows))
    dU, dV = (_parts(g.U, g.U.dtype, 1, T, F) if n else None for n in wanted[:2])
    dH1, dH3 = (_parts(g.U, g.U.dtype, parts, T, R) if n else None for n in wanted[2:4])
    dw = _parts(g.U, torch.float32, parts, T, K) if wanted[4] else None
    with torch.cuda.device_of(g.U):
        glu.glu_rows_kernel[(ceil_div(T, t.rows), parts)](
            *(*first, g.expert, g.scale1, g.scale3, dU, dV, dH1, dH3, dw, T, F, R, g.num_experts),
            *(*strides, slice_f),
            *(K, g.act, INTERPRETED, t.rows, t.cols, block, 1 << max(K - 1, 0).bit_length()),
            num_warps=t.warps,
            num_stages=t.stages,
        )
    return [dU, dV, dH1, dH3, dw]


def _backward_columns(
    g: Glu, first: tuple[Any, ...], strides: tuple[int, ...], wanted: list[bool], dtypes: list[Any]
) -> list[Tensor | None]:
    """Parts of dB1, dB3 and dA2, (PARTS, ...) each."""
    (T, F), R = g.U.shape, g.expert.shape[0]
    t, block = _tile("glu_columns", g)
    parts, slice_t = _cut(T, t.rows, ceil_div(F, t.cols))
    shapes = (F, R), (F, R), (R, F)
    out = [_parts(g.U, k, parts, *s) if n else None for n, k, s in zip(wanted, dtypes, shapes, strict=True)]
    with torch.cuda.device_of(g.U):
        glu.glu_columns_kernel[(ceil_div(F, t.cols), parts)](
            *(*first, *out, T, F, R, g.num_experts),
            *(*strides, slice_t),
            *(g.ids.shape[1], g.act, INTERPRETED, t.rows, t.cols, block),
            num_warps=t.warps,
            num_stages=t.stages,
        )
    return out


def _ready(g: Glu) -> Glu:
    """The operands as the kernels read them: rows of neighbours in memory, parameters whole and in the dtype of U."""
    whole = {n: getattr(g, n).contiguous() for n in ("ids", "expert", "scale1", "scale3", "scale2")}
    B1, B3, A2 = (None if x is None else x.to(g.U.dtype).contiguous() for x in g[4:7])
    return g._replace(U=_rows(g.U), V=_rows(g.V), B1=B1, B3=B3, A2=A2, **whole)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(kernel: str, g: Glu) -> tuple[Tile, int]:
    R = max(1, g.expert.shape[0])
    block = rank_block(R)
    assert block >= R, "mix_glu refuses more ranks than one program holds"
    return tile(kernel, g.U.shape[0], R, g.U.element_size()), block


def _cut(length: int, step: int, tiles: int) -> tuple[int, int]:
    """Number and length of the parts of a sum, so that there are programs enough for the GPU."""
    steps = ceil_div(length, step)
    size = ceil_div(steps, splits(tiles, steps, steps)) * step
    return ceil_div(length, size), size


def _parts(like: Tensor, dtype: torch.dtype, parts: int, *shape: int) -> Tensor:
    return like.new_empty(parts, *shape, dtype=dtype if parts == 1 else torch.float32)


def _total(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts added in their order."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


def _operands(g: Glu) -> tuple[Tensor | None, ...]:
    """What all three kernels begin with; every slot's own ranks of H1 and H3 are picked and scaled before."""
    H1, H3 = (None if h is None else _gated(h, g, s) for h, s in ((g.H1, g.scale1), (g.H3, g.scale3)))
    return g.U, g.V, H1, H3, *g[4:7], g.weights, g.ids


def _gated(h_TR: Tensor, g: Glu, scale_R: Tensor) -> Tensor:
    """(T, K, R): the rank product in the ranks of each slot's expert, times scale; 0 elsewhere."""
    gated_TKR = slot_gates(h_TR.contiguous(), None, Gates(None, g.ids, g.expert, scale_R))[1]
    assert gated_TKR is not None
    return gated_TKR
