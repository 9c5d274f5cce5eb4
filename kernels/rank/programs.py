"""Rank-concat in Triton: every expert's ranks side by side, so a mixture is two narrow products and a gate.

    h = x A^T        hg = h * g        y = base + hg B^T        g[t, c] = scale[c] * weight[t, expert(c)]

``contract`` is the product over a wide dimension (forward x A^T, backward dy B), ``expand`` the product back to one
(forward hg B^T, backward dh A), ``outer`` the gradients of A and B, and the gate sits between them in rank space.
So is its own gradient, ``dg[t, c] = (dy B)[t, c] h[t, c]``: exact where a gate is 0, with nothing of y's size saved.

No atomics: where a sum is split over programs, each writes its part and the parts are added in one order. Grids
depend on shapes alone, so nothing waits for the device and a captured graph stays right when the routing changes.
The first row of a tile is widened to 64 bits before it meets a stride, (T, O) passes 2^31 elements at 150,000 tokens;
within a tile 32 bits do, and a tile of 64-bit offsets would fill the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "contract_kernel",
    "dot",
    "expand_kernel",
    "gate_kernel",
    "gate_tile",
    "outer_kernel",
    "slot_gate_kernel",
    "weight_grad_kernel",
]


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def gate_tile(w_ptr, ids_ptr, row, live, expert, scale, stride_wt, stride_we, SLOTS: tl.constexpr, FORM: tl.constexpr):
    """(BM, BR) float32: the factor of each rank in each row."""
    if FORM == 0:
        g = tl.where(live[:, None], 1.0, 0.0) * tl.where(expert[None, :] >= 0, 1.0, 0.0)
    elif FORM == 1:
        g = tl.where(live[:, None], 0.0, 0.0) * tl.where(expert[None, :] >= 0, 0.0, 0.0)
        for j in range(SLOTS):
            id = tl.load(ids_ptr + row * SLOTS + j, mask=live, other=-1)
            w = tl.load(w_ptr + row * stride_wt + j * stride_we, mask=live, other=0.0).to(tl.float32)
            g += tl.where(id[:, None] == expert[None, :], w[:, None], 0.0)
    else:
        offset = row[:, None] * stride_wt + expert[None, :] * stride_we
        g = tl.load(w_ptr + offset, mask=live[:, None] & (expert[None, :] >= 0), other=0.0).to(tl.float32)
    return g * scale[None, :]


@triton.jit
def _weight_grads(dw_ptr, ids_ptr, row, live, share, expert, SLOTS: tl.constexpr, FORM: tl.constexpr):
    """Write dw[t, j] = sum over the ranks of slot j's expert (of expert j, when dense) of ``share`` (BM, BR)."""
    for j in range(SLOTS):
        if FORM == 1:
            id = tl.load(ids_ptr + row * SLOTS + j, mask=live, other=-1)
            mine = id[:, None] == expert[None, :]
        else:
            mine = tl.where(live[:, None], j, -1) == expert[None, :]
        tl.store(dw_ptr + row * SLOTS + j, tl.sum(tl.where(mine, share, 0.0), 1), mask=live)


@triton.jit(do_not_specialize=["N"])
def contract_kernel(
    x_ptr,  # (N, K)
    m_ptr,  # (R, K)
    out_ptr,  # MODE 0: (SPLIT, N, R) parts of x m^T; 1: (N, R) h; 2: (N, R) dh
    gated_ptr,  # MODE 1, 2: (N, R) h * g
    h_ptr,  # MODE 2: (N, R) the forward's h
    dw_ptr,  # MODE 2: (N, SLOTS) float32 or None
    w_ptr,
    ids_ptr,
    expert_ptr,
    scale_ptr,
    stride_wt,
    stride_we,
    N,
    R,
    K,
    stride_xn,
    stride_xk,
    stride_mr,
    stride_mk,
    slice_k,
    SLOTS: tl.constexpr,
    FORM: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    col = tl.program_id(1) * BR + tl.arange(0, BR)
    split = tl.program_id(2).to(tl.int64)
    live, known = row < N - first, col < R
    depth = tl.arange(0, BK)
    lo = tl.program_id(2) * slice_k
    hi = tl.minimum(K, lo + slice_k)
    x_ptrs = x_ptr + first * stride_xn + row[:, None] * stride_xn + (lo + depth)[None, :] * stride_xk
    m_ptrs = m_ptr + (lo + depth)[:, None].to(tl.int64) * stride_mk + col[None, :].to(tl.int64) * stride_mr
    acc = tl.zeros((BM, BR), tl.float32)
    for k in range(lo, hi, BK):
        inside = k + depth < hi
        x = tl.load(x_ptrs, mask=live[:, None] & inside[None, :], other=0.0)
        m = tl.load(m_ptrs, mask=inside[:, None] & known[None, :], other=0.0)
        acc = dot(x, m, acc, UPCAST)
        x_ptrs += BK * stride_xk
        m_ptrs += BK * stride_mk
    cell = row[:, None] * R + col[None, :]
    mask = live[:, None] & known[None, :]
    if MODE == 0:
        tl.store(out_ptr + (split * N + first) * R + cell, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        expert = tl.load(expert_ptr + col, mask=known, other=-2)
        scale = tl.load(scale_ptr + col, mask=known, other=0.0)
        if FORM != 0:
            w_ptr += first * stride_wt
        if FORM == 1:
            ids_ptr += first * SLOTS
        out_ptr += first * R
        gated_ptr += first * R
        g = gate_tile(w_ptr, ids_ptr, row, live, expert, scale, stride_wt, stride_we, SLOTS, FORM)
        if MODE == 1:
            tl.store(out_ptr + cell, acc.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(gated_ptr + cell, (acc * g).to(gated_ptr.dtype.element_ty), mask=mask)
        else:
            h = tl.load(h_ptr + first * R + cell, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + cell, (acc * g).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(gated_ptr + cell, (h * g).to(gated_ptr.dtype.element_ty), mask=mask)
            if dw_ptr is not None:
                _weight_grads(dw_ptr + first * SLOTS, ids_ptr, row, live, acc * h * scale[None, :], expert, SLOTS, FORM)


@triton.jit(do_not_specialize=["N"])
def gate_kernel(
    p_ptr,  # (SPLIT, N, R) parts by strides: of h forward, of the gradient of hg backward
    out_ptr,  # (N, R): h forward, dh backward
    gated_ptr,  # (N, R): h * g
    h_ptr,  # backward: (N, R)
    w_ptr,
    ids_ptr,
    expert_ptr,
    scale_ptr,
    stride_wt,
    stride_we,
    N,
    R,
    SPLIT,
    stride_ps,
    stride_pn,
    SLOTS: tl.constexpr,
    FORM: tl.constexpr,
    BACKWARD: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """The epilogue of ``contract`` on its own, where its sum was split. Grid over rows and ranks."""
    first = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    col = tl.program_id(1) * BR + tl.arange(0, BR)
    live, known = row < N - first, col < R
    expert = tl.load(expert_ptr + col, mask=known, other=-2)
    scale = tl.load(scale_ptr + col, mask=known, other=0.0)
    mask = live[:, None] & known[None, :]
    cell = row[:, None] * R + col[None, :]
    p_ptrs = p_ptr + first * stride_pn + row[:, None] * stride_pn + col[None, :]
    total = tl.zeros((BM, BR), tl.float32)
    for _ in range(SPLIT):
        total += tl.load(p_ptrs, mask=mask, other=0.0)
        p_ptrs += stride_ps
    if FORM != 0:
        w_ptr += first * stride_wt
    if FORM == 1:
        ids_ptr += first * SLOTS
    out_ptr += first * R
    gated_ptr += first * R
    g = gate_tile(w_ptr, ids_ptr, row, live, expert, scale, stride_wt, stride_we, SLOTS, FORM)
    if BACKWARD:
        h = tl.load(h_ptr + first * R + cell, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + cell, (total * g).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(gated_ptr + cell, (h * g).to(gated_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + cell, total.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(gated_ptr + cell, (total * g).to(gated_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def weight_grad_kernel(
    p_ptr,  # (SPLIT, N, R) float32 parts of dhg
    h_ptr,  # (N, R)
    dw_ptr,  # (N, SLOTS) float32
    ids_ptr,
    expert_ptr,
    scale_ptr,
    N,
    R,
    SPLIT,
    stride_ps,
    SLOTS: tl.constexpr,
    FORM: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """dw where the ranks of a row do not fit one program: a loop over their blocks. Grid over rows and slots."""
    first = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    slot = tl.program_id(1)
    live = row < N - first
    if FORM == 1:
        id = tl.load(ids_ptr + first * SLOTS + row * SLOTS + slot, mask=live, other=-1)
    else:
        id = tl.where(live, slot, -1)
    dw = tl.zeros((BM,), tl.float32)
    for c in range(0, R, BR):
        col = c + tl.arange(0, BR)
        known = col < R
        expert = tl.load(expert_ptr + col, mask=known, other=-2)
        scale = tl.load(scale_ptr + col, mask=known, other=0.0)
        mask = (live[:, None] & known[None, :]) & (id[:, None] == expert[None, :])
        cell = row[:, None] * R + col[None, :]
        p_ptrs = p_ptr + first * R + cell
        total = tl.zeros((BM, BR), tl.float32)
        for _ in range(SPLIT):
            total += tl.load(p_ptrs, mask=mask, other=0.0)
            p_ptrs += stride_ps
        h = tl.load(h_ptr + first * R + cell, mask=mask, other=0.0).to(tl.float32)
        dw += tl.sum(total * h * scale[None, :], 1)
    tl.store(dw_ptr + first * SLOTS + row * SLOTS + slot, dw, mask=live)


@triton.jit(do_not_specialize=["T"])
def slot_gate_kernel(
    token_ptr,  # (T, R) or None
    slot_ptr,  # (T, K, R) or None
    token_out_ptr,  # (T, R) = sum_j slot[t, j] * g[t, j], when there is a slot tensor
    slot_out_ptr,  # (T, K, R) = token[t] * g[t, j], when there is a token tensor
    dw_ptr,  # (T, K) float32 = sum_c token * slot * scale over the slot's ranks, or None
    w_ptr,
    ids_ptr,
    expert_ptr,
    scale_ptr,
    stride_wt,
    stride_we,
    T,
    R,
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """The gate between tokens and slots; without weights each slot counts 1. A program holds all ranks of its rows."""
    first = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    col = tl.arange(0, BR)
    live, known = row < T - first, col < R
    expert = tl.load(expert_ptr + col, mask=known, other=-2)
    scale = tl.load(scale_ptr + col, mask=known, other=0.0)
    mask = live[:, None] & known[None, :]
    cell = row[:, None] * R + col[None, :]
    ids_ptr += first * SLOTS
    if token_ptr is not None:
        token = tl.load(token_ptr + first * R + cell, mask=mask, other=0.0).to(tl.float32)
    if slot_ptr is not None:
        total = tl.zeros((BM, BR), tl.float32)
    for j in range(SLOTS):
        id = tl.load(ids_ptr + row * SLOTS + j, mask=live, other=-1)
        pick = tl.where(id[:, None] == expert[None, :], scale[None, :], 0.0)
        g = pick
        if w_ptr is not None:
            g = (
                pick
                * tl.load(w_ptr + first * stride_wt + row * stride_wt + j * stride_we, mask=live, other=0.0).to(
                    tl.float32
                )[:, None]
            )
            g = tl.where(pick == 0.0, 0.0, g)  # an empty slot's weight counts nothing, whatever it is
        place = first * SLOTS * R + (row[:, None] * SLOTS + j) * R + col[None, :]
        if token_ptr is not None:
            tl.store(slot_out_ptr + place, (token * g).to(slot_out_ptr.dtype.element_ty), mask=mask)
        if slot_ptr is not None:
            slot = tl.load(slot_ptr + place, mask=mask, other=0.0).to(tl.float32)
            total += slot * g
            if dw_ptr is not None:
                tl.store(dw_ptr + first * SLOTS + row * SLOTS + j, tl.sum(token * slot * pick, 1), mask=live)
    if slot_ptr is not None:
        tl.store(token_out_ptr + first * R + cell, total.to(token_out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def expand_kernel(
    h_ptr,  # (N, R) contiguous
    b_ptr,  # (O, R)
    base_ptr,  # (N // SHARE, O) or None
    y_ptr,  # (N, O) contiguous
    N,
    R,
    width,
    stride_bo,
    stride_br,
    stride_an,
    stride_ao,
    walk,  # row tiles of one program
    SHARE: tl.constexpr,
    UPCAST: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """A strip of columns: its tile of b stays while the program walks down the rows, so b costs next to nothing."""
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    rank = tl.arange(0, BR)
    inside = col < width
    b_ptrs = b_ptr + rank[:, None].to(tl.int64) * stride_br + col[None, :].to(tl.int64) * stride_bo
    if ONE_BLOCK:
        b = tl.load(b_ptrs, mask=(rank < R)[:, None] & inside[None, :], other=0.0)
    row = tl.arange(0, BM)
    for i in range(walk):
        first = (tl.program_id(1).to(tl.int64) * walk + i) * BM
        live = row < N - first
        mask = live[:, None] & inside[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        if ONE_BLOCK:
            h = tl.load(
                h_ptr + first * R + row[:, None] * R + rank[None, :],
                mask=live[:, None] & (rank < R)[None, :],
                other=0.0,
            )
            acc = dot(h, b, acc, UPCAST)
        else:
            for c in range(0, R, BR):
                known = c + rank < R
                h_ptrs = h_ptr + first * R + row[:, None] * R + c + rank[None, :]
                h = tl.load(h_ptrs, mask=live[:, None] & known[None, :], other=0.0)
                b = tl.load(b_ptrs + c * stride_br, mask=known[:, None] & inside[None, :], other=0.0)
                acc = dot(h, b, acc, UPCAST)
        if base_ptr is not None:
            near = ((first % SHARE + row) // SHARE).to(tl.int32)
            base_ptrs = base_ptr + first // SHARE * stride_an + near[:, None] * stride_an + col[None, :] * stride_ao
            acc += tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + first * width + row[:, None] * width + col[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def outer_kernel(
    wide_ptr,  # (T, M)
    rank_ptr,  # (T, R)
    out_ptr,  # (SPLIT, M, R) by strides: parts of wide^T rank
    T,
    M,
    R,
    stride_wt,
    stride_wm,
    stride_rt,
    stride_rr,
    stride_os,
    stride_om,
    stride_or,
    slice_t,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    first = tl.program_id(2).to(tl.int64) * slice_t
    t = tl.arange(0, BT)
    wide_ptrs = wide_ptr + first * stride_wt + m[:, None] * stride_wm + t[None, :] * stride_wt
    rank_ptrs = rank_ptr + first * stride_rt + t[:, None] * stride_rt + r[None, :] * stride_rr
    rows = tl.minimum(T - first, slice_t).to(tl.int32)
    acc = tl.zeros((BM, BR), tl.float32)
    for t0 in range(0, rows, BT):
        live = t0 + t < rows
        wide = tl.load(wide_ptrs, mask=(m < M)[:, None] & live[None, :], other=0.0)
        rank = tl.load(rank_ptrs, mask=live[:, None] & (r < R)[None, :], other=0.0)
        acc = dot(wide, rank, acc, UPCAST)
        wide_ptrs += BT * stride_wt
        rank_ptrs += BT * stride_rt
    cell = m[:, None].to(tl.int64) * stride_om + r[None, :].to(tl.int64) * stride_or
    out_ptrs = out_ptr + tl.program_id(2).to(tl.int64) * stride_os + cell
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])
