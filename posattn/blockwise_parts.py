"""Which rows see which keys: the parts of a call, and the blocks that a part is computed in.

A part is all there is for some batch entries; or one of the sequences that a batch entry is cut into; or some short
ones, next to each other and as many queries as keys each, which cost less together than one by one: their offsets
are those of one sequence, and pairs of two different ones are hidden in the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .strips import Batches, Block, Rule, same_keys

if TYPE_CHECKING:
    from .ops import Sequences


class Part(NamedTuple):
    """Rows and keys of some batch entries; key j has the offset j - i + rule.shift + ahead from query i."""

    batch: range
    rows: range
    keys: range
    padding: Tensor | None  # (Lk,), 0 or INVISIBLE; None without gaps among the keys
    ahead: int = 0
    several: bool = False  # sequences

    def rule(self, rule: Rule) -> Rule:
        """The rule by numbers of rows and keys."""
        return rule._replace(shift=rule.shift + self.ahead)

    def hides_future(self, rule: Rule) -> bool:
        """Some query does not see the last key, for it is too far to the right."""
        return 0 <= rule.right < self.keys.stop - 1 - self.rows.start + rule.shift + self.ahead

    def is_plain(self, rule: Rule) -> bool:
        """Every query sees all of these keys, or key n is seen from query n on."""
        if self.padding is not None or self.several or not self.keys:
            return False
        first = self.keys.start + rule.shift + self.ahead  # the offset of the first key from row 0
        if 0 <= rule.left < self.rows.stop - 1 - first:
            return False
        corner = rule.right == 0 and first == self.rows.start
        return corner or not self.hides_future(rule)


def whole(
    batch: int, query_length: int, key_length: int, key_mask: Tensor | None, dtype: torch.dtype
) -> list[Part]:
    """One part for all batch entries that see the same keys."""
    groups = same_keys(key_mask, batch, key_length, dtype)
    return [
        Part(range(g.start, g.end), range(query_length), range(g.first, g.last), g.padding) for g in groups
    ]


class Cut:
    """Sequences on the host.

    Short ones are put together to at most `pack` rows and keys. parts: those with queries, in order; margin: by how
    much offsets in a part may leave those of a sequence.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch: int,
        query_length: int,
        key_length: int,
        key_mask: Tensor | None,
        dtype: torch.dtype,
        pack: int,
    ) -> None:
        self.sequences, self.shape, self.pack = sequences, (batch, query_length, key_length), pack
        ends_q, ends_k = torch.stack([sequences.cu_q, sequences.cu_k]).tolist()
        _check_longest("max_seqlen_q", sequences.max_q, ends_q)
        _check_longest("max_seqlen_k", sequences.max_k, ends_k)
        self.parts: list[Part] = []
        for (q0, q1), (k0, k1) in zip(pairwise(ends_q), pairwise(ends_k)):
            if q0 < q1:
                b = q0 // query_length
                first, before = b * query_length, b * key_length
                rows, keys = range(q0 - first, q1 - first), range(k0 - before, k1 - before)
                self._append(Part(range(b, b + 1), rows, keys, None, rows.stop - keys.stop))
        rest = range(ends_q[-1] - (batch - 1) * query_length, query_length)
        if rest:  # behind the last sequence: nobody's, and so without keys
            self.parts.append(Part(range(batch - 1, batch), rest, range(0), None))
        self.margin = max((len(part.rows) + len(part.keys) for part in self.parts if part.several), default=0)
        self._numbers: tuple[Tensor, Tensor] | None = None
        seen = self.parts
        if key_mask is not None:
            groups = same_keys(key_mask, batch, key_length, dtype)
            entries = [group for group in groups for _ in range(group.start, group.end)]
            seen = [_without_padding(part, entries[part.batch.start]) for part in seen]
        self.parts = _alike_together(self.parts, seen)

    def _append(self, part: Part) -> None:
        last = self.parts[-1] if self.parts else None
        # With the last one's `ahead`, a part has as many queries as keys.
        if last is not None and (last.batch, last.ahead) == (part.batch, part.ahead):
            rows, keys = range(last.rows.start, part.rows.stop), range(last.keys.start, part.keys.stop)
            if len(rows) <= self.pack and len(keys) <= self.pack:
                self.parts[-1] = Part(part.batch, rows, keys, None, part.ahead, several=True)
                return
        self.parts.append(part)

    def strangers(self, block: Block) -> Tensor:
        """(rows, keys), last row first: whether the pair is of two sequences."""
        if self._numbers is None:
            batch, query_length, key_length = self.shape
            queries = _number(self.sequences.cu_q, batch * query_length)
            keys = _number(self.sequences.cu_k, batch * key_length)
            self._numbers = queries.view(batch, query_length), keys.view(batch, key_length)
        queries, keys = (numbers[block.batch.start] for numbers in self._numbers)
        rows = queries[block.rows.start : block.rows.stop].flip(0)
        return rows[:, None] != keys[block.keys.start : block.keys.stop]

    def positions(self) -> Tensor:
        """(B * Lq,): where each query stands among the keys of its sequence."""
        cu_q, cu_k, *_ = self.sequences
        row = torch.arange(self.shape[0] * self.shape[1], device=cu_q.device)
        first = F.pad(cu_k.diff() - cu_q[1:], (0, 1))  # what is added to a row's number
        position = row + first.repeat_interleave(_with_rest(cu_q, len(row)), output_size=len(row))
        return torch.where(row < cu_q[-1], position, -self.sequences.max_q)  # behind the last: any that there is


def _check_longest(name: str, said: int, ends: list[int]) -> None:
    longest = max((end - start for start, end in pairwise(ends)), default=0)
    if longest > said:
        raise ValueError(f"{name} must be at least the longest sequence's length {longest}, got {said}")


def _number(cu: Tensor, length: int) -> Tensor:
    """0 for the rows of the first sequence, 1 for those of the second, ...: (length,)."""
    sequence = torch.arange(len(cu), device=cu.device)
    return sequence.repeat_interleave(_with_rest(cu, length))


def _with_rest(cu: Tensor, length: int) -> Tensor:
    """The lengths of all sequences, and what is behind them."""
    return torch.cat([cu, cu.new_full((1,), length)]).diff()


def _without_padding(part: Part, entry: Batches) -> Part:
    first = max(part.keys.start, entry.first)
    last = max(first, min(part.keys.stop, entry.last))
    return part._replace(keys=range(first, last), padding=entry.padding)


def _alike_together(parts: list[Part], seen: list[Part]) -> list[Part]:
    """Those seen, one for batch entries next to each other with equal sequences there and without gaps in the keys."""
    made: list[Part] = []
    place: dict[tuple[range, range], int] = {}  # of the last part of a sequence with such rows and keys
    for part, new in zip(parts, seen):
        where = part.rows, part.keys
        last = made[place[where]] if where in place else None
        if last is not None and _is_next(last, new):
            made[place[where]] = new._replace(batch=range(last.batch.start, new.batch.stop))
        else:
            place[where] = len(made)
            made.append(new)
    return made


def _is_next(last: Part, part: Part) -> bool:
    alone = part.padding is None is last.padding and not part.several and not last.several
    return alone and last.keys == part.keys and last.batch.stop == part.batch.start


def blocks(
    rule: Rule, part: Part, key_heads: int, group: int, rows: int, least: int, scratch: int | None
) -> Iterator[Block]:
    """Of `rows` rows, fewer (but `least`) if `scratch` numbers do not hold those of a key head; None: any."""
    rule = part.rule(rule)
    if scratch is not None:
        widest = rule.most_keys(rows, len(part.keys))
        rows = min(rows, max(least, scratch // max(1, group * widest)))
    for start in range(part.rows.start, part.rows.stop, rows):
        span = range(start, min(start + rows, part.rows.stop))
        keys = rule.keys(span, part.keys.start, part.keys.stop)
        count = len(part.batch) * key_heads
        if scratch is not None:  # key heads together, so many that batch and heads still flatten
            count = max(1, scratch // max(1, group * len(span) * len(keys)))
        batch_step, head_step = max(1, count // key_heads), min(count, key_heads)
        for b in range(part.batch.start, part.batch.stop, batch_step):
            for h in range(0, key_heads, head_step):
                end = min(h + head_step, key_heads)
                yield Block(
                    slice(b, min(b + batch_step, part.batch.stop)),
                    slice(h, end),
                    slice(h * group, end * group),
                    span,
                    keys,
                    part.padding,
                    part.ahead,
                    part.several,
                )
