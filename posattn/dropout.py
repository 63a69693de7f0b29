"""Dropout of attention's probabilities: which pairs are kept is a function of a seed and of the pair's place.

So backward, a part of the model that is made again, and another device find the same pairs without a mask in memory.
A row's two random words come from Philox4x32-10 (Salmon et al., SC 2011) at the counter (query row, head, batch, 0);
from them and the key's number the bits of a score are mixed in 32 bits by multiplications and shifts, as in the
finalizer of MurmurHash3. kernels/dropout.py computes the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .noise import philox

_WORD = 0xFFFFFFFF
_STEP, _MIX = 0x9E3779B1, 0x85EBCA6B


class Dropout(NamedTuple):
    """p: the probability to drop a pair, below 1. seed: int64 (4,), the seed and the first row, key and head."""

    p: float
    seed: Tensor

    def threshold(self) -> int:
        """A pair is kept whose 32 bits are at least this."""
        return min(round(self.p * 2**32), _WORD)


def draw(p: float, query_start: int, key_start: int, device: torch.device) -> Dropout | None:
    """A new seed from the device's generator; None for p = 0. Nothing waits for the device."""
    if p == 0.0:
        return None
    seed = torch.randint(2**62, (4,), dtype=torch.int64, device=device)
    first = torch.zeros_like(seed)
    first[1], first[2] = query_start, key_start
    keep = torch.zeros_like(seed)
    keep[0] = 1
    return Dropout(p, seed * keep + first)


def kept(dropout: Dropout, batch: slice, heads: slice, rows: Tensor, columns: Tensor) -> Tensor:
    """Which pairs are kept: bool (batch, heads, rows, columns); rows and columns are int64 vectors of numbers."""
    seed = dropout.seed
    b, h = (
        torch.arange(part.start, part.stop, device=rows.device, dtype=torch.int64) for part in (batch, heads)
    )
    shape = (len(b), len(h), len(rows))
    counters = (
        (rows + seed[1] & _WORD).expand(shape),
        (h + seed[3] & _WORD)[:, None].expand(shape),
        (b & _WORD)[:, None, None].expand(shape),
        torch.zeros(shape, dtype=torch.int64, device=rows.device),
    )
    w0, w1, _, _ = philox(seed[0], *counters)
    x = w0[..., None] + (columns + seed[2] & _WORD) * _STEP & _WORD
    x ^= x >> 16
    x = x.mul_(_MIX).bitwise_and_(_WORD)
    x ^= x >> 13
    x = x.mul_((w1 | 1)[..., None]).bitwise_and_(_WORD)
    return x >= dropout.threshold()
