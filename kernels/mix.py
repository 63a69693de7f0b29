"""DAPE, forward: the scores of all heads at a pair, and the bias of all heads, through a small MLP to the logits.

    l = s + B + W2 lrelu(W1 [s; B] + b1) + b2        s, B, l: one number a head; slope 0.01

A cell of the matrix, rows m0 .. m1 - 1 and KEYS keys from n0 on, of all heads, stands in a scratch [B, H, C, W], pair
(i, j) at row i - m0, column j - n0. A program turns scores into logits in place: pairs are the rows of its products,
heads and hidden units their columns. It takes BLOCK_N pairs of a row at a time, then the row 8 below, 8 keys further
on: the offset j - i of each of its pairs never changes. So the bias, and what it adds to the hidden layer, is computed
once a program; so its gradient is a sum in registers; and steps of 8 keep 16 bytes aligned. Programs of 8 neighbouring
first rows make up the whole.

A bias that is not of the offset alone is FIRE's: B = LAST lrelu(FIRST x) + c, x = LINE[j - i] * ROWS[i].
"""

from __future__ import annotations

import triton
import triton.language as tl

STEP = tl.constexpr(8)
SLOPE = tl.constexpr(0.01)
NO_BASE = tl.constexpr(0)
TABLE_BASE = tl.constexpr(1)
FIRE_BASE = tl.constexpr(2)


@triton.jit
def walk(rows, KEYS, RUN, BLOCK_N: tl.constexpr):
    """Which pairs of a cell a program owns -> their first row and column in it, and the range of its steps.

    Step r is row + 8 r with the BLOCK_N columns from column + 8 r on, those of them in the cell.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(KEYS + (RUN - 1) * STEP, BLOCK_N)
    row = pid // STEP // blocks * RUN * STEP + pid % STEP
    column = pid // STEP % blocks * BLOCK_N - (RUN - 1) * STEP
    start = tl.maximum(-column + (STEP - BLOCK_N), 0) // STEP
    stop = tl.minimum(tl.maximum(rows - row + STEP - 1, 0) // STEP, (KEYS - column + STEP - 1) // STEP)
    return row, column, start, tl.minimum(stop, RUN)


@triton.jit
def matrix(M, ROWS: tl.constexpr, COLS: tl.constexpr, rows, cols, stride_row, stride_col):
    """[ROWS, COLS] of a weight matrix with these strides, zero beyond its [rows, cols]."""
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    return tl.load(M + r * stride_row + c * stride_col, mask=(r < rows) & (c < cols), other=0.0)


@triton.jit
def vector(M, SIZE: tl.constexpr, size):
    r = tl.arange(0, SIZE)
    return tl.load(M + r, mask=r < size, other=0.0)


@triton.jit
def table_strip(TABLE, t_h, t_length, x, H, HEADS: tl.constexpr):
    """The bias of all heads at offsets: x [BLOCK_N], already counted from the table's start -> [BLOCK_N, HEADS]."""
    h = tl.arange(0, HEADS)
    inside = ((x >= 0) & (x < t_length))[:, None] & (h < H)[None, :]
    return tl.load(TABLE + h[None, :].to(tl.int64) * t_h + x[:, None], mask=inside, other=0.0)


@triton.jit
def line_strip(LINE, length, x):
    return tl.load(LINE + x, mask=(x >= 0) & (x < length), other=0.0)


@triton.jit
def leaky(x, slope):
    """LeakyReLU, for slopes from 0 to 1."""
    return tl.maximum(x, x * slope)


@triton.jit
def identity(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    r = tl.arange(0, SIZE)
    return (r[:, None] == r[None, :]).to(DTYPE)


@triton.jit
def cell_tile(S, row, column, KEYS, C, W, H, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers [HEADS, BLOCK_N] at a row and from a column of a cell on, and which of them stand in it."""
    h = tl.arange(0, HEADS)[:, None]
    c = column + tl.arange(0, BLOCK_N)[None, :]
    pointers = S + h.to(tl.int64) * C * W + (row * W + c)
    return pointers, (c >= 0) & (c < KEYS) & (h < H)


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "m0", "m1", "n0", "RUN"])
def mix_forward(
    S, W1, B1, W2, B2, TABLE, LINE, ROWS, FIRST, LAST, LAST_BIAS, fire_slope,
    Lq, Lk, low, high, m0, m1, n0, KEYS, C, W, RUN, t_h,
    H: tl.constexpr, HIDDEN: tl.constexpr, FIRE: tl.constexpr, BASE: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FIRE_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column, start, stop = walk(m1 - m0, KEYS, RUN, BLOCK_N)
    x = n0 + column - m0 - row
    stop = tl.where((x <= high) & (x + BLOCK_N > low), stop, 0)
    S += tl.program_id(1).to(tl.int64) * H * C * W
    DTYPE: tl.constexpr = S.dtype.element_ty
    CHANNELS: tl.constexpr = H if BASE == NO_BASE else 2 * H
    w1 = matrix(W1, HEADS, UNITS, H, HIDDEN, 1, CHANNELS).to(DTYPE)
    w2 = matrix(W2, UNITS, HEADS, HIDDEN, H, 1, HIDDEN).to(DTYPE)
    eye = identity(HEADS, DTYPE)
    hidden = vector(B1, UNITS, HIDDEN)[None, :]
    rest = vector(B2, HEADS, H)[None, :]
    x += Lq - 1 + tl.arange(0, BLOCK_N)
    if BASE != NO_BASE:
        w1_base = matrix(W1 + H, HEADS, UNITS, H, HIDDEN, 1, CHANNELS)
    if BASE == TABLE_BASE:
        base = table_strip(TABLE, t_h, Lq + Lk - 1, x, H, HEADS)
        hidden += tl.dot(base, w1_base, input_precision=PRECISION)
        rest += base
    elif BASE == FIRE_BASE:
        line = line_strip(LINE, Lq + Lk - 1, x)
        first_weight = vector(FIRST, FIRE_UNITS, FIRE)[None, :]
        first_bias = vector(FIRST + FIRE, FIRE_UNITS, FIRE)[None, :]
        last = matrix(LAST, FIRE_UNITS, HEADS, FIRE, H, 1, FIRE).to(DTYPE)
        last_bias = vector(LAST_BIAS, HEADS, H)[None, :]
    for r in tl.range(start, stop):
        pointers, inside = cell_tile(S, row + r * STEP, column + r * STEP, KEYS, C, W, H, HEADS, BLOCK_N)
        s = tl.trans(tl.load(pointers, mask=inside, other=0.0))
        u = tl.dot(s, w1, input_precision=PRECISION) + hidden
        # A product with the identity brings the scores where the logits are, exactly.
        l = tl.dot(s, eye, input_precision=PRECISION) + rest
        if BASE == FIRE_BASE:
            f = leaky((line * tl.load(ROWS + m0 + row + r * STEP))[:, None] * first_weight + first_bias, fire_slope)
            base = tl.dot(f.to(DTYPE), last, input_precision=PRECISION) + last_bias
            u = tl.dot(base.to(DTYPE), w1_base.to(DTYPE), u, input_precision=PRECISION)
            l += base
        l = tl.dot(leaky(u, SLOPE).to(DTYPE), w2, l, input_precision=PRECISION)
        tl.store(pointers, tl.trans(l).to(DTYPE), mask=inside)
