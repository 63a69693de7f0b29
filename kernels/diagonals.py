"""Sums along the diagonals of tiles: the gradient of a bias that depends on j - i only.

A tile [M, N] is cut in 8 x 8 blocks. Blocks of one block diagonal are added up by a product with a constant one-hot
matrix, x[(p, q), (a, b)] @ onehot[(a, b), slot] with slot = b - a + M/8 - 1, so that what leaves the tile is 64 numbers
a block diagonal, no atomic a score: the sums over the pairs (8 a + p, 8 b + q), which go to j - i = 8 (b - a) + q - p.

In fixed order they go to fp32 [copies, H, block diagonals, 64] instead, each to a place of its own: entry
[zero + b - a, p * 8 + q]. `fold` adds the 8 entries that share an offset.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def onehot(M: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr, TURNED: tl.constexpr = False):
    """[M/8 * N/8, SLOTS]: which block of a tile stands on which of its block diagonals; TURNED, of a tile [N, M]."""
    c = tl.arange(0, (M // 8) * (N // 8))
    if TURNED:
        slot = c // (M // 8) - c % (M // 8) + (M // 8 - 1)
    else:
        slot = c % (N // 8) - c // (N // 8) + (M // 8 - 1)
    return (slot[:, None] == tl.arange(0, SLOTS)[None, :]).to(DTYPE)


@triton.jit
def block_diagonals(x, PRECISION: tl.constexpr, TURNED: tl.constexpr = False):
    """[M, N] -> [64, SLOTS]: the 8 x 8 blocks of each block diagonal, added up; SLOTS >= M/8 + N/8 - 1.

    TURNED: the same of the tile's transpose [N, M].
    """
    M: tl.constexpr = x.shape[1] if TURNED else x.shape[0]
    N: tl.constexpr = x.shape[0] if TURNED else x.shape[1]
    SLOTS: tl.constexpr = 16 if M + N <= 136 else 32
    if TURNED:
        blocks = x.reshape(N // 8, 8, M // 8, 8).permute(3, 1, 0, 2).reshape(64, (M // 8) * (N // 8))
    else:
        blocks = x.reshape(M // 8, 8, N // 8, 8).permute(1, 3, 0, 2).reshape(64, (M // 8) * (N // 8))
    return tl.dot(blocks, onehot(M, N, SLOTS, x.dtype, TURNED), input_precision=PRECISION)


@triton.jit
def slot_pointers(base, m0, n0, zero, M: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr):
    """Where the block diagonals of the tile at (m0, n0) live, and which slots are used."""
    slot = tl.arange(0, SLOTS)
    # One number moves with the tile; the rest is the same for every tile and leaves the loop.
    corner = base + (zero + ((n0 - m0) >> 3) - (M // 8 - 1)).to(tl.int64) * 64
    pointers = corner + (slot[None, :] * 64 + tl.arange(0, 64)[:, None])
    return pointers, (slot < M // 8 + N // 8 - 1)[None, :] & (tl.arange(0, 64) >= 0)[:, None]


@triton.jit
def add_diagonals(dl, rule, m0, n0, h, PRECISION: tl.constexpr, TURNED: tl.constexpr = False):
    """Add the diagonal sums of one tile of logit gradients to those of the head, j - i = x at rule.zero + x."""
    M: tl.constexpr = dl.shape[1] if TURNED else dl.shape[0]
    N: tl.constexpr = dl.shape[0] if TURNED else dl.shape[1]
    SLOTS: tl.constexpr = 16 if M + N <= 136 else 32
    g = block_diagonals(dl, PRECISION, TURNED)
    entry = tl.arange(0, 64)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    # One number moves with the tile; the rest is the same for every tile and leaves the loop.
    corner = rule.grad + h.to(tl.int64) * rule.grad_stride + (rule.zero + (n0 - m0) - (M - 8)).to(tl.int64)
    x = slot * 8 + (entry % 8 - entry // 8)
    tl.atomic_add(corner + x, g, mask=(slot < M // 8 + N // 8 - 1) & (entry >= 0), sem="relaxed")


@triton.jit(do_not_specialize=["zero", "lowest", "length"])
def fold_diagonals(
    BLOCKS, TABLE, blocks_stride, table_stride, copy_stride, zero, lowest, length,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, 8)
    total = tl.zeros([BLOCK, 8], tl.float32)
    for copy in tl.static_range(COPIES):
        x = lowest + t
        q = (p[None, :] + (x[:, None] & 7)) & 7
        row = zero + ((x[:, None] + p[None, :] - q) >> 3)
        pointers = BLOCKS + h * blocks_stride + row.to(tl.int64) * 64 + p[None, :] * 8 + q
        total += tl.load(pointers + copy * copy_stride, mask=(t < length)[:, None], other=0.0)
    tl.store(TABLE + h * table_stride + t, tl.sum(total, 1), mask=t < length)


def room(behind: int, ahead: int, packed: bool) -> tuple[int, int]:
    """How many block diagonals the tiles of offsets from 1 - behind to ahead - 1 touch, and which of them is b - a = 0.

    One more than that: `fold` reads the block diagonal after the last, where nothing can stand. Tiles of packed
    sequences need not begin at multiples of their size.
    """
    over = 16 if packed else 0
    zero = triton.cdiv(behind, 128) * 16 + over
    return zero + triton.cdiv(ahead, 128) * 16 + over + 1, zero


def fold(sums: Tensor, table: Tensor, zero: int, behind: int) -> None:
    """table [H, behind + ahead - 1] = for every offset from 1 - behind up, its sum over the copies, in one order."""
    copies, heads = sums.shape[:2]
    fold_diagonals[(triton.cdiv(table.shape[1], 128), heads)](
        sums, table, sums.stride(1), table.stride(0), sums.stride(0), zero, 1 - behind, table.shape[1],
        COPIES=copies, BLOCK=128,
    )  # fmt: skip
