"""The bias of a block that each query brings along, relative[b, h, i, -o] at the offsets o = 0, -1, ..., 1 - W.

In the rows of a block, last row first, the numbers of one offset stand one place further to the right from row to
row. Read with rows one number shorter, of a buffer with room between the rows, they are columns: `diagonal_sums` in
strips.py does that, too. So a band is copied there and back, and nothing is gathered.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .strips import Block, Rule


class Band(NamedTuple):
    """The keys of a block that relative reaches, and which of its numbers: those of [low, high), for o = -w."""

    keys: range
    low: int
    high: int


def band(relative: Tensor, rule: Rule, block: Block) -> Band:
    shift = rule.shift + block.ahead
    first = max(block.keys.start, block.rows.start - shift - relative.shape[3] + 1)
    last = max(first, min(block.keys.stop, block.rows.stop - shift))
    low = max(0, block.rows.start - shift - (last - 1))
    high = min(relative.shape[3], block.rows.stop - shift - first)
    return Band(range(first, last), low, max(low, high))


def add_band(scores: Tensor, scratch: Tensor, relative: Tensor, rule: Rule, block: Block) -> None:
    """Adds to scores (batch, heads, rows, keys); scratch has room for batch * heads * rows * (rows + keys)."""
    part = band(relative, rule, block)
    if part.keys:
        padded, columns = _sheared(scratch, part, rule, block)
        padded.zero_()
        columns.copy_(_numbers(relative, part, block).flip(2, 3))
        start = block.keys.start
        scores[..., part.keys.start - start : part.keys.stop - start] += padded[..., : len(part.keys)]


def write_gradient(
    into: Tensor, dS: Tensor, scratch: Tensor, relative: Tensor, rule: Rule, block: Block
) -> None:
    """Writes to `into`, of zeros like relative, the logit gradients dS of the pairs that it was added to."""
    part = band(relative, rule, block)
    if part.keys:
        padded, columns = _sheared(scratch, part, rule, block)
        start = block.keys.start
        padded[..., : len(part.keys)] = dS[..., part.keys.start - start : part.keys.stop - start]
        padded[..., len(part.keys) :] = 0
        _numbers(into, part, block).copy_(columns.flip(2, 3))


def _numbers(relative: Tensor, part: Band, block: Block) -> Tensor:
    """(batch, heads, rows, high - low), a view."""
    return relative[block.batch, block.heads, block.rows.start : block.rows.stop, part.low : part.high]


def _sheared(scratch: Tensor, part: Band, rule: Rule, block: Block) -> tuple[Tensor, Tensor]:
    """Two views of scratch: (batch, heads, rows, keys + rows), and its diagonals high - 1, ..., low as columns."""
    batch, heads, rows, _ = block.shape()
    pitch = len(part.keys) + rows
    padded = scratch[: batch * heads * rows * pitch].view(batch, heads, rows, pitch)
    # Row 0 is the last query; from it, key `start` is at w = last.
    last = block.rows.stop - 1 - part.keys.start - rule.shift - block.ahead
    size = (batch, heads, rows, part.high - part.low)
    strides = (padded.stride(0), padded.stride(1), pitch - 1, 1)
    return padded, padded.as_strided(size, strides, padded.storage_offset() + last - (part.high - 1))
