"""Attention backward, the part a key owns: dK and dV.

dV = p^T dO, dK = scale * dl^T Q. A program owns BLOCK_N keys and walks over the queries of every head that shares them.
Its tiles are born transposed, S^T = K Q^T: transposing dS instead gives wrong products on Hopper (Triton 3.4 to 3.7).

In one pass (DQT), dQ = scale * dl K and the gradient of the table are added up here too, from tiles that both have, and
backward_rows.py makes delta only. DQT is fp32 [B, H, HEAD_DIM, t_l], dQ transposed, because dl is; many programs add
to it, in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import choose, draw, load_words, stays
from .near import narrowed
from .sequences import keys_of_program
from .tile import HIDDEN, capped, load_kept, load_rows, store_rows


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "H", "softcap", "count", "threshold", "kept", "kept_h"])
def attend_backward_cols(
    Q, K, V, DO, LSE2, DELTA, kept_h, DK, DV_OUT, DQT, PAD, NEAR, CU_Q, CU_K, count, SEED, WORDS, threshold, kept, rule,
    scale, scale2, softcap, Lq, Lk, low, high, H, GROUP,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, p_b, t_l,
    SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n0, kv, b, q0, k0, lq, lk, d, there = keys_of_program(CU_Q, CU_K, count, Lq, Lk, H, GROUP, kept_h, BLOCK_N)
    if CU_Q is not None:  # noqa: SIM102 - known when compiled; the other only when run
        if n0 >= lk:
            return
    j = n0 + tl.arange(0, BLOCK_N)
    k = load_rows(K + b * k_b + kv.to(tl.int64) * k_h + k0 * k_l, n0, k_l, lk, BLOCK_N, HEAD_DIM, D)
    v = load_rows(V + b * v_b + kv.to(tl.int64) * v_h + k0 * v_l, n0, v_l, lk, BLOCK_N, VALUE_DIM, DV)
    if PAD is not None:
        keep = tl.load(PAD + b * p_b + k0 + j, mask=j < lk, other=0)
    hidden = HIDDEN
    if rule.lift is not None:
        hidden = HIDDEN / scale2
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE_DIM], tl.float32)
    # Query i sees key j where j - high <= i + d <= j - low.
    start = tl.maximum(n0 - (high + d), 0)
    stop = tl.minimum(lq, tl.minimum(n0 + BLOCK_N, lk) - (low + d))
    for member in tl.range(0, GROUP):
        h = kv * GROUP + member
        q_base = Q + b * q_b + h.to(tl.int64) * q_h + q0 * q_l
        do_base = DO + b * do_b + h.to(tl.int64) * do_h + q0 * do_l
        kept_row = there + h.to(tl.int64) * kept_h
        S = rule.setup(rule, b, h, q0 - d, lq + d)
        C = rule.cols(rule, h, j[:, None], n0, n0)
        if NEAR is None:
            begin, end = start, stop
        else:
            begin, end = narrowed(NEAR, b * H + h, n0, Lk, start, stop, BLOCK_N)
        for m0 in tl.range(begin // BLOCK_M * BLOCK_M, end, BLOCK_M):
            i = m0 + tl.arange(0, BLOCK_M)
            at = i + d
            p0 = m0 + d
            q = load_rows(q_base, m0, q_l, lq, BLOCK_M, HEAD_DIM, D)
            do = load_rows(do_base, m0, do_l, lq, BLOCK_M, VALUE_DIM, DV)
            lse, delta = load_kept(LSE2, DELTA, kept_row, i)
            lse -= rule.row_term(rule, h, at, p0, n0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            first = n0 - p0 - (BLOCK_M - 1)
            last = n0 - p0 + (BLOCK_N - 1)
            R = rule.rows(rule, h, at[None, :], p0, n0)
            if SOFTCAP:
                t = capped(s, scale2)
                s = rule.score(t, softcap, S, R, C, j[:, None], first, last, rule)
            elif rule.lift is not None:
                s, lift = rule.lift(s, scale2, S, R, C, j[:, None], first, last, rule)
            else:
                s = rule.score(s, scale2, S, R, C, j[:, None], first, last, rule)
            if PAD is not None:
                s = tl.where(keep[:, None] != 0, s, hidden)
            edge = (first < low) | (last > high)
            if DQT is not None:  # else what stands behind the last key is never stored
                edge = edge | (n0 + BLOCK_N > lk)
            if edge:
                x = j[:, None] - at[None, :]
                seen = (x >= low) & (x <= high)
                if DQT is not None:
                    seen = seen & (j < lk)[:, None]
                s = tl.where(seen, s, hidden)
            if rule.lift is not None:
                p = tl.math.exp2(s * scale2 - (lse - lift)[None, :])
            else:
                p = tl.math.exp2(s - lse[None, :])
            if SEED is None:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            else:
                w0, w1 = load_words(WORDS, kept_row, i)
                x = draw(w0[None, :], w1[None, :], j[:, None])
                dv = tl.dot(choose(p, 0.0, x, threshold).to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if SEED is None:
                ds = p * (dp - delta[None, :])
            else:
                ds = p * tl.where(stays(x, threshold), dp * kept - delta[None, :], -delta[None, :])
            if SOFTCAP:
                ds = ds * (1.0 - t * t)
            dl = ds.to(q.dtype)
            dk = tl.dot(dl, q, dk, input_precision=PRECISION)
            if DQT is not None:
                # Transposed, so that no product of tensor cores has to be.
                dq = tl.dot(tl.trans(k), dl, input_precision=PRECISION)
                x = tl.arange(0, HEAD_DIM)[:, None] * t_l + tl.arange(0, BLOCK_M)[None, :]
                tl.atomic_add(DQT + (b * H + h) * (HEAD_DIM * t_l.to(tl.int64)) + m0 + x, dq, sem="relaxed")
                rule.table(ds, dl, (), S, R, p0, n0, first, last, h, rule, PRECISION)
    if SEED is not None:
        dv = dv * kept
    store_rows(DK + b * dk_b + kv.to(tl.int64) * dk_h + k0 * dk_l, n0, dk_l, lk, dk * scale, BLOCK_N, HEAD_DIM, D)
    store_rows(DV_OUT + b * dv_b + kv.to(tl.int64) * dv_h + k0 * dv_l, n0, dv_l, lk, dv, BLOCK_N, VALUE_DIM, DV)


@triton.jit(do_not_specialize=["Lq", "H"])
def turn_rows(
    DQT, DQ, scale, Lq, H, t_l, dq_b, dq_h, dq_l, D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """DQ[b, h, i, c] = scale * DQT[b, h, c, i]."""
    blocks = tl.cdiv(Lq, BLOCK)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    m0 = tl.program_id(0) % blocks * BLOCK
    x = tl.arange(0, HEAD_DIM)[:, None] * t_l + tl.arange(0, BLOCK)[None, :]
    made = tl.load(DQT + bh * (HEAD_DIM * t_l.to(tl.int64)) + m0 + x) * scale
    store_rows(DQ + bh // H * dq_b + bh % H * dq_h, m0, dq_l, Lq, tl.trans(made), BLOCK, HEAD_DIM, D)
