"""Attention forward: one pass over the keys, softmax on line, the bias added where the scores are.

A program owns BLOCK_M queries of one head and walks over the keys that its rows may see: those with
low <= j - i - d <= high (sequences.py), inside of their sequence, and PAD[b, j] where there is one; of these, where
NEAR says which (near.py), over those that can matter.

A sink is one more logit in the softmax's denominator: l += 2^(sink - max). Dropout leaves the denominator alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import choose, draw, row_words
from .near import narrowed
from .sequences import rows_of_program
from .tile import HIDDEN, LN2, LOG2E, START, capped, load_columns, load_rows, saw, store_rows


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "H", "softcap", "count", "threshold", "kept"])
def attend_forward(
    Q, K, V, OUT, LSE, PAD, SINKS, NEAR, CU_Q, CU_K, count, SEED, threshold, kept, rule, scale, softcap, Lq, Lk,
    low, high, H, GROUP, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, p_b,
    SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m0, h, b, kv, q0, k0, lq, lk, d, row, _, bh, _ = rows_of_program(CU_Q, CU_K, count, Lq, Lk, H, GROUP, BLOCK_M)
    if CU_Q is not None:  # noqa: SIM102 - known when compiled; the other only when run
        if m0 < 0:
            return
    k_base = K + b * k_b + kv * k_h + k0 * k_l
    v_base = V + b * v_b + kv * v_h + k0 * v_l
    q = load_rows(Q + b * q_b + h.to(tl.int64) * q_h + q0 * q_l, m0, q_l, lq, BLOCK_M, HEAD_DIM, D)
    i = m0 + tl.arange(0, BLOCK_M)
    at = i + d
    p0 = m0 + d
    S = rule.setup(rule, b, h, q0 - d, lq + d)
    R = rule.rows(rule, h, at[:, None], p0, p0)
    if SEED is not None:
        w0, w1 = row_words(SEED, b, h, q0, k0, i)
    # A rule that leaves the scores alone leaves the scale to the exponent, where it is part of a multiply-add.
    hidden = HIDDEN
    if rule.unscaled is not None or rule.lift is not None:
        hidden = HIDDEN / scale
    running_max = tl.full([BLOCK_M], START, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_DIM], tl.float32)

    start = tl.maximum(p0 + low, 0)
    stop = tl.minimum(lk, tl.minimum(m0 + BLOCK_M, lq) + (high + d))
    if NEAR is not None:
        start, stop = narrowed(NEAR, bh, m0, Lq, start, stop, BLOCK_M)
    for n0 in tl.range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        k = load_columns(k_base, n0, k_l, lk, BLOCK_N, HEAD_DIM, D)
        s = tl.dot(q, k, input_precision=PRECISION)
        first = n0 - p0 - (BLOCK_M - 1)
        last = n0 - p0 + (BLOCK_N - 1)
        C = rule.cols(rule, h, j[None, :], n0, p0)
        if SOFTCAP:
            s = rule.score(capped(s, scale), softcap, S, R, C, j[None, :], first, last, rule)
        elif rule.lift is not None:
            s, lift = rule.lift(s, scale, S, R, C, j[None, :], first, last, rule)
        elif rule.unscaled is None:
            s = rule.score(s, scale, S, R, C, j[None, :], first, last, rule)
        if PAD is not None:
            keep = tl.load(PAD + b * p_b + k0 + j, mask=j < lk, other=0)
            s = tl.where(keep[None, :] != 0, s, hidden)
        if (first < low) | (last > high) | (n0 + BLOCK_N > lk):
            x = j[None, :] - at[:, None]
            s = tl.where((x >= low) & (x <= high) & (j[None, :] < lk), s, hidden)
        if rule.lift is not None:
            top = tl.max(s, 1) * scale
            new_max = tl.maximum(running_max, top + lift)
            # Not below top, which is lost in the sum where a lift is as good as -inf.
            p = tl.math.exp2(s * scale - tl.maximum(new_max - lift, top)[:, None])
        elif rule.unscaled is None:
            new_max = tl.maximum(running_max, tl.max(s, 1))
            p = tl.math.exp2(s - new_max[:, None])
        else:
            new_max = tl.maximum(running_max, tl.max(s, 1) * scale)
            p = tl.math.exp2(s * scale - new_max[:, None])
        alpha = tl.math.exp2(running_max - new_max)
        running_sum = running_sum * alpha + tl.sum(p, 1)
        if SEED is not None:
            x = draw(w0[:, None], w1[:, None], j[None, :])
            p = choose(p, 0.0, x, threshold)
        v = load_rows(v_base, n0, v_l, lk, BLOCK_N, VALUE_DIM, DV)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        running_max = new_max

    alive = saw(running_max, running_sum)
    term = rule.row_term(rule, h, at, p0, p0)
    if SINKS is not None:
        sink = tl.load(SINKS + h) * LOG2E - term
        new_max = tl.maximum(running_max, sink)
        alpha = tl.math.exp2(running_max - new_max)
        running_sum = running_sum * alpha + tl.math.exp2(sink - new_max)
        acc = acc * alpha[:, None]
        running_max = new_max
    if SEED is not None:
        acc = acc * kept
    acc = tl.where(alive[:, None], acc / tl.where(alive, running_sum, 1.0)[:, None], 0.0)
    lse = (running_max + tl.math.log2(running_sum) + term) * LN2
    unseen = -float("inf")
    if SINKS is not None:
        unseen = tl.load(SINKS + h)
    store_rows(OUT + b * o_b + h.to(tl.int64) * o_h + q0 * o_l, m0, o_l, lq, acc, BLOCK_M, VALUE_DIM, DV)
    tl.store(LSE + row + i, tl.where(alive, lse, unseen), mask=i < lq)
