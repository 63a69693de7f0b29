"""What is done head by head with a cell of stored pairs: scores in, softmax times V out, and the gradients' products.

The cell is that of mix.py: rows m0 .. m1 - 1 and KEYS keys from n0 on, pair (i, j) of batch b and head h at
S[b, h, i - m0, j - n0], pitch W, room for C rows; KEYS and W are multiples of 16, so that 16 bytes are moved at a time.
Only tiles that hold a visible pair are touched; what else stands in the scratch is finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import HIDDEN, LN2, LOG2E, load_columns, load_lse, load_rows, saw, store_rows


@triton.jit
def stored_tile(S, bh, row, column, C, W, KEYS, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers [ROWS, COLS] into a cell, and which of them stand in it."""
    r = row + tl.arange(0, ROWS)[:, None]
    c = column + tl.arange(0, COLS)[None, :]
    return S + bh.to(tl.int64) * C * W + (r * W + c), (r < C) & (c < KEYS)


@triton.jit
def columns_seen(m, m1, n0, low, high, column, stop, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Columns from `column` to `stop` of the cell, in whole tiles, that the ROWS rows from m on may see.

    Columns, not keys: as multiples of COLS they are known to be aligned.
    """
    start = column + tl.maximum(m + low - n0 - column, 0) // COLS * COLS
    return start, tl.minimum(stop, tl.minimum(m + ROWS, m1) + high - n0)


@triton.jit(do_not_specialize=["Lk", "low", "high", "m0", "m1", "n0", "b0", "H", "GROUP"])
def store_scores(
    Q, K, DO, V, DELTA, S, X, scale, Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, H, GROUP, RUN,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l,
    D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S = scale Q K^T and, where there is X, X = dO V^T - delta; a program owns BLOCK_M rows and RUN keys."""
    tiles = tl.cdiv(m1 - m0, BLOCK_M)
    m = m0 + tl.program_id(0) % tiles * BLOCK_M
    column = tl.program_id(0) // tiles * RUN
    bh = tl.program_id(1)
    h = (bh % H).to(tl.int64)
    b = (b0 + bh // H).to(tl.int64)
    k_base = K + b * k_b + h // GROUP * k_h
    v_base = V + b * v_b + h // GROUP * v_h
    q = load_rows(Q + b * q_b + h * q_h, m, q_l, m1, BLOCK_M, HEAD_DIM, D)
    if X is not None:
        do = load_rows(DO + b * do_b + h * do_h, m, do_l, m1, BLOCK_M, VALUE_DIM, DV)
        i = m + tl.arange(0, BLOCK_M)
        delta = tl.load(DELTA + (b * H + h) * Lq + i, mask=i < m1, other=0.0)
    start, stop = columns_seen(m, m1, n0, low, high, column, tl.minimum(column + RUN, KEYS), BLOCK_M, BLOCK_N)
    for c in tl.range(start, stop, BLOCK_N):
        k = load_columns(k_base, n0 + c, k_l, Lk, BLOCK_N, HEAD_DIM, D)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        pointers, inside = stored_tile(S, bh, m - m0, c, C, W, KEYS, BLOCK_M, BLOCK_N)
        tl.store(pointers, s.to(S.dtype.element_ty), mask=inside)
        if X is not None:
            v = load_columns(v_base, n0 + c, v_l, Lk, BLOCK_N, VALUE_DIM, DV)
            x = tl.dot(do, v, input_precision=PRECISION) - delta[:, None]
            pointers, inside = stored_tile(X, bh, m - m0, c, C, W, KEYS, BLOCK_M, BLOCK_N)
            tl.store(pointers, x.to(X.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["Lk", "low", "high", "m0", "m1", "n0", "b0", "H", "GROUP", "first", "last"])
def attend_stored(
    S, V, OUT, REST, LSE, ACC, STATE, PAD, first, last, Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, H, GROUP,
    v_b, v_h, v_l, o_b, o_h, o_l, p_b,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax times V over the stored logits; a program owns BLOCK_M rows of a head.

    Between the cells of one row the sums stand in ACC [B H, C, DV] and STATE [2, B H, C]; the last one writes OUT, and
    to REST what rounding takes from it.
    """
    m = m0 + tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1)
    h = (bh % H).to(tl.int64)
    b = (b0 + bh // H).to(tl.int64)
    v_base = V + b * v_b + h // GROUP * v_h
    i = m + tl.arange(0, BLOCK_M)
    d = tl.arange(0, VALUE_DIM)[None, :]
    row = bh.to(tl.int64) * C + (i - m0)
    state = STATE + row
    sums = tl.num_programs(1).to(tl.int64) * C
    acc_pointers = ACC + row[:, None] * DV + d
    kept = (i < m1) & (first == 0)
    running_max = tl.load(state, mask=kept, other=HIDDEN)
    running_sum = tl.load(state + sums, mask=kept, other=0.0)
    acc = tl.load(acc_pointers, mask=kept[:, None] & (d < DV), other=0.0)
    end = tl.minimum(n0 + KEYS, Lk)
    start, stop = columns_seen(m, m1, n0, low, high, 0, end - n0, BLOCK_M, BLOCK_N)
    for c in tl.range(start, stop, BLOCK_N):
        n = n0 + c
        j = n + tl.arange(0, BLOCK_N)
        pointers, inside = stored_tile(S, bh, m - m0, c, C, W, KEYS, BLOCK_M, BLOCK_N)
        s = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if PAD is not None:
            keep = tl.load(PAD + b * p_b + j, mask=j < Lk, other=0)
            s = tl.where(keep[None, :] != 0, s, HIDDEN)
        if (n - m - (BLOCK_M - 1) < low) | (n - m + (BLOCK_N - 1) > high) | (n + BLOCK_N > end):
            x = j[None, :] - i[:, None]
            s = tl.where((x >= low) & (x <= high) & (j[None, :] < end), s, HIDDEN)
        new_max = tl.maximum(running_max, tl.max(s, 1) * LOG2E)
        p = tl.math.exp2(s * LOG2E - new_max[:, None])
        alpha = tl.math.exp2(running_max - new_max)
        running_sum = running_sum * alpha + tl.sum(p, 1)
        v = load_rows(v_base, n, v_l, Lk, BLOCK_N, VALUE_DIM, DV)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        running_max = new_max
    if last != 0:
        alive = saw(running_max, running_sum)
        running_sum = tl.where(alive, running_sum, 1.0)
        acc = tl.where(alive[:, None], acc / running_sum[:, None], 0.0)
        store_rows(OUT + b * o_b + h * o_h, m, o_l, m1, acc, BLOCK_M, VALUE_DIM, DV)
        if REST is not None:
            acc -= acc.to(OUT.dtype.element_ty).to(tl.float32)
            store_rows(REST + b * o_b + h * o_h, m, o_l, m1, acc, BLOCK_M, VALUE_DIM, DV)
        lse = tl.where(alive, (running_max + tl.math.log2(running_sum)) * LN2, -float("inf"))
        tl.store(LSE + (b * H + h) * Lq + i, lse, mask=i < m1)
    else:
        tl.store(state, running_max, mask=i < m1)
        tl.store(state + sums, running_sum, mask=i < m1)
        tl.store(acc_pointers, acc, mask=(i < m1)[:, None] & (d < DV))


@triton.jit(do_not_specialize=["Lq", "H"])
def row_sums(
    OUT, REST, DO, LSE, DLSE, LSE2, DELTA, Lq, H, o_b, o_h, o_l, do_b, do_h, do_l,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """LSE2 in base 2 and DELTA = rowsum(dO O) - dlse.

    REST makes O exact: a rounded O moves the gradients of all logits of a row the same way, and what these sum up to
    for a bias would show it.
    """
    m = tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1)
    h = (bh % H).to(tl.int64)
    b = (bh // H).to(tl.int64)
    i = m + tl.arange(0, BLOCK_M)
    do = load_rows(DO + b * do_b + h * do_h, m, do_l, Lq, BLOCK_M, VALUE_DIM, DV).to(tl.float32)
    out = load_rows(OUT + b * o_b + h * o_h, m, o_l, Lq, BLOCK_M, VALUE_DIM, DV).to(tl.float32)
    if REST is not None:
        out += load_rows(REST + b * o_b + h * o_h, m, o_l, Lq, BLOCK_M, VALUE_DIM, DV).to(tl.float32)
    lse, delta = load_lse(LSE, DLSE, tl.sum(do * out, 1), bh.to(tl.int64) * Lq, i, Lq)
    tl.store(LSE2 + bh.to(tl.int64) * Lq + i, lse, mask=i < Lq)
    tl.store(DELTA + bh.to(tl.int64) * Lq + i, delta, mask=i < Lq)


@triton.jit(do_not_specialize=["Lk", "low", "high", "m0", "m1", "n0", "b0", "H", "GROUP", "first"])
def stored_rows(
    DS, K, DQ, first, scale, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, H, GROUP,
    k_b, k_h, k_l, dq_b, dq_h, dq_l, dq_row,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K, added to what is there unless this is the rows' first cell; DQ's row 0 is query m0 - dq_row."""
    m = m0 + tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1)
    h = (bh % H).to(tl.int64)
    b = (b0 + bh // H).to(tl.int64)
    k_base = K + b * k_b + h // GROUP * k_h
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    start, stop = columns_seen(m, m1, n0, low, high, 0, KEYS, BLOCK_M, BLOCK_N)
    for c in tl.range(start, stop, BLOCK_N):
        pointers, inside = stored_tile(DS, bh, m - m0, c, C, W, KEYS, BLOCK_M, BLOCK_N)
        ds = tl.load(pointers, mask=inside, other=0.0)
        k = load_rows(k_base, n0 + c, k_l, Lk, BLOCK_N, HEAD_DIM, D)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    out = DQ + (bh // H).to(tl.int64) * dq_b + h * dq_h
    dq *= scale
    if first == 0:
        dq += load_rows(out, m - dq_row, dq_l, m1 - dq_row, BLOCK_M, HEAD_DIM, D).to(tl.float32)
    store_rows(out, m - dq_row, dq_l, m1 - dq_row, dq, BLOCK_M, HEAD_DIM, D)


@triton.jit(do_not_specialize=["Lk", "low", "high", "m0", "m1", "n0", "b0", "H", "GROUP", "add"])
def stored_columns(
    DS, P, Q, DO, DK, DV_OUT, add, scale, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, H, GROUP,
    q_b, q_h, q_l, do_b, do_h, do_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T dO over the queries of all heads that share the keys; added to what is there."""
    c = tl.program_id(0) * BLOCK_N
    n = n0 + c
    bk = tl.program_id(1)
    key_heads = H // GROUP
    kv = bk % key_heads
    b = (b0 + bk // key_heads).to(tl.int64)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE_DIM], tl.float32)
    # Rows that see a key of n .. n + BLOCK_N - 1: low <= j - i <= high.
    start = tl.maximum(n - high - m0, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(n0 + KEYS, Lk)
    stop = tl.minimum(m1, tl.minimum(n + BLOCK_N, end) - low) - m0
    turns = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for t in tl.range(0, turns * GROUP):
        m = m0 + start + t % turns * BLOCK_M
        h = kv * GROUP + t // turns
        bh = bk // key_heads * H + h
        h = tl.cast(h, tl.int64)
        pointers, inside = stored_tile(DS, bh, m - m0, c, C, W, KEYS, BLOCK_M, BLOCK_N)
        inside = inside & (tl.arange(0, BLOCK_M)[:, None] < m1 - m)
        ds = tl.load(pointers, mask=inside, other=0.0)
        q = load_rows(Q + b * q_b + h * q_h, m, q_l, m1, BLOCK_M, HEAD_DIM, D)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        pointers, inside = stored_tile(P, bh, m - m0, c, C, W, KEYS, BLOCK_M, BLOCK_N)
        p = tl.load(pointers, mask=inside, other=0.0)
        do = load_rows(DO + b * do_b + h * do_h, m, do_l, m1, BLOCK_M, VALUE_DIM, DV)
        dv = tl.dot(tl.trans(p), do, dv, input_precision=PRECISION)
    dk_out = DK + b * dk_b + kv.to(tl.int64) * dk_h
    dv_out = DV_OUT + b * dv_b + kv.to(tl.int64) * dv_h
    dk *= scale
    if add != 0:
        dk += load_rows(dk_out, n, dk_l, end, BLOCK_N, HEAD_DIM, D).to(tl.float32)
        dv += load_rows(dv_out, n, dv_l, end, BLOCK_N, VALUE_DIM, DV).to(tl.float32)
    store_rows(dk_out, n, dk_l, end, dk, BLOCK_N, HEAD_DIM, D)
    store_rows(dv_out, n, dv_l, end, dv, BLOCK_N, VALUE_DIM, DV)
