"""The middle of a feed-forward block of experts in Triton: gate and up LoRA, activation, weighted sum, down LoRA.

    u_j = U + (h1 M_j s1) B1^T        v_j = V + (h3 M_j s3) B3^T        h_j = act(u_j) v_j
    hbar = sum_j w_j h_j              H2 = sum_j w_j s2 M_j (h_j A2^T)  M_j[t, c] = [ids[t, j] == expert[c]]

One tile of U and V makes the u_j, v_j and h_j of all slots in registers, so that nothing of size (T, K, F) is ever in
memory; the backward kernels make them again the same way. The rank products come with every slot's own ranks already
picked and scaled, (T, K, R): as an operand from memory they cost no registers, of which these kernels have none to
spare. Where ranks are a result, each row's own are picked by comparing the experts.

``glu_kernel`` and ``glu_rows_kernel`` walk along F with a tile of tokens, ``glu_columns_kernel`` along the tokens with
a tile of columns. Sums that are cut into parts are written as parts and added in one order; there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from molora.kernels.rank.programs import dot

__all__ = ["glu_columns_kernel", "glu_kernel", "glu_rows_kernel"]


@triton.jit
def _act(x, ACT: tl.constexpr):
    """act(x), float32."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _slope(x, ACT: tl.constexpr):
    """The derivative of act at x, float32."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = s + x * s * (1.0 - s)
    elif ACT == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        y = tl.where(x > 0.0, 1.0, 0.0)
    return y


@triton.jit
def _slot(ids_ptr, w_ptr, row, live, E, stride_wt, stride_wj, j, SLOTS: tl.constexpr):
    """Slot j of the rows: whether it holds an expert, its weight (0 where it does not), and which (-1 for none)."""
    id = tl.load(ids_ptr + row * SLOTS + j, mask=live, other=-1)
    used = (id >= 0) & (id < E)
    w = tl.load(w_ptr + row * stride_wt + j * stride_wj, mask=used, other=0.0).to(tl.float32)
    return used, w, tl.where(used, id, -1).to(tl.int32)


@triton.jit
def _gated(h_ptr, row, live, j, rank, known, R, SLOTS: tl.constexpr):
    """(BM, BR): the rank product of the rows' slot j, times scale, 0 in the ranks of other experts."""
    h_ptrs = h_ptr + (row * SLOTS + j)[:, None] * R + rank[None, :]
    return tl.load(h_ptrs, mask=live[:, None] & known[None, :], other=0.0)


@triton.jit
def _add_own(acc, a, b, id, expert, UPCAST: tl.constexpr):
    """acc + a b in the ranks of each row's own expert."""
    part = dot(a, b, tl.zeros(acc.shape, tl.float32), UPCAST)
    return acc + tl.where(id[:, None] == expert[None, :], part, 0.0)


@triton.jit(do_not_specialize=["T"])
def glu_kernel(
    u_ptr,  # (T, F)
    v_ptr,  # (T, F)
    h1_ptr,  # (T, SLOTS, R) h1 M_j s1, with b1_ptr
    h3_ptr,  # (T, SLOTS, R) h3 M_j s3, with b3_ptr
    b1_ptr,  # (F, R) or None
    b3_ptr,  # (F, R) or None
    a2_ptr,  # (R, F) or None
    w_ptr,
    ids_ptr,
    expert_ptr,
    scale2_ptr,
    hbar_ptr,  # (T, F)
    h2_ptr,  # (PARTS, T, R), with a2_ptr
    T,
    F,
    R,
    E,
    stride_ut,
    stride_vt,
    stride_wt,
    stride_wj,
    slice_f,
    SLOTS: tl.constexpr,
    UNROLL: tl.constexpr,
    ACT: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
):
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    rank = tl.arange(0, BR)
    live, known = row < T, rank < R
    expert = tl.load(expert_ptr + rank, mask=known, other=-2).to(tl.int32)
    narrow: tl.constexpr = u_ptr.dtype.element_ty
    h2 = tl.zeros((BM, BR), tl.float32)
    lo = tl.program_id(1) * slice_f
    hi = tl.minimum(F, lo + slice_f)
    for f in range(lo, hi, BF):
        col = f + tl.arange(0, BF)
        inside = col < hi
        mask = live[:, None] & inside[None, :]
        u_base = tl.load(u_ptr + row[:, None] * stride_ut + col[None, :], mask=mask, other=0.0).to(tl.float32)
        v_base = tl.load(v_ptr + row[:, None] * stride_vt + col[None, :], mask=mask, other=0.0).to(tl.float32)
        b_cell = col.to(tl.int64)[:, None] * R + rank[None, :]
        b_mask = inside[:, None] & known[None, :]
        if b1_ptr is not None:
            b1 = tl.load(b1_ptr + b_cell, mask=b_mask, other=0.0)
        if b3_ptr is not None:
            b3 = tl.load(b3_ptr + b_cell, mask=b_mask, other=0.0)
        if a2_ptr is not None:
            a_cell = rank.to(tl.int64)[:, None] * F + col[None, :]
            a2 = tl.load(a2_ptr + a_cell, mask=known[:, None] & inside[None, :], other=0.0)
        hbar = tl.zeros((BM, BF), tl.float32)
        for j in tl.range(0, SLOTS, loop_unroll_factor=UNROLL):
            used, w, id = _slot(ids_ptr, w_ptr, row, live, E, stride_wt, stride_wj, j, SLOTS)
            u, v = u_base, v_base
            if b1_ptr is not None:
                u = dot(_gated(h1_ptr, row, live, j, rank, known, R, SLOTS), tl.trans(b1), u_base, UPCAST)
            if b3_ptr is not None:
                v = dot(_gated(h3_ptr, row, live, j, rank, known, R, SLOTS), tl.trans(b3), v_base, UPCAST)
            h = tl.where(used[:, None], _act(u, ACT) * v * w[:, None], 0.0)
            hbar += h
            if a2_ptr is not None:
                h2 = _add_own(h2, h.to(narrow), tl.trans(a2), id, expert, UPCAST)
        tl.store(hbar_ptr + row[:, None] * F + col[None, :], hbar.to(narrow), mask=mask)
    if a2_ptr is not None:
        scale2 = tl.load(scale2_ptr + rank, mask=known, other=0.0)
        h2_ptrs = h2_ptr + (tl.program_id(1).to(tl.int64) * T + row)[:, None] * R + rank[None, :]
        tl.store(h2_ptrs, (h2 * scale2[None, :]).to(h2_ptr.dtype.element_ty), mask=live[:, None] & known[None, :])


@triton.jit(do_not_specialize=["T"])
def glu_rows_kernel(
    u_ptr,  # (T, F)
    v_ptr,  # (T, F)
    h1_ptr,  # (T, SLOTS, R) h1 M_j s1, with b1_ptr
    h3_ptr,  # (T, SLOTS, R) h3 M_j s3, with b3_ptr
    b1_ptr,  # (F, R) or None
    b3_ptr,  # (F, R) or None
    a2_ptr,  # (R, F) or None
    w_ptr,
    ids_ptr,
    g_ptr,  # (T, F) the gradient of hbar
    d2_ptr,  # (T, SLOTS, R) the gradient of H2 times M_j s2, with a2_ptr
    expert_ptr,
    scale1_ptr,
    scale3_ptr,
    du_ptr,  # (T, F) or None
    dv_ptr,  # (T, F) or None
    dh1_ptr,  # (PARTS, T, R) or None
    dh3_ptr,  # (PARTS, T, R) or None
    dw_ptr,  # (PARTS, T, SLOTS) float32 or None
    T,
    F,
    R,
    E,
    stride_ut,
    stride_vt,
    stride_gt,
    stride_wt,
    stride_wj,
    slice_f,
    SLOTS: tl.constexpr,
    ACT: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,  # SLOTS rounded up to a power of two
):
    """What every token gets: with q_j = dhbar + (dH2 M_j s2) A2, dw_j = sum_f q_j h_j and dh_j = w_j q_j."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    rank = tl.arange(0, BR)
    slot = tl.arange(0, BS)
    live, known = row < T, rank < R
    expert = tl.load(expert_ptr + rank, mask=known, other=-2).to(tl.int32)
    narrow: tl.constexpr = u_ptr.dtype.element_ty
    dh1 = tl.zeros((BM, BR), tl.float32)
    dh3 = tl.zeros((BM, BR), tl.float32)
    dw = tl.zeros((BM, BS), tl.float32)
    lo = tl.program_id(1) * slice_f
    hi = tl.minimum(F, lo + slice_f)
    for f in range(lo, hi, BF):
        col = f + tl.arange(0, BF)
        inside = col < hi
        mask = live[:, None] & inside[None, :]
        u_base = tl.load(u_ptr + row[:, None] * stride_ut + col[None, :], mask=mask, other=0.0).to(tl.float32)
        v_base = tl.load(v_ptr + row[:, None] * stride_vt + col[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row[:, None] * stride_gt + col[None, :], mask=mask, other=0.0).to(tl.float32)
        b_cell = col.to(tl.int64)[:, None] * R + rank[None, :]
        b_mask = inside[:, None] & known[None, :]
        if b1_ptr is not None:
            b1 = tl.load(b1_ptr + b_cell, mask=b_mask, other=0.0)
        if b3_ptr is not None:
            b3 = tl.load(b3_ptr + b_cell, mask=b_mask, other=0.0)
        if a2_ptr is not None:
            a_cell = rank.to(tl.int64)[:, None] * F + col[None, :]
            a2 = tl.load(a2_ptr + a_cell, mask=known[:, None] & inside[None, :], other=0.0)
        du = tl.zeros((BM, BF), tl.float32)
        dv = tl.zeros((BM, BF), tl.float32)
        for j in tl.range(0, SLOTS, disable_licm=True):  # what is hoisted would take registers that are needed
            used, w, id = _slot(ids_ptr, w_ptr, row, live, E, stride_wt, stride_wj, j, SLOTS)
            u, v, q = u_base, v_base, g
            if b1_ptr is not None:
                u = dot(_gated(h1_ptr, row, live, j, rank, known, R, SLOTS), tl.trans(b1), u_base, UPCAST)
            if b3_ptr is not None:
                v = dot(_gated(h3_ptr, row, live, j, rank, known, R, SLOTS), tl.trans(b3), v_base, UPCAST)
            if a2_ptr is not None:
                q = dot(_gated(d2_ptr, row, live, j, rank, known, R, SLOTS), a2, g, UPCAST)
            act = _act(u, ACT)
            if dw_ptr is not None:
                share = tl.sum(tl.where(used[:, None], q * act * v, 0.0), 1)
                dw += tl.where(slot[None, :] == j, share[:, None], 0.0)
            q *= w[:, None]
            du_j = tl.where(used[:, None], q * v * _slope(u, ACT), 0.0)
            dv_j = tl.where(used[:, None], q * act, 0.0)
            du += du_j
            dv += dv_j
            if dh1_ptr is not None:
                dh1 = _add_own(dh1, du_j.to(narrow), b1, id, expert, UPCAST)
            if dh3_ptr is not None:
                dh3 = _add_own(dh3, dv_j.to(narrow), b3, id, expert, UPCAST)
        if du_ptr is not None:
            tl.store(du_ptr + row[:, None] * F + col[None, :], du.to(narrow), mask=mask)
        if dv_ptr is not None:
            tl.store(dv_ptr + row[:, None] * F + col[None, :], dv.to(narrow), mask=mask)
    cell = (part * T + row)[:, None] * R + rank[None, :]
    mask = live[:, None] & known[None, :]
    if dh1_ptr is not None:
        scale1 = tl.load(scale1_ptr + rank, mask=known, other=0.0)
        tl.store(dh1_ptr + cell, (dh1 * scale1[None, :]).to(dh1_ptr.dtype.element_ty), mask=mask)
    if dh3_ptr is not None:
        scale3 = tl.load(scale3_ptr + rank, mask=known, other=0.0)
        tl.store(dh3_ptr + cell, (dh3 * scale3[None, :]).to(dh3_ptr.dtype.element_ty), mask=mask)
    if dw_ptr is not None:
        dw_ptrs = dw_ptr + (part * T + row)[:, None] * SLOTS + slot[None, :]
        tl.store(dw_ptrs, dw, mask=live[:, None] & (slot < SLOTS)[None, :])


@triton.jit(do_not_specialize=["T"])
def glu_columns_kernel(
    u_ptr,  # (T, F)
    v_ptr,  # (T, F)
    h1_ptr,  # (T, SLOTS, R) h1 M_j s1, with b1_ptr
    h3_ptr,  # (T, SLOTS, R) h3 M_j s3, with b3_ptr
    b1_ptr,  # (F, R) or None
    b3_ptr,  # (F, R) or None
    a2_ptr,  # (R, F) or None
    w_ptr,
    ids_ptr,
    g_ptr,  # (T, F) the gradient of hbar
    d2_ptr,  # (T, SLOTS, R) the gradient of H2 times M_j s2, with a2_ptr
    db1_ptr,  # (PARTS, F, R) or None
    db3_ptr,  # (PARTS, F, R) or None
    da2_ptr,  # (PARTS, R, F) or None
    T,
    F,
    R,
    E,
    stride_ut,
    stride_vt,
    stride_gt,
    stride_wt,
    stride_wj,
    slice_t,
    SLOTS: tl.constexpr,
    ACT: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
):
    """What the parameters get. Columns are the rows of every tile here, so that no gradient has to be transposed."""
    col = tl.program_id(0) * BF + tl.arange(0, BF)
    part = tl.program_id(1).to(tl.int64)
    rank = tl.arange(0, BR)
    inside, known = col < F, rank < R
    narrow: tl.constexpr = u_ptr.dtype.element_ty
    b_cell = col.to(tl.int64)[:, None] * R + rank[None, :]
    a_cell = rank.to(tl.int64)[None, :] * F + col[:, None]
    b_mask = inside[:, None] & known[None, :]
    if b1_ptr is not None:
        b1 = tl.load(b1_ptr + b_cell, mask=b_mask, other=0.0)
    if b3_ptr is not None:
        b3 = tl.load(b3_ptr + b_cell, mask=b_mask, other=0.0)
    if a2_ptr is not None:
        a2 = tl.load(a2_ptr + a_cell, mask=b_mask, other=0.0)
    db1 = tl.zeros((BF, BR), tl.float32)
    db3 = tl.zeros((BF, BR), tl.float32)
    da2 = tl.zeros((BF, BR), tl.float32)
    lo = tl.program_id(1) * slice_t
    hi = tl.minimum(T, lo + slice_t)
    for t in range(lo, hi, BM):
        row = (t + tl.arange(0, BM)).to(tl.int64)
        live = row < hi
        mask = inside[:, None] & live[None, :]
        u_base = tl.load(u_ptr + row[None, :] * stride_ut + col[:, None], mask=mask, other=0.0).to(tl.float32)
        v_base = tl.load(v_ptr + row[None, :] * stride_vt + col[:, None], mask=mask, other=0.0).to(tl.float32)
        if db1_ptr is not None or db3_ptr is not None:
            g = tl.load(g_ptr + row[None, :] * stride_gt + col[:, None], mask=mask, other=0.0).to(tl.float32)
        for j in range(SLOTS):
            used, w, id = _slot(ids_ptr, w_ptr, row, live, E, stride_wt, stride_wj, j, SLOTS)
            u, v = u_base, v_base
            if b1_ptr is not None:
                h1_j = _gated(h1_ptr, row, live, j, rank, known, R, SLOTS)
                u = dot(b1, tl.trans(h1_j), u_base, UPCAST)
            if b3_ptr is not None:
                h3_j = _gated(h3_ptr, row, live, j, rank, known, R, SLOTS)
                v = dot(b3, tl.trans(h3_j), v_base, UPCAST)
            if a2_ptr is not None:
                d2_j = _gated(d2_ptr, row, live, j, rank, known, R, SLOTS)
            act = _act(u, ACT)
            if da2_ptr is not None:
                h = tl.where(used[None, :], act * v * w[None, :], 0.0)
                da2 = dot(h.to(narrow), d2_j, da2, UPCAST)
            if db1_ptr is not None or db3_ptr is not None:
                q = g
                if a2_ptr is not None:
                    q = dot(a2, tl.trans(d2_j), g, UPCAST)
                q *= w[None, :]
                if db1_ptr is not None:
                    du = tl.where(used[None, :], q * v * _slope(u, ACT), 0.0)
                    db1 = dot(du.to(narrow), h1_j, db1, UPCAST)
                if db3_ptr is not None:
                    dv = tl.where(used[None, :], q * act, 0.0)
                    db3 = dot(dv.to(narrow), h3_j, db3, UPCAST)
    start = part * F * R
    if db1_ptr is not None:
        tl.store(db1_ptr + start + b_cell, db1.to(db1_ptr.dtype.element_ty), mask=b_mask)
    if db3_ptr is not None:
        tl.store(db3_ptr + start + b_cell, db3.to(db3_ptr.dtype.element_ty), mask=b_mask)
    if da2_ptr is not None:
        tl.store(da2_ptr + start + a_cell, da2.to(da2_ptr.dtype.element_ty), mask=b_mask)
