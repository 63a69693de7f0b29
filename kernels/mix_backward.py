"""DAPE, backward: from the gradients of softmax times V to those of scores, weights and bias; walks as mix.py does.

    p = exp(l - lse)    dl = p x, x = dP - delta    du = lrelu'(u) W2^T dl    ds = dl + W1s^T du    dB = dl + W1b^T du

A program turns a cell's x into p, and its scores S into ds (DS is the same memory), in place. What pairs sum up to, it
keeps: the weights' gradients in PART [programs, parts], added to from cell to cell; the bias's in STRIPS [copies, H,
width], by offset, which `add_strips` adds to the table. No sum depends on the order in which programs run.
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
from .tile import LOG2E


@triton.jit
def add_to(PART, value, ROWS: tl.constexpr, COLS: tl.constexpr):
    """PART[ROWS, COLS] += value; the place behind it."""
    pointers = PART + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(pointers, tl.load(pointers) + value)
    return PART + ROWS * COLS


@triton.jit
def fire_gradient(dbase, f, position, first_weight, last_back, dlast, dfirst, fire_slope, PRECISION: tl.constexpr):
    """FIRE's MLP backward -> dlast and dfirst (its first two rows: weight, bias) with more added, and d position."""
    dlast = tl.dot(tl.trans(dbase), f.to(dbase.dtype), dlast, input_precision=PRECISION)
    dv = tl.dot(dbase, last_back, input_precision=PRECISION)
    dv = tl.where(f > 0, dv, dv * fire_slope)
    kind = tl.arange(0, 16)[:, None]
    moments = tl.where(kind == 0, position[None, :], tl.where(kind == 1, 1.0, 0.0))
    dfirst = tl.dot(moments.to(dbase.dtype), dv.to(dbase.dtype), dfirst, input_precision=PRECISION)
    return dlast, dfirst, tl.sum(dv * first_weight, 1)


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "m0", "m1", "n0", "b0", "RUN", "slots"])
def mix_backward(
    S, DS, X, LSE2, PAD, W1, B1, W2, B2, TABLE, LINE, ROWS, FIRST, LAST, LAST_BIAS, fire_slope,
    PART, STRIPS, DROWS, Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, b0, RUN, slots, margin, t_h, p_b, r_x,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, column, start, stop = walk(m1 - m0, KEYS, RUN, BLOCK_N)
    first_x = n0 + column - m0 - row
    pid, slot = tl.program_id(0), tl.program_id(1)
    b = (b0 + slot).to(tl.int64)
    blocks = tl.cdiv(KEYS + (RUN - 1) * STEP, BLOCK_N)
    cell = slot.to(tl.int64) * H * C * W
    S += cell
    DS += cell
    X += cell
    DTYPE: tl.constexpr = S.dtype.element_ty
    GRAD: tl.constexpr = DS.dtype.element_ty
    lanes = tl.arange(0, BLOCK_N)
    heads = tl.arange(0, HEADS)
    # Where this program's pairs stand among those of its copy of the strips.
    copy = (slot * (tl.num_programs(0) // blocks) + pid // STEP // blocks * STEP + pid % STEP).to(tl.int64)
    place = pid // STEP % blocks * BLOCK_N + lanes
    strip_width = blocks * BLOCK_N
    visible = (first_x + lanes >= low) & (first_x + lanes <= high)
    if (first_x > high) | (first_x + BLOCK_N <= low):
        if (first_x > high + margin) | (first_x + BLOCK_N <= low - margin):
            stop = 0
        for r in tl.range(start, stop):
            pointers, inside = cell_tile(DS, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
            tl.store(pointers, tl.zeros([HEADS, BLOCK_N], GRAD), mask=inside)
            pointers, inside = cell_tile(X, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
            tl.store(pointers, tl.zeros([HEADS, BLOCK_N], GRAD), mask=inside)
        if BASE == TABLE_BASE:
            strips = STRIPS + (copy * H + heads[None, :]) * strip_width + place[:, None]
            tl.store(strips, tl.zeros([BLOCK_N, HEADS], tl.float32), mask=(heads < H)[None, :])
        elif BASE == FIRE_BASE:
            tl.store(STRIPS + copy * strip_width + place, tl.zeros([BLOCK_N], tl.float32))
    else:
        CHANNELS: tl.constexpr = H if BASE == NO_BASE else 2 * H
        w1 = matrix(W1, HEADS, UNITS, H, HIDDEN, 1, CHANNELS).to(DTYPE)
        w2 = matrix(W2, UNITS, HEADS, HIDDEN, H, 1, HIDDEN).to(DTYPE)
        w1_back = matrix(W1, UNITS, HEADS, HIDDEN, H, CHANNELS, 1).to(GRAD)
        w2_back = matrix(W2, HEADS, UNITS, H, HIDDEN, HIDDEN, 1).to(GRAD)
        eye = identity(HEADS, DTYPE)
        eye_grad = identity(HEADS, GRAD)
        hidden = vector(B1, UNITS, HIDDEN)[None, :]
        rest = vector(B2, HEADS, H)[None, :]
        x = first_x + Lq - 1 + lanes
        dw1 = tl.zeros([HEADS, UNITS], tl.float32)
        dw2 = tl.zeros([HEADS, UNITS], tl.float32)
        # By offset, over all rows: the gradients of the hidden layer and of the logits.
        du_sum = tl.zeros([BLOCK_N, UNITS], tl.float32)
        dl_sum = tl.zeros([BLOCK_N, HEADS], tl.float32)
        if BASE == TABLE_BASE:
            base = table_strip(TABLE, t_h, Lq + Lk - 1, x, H, HEADS)
            w1_base = matrix(W1 + H, HEADS, UNITS, H, HIDDEN, 1, CHANNELS)
            hidden += tl.dot(base, w1_base, input_precision=PRECISION)
            rest += base
        elif BASE == FIRE_BASE:
            line = line_strip(LINE, Lq + Lk - 1, x)
            w1_base = matrix(W1 + H, HEADS, UNITS, H, HIDDEN, 1, CHANNELS).to(DTYPE)
            w1_base_back = matrix(W1 + H, UNITS, HEADS, HIDDEN, H, CHANNELS, 1).to(GRAD)
            first_weight = vector(FIRST, FIRE_UNITS, FIRE)[None, :]
            first_bias = vector(FIRST + FIRE, FIRE_UNITS, FIRE)[None, :]
            last = matrix(LAST, FIRE_UNITS, HEADS, FIRE, H, 1, FIRE).to(DTYPE)
            last_back = matrix(LAST, HEADS, FIRE_UNITS, H, FIRE, FIRE, 1).to(GRAD)
            last_bias = vector(LAST_BIAS, HEADS, H)[None, :]
            dw1_base = tl.zeros([HEADS, UNITS], tl.float32)
            dlast = tl.zeros([HEADS, FIRE_UNITS], tl.float32)
            dfirst = tl.zeros([16, FIRE_UNITS], tl.float32)
            dbase_sum = tl.zeros([BLOCK_N, HEADS], tl.float32)
            dline = tl.zeros([BLOCK_N], tl.float32)
        lse_pointers = LSE2 + (b * H + heads) * Lq
        for r in tl.range(start, stop):
            i = m0 + row + r * STEP
            j = n0 + column + r * STEP + lanes
            pointers, inside = cell_tile(S, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
            raw = tl.load(pointers, mask=inside, other=0.0)
            s = tl.trans(raw)
            pointers, inside = cell_tile(X, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
            t = tl.trans(tl.load(pointers, mask=inside, other=0.0))
            u = tl.dot(s, w1, input_precision=PRECISION) + hidden
            l = tl.dot(s, eye, input_precision=PRECISION) + rest
            if BASE == FIRE_BASE:
                row_scale = tl.load(ROWS + i)
                position = line * row_scale
                v = position[:, None] * first_weight + first_bias
                f = leaky(v, fire_slope).to(DTYPE)
                base = tl.dot(f, last, input_precision=PRECISION) + last_bias
                u = tl.dot(base.to(DTYPE), w1_base, u, input_precision=PRECISION)
                l += base
            h = leaky(u, SLOPE).to(DTYPE)
            l = tl.dot(h, w2, l, input_precision=PRECISION)
            lse = tl.load(lse_pointers + i, mask=heads < H, other=0.0)
            p = tl.math.exp2(l * LOG2E - lse[None, :])
            seen = visible & (j < n0 + KEYS) & (j < Lk) & (j >= n0)
            if PAD is not None:
                seen = seen & (tl.load(PAD + b * p_b + j, mask=(j >= 0) & (j < Lk), other=0) != 0)
            p = tl.where(seen[:, None] & (heads < H)[None, :], p, 0.0)
            dl = tl.dot(t, eye_grad, input_precision=PRECISION) * p
            dl_sum += dl
            dl_in = dl.to(GRAD)
            du = tl.dot(dl_in, w2_back, input_precision=PRECISION)
            du = tl.where(h > 0, du, du * SLOPE)  # h has u's sign, in half the registers
            du_in = du.to(GRAD)
            du_sum += du
            ds = tl.dot(du_in, w1_back, dl, input_precision=PRECISION)
            dw1 = tl.dot(raw.to(GRAD), du_in, dw1, input_precision=PRECISION)
            dw2 = tl.dot(tl.trans(dl_in), h.to(GRAD), dw2, input_precision=PRECISION)
            if BASE == FIRE_BASE:
                dbase = tl.dot(du_in, w1_base_back, dl, input_precision=PRECISION)
                dbase_sum += dbase
                dbase_in = dbase.to(GRAD)
                dw1_base = tl.dot(tl.trans(base.to(GRAD)), du_in, dw1_base, input_precision=PRECISION)
                dlast, dfirst, dx = fire_gradient(
                    dbase_in, f, position, first_weight, last_back, dlast, dfirst, fire_slope, PRECISION
                )
                dline += dx * row_scale
                own_row = DROWS + (slot * blocks + pid // STEP % blocks).to(tl.int64) * r_x
                tl.store(own_row + row + r * STEP, tl.sum(dx * line, 0))
            tl.store(pointers, tl.trans(p).to(GRAD), mask=inside)
            pointers, inside = cell_tile(DS, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
            tl.store(pointers, tl.trans(ds).to(GRAD), mask=inside)
        part = PART + (slot.to(tl.int64) * slots + pid) * PARTS
        part = add_to(part, dw1, HEADS, UNITS)
        if BASE == TABLE_BASE:
            # The bias is the same in every row, so its part of the first layer takes one product a program.
            part = add_to(part, tl.dot(tl.trans(base), du_sum, input_precision=PRECISION), HEADS, UNITS)
            w1_base_back = matrix(W1 + H, UNITS, HEADS, HIDDEN, H, CHANNELS, 1)
            dbase = tl.dot(du_sum, w1_base_back, dl_sum, input_precision=PRECISION)
            strips = STRIPS + (copy * H + heads[None, :]) * strip_width + place[:, None]
            tl.store(strips, dbase, mask=(heads < H)[None, :])
        elif BASE == FIRE_BASE:
            part = add_to(part, dw1_base, HEADS, UNITS)
            tl.store(STRIPS + copy * strip_width + place, dline)
        part = add_to(part, tl.sum(du_sum, 0)[None, :], 1, UNITS)
        part = add_to(part, dw2, HEADS, UNITS)
        part = add_to(part, tl.sum(dl_sum, 0)[None, :], 1, HEADS)
        if BASE == FIRE_BASE:
            part = add_to(part, dlast, HEADS, FIRE_UNITS)
            part = add_to(part, dfirst, 16, FIRE_UNITS)
            part = add_to(part, tl.sum(dbase_sum, 0)[None, :], 1, HEADS)


@triton.jit(do_not_specialize=["Lq", "length", "m0", "n0", "RUN", "copies", "rows"])
def add_strips(
    STRIPS, TABLE, Lq, length, m0, n0, KEYS, RUN, copies, rows, t_h, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """TABLE[h, j - i + Lq - 1] += what the programs of one cell found at j - i, copy by copy in their order.

    `rows` copies, one for each first row of a program, stand for each entry of the batch.
    """
    heads = tl.num_programs(1)
    h = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(KEYS + (RUN - 1) * STEP, BLOCK_N)
    width = blocks * BLOCK_N
    # The smallest offset of the cell is that of the last copy's first pair.
    x = n0 - m0 - (RUN - 1) * STEP - (rows // STEP - 1) * RUN * STEP - (STEP - 1)
    x += tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for copy in tl.range(0, copies):
        first = copy % rows
        place = x - (n0 - m0 - (RUN - 1) * STEP - first // STEP * RUN * STEP - first % STEP)
        inside = (place >= 0) & (place < width)
        total += tl.load(STRIPS + (tl.cast(copy, tl.int64) * heads + h) * width + place, mask=inside, other=0.0)
    t = x + Lq - 1
    inside = (t >= 0) & (t < length)
    pointers = TABLE + h * t_h + t
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + total, mask=inside)
