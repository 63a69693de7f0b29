"""DAPE V2: the two layers of mix.py as 1 x K convolutions along the keys, a kernel a layer; and the softmax backward.

    u(j) = b1 + sum_t W1[t] z(j + t - K//2)    a = lrelu(u)    l(j) = s + B + b2 + sum_t W2[t] a(j + t - K//2)

z is the scores and the bias of all heads at a pair. Hidden units are stored beside the scores, ACT [B, HIDDEN, C, W],
so that each layer reads its neighbours from there, and each kernel changes in place only what it alone reads. Where a
query does not see a key, z and a are zero; PUBLISHED is the paper's form: z is zero in the future only, and a never.
A cell has MARGIN columns more on either side than those it is made for, which is enough for K = 7; what they get is
not used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mix import (
    FIRE_BASE,
    NO_BASE,
    SLOPE,
    STEP,
    TABLE_BASE,
    cell_tile,
    identity,
    leaky,
    line_strip,
    matrix,
    table_strip,
    vector,
    walk,
)
from .mix_backward import add_to
from .tile import LOG2E

MARGIN = 16


@triton.jit
def exists(j, Lk):
    return (j >= 0) & (j < Lk)


@triton.jit
def seen(x, j, low, high, Lk, PAD):
    ok = exists(j, Lk) & (x >= low) & (x <= high)
    if PAD is not None:
        ok = ok & (tl.load(PAD + j, mask=exists(j, Lk), other=0) != 0)
    return ok


@triton.jit
def taken_up(x, j, low, high, Lk, PAD, PUBLISHED: tl.constexpr):
    """Where z is not zero."""
    if PUBLISHED:
        return seen(x, j, low, high, Lk, None)
    else:
        return seen(x, j, low, high, Lk, PAD)


@triton.jit
def bias_at(
    x, row_scale, TABLE, LINE, FIRST, LAST, LAST_BIAS, fire_slope, Lq, Lk, t_h, H: tl.constexpr, FIRE: tl.constexpr,
    BASE: tl.constexpr, HEADS: tl.constexpr, FIRE_UNITS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The bias of all heads at offsets x, [BLOCK_N, HEADS] fp32."""
    if BASE == TABLE_BASE:
        return table_strip(TABLE, t_h, Lq + Lk - 1, x + (Lq - 1), H, HEADS)
    else:
        position = line_strip(LINE, Lq + Lk - 1, x + (Lq - 1)) * row_scale
        v = position[:, None] * vector(FIRST, FIRE_UNITS, FIRE)[None, :]
        v += vector(FIRST + FIRE, FIRE_UNITS, FIRE)[None, :]
        last = matrix(LAST, FIRE_UNITS, HEADS, FIRE, H, 1, FIRE).to(DTYPE)
        out = tl.dot(leaky(v, fire_slope).to(DTYPE), last, input_precision=PRECISION)
        return out + vector(LAST_BIAS, HEADS, H)[None, :]


@triton.jit
def shifted(S, row, column, shift, KEYS, C, W, H, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, HEADS] of a cell `shift` columns further on; zero outside of it."""
    h = tl.arange(0, HEADS)[:, None]
    c = column + shift + tl.arange(0, BLOCK_N)[None, :]
    inside = (c >= 0) & (c < KEYS) & (h < H)
    return tl.trans(tl.load(S + h.to(tl.int64) * C * W + (row * W + c), mask=inside, other=0.0))


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "m0", "m1", "n0", "b0", "RUN"])
def conv_hidden(
    S, ACT, PAD, W1, B1, W2, B2, TABLE, LINE, ROWS, FIRST, LAST, LAST_BIAS, fire_slope,
    Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, RUN, margin, t_h, p_b,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, PUBLISHED: tl.constexpr,
):  # fmt: skip
    """ACT = a, the hidden units."""
    row, column, start, stop = walk(m1 - m0, KEYS, RUN, BLOCK_N)
    x0 = n0 + column - m0 - row
    stop = tl.where((x0 <= high + margin) & (x0 + BLOCK_N > low - margin), stop, 0)
    slot = tl.program_id(1).to(tl.int64)
    S += slot * H * C * W
    ACT += slot * HIDDEN * C * W
    if PAD is not None:
        PAD += (b0 + slot) * p_b
    DTYPE: tl.constexpr = S.dtype.element_ty
    CHANNELS: tl.constexpr = H if BASE == NO_BASE else 2 * H
    lanes = tl.arange(0, BLOCK_N)
    b1 = vector(B1, UNITS, HIDDEN)[None, :]
    for r in tl.range(start, stop):
        i = m0 + row + r * STEP
        j = n0 + column + r * STEP + lanes
        row_scale = 1.0
        if BASE == FIRE_BASE:
            row_scale = tl.load(ROWS + i)
        u = tl.zeros([BLOCK_N, UNITS], tl.float32) + b1
        for t in tl.static_range(K):
            near = t - K // 2
            use = taken_up(x0 + near + lanes, j + near, low, high, Lk, PAD, PUBLISHED)[:, None]
            s = shifted(S, row + r * STEP, column + r * STEP, near, KEYS, C, W, H, HEADS, BLOCK_N)
            w1 = matrix(W1 + t, HEADS, UNITS, H, HIDDEN, K, CHANNELS * K).to(DTYPE)
            u = tl.dot(tl.where(use, s, 0.0).to(DTYPE), w1, u, input_precision=PRECISION)
            if BASE != NO_BASE:
                base = bias_at(
                    x0 + near + lanes, row_scale, TABLE, LINE, FIRST, LAST, LAST_BIAS, fire_slope, Lq, Lk, t_h, H, FIRE,
                    BASE, HEADS, FIRE_UNITS, DTYPE, PRECISION,
                )  # fmt: skip
                w1 = matrix(W1 + H * K + t, HEADS, UNITS, H, HIDDEN, K, CHANNELS * K).to(DTYPE)
                u = tl.dot(tl.where(use, base, 0.0).to(DTYPE), w1, u, input_precision=PRECISION)
        if PUBLISHED:
            use = exists(j, Lk)
        else:
            use = seen(x0 + lanes, j, low, high, Lk, PAD)
        pointers, inside = cell_tile(ACT, row + r * STEP, column + r * STEP, KEYS, C, W, HIDDEN, UNITS, BLOCK_N)
        tl.store(pointers, tl.trans(tl.where(use[:, None], leaky(u, SLOPE), 0.0)).to(DTYPE), mask=inside)


@triton.jit
def conv_logits(
    S, ACT, row, column, x, row_scale, W2, B2, TABLE, LINE, FIRST, LAST, LAST_BIAS, fire_slope, Lq, Lk, KEYS, C, W, t_h,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr, HEADS: tl.constexpr,
    UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """l of BLOCK_N pairs, [BLOCK_N, HEADS] fp32."""
    DTYPE: tl.constexpr = S.dtype.element_ty
    s = shifted(S, row, column, 0, KEYS, C, W, H, HEADS, BLOCK_N)
    l = tl.dot(s, identity(HEADS, DTYPE), input_precision=PRECISION) + vector(B2, HEADS, H)[None, :]
    if BASE != NO_BASE:
        l += bias_at(x, row_scale, TABLE, LINE, FIRST, LAST, LAST_BIAS, fire_slope, Lq, Lk, t_h, H, FIRE, BASE, HEADS,
                     FIRE_UNITS, DTYPE, PRECISION)  # fmt: skip
    for t in tl.static_range(K):
        a = shifted(ACT, row, column, t - K // 2, KEYS, C, W, HIDDEN, UNITS, BLOCK_N)
        w2 = matrix(W2 + t, UNITS, HEADS, HIDDEN, H, K, HIDDEN * K).to(DTYPE)
        l = tl.dot(a, w2, l, input_precision=PRECISION)
    return l


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "m0", "m1", "n0", "b0", "RUN"])
def conv_forward(
    S, ACT, PAD, W1, B1, W2, B2, TABLE, LINE, ROWS, FIRST, LAST, LAST_BIAS, fire_slope,
    Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, RUN, margin, t_h, p_b,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, PUBLISHED: tl.constexpr,
):  # fmt: skip
    """Scores S become logits, in place."""
    row, column, start, stop = walk(m1 - m0, KEYS, RUN, BLOCK_N)
    x0 = n0 + column - m0 - row
    stop = tl.where((x0 <= high) & (x0 + BLOCK_N > low), stop, 0)
    slot = tl.program_id(1).to(tl.int64)
    S += slot * H * C * W
    ACT += slot * HIDDEN * C * W
    for r in tl.range(start, stop):
        row_scale = 1.0
        if BASE == FIRE_BASE:
            row_scale = tl.load(ROWS + m0 + row + r * STEP)
        l = conv_logits(
            S, ACT, row + r * STEP, column + r * STEP, x0 + tl.arange(0, BLOCK_N), row_scale, W2, B2, TABLE, LINE,
            FIRST, LAST, LAST_BIAS, fire_slope, Lq, Lk, KEYS, C, W, t_h, H, HIDDEN, FIRE, BASE, HEADS, UNITS,
            FIRE_UNITS, BLOCK_N, PRECISION, K,
        )  # fmt: skip
        pointers, inside = cell_tile(S, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
        tl.store(pointers, tl.trans(l).to(S.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "m0", "m1", "n0", "b0", "RUN", "slots", "own0", "own1"])
def conv_softmax_backward(
    S, X, P, ACT, LSE2, PAD, W1, B1, W2, B2, TABLE, LINE, ROWS, FIRST, LAST, LAST_BIAS, fire_slope,
    PART, Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, RUN, slots, margin, own0, own1, t_h, p_b,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, PUBLISHED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """P = p; X = dP - delta becomes dl, in place; PART += dW2 [K, HEADS, UNITS], db2."""
    row, column, start, stop = walk(m1 - m0, KEYS, RUN, BLOCK_N)
    x0 = n0 + column - m0 - row
    stop = tl.where((x0 <= high + margin) & (x0 + BLOCK_N > low - margin), stop, 0)
    slot = tl.program_id(1).to(tl.int64)
    b = (b0 + slot).to(tl.int64)
    S += slot * H * C * W
    X += slot * H * C * W
    P += slot * H * C * W
    ACT += slot * HIDDEN * C * W
    if PAD is not None:
        PAD += b * p_b
    GRAD: tl.constexpr = X.dtype.element_ty
    lanes = tl.arange(0, BLOCK_N)
    heads = tl.arange(0, HEADS)
    eye = identity(HEADS, GRAD)
    part = PART + (slot * slots + tl.program_id(0)) * PARTS
    db2 = tl.zeros([BLOCK_N, HEADS], tl.float32)
    for r in tl.range(start, stop):
        i = m0 + row + r * STEP
        j = n0 + column + r * STEP + lanes
        row_scale = 1.0
        if BASE == FIRE_BASE:
            row_scale = tl.load(ROWS + i)
        l = conv_logits(
            S, ACT, row + r * STEP, column + r * STEP, x0 + lanes, row_scale, W2, B2, TABLE, LINE, FIRST, LAST,
            LAST_BIAS, fire_slope, Lq, Lk, KEYS, C, W, t_h, H, HIDDEN, FIRE, BASE, HEADS, UNITS, FIRE_UNITS, BLOCK_N,
            PRECISION, K,
        )  # fmt: skip
        lse = tl.load(LSE2 + (b * H + heads) * Lq + i, mask=heads < H, other=0.0)
        ok = seen(x0 + lanes, j, low, high, Lk, PAD)[:, None] & (heads < H)[None, :]
        p = tl.where(ok, tl.math.exp2(l * LOG2E - lse[None, :]), 0.0)
        pointers, inside = cell_tile(X, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
        x = tl.trans(tl.load(pointers, mask=inside, other=0.0))
        dl = tl.dot(x, eye, input_precision=PRECISION) * p
        tl.store(pointers, tl.trans(dl).to(GRAD), mask=inside)
        pointers, inside = cell_tile(P, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
        tl.store(pointers, tl.trans(p).to(GRAD), mask=inside)
        own = ((j >= own0) & (j < own1))[:, None]
        dl = tl.where(own, dl, 0.0)
        db2 += dl
        for t in tl.static_range(K):
            a = shifted(ACT, row + r * STEP, column + r * STEP, t - K // 2, KEYS, C, W, HIDDEN, UNITS, BLOCK_N)
            dw2 = tl.dot(tl.trans(dl.to(GRAD)), a.to(GRAD), input_precision=PRECISION)
            add_to(part + t * HEADS * UNITS, dw2, HEADS, UNITS)
    add_to(part + K * HEADS * UNITS, tl.sum(db2, 0)[None, :], 1, HEADS)
