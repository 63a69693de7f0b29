"""The gradient of a bias's table in fixed order, for runs that must repeat bit by bit.

A program owns one diagonal of tiles of one head, adds up their logit gradients in fp32, over the batch or the packed
sequences too, and reduces them once: no atomics, and two copies of the block diagonals, because neighbouring tile
diagonals share entries. Tiles begin at rows that are multiples of their size, so n0 = m0 + d + c * BLOCK may be < 0. It
recomputes the scores (4 D more multiply-adds a score than backward_rows.py), so it runs only where order matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .diagonals import block_diagonals, slot_pointers
from .dropout import draw, load_words, stays
from .sequences import kept_place, sequence
from .tile import HIDDEN, capped, load_rows


@triton.jit
def row_products(
    A, B, m0, n0, a_l, b_l, a_rows, b_rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """A[m0 :] @ B[n0 :]^T -> [BLOCK, BLOCK]; fp32 comes in pieces of 64 columns, or its registers would not do."""
    PIECE: tl.constexpr = 64 if A.dtype.element_ty == tl.float32 and HEAD_DIM > 64 else HEAD_DIM
    s = tl.zeros([BLOCK, BLOCK], tl.float32)
    for d in tl.static_range(0, D, PIECE):
        a = load_rows(A + d, m0, a_l, a_rows, BLOCK, PIECE, D - d)
        b = load_rows(B + d, n0, b_l, b_rows, BLOCK, PIECE, D - d, SIGNED)
        s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
    return s


@triton.jit(do_not_specialize=["B", "Lq", "Lk", "low", "high", "H", "softcap", "count", "max_q", "max_k",
                              "threshold", "kept", "kept_h"])
def attend_backward_diagonals(
    Q, K, V, DO, LSE2, DELTA, kept_h, BLOCKS, PAD, CU_Q, CU_K, count, max_q, max_k, SEED, WORDS, threshold, kept, rule,
    scale2, softcap, B, Lq, Lk, low, high, H, GROUP,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, p_b, g_copy, g_h, g_zero,
    SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = CU_Q is not None
    if not PACKED:
        behind = tl.cdiv(Lq, BLOCK) - 1
        diagonals = behind + tl.cdiv(Lk, BLOCK)
        parts = B
    else:
        behind = tl.cdiv(max_k, BLOCK)
        diagonals = behind + tl.cdiv(max_q, BLOCK)
        parts = count
    pid = tl.program_id(0)
    h = pid // diagonals
    c = pid % diagonals - behind
    kv = (h // GROUP).to(tl.int64)
    first = c * BLOCK - (BLOCK - 1)
    last = c * BLOCK + (BLOCK - 1)
    S = rule.setup(rule, 0, h, 0, 0)
    # Outside of its span a table is constant; backward_rows.py adds up what falls there.
    if rule.span is not None:
        low = tl.maximum(low, S[0])
        high = tl.minimum(high, S[1])
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    if (last >= low) & (first <= high):
        for part in tl.range(0, parts):
            if not PACKED:
                b = tl.cast(part, tl.int64)
                q0, k0, lq, lk, d = 0, 0, Lq, Lk, 0
                kept_row = (b * H + h) * kept_h
            else:
                query, key, lq, lk = sequence(CU_Q, CU_K, part, Lq, Lk)
                b = (query // Lq).to(tl.int64)
                q0, k0, d = query - b * Lq, key - b * Lk, lk - lq
                kept_row = h.to(tl.int64) * kept_h + kept_place(query, part)
            start = tl.maximum(-(c * BLOCK + d), 0) // BLOCK * BLOCK
            stop = tl.minimum(lq, lk - d - c * BLOCK)
            for m0 in tl.range(start, stop, BLOCK):
                p0 = m0 + d
                n0 = p0 + c * BLOCK
                i = m0 + tl.arange(0, BLOCK)
                at = i + d
                j = n0 + tl.arange(0, BLOCK)
                lse = tl.load(LSE2 + kept_row + i, mask=i < lq, other=-HIDDEN) - rule.row_term(rule, h, at, p0, p0)
                delta = tl.load(DELTA + kept_row + i, mask=i < lq, other=0.0)
                R = rule.rows(rule, h, at[:, None], p0, p0)
                C = rule.cols(rule, h, j[None, :], n0, p0)
                q_base = Q + b * q_b + h.to(tl.int64) * q_h + q0 * q_l
                k_base = K + b * k_b + kv * k_h + k0 * k_l
                s = row_products(q_base, k_base, m0, n0, q_l, k_l, lq, lk, BLOCK, HEAD_DIM, D, PRECISION, PACKED)
                if SOFTCAP:
                    s = rule.score(capped(s, scale2), softcap, S, R, C, j[None, :], first, last, rule)
                else:
                    s = rule.score(s, scale2, S, R, C, j[None, :], first, last, rule)
                there = j < lk
                if PACKED:
                    there = there & (j >= 0)
                if PAD is not None:
                    keep = tl.load(PAD + b * p_b + k0 + j, mask=there, other=0)
                    s = tl.where(keep[None, :] != 0, s, HIDDEN)
                x = j[None, :] - at[:, None]
                s = tl.where((x >= low) & (x <= high) & there[None, :], s, HIDDEN)
                p = tl.math.exp2(s - lse[:, None])
                do_base = DO + b * do_b + h.to(tl.int64) * do_h + q0 * do_l
                v_base = V + b * v_b + kv * v_h + k0 * v_l
                dp = row_products(do_base, v_base, m0, n0, do_l, v_l, lq, lk, BLOCK, VALUE_DIM, DV, PRECISION, PACKED)
                if SEED is not None:
                    w0, w1 = load_words(WORDS, kept_row, i)
                    x = draw(w0[:, None], w1[:, None], j[None, :])
                    dp = tl.where(stays(x, threshold), dp * kept, 0.0)
                total += rule.along(p * (dp - delta[:, None]), S, R, j[None, :], first, last, rule)
        g = block_diagonals(total, SUM_PRECISION)
        copy = (c + behind) % 2
        base = BLOCKS + copy * g_copy + h.to(tl.int64) * g_h
        pointers, used = slot_pointers(base, 0, c * BLOCK, g_zero, BLOCK, BLOCK, 16)
        tl.store(pointers, g, mask=used)
