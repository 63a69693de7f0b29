"""Dropout of the probabilities: which of them stay, the same bits in every kernel and in plain torch.

With Philox4x32-10, key seed[0] and counter (i, h, b, 0), words w0 and w1: query i of head h keeps key j where the hash
x = w0 + j * 0x9E3779B1; x ^= x >> 16; x *= 0x85EBCA6B; x ^= x >> 13; x *= w1 | 1 (uint32) is at least
round(p * 2^32). seed, int64 [4], holds the key and where rows, keys and heads begin. A row costs ten rounds, a score
nine instructions. The rows' words are made by the kernels that own rows; the backward keeps them beside the lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import ASM_LOADS, load_scattered


@triton.jit
def row_words(SEED, b, h, q0, k0, i):
    """w0, moved on to key k0, and w1 | 1 of rows q0 + i, uint32."""
    row = (tl.load(SEED + 1) + q0).to(tl.int32) + i
    zero = row * 0
    head = zero + (tl.load(SEED + 3) + h).to(tl.int32)
    w0, w1, _, _ = tl.philox(tl.load(SEED), row, head, zero + b.to(tl.int32), zero)
    return w0 + (tl.load(SEED + 2) + k0).to(tl.uint32) * 0x9E3779B1, w1 | 1


@triton.jit
def store_words(WORDS, row, i, length, w0, w1):
    """WORDS has two places beside each of lse's (sequences.py), fp32 that hold these bits."""
    pair = WORDS + 2 * (row + i)
    tl.store(pair, w0.to(tl.float32, bitcast=True), mask=i < length)
    tl.store(pair + 1, w1.to(tl.float32, bitcast=True), mask=i < length)


@triton.jit
def load_words(WORDS, row, i):
    """Anything behind the last row of a sequence."""
    pair = WORDS + 2 * (row + i)
    w0 = load_scattered(pair).to(tl.uint32, bitcast=True)
    return w0, load_scattered(pair + 1).to(tl.uint32, bitcast=True)


@triton.jit
def draw(w0, w1, j):
    """The hash of keys j; all of them broadcast to the tile."""
    x = w0 + j.to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    return (x ^ (x >> 13)) * w1


@triton.jit
def choose(kept, dropped, x, threshold):
    """By what was drawn, for what is rounded next: the compiler would round both to 16 bit and pick halves of words."""
    if ASM_LOADS:
        return tl.inline_asm_elementwise(
            "{ .reg .pred in; setp.hs.u32 in, $3, $4; selp.f32 $0, $1, $2, in; }",
            "=f,f,f,r,r", [kept, dropped, x, threshold], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where(stays(x, threshold), kept, dropped)


@triton.jit
def stays(x, threshold):
    return x >= threshold.to(tl.uint32, bitcast=True)


def constants(p: float) -> tuple[int, float]:
    """(round(p * 2^32) as a signed number of 32 bits, what kept probabilities are multiplied by)."""
    threshold = min(round(p * 2**32), 2**32 - 1)
    return threshold - (threshold >> 31 << 32), 1.0 / (1.0 - p) if p < 1.0 else 0.0
