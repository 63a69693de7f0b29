"""The noise of stochastic positional encoding: what is kept of it, and the generator that makes it by position.

ConvSPE's noise goes on with the positions, so no tensor holds it: each number is a function of a seed and of its
place, by the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), here in int64 arithmetic and in Triton by `tl.philox`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


class Noise(NamedTuple):
    """The random part of positional codes; what is given here is never differentiated.

    codes: of a SineSPE (H, D, 2 K, R), the cosine's and the sine's rows of each frequency in turn; of a ConvSPE
    either a seed, int64 (1,), or (H, D, T, R), read at position + tap. Empty for an exact SineSPE.
    gate: (H, D, R), None without a gate. Both are float32 standard normal numbers.
    """

    codes: Tensor
    gate: Tensor | None


def philox(
    seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each counter, as int64; the counters (int64, 0 to 2^32 - 1) broadcast.

    A seed that is a tensor, int64 (), need not be known to the host.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox(0, zero, zero, zero, zero)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        # Products may wrap around in int64: their 64 bits are right all the same. Words that are only xored
        # until the next mask keep their upper half, which the mask then removes.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = _word(high, c1, k0)
        c2 = _word(low, c3, k1)
        c1, c3 = high, low
        k0, k1 = k0 + _KEY_STEPS[0] & _MASK, k1 + _KEY_STEPS[1] & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _word(product: Tensor, other: Tensor, key: int | Tensor) -> Tensor:
    """The upper half of the product, xor the other word, xor the key."""
    upper = product >> 32
    small = other ^ key if other.numel() < upper.numel() else other
    if small is other:
        upper ^= key
    mixed = upper.bitwise_xor_(small) if _covers(upper, small) else upper ^ small
    return mixed.bitwise_and_(_MASK)


def _covers(large: Tensor, small: Tensor) -> bool:
    shape: torch.Size = torch.broadcast_shapes(large.shape, small.shape)
    return shape == large.shape


def normal(seed: int, rows: range, times: range, realizations: int, like: Tensor) -> Tensor:
    """Standard normal numbers (len(rows), len(times), R) of ``like``'s device, in float32, or float64 as ``like``.

    The counter of realization r at row h * D + d and time t is (t, r // 4, row, 0); the four words w make
    ``u = ((w >> 8) + 0.5) / 2^24`` and, by Box and Muller, the numbers of four realizations in turn.
    """
    groups = -(-realizations // 4)

    def counter(values: range, *shape: int) -> Tensor:
        return torch.arange(values.start, values.stop, device=like.device).view(shape)

    words = philox(
        seed,
        counter(times, -1, 1),
        counter(range(groups), -1),
        counter(rows, -1, 1, 1),
        torch.zeros(1, dtype=torch.int64, device=like.device),
    )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    made = torch.empty(len(rows), len(times), groups, 4, dtype=dtype, device=like.device)
    for pair in (0, 2):
        radius, angle = ((word >> 8).to(dtype).add_(0.5).mul_(2.0**-24) for word in words[pair : pair + 2])
        radius.log_().mul_(-2.0).sqrt_()
        angle.mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=made[..., pair])
        torch.mul(radius, angle.sin_(), out=made[..., pair + 1])
    return made.flatten(2)[..., :realizations]
