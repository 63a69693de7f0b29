"""Attention backward, the part a query owns: delta, dQ and the gradient of the bias's table.

p = exp2(l - lse), delta = rowsum(dO * O) - dlse, dl = p (dO V^T - delta), dQ = scale * dl K. A program owns BLOCK_M
queries; nothing but the table's gradient is shared between programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import choose, draw, row_words, store_words
from .near import narrowed
from .sequences import rows_of_program
from .tile import HIDDEN, capped, load_lse, load_rows, store_rows


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "H", "softcap", "count", "threshold", "kept", "kept_h"])
def attend_backward_rows(
    Q, K, V, OUT, DO, LSE, DLSE, LSE2, DELTA, kept_h, DQ, PAD, NEAR, CU_Q, CU_K, count, SEED, WORDS, threshold, kept,
    rule, scale, scale2, softcap, Lq, Lk, low, high, H, GROUP,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, do_b, do_h, do_l, dq_b, dq_h, dq_l, p_b,
    LOOP: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m0, h, b, kv, q0, k0, lq, lk, d, row, there, group, n = rows_of_program(
        CU_Q, CU_K, count, Lq, Lk, H, GROUP, BLOCK_M, kept_h
    )
    if CU_Q is not None:  # noqa: SIM102 - known when compiled; the other only when run
        if m0 < 0:
            return
    i = m0 + tl.arange(0, BLOCK_M)
    do = load_rows(DO + b * do_b + h.to(tl.int64) * do_h + q0 * do_l, m0, do_l, lq, BLOCK_M, VALUE_DIM, DV)
    out = load_rows(OUT + b * o_b + h.to(tl.int64) * o_h + q0 * o_l, m0, o_l, lq, BLOCK_M, VALUE_DIM, DV)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse, delta = load_lse(LSE, DLSE, delta, row, i, lq)
    tl.store(LSE2 + there + i, lse, mask=i < lq)
    tl.store(DELTA + there + i, delta, mask=i < lq)
    if SEED is not None:
        w0, w1 = row_words(SEED, b, h, q0, k0, i)
        store_words(WORDS, there, i, lq, w0, w1)
    if LOOP:
        at = i + d
        p0 = m0 + d
        k_base = K + b * k_b + kv * k_h + k0 * k_l
        v_base = V + b * v_b + kv * v_h + k0 * v_l
        q = load_rows(Q + b * q_b + h.to(tl.int64) * q_h + q0 * q_l, m0, q_l, lq, BLOCK_M, HEAD_DIM, D)
        lse -= rule.row_term(rule, h, at, p0, p0)
        S = rule.setup(rule, b, h, q0 - d, lq + d)
        R = rule.rows(rule, h, at[:, None], p0, p0)
        T = rule.start(rule, BLOCK_M)
        dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        hidden = HIDDEN
        if rule.lift is not None:
            hidden = HIDDEN / scale2
        start = tl.maximum(p0 + low, 0)
        stop = tl.minimum(lk, tl.minimum(m0 + BLOCK_M, lq) + (high + d))
        if NEAR is not None:
            start, stop = narrowed(NEAR, group, m0, Lq, start, stop, BLOCK_M)
        for n0 in tl.range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
            j = n0 + tl.arange(0, BLOCK_N)
            k = load_rows(k_base, n0, k_l, lk, BLOCK_N, HEAD_DIM, D)
            v = load_rows(v_base, n0, v_l, lk, BLOCK_N, VALUE_DIM, DV)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            first = n0 - p0 - (BLOCK_M - 1)
            last = n0 - p0 + (BLOCK_N - 1)
            C = rule.cols(rule, h, j[None, :], n0, p0)
            if SOFTCAP:
                t = capped(s, scale2)
                s = rule.score(t, softcap, S, R, C, j[None, :], first, last, rule)
            elif rule.lift is not None:
                s, lift = rule.lift(s, scale2, S, R, C, j[None, :], first, last, rule)
            else:
                s = rule.score(s, scale2, S, R, C, j[None, :], first, last, rule)
            if PAD is not None:
                keep = tl.load(PAD + b * p_b + k0 + j, mask=j < lk, other=0)
                s = tl.where(keep[None, :] != 0, s, hidden)
            if (first < low) | (last > high) | (n0 + BLOCK_N > lk):
                x = j[None, :] - at[:, None]
                s = tl.where((x >= low) & (x <= high) & (j[None, :] < lk), s, hidden)
            if rule.lift is not None:
                p = tl.math.exp2(s * scale2 - (lse - lift)[:, None])
            else:
                p = tl.math.exp2(s - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            # The gradient of the logits; behind a softcap it is not yet that of the scores.
            if SEED is None:
                ds = p * (dp - delta[:, None])
            else:
                x = draw(w0[:, None], w1[:, None], j[None, :])
                ds = p * choose(dp * kept - delta[:, None], -delta[:, None], x, threshold)
            dl = ds.to(k.dtype)
            if DQ is not None:
                if SOFTCAP:
                    dq = tl.dot((ds * (1.0 - t * t)).to(k.dtype), k, dq, input_precision=PRECISION)
                else:
                    dq = tl.dot(dl, k, dq, input_precision=PRECISION)
            # After dQ's product, not before: the other order costs 40 instructions a tile (sm_90).
            T = rule.table(ds, dl, T, S, R, p0, n0, first, last, h, rule, PRECISION)
        rule.finish(T, S, R, rule, group, n, row + m0, lq - m0)
        if DQ is not None:
            base = DQ + b * dq_b + h.to(tl.int64) * dq_h + q0 * dq_l
            store_rows(base, m0, dq_l, lq, dq * scale, BLOCK_M, HEAD_DIM, D)
