"""Attention backward, the part a query owns: delta, dQ and the gradient of the bias's table.

p = exp2(l - lse), delta = rowsum(dO * O) - dlse, dl = p (dO V^T - delta), dQ = scale * dl K. A program owns BLOCK_M
queries; nothing but the table's gradient is shared between programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import HIDDEN, capped, load_lse, load_rows, row_block, store_rows


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "H", "softcap"])
def attend_backward_rows(
    Q, K, V, OUT, DO, LSE, DLSE, LSE2, DELTA, DQ, PAD, rule, scale, scale2, softcap, Lq, Lk, low, high, H, GROUP,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, do_b, do_h, do_l, dq_b, dq_h, dq_l, p_b,
    LOOP: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m0, bh, h, b, kv = row_block(Lq, H, GROUP, BLOCK_M)
    i = m0 + tl.arange(0, BLOCK_M)
    do = load_rows(DO + b * do_b + h.to(tl.int64) * do_h, m0, do_l, Lq, BLOCK_M, VALUE_DIM, DV)
    out = load_rows(OUT + b * o_b + h.to(tl.int64) * o_h, m0, o_l, Lq, BLOCK_M, VALUE_DIM, DV)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse, delta = load_lse(LSE, DLSE, delta, bh, i, Lq)
    tl.store(LSE2 + bh.to(tl.int64) * Lq + i, lse, mask=i < Lq)
    tl.store(DELTA + bh.to(tl.int64) * Lq + i, delta, mask=i < Lq)
    if LOOP:
        k_base = K + b * k_b + kv * k_h
        v_base = V + b * v_b + kv * v_h
        q = load_rows(Q + b * q_b + h.to(tl.int64) * q_h, m0, q_l, Lq, BLOCK_M, HEAD_DIM, D)
        lse -= rule.row_term(rule, h, i, m0, m0)
        S = rule.setup(rule, h)
        R = rule.rows(rule, h, i[:, None], m0, m0)
        T = rule.start(rule, BLOCK_M)
        dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        start = tl.maximum(m0 + low, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(Lk, tl.minimum(m0 + BLOCK_M, Lq) + high)
        for n0 in tl.range(start, stop, BLOCK_N):
            j = n0 + tl.arange(0, BLOCK_N)
            k = load_rows(k_base, n0, k_l, Lk, BLOCK_N, HEAD_DIM, D)
            v = load_rows(v_base, n0, v_l, Lk, BLOCK_N, VALUE_DIM, DV)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            first = n0 - m0 - (BLOCK_M - 1)
            last = n0 - m0 + (BLOCK_N - 1)
            C = rule.cols(rule, h, j[None, :], n0, m0)
            if SOFTCAP:
                t = capped(s, scale2)
                s = rule.score(t, softcap, S, R, C, j[None, :], first, last, rule)
            else:
                s = rule.score(s, scale2, S, R, C, j[None, :], first, last, rule)
            if PAD is not None:
                keep = tl.load(PAD + b * p_b + j, mask=j < Lk, other=0)
                s = tl.where(keep[None, :] != 0, s, HIDDEN)
            if (first < low) | (last > high) | (n0 + BLOCK_N > Lk):
                x = j[None, :] - i[:, None]
                s = tl.where((x >= low) & (x <= high) & (j[None, :] < Lk), s, HIDDEN)
            p = tl.math.exp2(s - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            # The gradient of the logits; behind a softcap it is not yet that of the scores.
            ds = p * (dp - delta[:, None])
            dl = ds.to(k.dtype)
            if DQ is not None:
                if SOFTCAP:
                    dq = tl.dot((ds * (1.0 - t * t)).to(k.dtype), k, dq, input_precision=PRECISION)
                else:
                    dq = tl.dot(dl, k, dq, input_precision=PRECISION)
            # After dQ's product, not before: the other order costs 40 instructions a tile (sm_90).
            T = rule.table(ds, dl, T, S, R, m0, n0, first, last, h, rule, PRECISION)
        rule.finish(T, S, R, rule, bh, m0)
        if DQ is not None:
            store_rows(DQ + b * dq_b + h.to(tl.int64) * dq_h, m0, dq_l, Lq, dq * scale, BLOCK_M, HEAD_DIM, D)
