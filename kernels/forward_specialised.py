"""Attention forward for sm_90 by tensor descriptors, and with specialised warps: one group copies, two compute.

The compiler divides the work where the loop over keys is the only one with products, holds no branch, and reads its
tiles through descriptors; otherwise it compiles something else and says nothing, or fails. So:

  - the mask is in the rule's table, HIDDEN where j - i is not visible (toeplitz.py); without a bias the table is one
    row of zeros for all heads. A comparison per score costs 40 to 700 instructions a tile more than the table does.
    Keys from Lk on are read as zeros: no row that exists sees them, or there are none (schedules.py). NaN in a key
    reaches all rows of its tile, those that do not see it too.
  - Q is one matrix of rows, K and V have four dimensions, so that descriptors are made once and never change: a copy
    in flight cannot meet the descriptor of another tile. Rows of Q from Lq on may be another head's; none is stored.
  - a tile has 128 rows, 64 for each group. With 64, both groups would compute all of them.

PERSISTENT: as many programs as the GPU has multiprocessors walk over all tiles, those with the most keys first.
Copies of the next tile's Q, K and V then overlap with the end of the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .near import narrowed
from .tile import LN2, LOG2E, START, saw, store_rows

NUMBERS = ["Lq", "Lk", "low", "high", "B", "H", "GROUP", "tiles", "q_rows"]
NUMBERS += ["q_b", "q_h", "q_c", "q_l"] + [f"{x}_{axis}" for x in "kvo" for axis in "bhl"]


@triton.jit
def attend_rows(
    q_rows, k_rows, v_rows, OUT, LSE, SINKS, NEAR, rule, scale, Lq, Lk, low, high, H, GROUP, m0, bh,
    q_b, q_h, q_c, o_b, o_h, o_l,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """Rows m0 .. of head bh % H in batch entry bh // H; as attend_forward (forward.py)."""
    h = bh % H
    b = bh // H
    kv = h // GROUP
    i = m0 + tl.arange(0, BLOCK_M)
    q = q_rows.load([b * q_b + h * q_h + m0, h * q_c])
    S = rule.setup(rule, b, h, 0, Lq)
    R = rule.rows(rule, h, i[:, None], m0, m0)
    running_max = tl.full([BLOCK_M], START, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    start = tl.maximum(m0 + low, 0) // BLOCK_N * BLOCK_N
    stop = tl.minimum(Lk, tl.minimum(m0 + BLOCK_M, Lq) + high)
    if NEAR is not None:
        start, stop = narrowed(NEAR, bh, m0, Lq, start, stop, BLOCK_M)
        start = start // BLOCK_N * BLOCK_N
    for n0 in tl.range(start, stop, BLOCK_N, warp_specialize=SPECIALISE):
        k = k_rows.load([b, kv, n0, 0]).reshape(BLOCK_N, D)
        s = tl.dot(q, k.T)
        if rule.unscaled is None:
            j = (n0 + tl.arange(0, BLOCK_N))[None, :]
            C = rule.cols(rule, h, j, n0, m0)
            s = rule.score(s, scale, S, R, C, j, n0 - m0 - (BLOCK_M - 1), n0 - m0 + (BLOCK_N - 1), rule)
            new_max = tl.maximum(running_max, tl.max(s, 1))
            p = tl.math.exp2(s - new_max[:, None])
        else:
            new_max = tl.maximum(running_max, tl.max(s, 1) * scale)
            p = tl.math.exp2(s * scale - new_max[:, None])
        alpha = tl.math.exp2(running_max - new_max)
        running_sum = running_sum * alpha + tl.sum(p, 1)
        v = v_rows.load([b, kv, n0, 0]).reshape(BLOCK_N, D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        running_max = new_max

    alive = saw(running_max, running_sum)
    unseen = -float("inf")
    if SINKS is not None:
        unseen = tl.load(SINKS + h)
        new_max = tl.maximum(running_max, unseen * LOG2E)
        alpha = tl.math.exp2(running_max - new_max)
        running_sum = running_sum * alpha + tl.math.exp2(unseen * LOG2E - new_max)
        acc = acc * alpha[:, None]
        running_max = new_max
    acc = tl.where(alive[:, None], acc / tl.where(alive, running_sum, 1.0)[:, None], 0.0)
    lse = (running_max + tl.math.log2(running_sum)) * LN2
    store_rows(OUT + (b.to(tl.int64) * (o_b * 8) + h.to(tl.int64) * (o_h * 8)), m0, o_l * 8, Lq, acc, BLOCK_M, D, D)
    tl.store(LSE + bh.to(tl.int64) * Lq + i, tl.where(alive, lse, unseen), mask=i < Lq)


@triton.jit(do_not_specialize=NUMBERS)
def attend_forward_specialised(
    Q, K, V, OUT, LSE, SINKS, NEAR, rule, scale, Lq, Lk, low, high, B, H, GROUP, tiles, q_rows,
    q_b, q_h, q_c, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr,
    SPECIALISE: tl.constexpr,
):  # fmt: skip
    """One kernel for all shapes: no number is specialised, what descriptors need of them is checked before.

    Row i of head h, entry b of Q is row b q_b + h q_h + i of [q_rows, q_l], from column h q_c on. Strides of OUT count
    eights: stores are then wide.
    """
    q = tl.make_tensor_descriptor(Q, [q_rows, q_l], [q_l, 1], [BLOCK_M, D])
    k = tl.make_tensor_descriptor(K, [B, H // GROUP, Lk, D], [k_b, k_h, k_l, 1], [1, 1, BLOCK_N, D])
    v = tl.make_tensor_descriptor(V, [B, H // GROUP, Lk, D], [v_b, v_h, v_l, 1], [1, 1, BLOCK_N, D])
    blocks = tl.cdiv(Lq, BLOCK_M)
    if PERSISTENT:
        for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            m0 = (blocks - 1 - t // (B * H)) * BLOCK_M
            attend_rows(
                q, k, v, OUT, LSE, SINKS, NEAR, rule, scale, Lq, Lk, low, high, H, GROUP, m0, t % (B * H),
                q_b, q_h, q_c, o_b, o_h, o_l, D, BLOCK_M, BLOCK_N, SPECIALISE,
            )  # fmt: skip
    else:
        # As sequences.py has it: programs of one head are neighbours, and its long rows come first.
        t = tl.program_id(0)
        m0 = (blocks - 1 - t % blocks) * BLOCK_M
        attend_rows(
            q, k, v, OUT, LSE, SINKS, NEAR, rule, scale, Lq, Lk, low, high, H, GROUP, m0, t // blocks,
            q_b, q_h, q_c, o_b, o_h, o_l, D, BLOCK_M, BLOCK_N, SPECIALISE,
        )  # fmt: skip
