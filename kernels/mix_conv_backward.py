"""DAPE V2, backward, after the softmax: from the gradients of the logits to those of hidden units, scores and bias."""

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
    vector,
    walk,
)
from .mix_backward import add_to, fire_gradient
from .mix_conv import bias_at, exists, seen, shifted, taken_up


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "m0", "m1", "n0", "b0", "RUN", "slots", "own0", "own1"])
def conv_hidden_backward(
    S, DL, ACT, DU, PAD, W1, B1, W2, B2, TABLE, LINE, ROWS, FIRST, LAST, LAST_BIAS, fire_slope,
    PART, Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, RUN, slots, margin, own0, own1, t_h, p_b,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, PUBLISHED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """DU, the memory of ACT = du; PART += dW1 [K, scores then bias, HEADS, UNITS], db1."""
    row, column, start, stop = walk(m1 - m0, KEYS, RUN, BLOCK_N)
    x0 = n0 + column - m0 - row
    stop = tl.where((x0 <= high + margin) & (x0 + BLOCK_N > low - margin), stop, 0)
    slot = tl.program_id(1).to(tl.int64)
    S += slot * H * C * W
    DL += slot * H * C * W
    ACT += slot * HIDDEN * C * W
    DU += slot * HIDDEN * C * W
    if PAD is not None:
        PAD += (b0 + slot) * p_b
    GRAD: tl.constexpr = DL.dtype.element_ty
    DTYPE: tl.constexpr = S.dtype.element_ty
    PLANES: tl.constexpr = 1 if BASE == NO_BASE else 2
    lanes = tl.arange(0, BLOCK_N)
    part = PART + (slot * slots + tl.program_id(0)) * PARTS
    db1 = tl.zeros([BLOCK_N, UNITS], tl.float32)
    for r in tl.range(start, stop):
        j = n0 + column + r * STEP + lanes
        row_scale = 1.0
        if BASE == FIRE_BASE:
            row_scale = tl.load(ROWS + m0 + row + r * STEP)
        da = tl.zeros([BLOCK_N, UNITS], tl.float32)
        for t in tl.static_range(K):
            dl = shifted(DL, row + r * STEP, column + r * STEP, K // 2 - t, KEYS, C, W, H, HEADS, BLOCK_N)
            w2 = matrix(W2 + t, HEADS, UNITS, H, HIDDEN, HIDDEN * K, K).to(GRAD)
            da = tl.dot(dl, w2, da, input_precision=PRECISION)
        pointers, inside = cell_tile(ACT, row + r * STEP, column + r * STEP, KEYS, C, W, HIDDEN, UNITS, BLOCK_N)
        a = tl.trans(tl.load(pointers, mask=inside, other=0.0))
        if PUBLISHED:
            use = exists(j, Lk)
        else:
            use = seen(x0 + lanes, j, low, high, Lk, PAD)
        du = tl.where(use[:, None], tl.where(a > 0, da, da * SLOPE), 0.0)
        pointers, inside = cell_tile(DU, row + r * STEP, column + r * STEP, KEYS, C, W, HIDDEN, UNITS, BLOCK_N)
        tl.store(pointers, tl.trans(du).to(GRAD), mask=inside)
        own = ((j >= own0) & (j < own1))[:, None]
        du = tl.where(own, du, 0.0)
        db1 += du
        du_in = du.to(GRAD)
        for t in tl.static_range(K):
            near = t - K // 2
            use = taken_up(x0 + near + lanes, j + near, low, high, Lk, PAD, PUBLISHED)[:, None]
            s = shifted(S, row + r * STEP, column + r * STEP, near, KEYS, C, W, H, HEADS, BLOCK_N)
            s = tl.where(use, s, 0.0).to(GRAD)
            into = part + t * PLANES * HEADS * UNITS
            into = add_to(into, tl.dot(tl.trans(s), du_in, input_precision=PRECISION), HEADS, UNITS)
            if BASE != NO_BASE:
                base = bias_at(
                    x0 + near + lanes, row_scale, TABLE, LINE, FIRST, LAST, LAST_BIAS, fire_slope, Lq, Lk, t_h, H, FIRE,
                    BASE, HEADS, FIRE_UNITS, DTYPE, PRECISION,
                )  # fmt: skip
                base = tl.where(use, base, 0.0).to(GRAD)
                add_to(into, tl.dot(tl.trans(base), du_in, input_precision=PRECISION), HEADS, UNITS)
    add_to(part + K * PLANES * HEADS * UNITS, tl.sum(db1, 0)[None, :], 1, UNITS)


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "m0", "m1", "n0", "b0", "RUN", "slots", "own0", "own1"])
def conv_scores_backward(
    DL, DU, DROWS, PAD, W1, B1, W2, B2, TABLE, LINE, ROWS, FIRST, LAST, LAST_BIAS, fire_slope,
    PART, STRIPS, Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, RUN, slots, margin, own0, own1, t_h, p_b, r_x,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, PUBLISHED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """DL = dl becomes ds, in place; the bias's gradient goes to STRIPS as in mix_backward.py, FIRE's to PART."""
    row, column, start, stop = walk(m1 - m0, KEYS, RUN, BLOCK_N)
    x0 = n0 + column - m0 - row
    stop = tl.where((x0 <= high + margin) & (x0 + BLOCK_N > low - margin), stop, 0)
    pid = tl.program_id(0)
    slot = tl.program_id(1).to(tl.int64)
    DL += slot * H * C * W
    DU += slot * HIDDEN * C * W
    if PAD is not None:
        PAD += (b0 + slot) * p_b
    GRAD: tl.constexpr = DL.dtype.element_ty
    CHANNELS: tl.constexpr = H if BASE == NO_BASE else 2 * H
    lanes = tl.arange(0, BLOCK_N)
    heads = tl.arange(0, HEADS)
    blocks = tl.cdiv(KEYS + (RUN - 1) * STEP, BLOCK_N)
    copy = slot * (tl.num_programs(0) // blocks) + pid // STEP // blocks * STEP + pid % STEP
    place = pid // STEP % blocks * BLOCK_N + lanes
    strip_width = blocks * BLOCK_N
    eye = identity(HEADS, GRAD)
    dbase_sum = tl.zeros([BLOCK_N, HEADS], tl.float32)
    if BASE == FIRE_BASE:
        line = line_strip(LINE, Lq + Lk - 1, x0 + lanes + (Lq - 1))
        first_weight = vector(FIRST, FIRE_UNITS, FIRE)[None, :]
        first_bias = vector(FIRST + FIRE, FIRE_UNITS, FIRE)[None, :]
        last_back = matrix(LAST, HEADS, FIRE_UNITS, H, FIRE, FIRE, 1).to(GRAD)
        dlast = tl.zeros([HEADS, FIRE_UNITS], tl.float32)
        dfirst = tl.zeros([16, FIRE_UNITS], tl.float32)
        dline = tl.zeros([BLOCK_N], tl.float32)
    for r in tl.range(start, stop):
        j = n0 + column + r * STEP + lanes
        pointers, inside = cell_tile(DL, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
        dl = tl.dot(tl.trans(tl.load(pointers, mask=inside, other=0.0)), eye, input_precision=PRECISION)
        ds = tl.zeros([BLOCK_N, HEADS], tl.float32)
        dbase = tl.zeros([BLOCK_N, HEADS], tl.float32)
        for t in tl.static_range(K):
            du = shifted(DU, row + r * STEP, column + r * STEP, K // 2 - t, KEYS, C, W, HIDDEN, UNITS, BLOCK_N)
            w1 = matrix(W1 + t, UNITS, HEADS, HIDDEN, H, CHANNELS * K, K).to(GRAD)
            ds = tl.dot(du, w1, ds, input_precision=PRECISION)
            if BASE != NO_BASE:
                w1 = matrix(W1 + H * K + t, UNITS, HEADS, HIDDEN, H, CHANNELS * K, K).to(GRAD)
                dbase = tl.dot(du, w1, dbase, input_precision=PRECISION)
        use = taken_up(x0 + lanes, j, low, high, Lk, PAD, PUBLISHED)[:, None]
        own = ((j >= own0) & (j < own1))[:, None]
        ds = tl.where(own, dl + tl.where(use, ds, 0.0), 0.0)
        tl.store(pointers, tl.trans(ds).to(GRAD), mask=inside)
        if BASE != NO_BASE:
            dbase = tl.where(own, dl + tl.where(use, dbase, 0.0), 0.0)
            dbase_sum += dbase
        if BASE == FIRE_BASE:
            i = m0 + row + r * STEP
            row_scale = tl.load(ROWS + i)
            position = line * row_scale
            f = leaky(position[:, None] * first_weight + first_bias, fire_slope).to(GRAD)
            dlast, dfirst, dx = fire_gradient(
                dbase.to(GRAD), f, position, first_weight, last_back, dlast, dfirst, fire_slope, PRECISION
            )
            dline += dx * row_scale
            tl.store(DROWS + (slot * blocks + pid // STEP % blocks) * r_x + row + r * STEP, tl.sum(dx * line, 0))
    if BASE == TABLE_BASE:
        strips = STRIPS + (copy * H + heads[None, :]) * strip_width + place[:, None]
        tl.store(strips, dbase_sum, mask=(heads < H)[None, :])
    elif BASE == FIRE_BASE:
        part = PART + (slot * slots + pid) * PARTS
        part = add_to(part, dlast, HEADS, FIRE_UNITS)
        part = add_to(part, dfirst, 16, FIRE_UNITS)
        part = add_to(part, tl.sum(dbase_sum, 0)[None, :], 1, HEADS)
        tl.store(STRIPS + copy * strip_width + place, dline)
