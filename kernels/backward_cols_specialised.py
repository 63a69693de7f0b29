"""Gradients of K and V for sm_90 with specialised warps: one group copies tiles of Q and dO, two compute.

As backward_cols.py, of 128 keys, 64 for each group; what the compiler asks for is said in forward_specialised.py. Heads
that share their keys are one loop (GROUPED): around two of them warps are not specialised. Queries from Lq on are read
as zeros, and what LSE2 holds there makes their p zero. Keys from Lk on make rows that are not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .near import narrowed
from .tile import load_scattered, store_rows

NUMBERS = ["Lq", "Lk", "low", "high", "kept_h", "B", "H", "GROUP"]
NUMBERS += [f"{x}_{axis}" for x in ("q", "do", "k", "v", "dk", "dv") for axis in "bhl"]


@triton.jit(do_not_specialize=NUMBERS)
def attend_backward_cols_specialised(
    Q, K, V, DO, LSE2, DELTA, DK, DV, NEAR, rule, scale, scale2, Lq, Lk, low, high, kept_h, B, H, GROUP,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """Strides of DK and DV count eights, for wide stores. NEAR, the rows of each group of keys, without GROUPED."""
    blocks = tl.cdiv(Lk, BLOCK_N)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    kv = tl.program_id(0) // blocks % (H // GROUP)
    b = tl.program_id(0) // blocks // (H // GROUP)
    at_k = b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    at_v = b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    k = tl.make_tensor_descriptor(K + at_k, [Lk, D], [k_l, 1], [BLOCK_N, D]).load([n0, 0])
    v = tl.make_tensor_descriptor(V + at_v, [Lk, D], [v_l, 1], [BLOCK_N, D]).load([n0, 0])
    q_rows = tl.make_tensor_descriptor(Q, [B, H, Lq, D], [q_b, q_h, q_l, 1], [1, 1, BLOCK_M, D])
    do_rows = tl.make_tensor_descriptor(DO, [B, H, Lq, D], [do_b, do_h, do_l, 1], [1, 1, BLOCK_M, D])
    j = (n0 + tl.arange(0, BLOCK_N))[:, None]
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    start = tl.maximum(n0 - high, 0)
    stop = tl.minimum(Lq, tl.minimum(n0 + BLOCK_N, Lk) - low)
    if NEAR is not None:
        start, stop = narrowed(NEAR, b * H + kv, n0, Lk, start, stop, BLOCK_N)
    start = start // BLOCK_M * BLOCK_M
    rows = tl.maximum(tl.cdiv(stop - start, BLOCK_M), 0) * BLOCK_M
    if GROUPED:
        stop = start + rows * GROUP
    for at in tl.range(start, stop, BLOCK_M, warp_specialize=SPECIALISE):
        h = kv
        m0 = at
        if GROUPED:
            h = kv * GROUP + (at - start) // rows
            m0 = start + (at - start) % rows
        i = m0 + tl.arange(0, BLOCK_M)
        q = q_rows.load([b, h, m0, 0]).reshape(BLOCK_M, D)
        do = do_rows.load([b, h, m0, 0]).reshape(BLOCK_M, D)
        kept = (b * H + h).to(tl.int64) * kept_h + i
        lse = load_scattered(LSE2 + kept)
        delta = load_scattered(DELTA + kept)
        s = tl.dot(k, q.T)
        S = rule.setup(rule, b, h, 0, Lq)
        R = rule.rows(rule, h, i[None, :], m0, n0)
        C = rule.cols(rule, h, j, n0, n0)
        s = rule.score(s, scale2, S, R, C, j, n0 - m0 - (BLOCK_M - 1), n0 - m0 + (BLOCK_N - 1), rule)
        p = tl.math.exp2(s - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv)
        dp = tl.dot(v, do.T)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    dk_at = DK + (b.to(tl.int64) * (dk_b * 8) + kv.to(tl.int64) * (dk_h * 8))
    dv_at = DV + (b.to(tl.int64) * (dv_b * 8) + kv.to(tl.int64) * (dv_h * 8))
    store_rows(dk_at, n0, dk_l * 8, Lk, dk * scale, BLOCK_N, D, D)
    store_rows(dv_at, n0, dv_l * 8, Lk, dv, BLOCK_N, D, D)
