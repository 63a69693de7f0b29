"""Where a program works: which rows of which head and, where sequences are packed, in which sequence.

Packed, the rows of all batch entries are one list, and cu_q, cu_k [S + 1] say where each sequence begins in it; a
sequence never crosses a batch entry. Tile t of a head belongs to the last sequence s with cu[s] // BLOCK + s <= t:
every sequence then has tiles enough for its rows, total // BLOCK + S tiles do for a head whatever the lengths are, and
nothing is counted on the host. A program that finds no rows left in its sequence returns. Rows behind the last
sequence belong to none: `clear_behind` writes there what a query that sees nothing gets.

What is kept for a row beside its tensors (lse in base 2, delta) has room for whole tiles of KEPT rows: a sequence's
begins at place (cu_q[s] // KEPT + s) * KEPT of its head's, by the same count; unpacked, a batch entry's at 0.

In a kernel i and j count from the start of the sequence, base pointers stand there, and query i has the position
i + d, d = keys - queries; key j has the position j. Rules are given positions. Unpacked, d is the constant 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import uniform

KEPT = tl.constexpr(128)  # at least any tile's rows


@triton.jit
def owner(CU, count, tile, BLOCK: tl.constexpr):
    """The sequence that tile belongs to."""
    first = tile * 0
    last = count - 1 + first
    while first < last:
        middle = (first + last + 1) // 2
        mine = tl.load(CU + middle) // BLOCK + middle <= tile
        first = tl.where(mine, middle, first)
        last = tl.where(mine, last, middle - 1)
    return first


@triton.jit
def sequence(CU_Q, CU_K, s, Lq, Lk):
    """First query and key in the lists of all, batch entry of the queries, and lengths of sequence s."""
    query = uniform(tl.load(CU_Q + s))
    key = uniform(tl.load(CU_K + s))
    return query, key, uniform(tl.load(CU_Q + s + 1)) - query, uniform(tl.load(CU_K + s + 1)) - key


@triton.jit
def kept_place(query, s):
    return (query // KEPT + s).to(tl.int64) * KEPT


@triton.jit
def rows_of_program(CU_Q, CU_K, count, Lq, Lk, H, GROUP, BLOCK_M: tl.constexpr, kept_h=0):
    """Which rows a program owns.

    -> m0, its first row; head; batch and key head (int64); first row and key of the sequence in the batch entry
    (int64); lengths of the sequence; d; where its head keeps its rows in [B, H, Lq] (int64), and where in what is kept
    beside, kept_h places a head (int64); and a place for sums of its own: (batch and) head, number in it. m0 < 0: no
    rows.
    Long rows first: under a causal mask the last block of rows sees the most keys. Programs of one head are neighbours
    and so share its keys in L2.
    """
    pid = tl.program_id(0)
    if CU_Q is None:
        blocks = tl.cdiv(Lq, BLOCK_M)
        bh = pid // blocks
        h = bh % H
        n = blocks - 1 - pid % blocks
        b = (bh // H).to(tl.int64)
        row, there = bh.to(tl.int64) * Lq, bh.to(tl.int64) * kept_h
        return n * BLOCK_M, h, b, (h // GROUP).to(tl.int64), 0, 0, Lq, Lk, 0, row, there, bh, n
    else:
        tiles = tl.num_programs(0) // H
        h = pid // tiles
        n = pid % tiles
        s = owner(CU_Q, count, n, BLOCK_M)
        query, key, lq, lk = sequence(CU_Q, CU_K, s, Lq, Lk)
        m0 = (tl.cdiv(lq, BLOCK_M) - 1 - (n - query // BLOCK_M - s)) * BLOCK_M
        b = (query // Lq).to(tl.int64)
        q0 = query - b * Lq
        row, there = (b * H + h) * Lq + q0, h.to(tl.int64) * kept_h + kept_place(query, s)
        return m0, h, b, (h // GROUP).to(tl.int64), q0, key - b * Lk, lq, lk, lk - lq, row, there, h, n


@triton.jit
def keys_of_program(CU_Q, CU_K, count, Lq, Lk, H, GROUP, kept_h, BLOCK_N: tl.constexpr):
    """Which keys a program owns -> n0, key head, batch (int64), first row and key (int64), lengths, d; where head 0
    keeps what is kept of the rows (int64).

    First keys first: under a causal mask they are seen by the most queries. n0 >= keys: none.
    """
    pid = tl.program_id(0)
    heads = H // GROUP
    if CU_Q is None:
        blocks = tl.cdiv(Lk, BLOCK_N)
        b = (pid // blocks // heads).to(tl.int64)
        return pid % blocks * BLOCK_N, pid // blocks % heads, b, 0, 0, Lq, Lk, 0, b * H * kept_h
    else:
        tiles = tl.num_programs(0) // heads
        n = pid % tiles
        s = owner(CU_K, count, n, BLOCK_N)
        query, key, lq, lk = sequence(CU_Q, CU_K, s, Lq, Lk)
        b = (key // Lk).to(tl.int64)
        n0 = (n - key // BLOCK_N - s) * BLOCK_N
        return n0, pid // tiles, b, query - b * Lq, key - b * Lk, lq, lk, lk - lq, kept_place(query, s)


@triton.jit(do_not_specialize=["count", "length"])
def clear_behind(X, CU, VALUES, count, length, x_h, x_l, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """X [H, length, D] = VALUES[h], or 0 without, in the rows behind the last sequence, which no program owns."""
    first = tl.program_id(0) * BLOCK
    h = tl.program_id(1)
    last = tl.load(CU + count)
    if first + BLOCK > last:
        row = first + tl.arange(0, BLOCK)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        filled = tl.zeros([BLOCK, WIDTH], tl.float32)
        if VALUES is not None:
            filled += tl.load(VALUES + h)
        pointers = X + h.to(tl.int64) * x_h + row.to(tl.int64) * x_l + column
        tl.store(pointers, filled.to(X.dtype.element_ty), mask=(row >= last) & (row < length) & (column < D))


@triton.jit(do_not_specialize=["count", "lowest", "length"])
def fold_rows(ROWS, OUT, CU_Q, CU_K, count, lowest, length, BLOCK: tl.constexpr):
    """OUT[x] = the sum of ROWS over the queries that stand at position lowest + x, by sequences, in order."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.range(0, count):
        query, _, lq, lk = sequence(CU_Q, CU_K, s, 1, 1)
        i = lowest + t - (lk - lq)
        total += tl.load(ROWS + query + i, mask=(i >= 0) & (i < lq), other=0.0)
    tl.store(OUT + t, total, mask=t < length)
