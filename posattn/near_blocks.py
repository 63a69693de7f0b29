"""Blocks that leave out the keys that near.py finds negligible, one query head at a time where that saves time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockwise_bias import BlockBias
from .blockwise_parts import Part, blocks
from .near import ROWS, needed_keys
from .strips import Block, Rule

NEAR_ROWS = 192  # of a block: with more, more keys are not needed by all of its rows
CALL = 1 << 14  # pairs that take about as long as all there is around the products of a block
WORTH = 0.9  # of the time of the usual blocks: a head that needs more is computed as usual


class NearBlocks:
    """The blocks of a call, as `blocks` and with less to do; arguments as in ops.py, lse in backward only."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        bias: BlockBias,
        *,
        key_mask: Tensor | None,
        scale: float,
        sinks: Tensor | None,
        lse: Tensor | None = None,
    ) -> None:
        self.first, self.last = needed_keys(
            q, k, bias.line, bias.rule, key_mask=key_mask, scale=scale, sinks=sinks, lse=lse
        )
        self.rule, self.key_heads, self.group = bias.rule, k.shape[1], q.shape[1] // k.shape[1]

    def blocks(self, part: Part, rows: int, least: int, scratch: int | None) -> Iterator[Block]:
        """Of a part of all rows. `rows`, `least` and `scratch` as in `blocks`."""
        step = max(ROWS, min(rows, NEAR_ROWS) // ROWS * ROWS)
        first, last = self._ranges(part, step)  # (batch, Hq, blocks)
        size = (last - first).clamp(min=0) * self._rows(part, step)
        together = (last.amax(0) - first.amin(0)).clamp(min=0) * self._rows(part, step)
        count = first.shape[2]
        alone_cost = (size + CALL).sum((0, 2))  # (Hq,)
        together_cost = len(part.batch) * together.sum(1) + CALL * count
        usual = list(blocks(self.rule, part, self.key_heads, self.group, rows, least, scratch))
        usual_cost = _cost(usual) / first.shape[1]
        cost = torch.minimum(alone_cost, together_cost)
        short = (cost < WORTH * usual_cost).tolist()
        if not any(short):
            yield from usual
            return
        yield from self._usual(short, part, rows, least, scratch)
        starts = range(part.rows.start, part.rows.stop, step)
        entries = range(len(part.batch))
        merged = (together_cost <= alone_cost).tolist()
        all_first, all_last = first.amin(0).tolist(), last.amax(0).tolist()
        each_first, each_last = first.tolist(), last.tolist()
        for h in (h for h, is_short in enumerate(short) if is_short):
            for n, start in enumerate(starts):
                span = range(start, min(start + step, part.rows.stop))
                if merged[h]:
                    needed = range(all_first[h][n], all_last[h][n])
                    yield from self._cut(part, part.batch, h, span, needed, least, scratch)
                    continue
                for b in entries:
                    needed = range(each_first[b][h][n], each_last[b][h][n])
                    batch = range(part.batch.start + b, part.batch.start + b + 1)
                    yield from self._cut(part, batch, h, span, needed, least, scratch)

    def _ranges(self, part: Part, step: int) -> tuple[Tensor, Tensor]:
        """The keys that each block of `step` rows needs and may see, for each batch entry of the part and head."""
        count = -(-len(part.rows) // step)
        first, last = (t[part.batch.start : part.batch.stop] for t in (self.first, self.last))
        missing = count * step // ROWS - first.shape[2]
        first = F.pad(first, (0, missing), value=part.keys.stop).unflatten(2, (count, -1)).amin(3)
        last = F.pad(last, (0, missing), value=part.keys.start).unflatten(2, (count, -1)).amax(3)
        seen = [self._seen(part, range(s, min(s + step, part.rows.stop))) for s in part.rows[::step]]
        begin = torch.tensor([keys.start for keys in seen], device=first.device)
        end = torch.tensor([keys.stop for keys in seen], device=first.device)
        first, last = torch.maximum(first, begin), torch.minimum(last, end)
        return first, torch.maximum(first, last)

    def _seen(self, part: Part, rows: range) -> range:
        return part.rule(self.rule).keys(rows, part.keys.start, part.keys.stop)

    def _rows(self, part: Part, step: int) -> Tensor:
        sizes = [min(step, part.rows.stop - start) for start in part.rows[::step]]
        return torch.tensor(sizes, device=self.first.device)

    def _cut(
        self, part: Part, batch: range, head: int, rows: range, needed: range, least: int, scratch: int | None
    ) -> Iterator[Block]:
        """One head's pairs of these rows; several blocks where `scratch` numbers do not hold them."""
        step, entries = len(rows), len(batch)
        if scratch is not None and needed:
            step = min(step, max(least, scratch // len(needed)))
            entries = min(entries, max(1, scratch // (step * len(needed))))
        key_head = slice(head // self.group, head // self.group + 1)
        for start in range(rows.start, rows.stop, step):
            span = range(start, min(start + step, rows.stop))
            seen = self._seen(part, span)
            first = max(seen.start, needed.start)
            keys = range(first, max(first, min(seen.stop, needed.stop)))
            for b in range(batch.start, batch.stop, entries):
                some = slice(b, min(b + entries, batch.stop))
                heads = slice(head, head + 1)
                yield Block(some, key_head, heads, span, keys, part.padding, part.ahead)

    def _usual(
        self, short: list[bool], part: Part, rows: int, least: int, scratch: int | None
    ) -> Iterator[Block]:
        """Those of the other heads: key heads together where all of their heads are long."""
        group = self.group
        whole = [not any(short[h * group : (h + 1) * group]) for h in range(self.key_heads)]
        for is_whole, run in groupby(range(self.key_heads), key=lambda h: whole[h]):
            heads = list(run)
            if is_whole:
                # Of several entries, some of the heads could not be flattened.
                together = len(heads) == self.key_heads or len(heads) == 1
                for entries in [part.batch] if together else [range(b, b + 1) for b in part.batch]:
                    some = part._replace(batch=entries)
                    for block in blocks(self.rule, some, len(heads), group, rows, least, scratch):
                        yield _moved(block, heads[0], heads[0] * group)
                continue
            for head in range(heads[0] * group, (heads[-1] + 1) * group):
                if not short[head]:
                    for block in blocks(self.rule, part, 1, 1, rows, least, scratch):
                        yield _moved(block, head // group, head)


def _moved(block: Block, key_head: int, head: int) -> Block:
    key_heads, heads = block.key_heads, block.heads
    return block._replace(
        key_heads=slice(key_heads.start + key_head, key_heads.stop + key_head),
        heads=slice(heads.start + head, heads.stop + head),
    )


def _cost(made: list[Block]) -> float:
    """In pairs."""
    return sum(b * h * rows * keys + CALL for b, h, rows, keys in (block.shape() for block in made))


def some_blocks(
    near: NearBlocks | None,
    rule: Rule,
    part: Part,
    key_heads: int,
    group: int,
    rows: int,
    least: int,
    scratch: int | None,
) -> Iterator[Block]:
    """Those of `blocks`, or with `near` those without the pairs that are negligible."""
    if near is None:
        return blocks(rule, part, key_heads, group, rows, least, scratch)
    return near.blocks(part, rows, least, scratch)
