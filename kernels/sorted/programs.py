"""Grouped products in Triton: each row meets the ranks of one expert, for total ranks too large to multiply by zeros.

    h[t, j] = A_e x[t]        y[t] = base[t] + sum_j g[t, j] B_e h[t, j]        e = ids[t, j]

``grouped_shrink`` is the product over a wide dimension with the gate behind it (forward A x, backward B^T dy),
``grouped_expand`` the product back to one (forward B h, backward A^T dh), ``grouped_outer`` the gradients of A and B.
Rows are taken in the order of :mod:`molora.kernels.sorted.order`. A slot holds each token once, so expanding one slot
after the other needs no atomics: no two programs of a pass write the same row, and every pass adds to what the last
left.

Tensors in rank space are (T, SLOTS, RANK), RANK the largest rank of an expert; ranks that an expert lacks hold 0.
With EVEN all experts have RANK ranks, and where they start is known when the kernel is compiled, which is what lets
loads of neighbouring ranks be wide. The ``gather`` kernels serve a few tokens: no order, no tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from molora.kernels.rank.programs import dot

__all__ = ["gather_expand_kernel", "gather_shrink_kernel", "grouped_expand_kernel", "grouped_outer_kernel"]
__all__ += ["grouped_shrink_kernel"]


@triton.jit
def _tile(tile_ptr, end_ptr, slot, p, E, BM: tl.constexpr, BE: tl.constexpr):
    """The expert of tile p (above E: none, the tile is surplus), its first place in the order, and its group's end."""
    at = slot * (E + 1)
    lane = tl.arange(0, BE)
    tiles = tl.load(tile_ptr + at + lane, mask=lane <= E, other=2147483647)
    e = tl.sum((tiles <= p).to(tl.int32), 0)
    before = (e > 0) & (e <= E)
    first = tl.load(tile_ptr + at + e - 1, mask=before, other=0)
    lo = tl.load(end_ptr + at + e - 1, mask=before, other=0)
    hi = tl.load(end_ptr + at + e, mask=e <= E, other=0)
    return e, lo + (p - first) * BM, hi


@triton.jit
def _ranks(start_ptr, e, E, RANK: tl.constexpr, EVEN: tl.constexpr):
    """Where the ranks of an expert start, and how many there are; expert E has none."""
    if EVEN:
        start = e * RANK
        rank = RANK
    else:
        start = tl.load(start_ptr + e, mask=e < E, other=0).to(tl.int32)
        rank = tl.load(start_ptr + e + 1, mask=e < E, other=0).to(tl.int32) - start
    return start, rank


@triton.jit
def _tokens(token_ptr, slot, T, place, live):
    """The rows of x and y that stand at these places of the order."""
    token = place.to(tl.int64)
    if token_ptr is not None:
        token = tl.load(token_ptr + (tl.zeros_like(token) + slot) * T + token, mask=live, other=0).to(tl.int64)
    return token


@triton.jit(do_not_specialize=["T"])
def grouped_shrink_kernel(
    x_ptr,  # (T, K)
    m_ptr,  # (R, K)
    out_ptr,  # (T, SLOTS, RANK): h forward, the gradient of h backward
    gated_ptr,  # (T, SLOTS, RANK): h * g
    h_ptr,  # backward: (T, SLOTS, RANK) the forward's h; else None
    dw_ptr,  # backward: (T, SLOTS) float32, or None
    w_ptr,  # (T, SLOTS), or None for 1
    scale_ptr,  # (R,) float32
    token_ptr,  # (SLOTS, T) int32, or None where rows lie in order
    end_ptr,  # (SLOTS, E + 1) int32
    tile_ptr,  # (SLOTS, E + 1) int32
    start_ptr,  # (E + 1,)
    T,
    K,
    E,
    stride_xt,
    stride_xk,
    stride_mr,
    stride_mk,
    stride_wt,
    stride_ws,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
):
    """Grid over tiles and slots. Every element is written: with 0 for an empty slot, whatever its weight is."""
    slot = tl.program_id(1)
    e, place, hi = _tile(tile_ptr, end_ptr, slot, tl.program_id(0), E, BM, BE)
    if e > E:
        return
    start, rank = _ranks(start_ptr, e, E, RANK, EVEN)
    place = place + tl.arange(0, BM)
    live = place < hi
    token = _tokens(token_ptr, slot, T, place, live)
    c = tl.arange(0, BR)
    has = c < rank
    depth = tl.arange(0, BK)
    x_ptrs = x_ptr + token[:, None] * stride_xt + depth[None, :] * stride_xk
    m_ptrs = m_ptr + depth[:, None].to(tl.int64) * stride_mk + (start + c)[None, :].to(tl.int64) * stride_mr
    acc = tl.zeros((BM, BR), tl.float32)
    taken = e < E
    for k in range(0, tl.where(taken, K, 0), BK):
        inside = k + depth < K
        x = tl.load(x_ptrs, mask=live[:, None] & inside[None, :], other=0.0)
        m = tl.load(m_ptrs, mask=inside[:, None] & has[None, :], other=0.0)
        acc = dot(x, m, acc, UPCAST)
        x_ptrs += BK * stride_xk
        m_ptrs += BK * stride_mk
    scale = tl.load(scale_ptr + start + c, mask=has & taken, other=0.0)
    if w_ptr is None:
        g = tl.where(live, 1.0, 0.0)[:, None] * scale[None, :]
    else:
        w = tl.load(w_ptr + token * stride_wt + slot * stride_ws, mask=live & taken, other=0.0).to(tl.float32)
        g = w[:, None] * scale[None, :]
    row = token * SLOTS + slot
    cell = row[:, None] * RANK + c[None, :]
    mask = live[:, None] & (c < RANK)[None, :]
    if h_ptr is None:
        tl.store(out_ptr + cell, acc.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(gated_ptr + cell, (acc * g).to(gated_ptr.dtype.element_ty), mask=mask)
    else:
        h = tl.load(h_ptr + cell, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + cell, (acc * g).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(gated_ptr + cell, (h * g).to(gated_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            tl.store(dw_ptr + row, tl.sum(acc * h * scale[None, :], 1), mask=live)


@triton.jit(do_not_specialize=["T", "slot", "walk"])
def grouped_expand_kernel(
    h_ptr,  # (T, SLOTS, RANK)
    b_ptr,  # (O, R)
    base_ptr,  # (T, O) or None; y itself after the first pass
    y_ptr,  # (T, O) contiguous
    token_ptr,
    end_ptr,
    tile_ptr,
    start_ptr,
    T,
    width,
    E,
    slot,
    walk,  # strips of columns that one program visits
    stride_bo,
    stride_br,
    stride_at,
    stride_ao,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """The pass of one slot; the first writes every row of y. Grid over tiles x walks along a row, walks first."""
    walks = tl.cdiv(tl.cdiv(width, BN), walk)
    e, place, hi = _tile(tile_ptr, end_ptr, slot, tl.program_id(0) // walks, E, BM, BE)
    last = E if FIRST else E - 1
    if e > last:
        return
    start, rank = _ranks(start_ptr, e, E, RANK, EVEN)
    place = place + tl.arange(0, BM)
    live = place < hi
    token = _tokens(token_ptr, slot, T, place, live)
    c = tl.arange(0, BR)
    h_ptrs = h_ptr + (token * SLOTS + slot)[:, None] * RANK + c[None, :]
    if RANK <= BR:
        h = tl.load(h_ptrs, mask=live[:, None] & (c < RANK)[None, :], other=0.0)
    first = (tl.program_id(0) % walks) * walk
    for i in range(walk):
        col = (first + i) * BN + tl.arange(0, BN)
        inside = col < width
        b_ptrs = b_ptr + (start + c)[:, None].to(tl.int64) * stride_br + col[None, :].to(tl.int64) * stride_bo
        acc = tl.zeros((BM, BN), tl.float32)
        for block in range(0, RANK, BR):
            if RANK > BR:
                h = tl.load(h_ptrs + block, mask=live[:, None] & (block + c < RANK)[None, :], other=0.0)
            has = (block + c < rank) & (e < E)
            b = tl.load(b_ptrs + block * stride_br, mask=has[:, None] & inside[None, :], other=0.0)
            acc = dot(h, b, acc, UPCAST)
        mask = live[:, None] & inside[None, :]
        if base_ptr is not None:
            base_ptrs = base_ptr + token[:, None] * stride_at + col[None, :].to(tl.int64) * stride_ao
            acc += tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + token[:, None] * width + col[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "parts"])
def grouped_outer_kernel(
    wide_ptr,  # (T, M)
    rank_ptr,  # (T, SLOTS, RANK)
    out_ptr,  # (parts, M, R) by strides: parts of the sum over an expert's rows of wide^T rank
    token_ptr,
    end_ptr,
    start_ptr,
    T,
    M,
    E,
    parts,
    stride_wt,
    stride_wm,
    stride_os,
    stride_om,
    stride_or,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """Grid over tiles of M, experts and parts; a part takes its share of each slot's rows. No rows: zeros."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    e = tl.program_id(1)
    part = tl.program_id(2)
    c = tl.arange(0, BR)
    acc = tl.zeros((BM, BR), tl.float32)
    for slot in range(SLOTS):
        at = slot * (E + 1) + e
        lo = tl.load(end_ptr + at - 1, mask=e > 0, other=0)
        hi = tl.load(end_ptr + at)
        share = tl.cdiv(tl.cdiv(hi - lo, BT), parts) * BT
        lo += part * share
        hi = tl.minimum(hi, lo + share)
        for first in range(lo, hi, BT):
            place = first + tl.arange(0, BT)
            live = place < hi
            token = _tokens(token_ptr, slot, T, place, live)
            wide_ptrs = wide_ptr + m[:, None].to(tl.int64) * stride_wm + token[None, :] * stride_wt
            rank_ptrs = rank_ptr + (token * SLOTS + slot)[:, None] * RANK + c[None, :]
            wide = tl.load(wide_ptrs, mask=(m < M)[:, None] & live[None, :], other=0.0)
            small = tl.load(rank_ptrs, mask=live[:, None] & (c < RANK)[None, :], other=0.0)
            acc = dot(wide, small, acc, UPCAST)
    start, rank = _ranks(start_ptr, e, E, RANK, EVEN)
    cell = m[:, None].to(tl.int64) * stride_om + (start + c)[None, :].to(tl.int64) * stride_or
    out_ptrs = out_ptr + part.to(tl.int64) * stride_os + cell
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < rank)[None, :])


@triton.jit
def gather_shrink_kernel(
    x_ptr,  # (T, K)
    a_ptr,  # (R, K)
    h_ptr,  # (T, SLOTS, RANK) float32
    ids_ptr,  # (T, SLOTS)
    start_ptr,
    K,
    E,
    stride_xt,
    stride_xk,
    stride_ar,
    stride_ak,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid over pairs of token and slot, and blocks of ranks. What belongs to an empty slot is left unwritten."""
    pair = tl.program_id(0).to(tl.int64)
    id = tl.load(ids_ptr + pair)
    if (id < 0) | (id >= E):
        return
    start, rank = _ranks(start_ptr, id.to(tl.int32), E, RANK, EVEN)
    c = tl.program_id(1) * BR + tl.arange(0, BR)
    depth = tl.arange(0, BK)
    x_ptrs = x_ptr + (pair // SLOTS) * stride_xt + depth.to(tl.int64) * stride_xk
    a_ptrs = a_ptr + (start + c)[:, None].to(tl.int64) * stride_ar + depth[None, :].to(tl.int64) * stride_ak
    acc = tl.zeros((BR, BK), tl.float32)
    for k in range(0, K, BK):
        inside = k + depth < K
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_ptrs, mask=(c < rank)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc += a * x[None, :]
        x_ptrs += BK * stride_xk
        a_ptrs += BK * stride_ak
    tl.store(h_ptr + pair * RANK + c, tl.sum(acc, 1), mask=c < RANK)


@triton.jit
def gather_expand_kernel(
    h_ptr,  # (T, SLOTS, RANK) float32
    b_ptr,  # (O, R)
    base_ptr,  # (T, O)
    y_ptr,  # (T, O) contiguous
    w_ptr,  # (T, SLOTS)
    ids_ptr,  # (T, SLOTS)
    scale_ptr,  # (R,) float32
    start_ptr,
    width,
    E,
    stride_bo,
    stride_br,
    stride_at,
    stride_ao,
    stride_wt,
    stride_ws,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Grid over tokens and strips of columns; the slots are added in their order and rounded once."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = col < width
    acc = tl.load(base_ptr + token * stride_at + col.to(tl.int64) * stride_ao, mask=inside, other=0.0).to(tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        id = tl.load(ids_ptr + pair)
        if (id >= 0) & (id < E):
            start, rank = _ranks(start_ptr, id.to(tl.int32), E, RANK, EVEN)
            w = tl.load(w_ptr + token * stride_wt + slot * stride_ws).to(tl.float32)
            for first in range(0, RANK, BR):
                c = first + tl.arange(0, BR)
                has = c < rank
                scale = tl.load(scale_ptr + start + c, mask=has, other=0.0)
                h = tl.load(h_ptr + pair * RANK + c, mask=has, other=0.0)
                b_ptrs = b_ptr + col[:, None].to(tl.int64) * stride_bo + (start + c)[None, :].to(tl.int64) * stride_br
                b = tl.load(b_ptrs, mask=inside[:, None] & has[None, :], other=0.0).to(tl.float32)
                acc += w * tl.sum(b * (h * scale)[None, :], 1)
    tl.store(y_ptr + token * width + col, acc.to(y_ptr.dtype.element_ty), mask=inside)
