"""Blocks of query rows, the bias of a block as a view of the table, and the way back for its gradient.

A bias of the offset is one line of numbers per head, line[h, j - i + Lq - 1]. For the rows e-1, e-2, ..., s
(last first) of a block, row r of the bias is the line from Lq - e + r on: a view in which both strides are 1,
so the bias costs no memory and nothing is gathered. What is not visible is INVISIBLE on the line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Finite, so that no difference of two logits is NaN. With a logsumexp of DEAD or less there was no visible key.
INVISIBLE = -1e30
DEAD = -1e29


class Rule(NamedTuple):
    """Lengths, and what is visible: -left <= j - i + shift <= right, -1 being open."""

    query_length: int
    key_length: int
    shift: int
    left: int
    right: int

    def keys(self, rows: range, first: int, last: int) -> range:
        """What some of these queries see of the keys [first, last)."""
        if self.left >= 0:
            first = max(first, rows.start - self.shift - self.left)
        if self.right >= 0:
            last = min(last, rows.stop - self.shift + self.right)
        return range(first, max(first, last))

    def most_keys(self, rows: int, most: int) -> int:
        """What `rows` queries one after the other can see of `most` keys."""
        return min(most, self.left + self.right + rows) if self.left >= 0 and self.right >= 0 else most


class Batches(NamedTuple):
    """Consecutive batch entries that see the same keys: [first, last), where padding is 0."""

    start: int
    end: int
    first: int
    last: int
    padding: Tensor | None  # (Lk,), 0 or INVISIBLE; None without gaps between first and last


class Block(NamedTuple):
    """What is computed at a time: some batch entries, key heads with their query heads, rows, keys."""

    batch: slice
    key_heads: slice
    heads: slice
    rows: range
    keys: range
    padding: Tensor | None  # (Lk,)
    ahead: int = 0  # key j has the offset j - i + rule.shift + ahead from query i
    several: bool = False  # sequences: pairs of two different ones are hidden

    def shape(self) -> tuple[int, int, int, int]:
        """(batch, query heads, rows, keys)."""
        batch = self.batch.stop - self.batch.start
        return batch, self.heads.stop - self.heads.start, len(self.rows), len(self.keys)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """(B, Hq, Lq, ...) -> (batch, heads, rows, ...) with the last row first, a copy."""
        return tensor[self.batch, self.heads, self.rows.start : self.rows.stop].flip(2)

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """The reverse of rows_of."""
        rows = tensor[self.batch, self.heads, self.rows.start : self.rows.stop]
        rows.copy_(value.view(rows.shape).flip(2))  # may cast

    def fill(self, tensor: Tensor, value: float | Tensor) -> None:
        tensor[self.batch, self.heads, self.rows.start : self.rows.stop] = value

    def keys_of(self, tensor: Tensor) -> Tensor:
        """(B, Hk, Lk, D) -> (batch, key heads, keys, D), a view."""
        return tensor[self.batch, self.key_heads, self.keys.start : self.keys.stop]


def same_keys(key_mask: Tensor | None, batch: int, key_length: int, dtype: torch.dtype) -> list[Batches]:
    """Padding at the ends only shortens the range of keys; a gap between them needs a number per key."""
    if key_mask is None:
        return [Batches(0, batch, 0, key_length, None)]
    seen = key_mask.to(torch.int32)
    numbers = torch.stack([seen.argmax(1), key_length - seen.flip(1).argmax(1), seen.sum(1)], dim=1)
    groups: list[Batches] = []
    for b, (first, last, count) in enumerate(numbers.tolist()):
        if count == 0:
            first = last = 0
        padding = None
        if count < last - first:
            padding = torch.zeros_like(key_mask[b], dtype=dtype).masked_fill_(~key_mask[b], INVISIBLE)
        if groups and padding is None is groups[-1].padding and groups[-1][2:4] == (first, last):
            groups[-1] = groups[-1]._replace(end=b + 1)
        else:
            groups.append(Batches(b, b + 1, first, last, padding))
    return groups


def make_line(
    rule: Rule, table: Tensor | None, slopes: Tensor | None, symmetric: bool, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """(Hq or 1, Lq + Lk - 1): the bias of every offset, INVISIBLE outside the window."""
    first = rule.shift - (rule.query_length - 1)
    offset = torch.arange(first, rule.shift + rule.key_length, device=like.device)
    if table is not None:
        line = table.to(dtype).clamp(min=INVISIBLE)
    elif slopes is not None:
        line = slopes.to(dtype)[:, None] * (-offset.abs() if symmetric else offset).to(dtype)
    else:
        line = torch.zeros_like(offset, dtype=dtype)[None]
    if rule.left >= 0:
        line = line.masked_fill(offset < -rule.left, INVISIBLE)
    if rule.right >= 0:
        line = line.masked_fill(offset > rule.right, INVISIBLE)
    return line.contiguous()


def line_range(rule: Rule, block: Block) -> range:
    """Which numbers of the line a block reads."""
    start = rule.query_length - block.rows.stop + block.keys.start + block.ahead
    return range(start, start + len(block.rows) + len(block.keys) - 1)


def strip(line: Tensor, rule: Rule, block: Block) -> Tensor:
    """(1, heads or 1, rows, keys): the bias of a block, last row first, as a view of the line."""
    part = line if line.shape[0] == 1 else line[block.heads]
    start = part.storage_offset() + line_range(rule, block).start
    size = (1, part.shape[0], len(block.rows), len(block.keys))
    return part.as_strided(size, (0, part.stride(0), 1, 1), start)


def diagonal_sums(scores: Tensor, scratch: Tensor) -> Tensor:
    """(batch, heads, C, n), last row first -> (heads, n + C - 1): sums along j - i and over the batch.

    With C zeros after each row and read again with rows one shorter, row r stands r places to the right: the
    diagonals have become columns. scratch has room for batch * heads * C * (n + C) numbers.
    """
    batch, heads, rows, n = scores.shape
    pitch = n + rows
    padded = scratch[: batch * heads * rows * pitch].view(batch, heads, rows, pitch)
    padded[..., :n] = scores
    padded[..., n:] = 0
    size = (batch, heads, rows, pitch - 1)
    strides = (padded.stride(0), padded.stride(1), pitch - 1, 1)
    return padded.as_strided(size, strides, padded.storage_offset()).sum((0, 2))


def sheared_sums(scores: Tensor) -> Tensor:
    """(heads, rows, n), last row first -> (heads, n + rows - 1): sums along j - i.

    Number d of row r is number d - r of the row: from each row to the next the reading starts one number earlier.
    That leaves the row only at the two ends, which `diagonal_sums` does.
    """
    heads, rows, n = scores.shape
    edge = rows - 1

    def small(part: Tensor) -> Tensor:
        return diagonal_sums(part[None], part.new_empty(heads * rows * (part.shape[2] + rows)))

    if n < 2 * rows:
        return small(scores)
    sums = scores.new_empty(heads, n + edge)
    middle = scores.as_strided(
        (heads, rows, n - edge), (scores.stride(0), n - 1, 1), scores.storage_offset() + edge
    )
    torch.sum(middle, 1, out=sums[:, edge:n])
    if edge:
        sums[:, :edge] = small(scores[:, :, :edge])[:, :edge]
        sums[:, n:] = small(scores[:, :, n - edge :])[:, edge:]
    return sums
