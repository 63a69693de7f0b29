"""The scores of one block under DAPE, and the way back: dense matrix products over channels.

A channel (a head of A, a head of the base B, a hidden unit) is a row of numbers, one for each pair of the block: its
rows of pairs one after the other, last row first. So a layer of kernel size 1 is one product. For a kernel size of
2 p + 1 a block has p more columns that nobody sees, and p more zeros stand before and after a channel: a tap is the
same product with the channel read from another start, and the p zeros between two rows keep them apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .mix_fire import FireBase, leaky_backward
from .strips import INVISIBLE, Block, Rule, line_range, sheared_sums, strip

SLOPE = 0.01


class Scores:
    """What the blocks of one call share: layers, lines, buffers, sums of gradients.

    `backward` goes with the last `logits`: it reads the buffers that these left behind.
    """

    def __init__(
        self,
        rule: Rule,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        table: Tensor | None,
        fire: FireBase | None,
        published: bool,
    ) -> None:
        self.rule, self.fire, self.published = rule, fire, published
        self.heads, self.hidden, taps = w2.shape
        self.channels = w1.shape[1]
        self.middle = p = taps // 2
        # One matrix per tap. Channel 0 is all ones and brings the bias along, with the tap in the middle.
        self.first_layer = w1.new_zeros(taps, self.hidden, 1 + self.channels)
        self.first_layer[:, :, 1:] = w1.permute(2, 0, 1)
        self.first_layer[p, :, 0] = b1
        self.second_layer = w2.permute(2, 0, 1).contiguous()

        lowest = rule.shift - rule.query_length + 1
        offset = torch.arange(lowest, rule.shift + rule.key_length + p, device=w1.device)
        seen = torch.ones_like(offset, dtype=torch.bool)
        if rule.left >= 0:
            seen &= offset >= -rule.left
        if rule.right >= 0:
            seen &= offset <= rule.right
        self.seen = seen.to(w1.dtype)[None]
        self.table = None if table is None else F.pad(table.to(w1.dtype), (0, p))
        added = b2[:, None] if self.table is None else self.table + b2[:, None]
        self.added = added.expand(-1, len(offset)).masked_fill(~seen, INVISIBLE)  # to A, beside the network

        self.heard = (
            self.seen
        )  # of the block, with a kernel size over 1: 1 where the network hears a pair, (rows, keys)

    # ------------------------------------------------------------------------------------------ memory

    def make_buffers(self, todo: list[Block], count: int) -> None:
        """Room for any block; count is 1 for forward, 2 for backward."""
        p, w1 = self.middle, self.first_layer
        pairs = max((len(b.rows) * (len(b.keys) + p) for b in todo if b.keys), default=0)

        def buffer(channels: int) -> Tensor:
            return torch.empty(channels * (pairs + 2 * p), dtype=w1.dtype, device=w1.device)

        self.inputs, self.units = buffer(1 + self.channels), buffer(self.hidden)
        self.scores = [buffer(self.heads) for _ in range(count)]
        if self.fire is not None:
            self.fire.make_buffers(pairs)
        if count > 1:
            self.slopes = buffer(self.heads if p else 0)
            self.unit_slopes = buffer(max(self.hidden, 0 if self.fire is None else self.fire.width))

    def make_gradients(self, need_weights: bool, need_base: bool) -> None:
        """Zeros to sum in."""
        self.need_weights, self.need_base = need_weights, need_base
        self.dfirst_layer = torch.zeros_like(self.first_layer)
        self.dsecond_layer = torch.zeros_like(self.second_layer)
        self.db2 = self.second_layer.new_zeros(self.heads)
        if self.table is not None:
            self.dtable = torch.zeros_like(self.table)
        if self.fire is not None:
            self.fire.make_gradients()

    def gradients(self) -> list[Tensor | None]:
        """Of w1, b1, w2, b2, table, line, rows, first, last, last_bias; None for what is not needed or not there."""
        made: list[Tensor | None] = [None] * 10
        if self.need_weights:
            made[0] = self.dfirst_layer[:, :, 1:].permute(1, 2, 0)
            made[1] = self.dfirst_layer[self.middle, :, 0]
            made[2], made[3] = self.dsecond_layer.permute(1, 2, 0), self.db2
        if self.need_base and self.table is not None:
            made[4] = self.dtable[:, : self.dtable.shape[1] - self.middle]
        if self.need_base and self.fire is not None:
            made[5:] = self.fire.gradients()
        return [None if grad is None else grad.contiguous() for grad in made]

    def beyond(self, tensor: Tensor) -> Tensor:
        """Keys or values, contiguous, with zeros for the columns beyond the last key."""
        return F.pad(tensor.to(self.seen.dtype), (0, 0, 0, self.middle)).contiguous()

    def keys_of(self, tensor: Tensor, block: Block) -> Tensor:
        """(B, Hk, Lk + p, D) -> (Hk, keys + p, D), a view."""
        return tensor[block.batch.start, :, block.keys.start : block.keys.stop + self.middle]

    def second_buffer(self, block: Block) -> Tensor:
        """(heads, rows, keys + p)."""
        return self._matrices(self.scores[1], block)

    def _matrices(self, buffer: Tensor, block: Block) -> Tensor:
        shape = (self.heads, len(block.rows), len(block.keys) + self.middle)
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def _padded(self, buffer: Tensor, channels: int, pairs: int) -> Tensor:
        """(channels, p + pairs + p), the first and the last p being 0."""
        p = self.middle
        padded = buffer[: channels * (pairs + 2 * p)].view(channels, pairs + 2 * p)
        if p:
            padded[:, :p] = 0
            padded[:, p + pairs :] = 0
        return padded

    # ------------------------------------------------------------------------------------------- forward

    def logits(self, block: Block, queries: Tensor, keys: Tensor, less: Tensor | None = None) -> Tensor:
        """S - less, (heads, rows, keys + p), INVISIBLE or less where the query does not see the key.

        queries (1, heads, rows, D), already scaled and last row first; keys from `keys_of`; less (heads, rows).
        """
        block = block._replace(keys=range(block.keys.start, block.keys.stop + self.middle))
        p, heads, rows, count = self.middle, self.heads, len(block.rows), len(block.keys)
        pairs = rows * count
        scores = self.scores[0][: heads * pairs].view(heads, rows, count)
        inputs = self._padded(self.inputs, 1 + self.channels, pairs)
        channels = inputs[:, p : p + pairs].view(-1, rows, count)
        channels[0] = 1
        a, b = channels[1 : 1 + heads], channels[1 + heads :]
        columns = self._columns(block)
        queries = queries.reshape(keys.shape[0], -1, keys.shape[2])
        if p == 0:
            torch.bmm(queries, keys.mT, out=a.view(keys.shape[0], -1, count))
        else:
            torch.bmm(queries, keys.mT, out=scores.view(keys.shape[0], -1, count))
            self.heard = strip(self.seen, self.rule, block)[0, 0].clone()
            if self.published:
                self.heard[:, count - p :] = 0
            else:
                self.heard.mul_(columns == 0)
            torch.mul(scores, self.heard, out=a)
        if self.table is not None:
            b.copy_(strip(self.table, self.rule, block)[0])
        elif self.fire is not None:
            self.fire.values(block, b)
        if p and len(b):
            b.mul_(self.heard)

        hidden = self._padded(self.units, self.hidden, pairs)
        self._taps(self.first_layer, inputs, hidden[:, p : p + pairs], 1)
        F.leaky_relu_(hidden[:, p : p + pairs], SLOPE)
        if p:
            hidden[:, p : p + pairs].view(-1, rows, count).mul_(self._kept(rows, count))

        torch.add(a, strip(self.added, self.rule, block)[0], out=scores)
        if self.fire is not None:
            scores += b
        if less is not None:
            scores -= less[..., None]
        if columns is not None:
            scores += columns
        self._taps(self.second_layer, hidden, scores.view(heads, pairs), 1, add=True)
        return scores

    def _columns(self, block: Block) -> Tensor | None:
        """0 for a key that counts, INVISIBLE for one in the padding and for the p beyond; (keys + p,)."""
        p = self.middle
        if block.padding is None and p == 0:
            return None
        columns = self.seen.new_zeros(len(block.keys))
        last = len(block.keys) - p
        if block.padding is not None:
            columns[:last] = block.padding[block.keys.start : block.keys.start + last]
        columns[last:] = INVISIBLE
        return columns

    def _kept(self, rows: int, count: int) -> Tensor:
        """1 where the hidden layer is kept: where the pair is heard, or, as published, before the p columns beyond."""
        if not self.published:
            return self.heard
        kept = self.heard.new_ones(count)
        kept[count - self.middle :] = 0
        return kept

    def _taps(self, layer: Tensor, padded: Tensor, out: Tensor, step: int, add: bool = False) -> None:
        """out = sum over the taps of layer[tap] @ padded from column tap on (step -1: from 2 p - tap)."""
        pairs, last = out.shape[1], 2 * self.middle
        for tap, weight in enumerate(layer):
            start = tap if step > 0 else last - tap
            read = padded[:, start : start + pairs]
            if add or tap:
                out.addmm_(weight, read)
            else:
                torch.mm(weight, read, out=out)

    # ------------------------------------------------------------------------------------------ backward

    def backward(self, block: Block, weight: Tensor, slope: Tensor) -> Tensor:
        """P and dL/dP -> dL/dA, (heads, rows, keys + p); overwrites both."""
        block = block._replace(keys=range(block.keys.start, block.keys.stop + self.middle))
        p, heads, (rows, count) = self.middle, self.heads, weight.shape[1:]
        pairs = rows * count
        if p == 0:
            grads = weight.mul_(slope).view(heads, pairs)
        else:
            grads = self._padded(self.slopes, heads, pairs)
            torch.mul(weight, slope, out=grads[:, p : p + pairs].view(weight.shape))
        inner = grads[:, p : p + pairs]  # dL/dS
        inputs = self.inputs[: (1 + self.channels) * (pairs + 2 * p)].view(1 + self.channels, -1)
        hidden = self.units[: self.hidden * (pairs + 2 * p)].view(self.hidden, -1)
        if self.need_weights:
            for tap, total in enumerate(self.dsecond_layer):
                total.addmm_(inner, hidden[:, tap : tap + pairs].mT)

        back = self._padded(self.unit_slopes, self.hidden, pairs)
        inside = back[:, p : p + pairs]
        self._taps(self.second_layer.mT, grads, inside, -1)
        if p:
            inside.view(-1, rows, count).mul_(self._kept(rows, count))
        leaky_backward(inside, hidden[:, p : p + pairs], SLOPE, True, grad_input=inside)
        if self.need_weights:
            for tap, total in enumerate(self.dfirst_layer):
                total.addmm_(inside, inputs[:, tap : tap + pairs].mT)

        # The inputs are needed no more: their gradients take their place.
        channels = inputs[1:, p : p + pairs]
        self._taps(self.first_layer.mT[:, 1:], back, channels, -1)
        if p:
            channels.view(-1, rows, count).mul_(self.heard)
        a, b = channels[:heads].view(weight.shape), channels[heads:]
        inner = inner.view(weight.shape)
        if self.need_base and len(b):
            b = b.view(weight.shape)
            b = b.add_(inner) if p == 0 else torch.add(b, inner, out=slope)
            if self.fire is not None:
                self.fire.backward(block, b, self.unit_slopes)
            else:
                part = line_range(self.rule, block)
                self.dtable[:, part.start : part.stop] += sheared_sums(b)
        return a.add_(inner) if p == 0 else torch.add(a, inner, out=weight)
