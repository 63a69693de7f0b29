"""Attention of few queries and many keys: the keys are split over programs, and what these found is combined.

A program owns BLOCK_M of the GROUP * Lq rows that share a key head (so K and V are read once) and one of `splits`
parts of the keys they may see. Query i of batch entry b stands at position + i, position = SEQLENS[b] - Lq, or `start`
without SEQLENS; key j, below SEQLENS[b] or Lk, at j; a pair is visible where low <= o <= high, o its offset
j - position - i, and PAD[b, j]. Lengths and positions are data: one compiled kernel and one grid serve a cache while it
grows.

K and V are [B, Hk, Lk, D], or blocks [blocks, PAGE, Hk, D] of which PAGES[b, j // PAGE] holds key j. Without K the
logits are there already: BIAS is a strip of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import DEAD, HIDDEN, LN2, LOG2E, capped, load_columns, load_rows, load_scattered, saw

# What BIAS is, fp32 (RELATIVE: any) in natural units, unit stride last; strides t_b, t_h, t_l.
NONE = tl.constexpr(0)
TABLE = tl.constexpr(1)  # [H, length], offset o at zero + o
SLOPES = tl.constexpr(2)  # [H], slope * o
DISTANCES = tl.constexpr(3)  # [H], -slope * |o|
STRIP = tl.constexpr(4)  # [B, H, Lq, length], key j at j
RELATIVE = tl.constexpr(5)  # [B, H, Lq, length], -o in it; nothing for other offsets


@triton.jit
def place(SEQLENS, b, start, Lq, Lk):
    """-> number of keys, position of the first query."""
    if SEQLENS is None:
        return Lk, start
    else:
        keys = tl.minimum(tl.load(SEQLENS + b), Lk)
        return keys, keys - Lq


@triton.jit
def visible_range(position, keys, low, high, Lq, BLOCK_N: tl.constexpr):
    """-> first key that some query sees, the same at the start of a tile, and the end."""
    first = tl.maximum(position + low, 0)
    return first, first // BLOCK_N * BLOCK_N, tl.minimum(keys, position + Lq + high)


@triton.jit
def part_of(begin, end, split, splits, BLOCK_N: tl.constexpr):
    """-> first and end of the keys of one split."""
    run = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * run
    return begin, tl.minimum(end, begin + run)


@triton.jit
def rows_of(row0, kv, GROUP, Lq, BLOCK_M: tl.constexpr, ONE: tl.constexpr):
    """-> head, query and existence of each row; ONE: of the only one there is, for all."""
    r = row0 + tl.arange(0, 1 if ONE else BLOCK_M)
    return kv * GROUP + tl.minimum(r // Lq, GROUP - 1), r % Lq, r < GROUP * Lq


@triton.jit
def inside(ok, d, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    if D != HEAD_DIM:
        return ok & (d < D)
    else:
        return ok


@triton.jit
def load_packed(
    X, x_h, x_l, row0, kv, GROUP, Lq, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr
):
    """[BLOCK_M, HEAD_DIM]: the rows that share key head kv."""
    h, i, ok = rows_of(row0, kv, GROUP, Lq, BLOCK_M, False)
    d = tl.arange(0, HEAD_DIM)[None, :]
    pointers = X + (h.to(tl.int64) * x_h + i.to(tl.int64) * x_l)[:, None] + d
    return tl.load(pointers, mask=inside(ok[:, None], d, D, HEAD_DIM), other=0.0)


@triton.jit
def page_rows(PAGES, n0, first, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """-> block and row of the keys n0 .., and which of them count; the others' table entries may be anything."""
    if PAGE == 0:
        return ()
    else:
        j = n0 + tl.arange(0, BLOCK_N)
        ok = (j >= first) & (j < end)
        if PAGE % BLOCK_N == 0:
            page = tl.load(PAGES + n0 // PAGE).to(tl.int64)
        else:
            page = tl.load(PAGES + j // PAGE, mask=ok, other=0).to(tl.int64)
        return (page, (j % PAGE).to(tl.int64), ok)


@triton.jit
def load_keys(
    K, k_b, k_l, P, n0, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[HEAD_DIM, BLOCK_N]; P of `page_rows` where there are pages."""
    if PAGE == 0:
        return load_columns(K, n0, k_l, end, BLOCK_N, HEAD_DIM, D)
    else:
        d = tl.arange(0, HEAD_DIM)[:, None]
        pointers = K + (P[0] * k_b + P[1] * k_l)[None, :] + d
        return tl.load(pointers, mask=inside(P[2][None, :], d, D, HEAD_DIM), other=0.0)


@triton.jit
def load_values(
    V, v_b, v_l, P, n0, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, HEAD_DIM]."""
    if PAGE == 0:
        return load_rows(V, n0, v_l, end, BLOCK_N, HEAD_DIM, D)
    else:
        d = tl.arange(0, HEAD_DIM)[None, :]
        pointers = V + (P[0] * v_b + P[1] * v_l)[:, None] + d
        return tl.load(pointers, mask=inside(P[2][:, None], d, D, HEAD_DIM), other=0.0)


@triton.jit
def bias_rows(BIAS, b, h, i, t_b, t_h, t_l, KIND: tl.constexpr):
    """Where the rows' biases stand, [rows, 1]: pointers, or slopes in base 2."""
    h = h[:, None].to(tl.int64)
    if KIND == TABLE:
        return BIAS + h * t_h
    elif KIND == SLOPES or KIND == DISTANCES:  # noqa: SIM109 - no `in` here
        return tl.load(BIAS + h) * LOG2E
    else:
        return BIAS + b * t_b + h * t_h + i[:, None].to(tl.int64) * t_l


@triton.jit
def bias_at(B, o, j, ok, zero, length, KIND: tl.constexpr, STAGED: tl.constexpr):
    """The bias of offsets o and keys j, in base 2; rows B as `bias_rows` made them.

    STAGED: loaded ahead of its tile, through shared memory, for which a tile of many rows has no room.
    """
    if KIND == SLOPES:
        return B * o.to(tl.float32)
    elif KIND == DISTANCES:
        return -B * tl.abs(o).to(tl.float32)
    else:
        if KIND == TABLE:
            at = o + zero
        elif KIND == RELATIVE:
            at = -o
        else:
            at = j + 0 * o
        if STAGED or KIND == RELATIVE:
            ok = ok & (at >= 0) & (at < length)
            value = tl.load(B + at, mask=ok, other=0.0).to(tl.float32)
        else:
            value = load_scattered(B + tl.minimum(tl.maximum(at, 0), length - 1))
        return tl.maximum(value * LOG2E, HIDDEN)


@triton.jit
def finished(acc, top, total, SINKS, h):
    """Rows [n, ...] -> out and natural lse, the sink included; a row that saw nothing has 0 and -inf, or the sink."""
    some = saw(top, total)
    acc = tl.where(some[:, None], acc, 0.0)
    total = tl.where(some, total, 0.0)
    if SINKS is not None:
        sink = tl.maximum(tl.load(SINKS + h) * LOG2E, HIDDEN)
        new = tl.maximum(top, sink)
        alpha = tl.math.exp2(top - new)
        acc = acc * alpha[:, None]
        total = total * alpha + tl.where(sink > DEAD, tl.math.exp2(sink - new), 0.0)
        top = new
    alive = total != 0.0
    total = tl.where(alive, total, 1.0)
    return acc / total[:, None], tl.where(alive, (top + tl.math.log2(total)) * LN2, -float("inf"))


@triton.jit(
    do_not_specialize=[
        "softcap", "Lq", "Lk", "start", "low", "high", "H", "splits", "row_blocks", "zero", "length",
        "t_b", "t_h", "t_l", "p_b", "pages_b", "o_b", "o_h", "o_l",
    ]
)  # fmt: skip
def decode_split(
    Q, K, V, OUT, LSE, ACC, STATE, PAGES, SEQLENS, BIAS, SINKS, PAD,
    scale, softcap, Lq, Lk, start, low, high, H, GROUP, splits, row_blocks, zero, length,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, t_b, t_h, t_l, p_b, pages_b,
    KIND: tl.constexpr, ONE: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split: ACC [B, H, Lq, splits, DV] and STATE [2, B, H, Lq, splits], maximum and sum; the only one OUT, LSE."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    row0 = pid % row_blocks * BLOCK_M
    kv = pid // row_blocks % (H // GROUP)
    b = (pid // row_blocks // (H // GROUP)).to(tl.int64)
    keys, position = place(SEQLENS, b, start, Lq, Lk)
    first, begin, end = visible_range(position, keys, low, high, Lq, BLOCK_N)
    begin, stop = part_of(begin, end, split, splits, BLOCK_N)
    h, i, ok = rows_of(row0, kv, GROUP, Lq, BLOCK_M, ONE)
    if KIND != NONE:
        B = bias_rows(BIAS, b, h, i, t_b, t_h, t_l, KIND)
    if K is not None:
        q = load_packed(Q + b * q_b, q_h, q_l, row0, kv, GROUP, Lq, BLOCK_M, HEAD_DIM, D)
    if PAGES is not None:
        PAGES += b * pages_b
    if K is not None:
        K += kv.to(tl.int64) * k_h
        if PAGES is None:
            K += b * k_b
    V += kv.to(tl.int64) * v_h
    if PAGES is None:
        V += b * v_b
    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_DIM], tl.float32)
    for n0 in tl.range(begin, stop, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)[None, :]
        o = j - position - i[:, None]
        seen = (o >= low) & (o <= high) & (j < end)
        if PAD is not None:
            seen = seen & (tl.load(PAD + b * p_b + j, mask=j < end, other=0) != 0)
        P = page_rows(PAGES, n0, first, end, PAGE, BLOCK_N)
        if K is not None:
            k = load_keys(K, k_b, k_l, P, n0, end, PAGE, BLOCK_N, HEAD_DIM, D)
            s = tl.dot(q, k, input_precision=PRECISION)
            if SOFTCAP:
                s = capped(s, scale) * softcap
            else:
                s = s * scale
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if KIND != NONE:
            s += bias_at(B, o, j, ok[:, None] & seen, zero, length, KIND, BLOCK_M <= 16)
        s = tl.where(seen, s, HIDDEN)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s - new[:, None])
        alpha = tl.math.exp2(top - new)
        total = total * alpha + tl.sum(p, 1)
        v = load_values(V, v_b, v_l, P, n0, end, PAGE, BLOCK_N, VALUE_DIM, DV)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        top = new

    h, i, ok = rows_of(row0, kv, GROUP, Lq, BLOCK_M, False)
    d = tl.arange(0, VALUE_DIM)[None, :]
    row = (b * H + h) * Lq + i
    if splits == 1:
        out, lse = finished(acc, top, total, SINKS, h)
        pointers = OUT + b * o_b + (h.to(tl.int64) * o_h + i.to(tl.int64) * o_l)[:, None] + d
        tl.store(pointers, out.to(OUT.dtype.element_ty), mask=inside(ok[:, None], d, DV, VALUE_DIM))
        tl.store(LSE + row, lse, mask=ok)
    else:
        rows = tl.num_programs(0).to(tl.int64) // row_blocks * GROUP * Lq
        row = row * splits + split
        tl.store(ACC + row[:, None] * DV + d, acc, mask=inside(ok[:, None], d, DV, VALUE_DIM))
        tl.store(STATE + row, top, mask=ok)
        tl.store(STATE + rows * splits + row, total, mask=ok)


@triton.jit(do_not_specialize=["Lq", "H", "splits", "o_b", "o_h", "o_l"])
def decode_combine(
    ACC, STATE, OUT, LSE, SINKS, Lq, H, splits, o_b, o_h, o_l,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """OUT and LSE of one row, BLOCK_D of its numbers, from all splits."""
    row = tl.program_id(0)
    i = row % Lq
    h = row // Lq % H
    b = (row // Lq // H).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    state = STATE + row.to(tl.int64) * splits
    sums = tl.num_programs(0).to(tl.int64) * splits
    acc_row = ACC + row.to(tl.int64) * splits * DV
    top = tl.full([1], HIDDEN, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for s0 in tl.range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        part = tl.load(state + s, mask=s < splits, other=HIDDEN)
        sums_of = tl.load(state + sums + s, mask=s < splits, other=0.0)
        # A split that saw nothing has no share, whatever stands there.
        some = saw(part, sums_of)
        values = tl.load(acc_row + s[:, None] * DV + d, mask=some[:, None] & (d < DV), other=0.0)
        new = tl.maximum(top, tl.max(part, 0))
        weight = tl.where(some, tl.math.exp2(part - new), 0.0)
        alpha = tl.math.exp2(top - new)
        total = total * alpha + tl.sum(tl.where(some, sums_of, 0.0) * weight, 0)
        acc = acc * alpha[:, None] + tl.sum(values * weight[:, None], 0)[None, :]
        top = new
    out, lse = finished(acc, top, total, SINKS, h + tl.arange(0, 1))
    tl.store(
        OUT + b * o_b + h.to(tl.int64) * o_h + i.to(tl.int64) * o_l + d,
        out.to(OUT.dtype.element_ty),
        mask=d < DV,
    )
    if tl.program_id(1) == 0:
        tl.store(LSE + row + tl.arange(0, 1), lse)
