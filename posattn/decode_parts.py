"""Which keys the queries of a decoding call see: entries of the batch that see the same ones, and what is hidden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Batch entries that see the same keys: their queries stand at position, their keys are first .. last - 1."""

    batch: slice
    position: int
    first: int
    last: int
    keys: Tensor  # (batch, Hk, last - first, D)
    values: Tensor


def parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seqlens: Tensor | None,
    start: int,
    left: int,
    right: int,
    whole: bool,
) -> Iterator[Part]:
    """whole: also the keys that no query sees, except those beyond an entry's length."""
    queries, page = q.shape[2], 0 if block_table is None else k.shape[1]
    room = k.shape[2] if block_table is None else block_table.shape[1] * page
    if seqlens is None:
        spans = [(slice(0, q.shape[0]), room)] if block_table is None else each(q.shape[0], room)
    else:
        lengths = [min(max(0, n), room) for n in seqlens.tolist()]
        if block_table is None and len(set(lengths)) == 1:
            spans = [(slice(0, len(lengths)), lengths[0])]
        else:
            spans = [(slice(b, b + 1), n) for b, n in enumerate(lengths)]
    for batch, count in spans:
        position = start if seqlens is None else count - queries
        first, last = 0, count
        if not whole:
            first = 0 if left < 0 else max(0, position - left)
            last = count if right < 0 else min(count, position + queries + right)
        if block_table is None:
            keys, values = k[batch, :, first:last], v[batch, :, first:last]
        else:
            pages = block_table[batch.start, first // page : max(first, last + page - 1) // page].long()
            edge = first % page
            keys, values = (
                t[pages].flatten(0, 1)[edge : edge + max(0, last - first)].transpose(0, 1)[None]
                for t in (k, v)
            )
        yield Part(batch, position, first, last, keys, values)


def each(batch: int, count: int) -> list[tuple[slice, int]]:
    return [(slice(b, b + 1), count) for b in range(batch)]


def hidden(part: Part, queries: int, left: int, right: int, device: torch.device) -> Tensor | None:
    """(Lq, keys), True where a query does not see a key; None where they all see all."""
    sees_first = left < 0 or part.first - (part.position + queries - 1) >= -left
    sees_last = right < 0 or part.last - 1 - part.position <= right
    if sees_first and sees_last:
        return None
    i = torch.arange(part.position, part.position + queries, device=device)[:, None]
    offset = torch.arange(part.first, part.last, device=device) - i
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    return hidden


def padding(part: Part, key_mask: Tensor | None) -> Tensor | None:
    """(batch, 1, 1, keys), True for a key that does not count."""
    if key_mask is None:
        return None
    return ~key_mask[part.batch, None, None, part.first : part.last]


def either(hidden: Tensor | None, padding: Tensor | None) -> Tensor | None:
    if hidden is None or padding is None:
        return padding if hidden is None else hidden[None, None]
    return hidden | padding
