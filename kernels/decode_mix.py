"""DAPE of few queries and many keys: scores of all heads, S [B, H, Lq, W] fp32, then the network on them, into L.

Positions and visibility are those of decode.py, which makes a softmax of L; the network and its two forms are those of
mix.py and mix_conv.py. A program mixes BLOCK_N keys of one query at a time, and makes each hidden unit as often as a
tap reads it: of few queries reading K and V is what takes time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import (
    NONE,
    STRIP,
    TABLE,
    load_keys,
    load_packed,
    page_rows,
    part_of,
    place,
    rows_of,
    visible_range,
)
from .mix import SLOPE, leaky, matrix, vector
from .mix_conv import exists, taken_up


@triton.jit(
    do_not_specialize=[
        "Lq", "Lk", "start", "low", "high", "margin", "H", "splits", "row_blocks", "W", "pages_b",
    ]
)  # fmt: skip
def decode_scores(
    Q, K, S, PAGES, SEQLENS, scale, Lq, Lk, start, low, high, margin, H, GROUP, splits, row_blocks, W,
    q_b, q_h, q_l, k_b, k_h, k_l, pages_b,
    PAGE: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[b, h, i, j] = scale * q k of the keys that a query sees, and `margin` more on either side."""
    pid = tl.program_id(0)
    row0 = pid % row_blocks * BLOCK_M
    kv = pid // row_blocks % (H // GROUP)
    b = (pid // row_blocks // (H // GROUP)).to(tl.int64)
    keys, position = place(SEQLENS, b, start, Lq, Lk)
    first, begin, end = visible_range(position, keys, low - margin, high + margin, Lq, BLOCK_N)
    begin, stop = part_of(begin, end, tl.program_id(1), splits, BLOCK_N)
    q = load_packed(Q + b * q_b, q_h, q_l, row0, kv, GROUP, Lq, BLOCK_M, HEAD_DIM, D)
    K += kv.to(tl.int64) * k_h
    if PAGES is not None:
        PAGES += b * pages_b
    else:
        K += b * k_b
    h, i, ok = rows_of(row0, kv, GROUP, Lq, BLOCK_M, False)
    S += ((b * H + h) * Lq + i)[:, None] * W
    for n0 in tl.range(begin, stop, BLOCK_N):
        P = page_rows(PAGES, n0, first, end, PAGE, BLOCK_N)
        k = load_keys(K, k_b, k_l, P, n0, end, PAGE, BLOCK_N, HEAD_DIM, D)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        j = n0 + tl.arange(0, BLOCK_N)[None, :]
        tl.store(S + j, s, mask=ok[:, None] & (j < end))


@triton.jit
def channels_at(
    S, BIAS, j, x, low, high, keys, PAD, zero, length, s_h, t_h,
    H: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, PUBLISHED: tl.constexpr,
):  # fmt: skip
    """Scores and bias of all heads at the keys j, offsets x, [BLOCK_N, HEADS] each; zero where not taken up."""
    h = tl.arange(0, HEADS)[None, :]
    use = taken_up(x, j, low, high, keys, PAD, PUBLISHED)[:, None] & (h < H)
    s = tl.load(S + h.to(tl.int64) * s_h + j[:, None], mask=use, other=0.0)
    return s, base_at(BIAS, j, x, use, zero, length, t_h, KIND, HEADS)


@triton.jit
def base_at(BIAS, j, x, use, zero, length, t_h, KIND: tl.constexpr, HEADS: tl.constexpr):
    h = tl.arange(0, HEADS)[None, :].to(tl.int64)
    if KIND == TABLE:
        at = x[:, None] + zero
        return tl.load(BIAS + h * t_h + at, mask=use & (at >= 0) & (at < length), other=0.0)
    elif KIND == STRIP:
        return tl.load(BIAS + h * t_h + j[:, None], mask=use & (j < length)[:, None], other=0.0)
    else:
        return 0.0


@triton.jit(
    do_not_specialize=[
        "Lq", "Lk", "start", "low", "high", "splits", "W", "zero", "length", "t_b", "t_h", "t_l", "p_b",
    ]
)  # fmt: skip
def decode_mix(
    S, L, SEQLENS, BIAS, PAD, W1, B1, W2, B2, Lq, Lk, start, low, high, splits, W, zero, length, t_b, t_h, t_l, p_b,
    H: tl.constexpr, HIDDEN: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr,
    UNITS: tl.constexpr, PUBLISHED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L = S + bias + the network, natural units, at every key that the query sees."""
    i = tl.program_id(0) % Lq
    b = (tl.program_id(0) // Lq).to(tl.int64)
    keys, position = place(SEQLENS, b, start, Lq, Lk)
    _, begin, end = visible_range(position + i, keys, low, high, 1, BLOCK_N)
    begin, stop = part_of(begin, end, tl.program_id(1), splits, BLOCK_N)
    row = (b * H * Lq + i) * W
    S += row
    L += row
    s_h = tl.cast(Lq, tl.int64) * W
    if PAD is not None:
        PAD += b * p_b
    if KIND != NONE:
        BIAS += b * t_b + i.to(tl.int64) * t_l
    CHANNELS: tl.constexpr = H if KIND == NONE else 2 * H
    h = tl.arange(0, HEADS)[None, :]
    b1 = vector(B1, UNITS, HIDDEN)[None, :]
    b2 = vector(B2, HEADS, H)[None, :]
    for n0 in tl.range(begin, stop, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        x = j - position - i
        there = exists(j, keys)[:, None] & (h < H)
        l = tl.load(S + h.to(tl.int64) * s_h + j[:, None], mask=there, other=0.0) + b2
        l += base_at(BIAS, j, x, there, zero, length, t_h, KIND, HEADS)
        for t in tl.range(0, K):
            to = t - K // 2
            u = tl.zeros([BLOCK_N, UNITS], tl.float32) + b1
            for n in tl.range(0, K):
                near = to + n - K // 2
                s, base = channels_at(
                    S,
                    BIAS,
                    j + near,
                    x + near,
                    low,
                    high,
                    keys,
                    PAD,
                    zero,
                    length,
                    s_h,
                    t_h,
                    H,
                    KIND,
                    HEADS,
                    PUBLISHED,
                )
                w1 = matrix(W1 + n, HEADS, UNITS, H, HIDDEN, K, CHANNELS * K).to(DTYPE)
                u = tl.dot(s.to(DTYPE), w1, u, input_precision=PRECISION)
                if KIND != NONE:
                    w1_base = matrix(W1 + (H * K + n), HEADS, UNITS, H, HIDDEN, K, CHANNELS * K)
                    u = tl.dot(base, w1_base, u, input_precision=PRECISION)
            if PUBLISHED:
                kept = exists(j + to, keys)
            else:
                kept = taken_up(x + to, j + to, low, high, keys, PAD, PUBLISHED)
            a = tl.where(kept[:, None], leaky(u, SLOPE), 0.0).to(DTYPE)
            w2 = matrix(W2 + t, UNITS, HEADS, HIDDEN, H, K, HIDDEN * K).to(DTYPE)
            l = tl.dot(a, w2, l, input_precision=PRECISION)
        tl.store(L + h.to(tl.int64) * s_h + j[:, None], l, mask=there)
