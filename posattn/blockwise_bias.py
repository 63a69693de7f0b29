"""What is added to the products of a block: bias, window, padding, borders of sequences; and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scaled_blocks
from .biases.bias import Scaled
from .blockwise_parts import Cut, Part, whole
from .blockwise_relative import add_band, write_gradient
from .strips import INVISIBLE, Block, Rule, diagonal_sums, line_range, make_line, strip

if TYPE_CHECKING:
    from .ops import Sequences


class BlockBias:
    """The bias of a call, block by block; arguments as in ops.py, pack as in `Cut`.

    parts: what the call falls into.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        table: Tensor | None,
        slopes: Tensor | None,
        scaled: Scaled | None,
        relative: Tensor | None,
        sequences: Sequences | None,
        key_mask: Tensor | None,
        shift: int,
        left: int,
        right: int,
        symmetric: bool,
        pack: int,
    ) -> None:
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.table, self.relative, self.scaled = table, relative, scaled
        batch, query_length, key_length = q.shape[0], q.shape[2], k.shape[2]
        self.cut: Cut | None = None
        self.parts: list[Part]
        if sequences is None:
            self.rule = Rule(query_length, key_length, shift, left, right)
            self.parts = whole(batch, query_length, key_length, key_mask, self.dtype)
        else:
            self.cut = Cut(sequences, batch, query_length, key_length, key_mask, self.dtype, pack)
            self.parts = self.cut.parts
            # One line serves all: its offsets are those of a call of max_k queries and max_q keys.
            margin = self.margin
            self.rule = Rule(sequences.max_k + margin, sequences.max_q + margin, 0, left, right)
            table = None if table is None else F.pad(table, (margin, margin), value=INVISIBLE)
        others = any(part is not None for part in (scaled, relative, sequences))
        self.by_offset = (table is not None or slopes is not None) and not others
        self.line = make_line(self.rule, table, slopes, symmetric, q, self.dtype)
        if scaled is not None:
            self.scaled = self._by_row(scaled)

    @property
    def margin(self) -> int:
        return 0 if self.cut is None else self.cut.margin

    def _by_row(self, scaled: Scaled) -> Scaled:
        """line with a margin, rows (1, Lq) or (B, Lq)."""
        if self.cut is None:
            return scaled._replace(rows=scaled.rows[None])
        self.row_index = self.cut.positions() + self.cut.sequences.max_q
        rows = scaled.rows[self.row_index].view(self.cut.shape[:2])
        return scaled._replace(line=F.pad(scaled.line, (self.margin, self.margin)), rows=rows)

    # ------------------------------------------------------------------------------------------ forward

    def is_view(self, where: Part | Block) -> bool:
        """The bias there is a view of the line, and costs no memory."""
        return (self.scaled is None is self.relative) and where.padding is None and not where.several

    def of(self, block: Block, buffers: list[Tensor]) -> Tensor:
        """(1 or batch, 1 or heads, rows, keys), last row first: a view of the line, or in the first buffer."""
        if self.is_view(block):
            return strip(self.line, self.rule, block)
        batch, heads, rows, keys = block.shape()
        if self.relative is None:
            batch, heads = 1, heads if self.scaled is not None or len(self.line) > 1 else 1
        made = buffers[0][: batch * heads * rows * keys].view(batch, heads, rows, keys)
        self.write(made, block, buffers)
        return made

    def write(self, scores: Tensor, block: Block, buffers: list[Tensor], less: Tensor | None = None) -> None:
        """The bias, less a number a row (batch, heads, rows), into scores (batch, heads, rows, keys).

        With `relative`, overwrites the second buffer, which has room for batch * heads * rows * (rows + keys).
        """
        bias = strip(self.line, self.rule, block)
        if self.scaled is not None:
            bias = scaled_blocks.values(self.scaled, self.rule, block).add_(bias)
        if less is None:
            scores.copy_(bias)
        else:
            torch.sub(bias, less[..., None], out=scores)
        if block.padding is not None:
            scores += block.padding[block.keys.start : block.keys.stop]
        if block.several and self.cut is not None:
            scores += self.cut.strangers(block).to(self.dtype).mul_(INVISIBLE)
        if self.relative is not None:
            add_band(scores, buffers[1], self.relative, self.rule, block)

    # ----------------------------------------------------------------------------------------- backward

    def make_gradients(self, support: Tensor | None, tails_need_grad: bool) -> None:
        """Zeros to sum in. Where tails need none, the table's gradient is 0 outside of the support."""
        first, rule = self.rule.shift - self.rule.query_length, self.rule
        self.lowest, self.highest = first, rule.shift + rule.key_length  # every offset is between
        if support is not None and not tails_need_grad:
            self.lowest, self.highest = int(support[0].min()), int(support[1].max())
        if self.table is not None:
            self.dtable = torch.zeros_like(self.table if self.margin == 0 else self.line)
        if self.scaled is not None:
            self.dscaled = tuple(
                torch.zeros_like(part) for part in (self.scaled.line, self.scaled.rows, self.scaled.pieces)
            )
        if self.relative is not None:
            self.drelative = torch.zeros_like(self.relative)

    def add_gradients(self, dS: Tensor, block: Block, scratch: Tensor) -> None:
        """What the logit gradients dS of a block give; overwrites scratch, with room as in `write`."""
        if self.table is not None:
            self._add_to_table(dS, block, scratch)
        if self.scaled is not None:
            scaled_blocks.add_gradients(self.dscaled, dS, scratch, self.scaled, self.rule, block)
        if self.relative is not None:
            write_gradient(self.drelative, dS, scratch, self.relative, self.rule, block)

    def _add_to_table(self, dS: Tensor, block: Block, scratch: Tensor) -> None:
        """Columns that hold no offset in [lowest, highest] are left out."""
        shift = self.rule.shift + block.ahead
        first = max(block.keys.start, block.rows.start + self.lowest - shift)
        last = min(block.keys.stop, block.rows.stop + self.highest - shift)
        if first < last:
            start = block.keys.start
            sums = diagonal_sums(dS[..., first - start : last - start], scratch)
            part = line_range(self.rule, block._replace(keys=range(first, last)))
            self.dtable[block.heads, part.start : part.stop] += sums

    def gradients(self) -> tuple[Tensor, ...]:
        """Of table, then with `scaled` of its line, rows and pieces, then with `relative` of that."""
        nothing = self.line.new_empty(0)
        margin, made = self.margin, [nothing]
        if self.table is not None:
            made[0] = self.dtable
            if margin:
                made[0] = torch.empty_like(self.table).copy_(self.dtable[:, margin:-margin])
        if self.scaled is not None:
            line, rows, pieces = self.dscaled
            if self.cut is None:
                rows = rows[0]
            else:
                line = line[margin : len(line) - margin].contiguous()
                sums = rows.new_zeros(self.cut.sequences.max_q + self.cut.sequences.max_k)
                rows = sums.index_add_(0, self.row_index, rows.view(-1))
            made += [line, rows, pieces]
        return (*made, self.drelative) if self.relative is not None else tuple(made)
