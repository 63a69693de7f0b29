"""FIRE as the base of a DAPE: its values at the pairs of one block, and the way back.

``B = last @ act(first[0] x + first[1]) + last_bias`` with ``x = line[j - i + Lq - 1] * rows[i]``. Of the hidden layer
every block has its own; the rest is O(N).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .strips import Block, Rule, line_range, sheared_sums, strip

leaky_backward: Any = torch.ops.aten.leaky_relu_backward.grad_input


class FireBase:
    """`backward` goes with the last `values`: it reads the buffers that these left behind."""

    def __init__(
        self,
        rule: Rule,
        line: Tensor,
        rows: Tensor,
        first: Tensor,
        last: Tensor,
        last_bias: Tensor,
        negative_slope: float,
        beyond: int,
    ) -> None:
        self.rule, self.negative_slope, self.beyond = rule, negative_slope, beyond
        self.line = F.pad(line, (0, beyond))  # for columns beyond the last key
        self.rows, self.first, self.last, self.last_bias = rows, first, last, last_bias
        self.width = first.shape[1]

    def make_buffers(self, pairs: int) -> None:
        dtype, device = self.line.dtype, self.line.device
        self.inputs = torch.empty(2 * pairs, dtype=dtype, device=device)
        self.units = torch.empty(self.width * pairs, dtype=dtype, device=device)

    def make_gradients(self) -> None:
        parts = (self.line, self.rows, self.first, self.last, self.last_bias)
        self.dline, self.drows, self.dfirst, self.dlast, self.dlast_bias = map(torch.zeros_like, parts)

    def gradients(self) -> list[Tensor]:
        """Of line, rows, first, last, last_bias."""
        dline = self.dline[: len(self.dline) - self.beyond]
        return [dline, self.drows, self.dfirst, self.dlast, self.dlast_bias]

    def values(self, block: Block, out: Tensor) -> None:
        """Writes B, (heads, rows, keys)."""
        inputs, units = self._of(out)
        torch.mul(*self._factors(block), out=inputs[0].view(out.shape[1:]))
        inputs[1] = 1
        torch.mm(self.first.mT, inputs, out=units)
        F.leaky_relu_(units, self.negative_slope)
        torch.mm(self.last, units, out=out.view(len(out), -1))
        out += self.last_bias[:, None, None]

    def backward(self, block: Block, grad: Tensor, scratch: Tensor) -> None:
        """Adds up the gradients, of which grad (heads, rows, keys) is that of B; scratch takes the units' place."""
        inputs, units = self._of(grad)
        flat = grad.view(len(grad), -1)
        self.dlast.addmm_(flat, units.mT)
        self.dlast_bias += flat.sum(1)
        back = scratch[: units.numel()].view(units.shape)
        torch.mm(self.last.mT, flat, out=back)
        leaky_backward(back, units, self.negative_slope, True, grad_input=back)
        self.dfirst.addmm_(inputs, back.mT)
        dx = torch.mm(self.first[:1], back).view(grad.shape[1:])
        line, rows = self._factors(block)
        self.drows[block.rows.start : block.rows.stop] += (dx * line).sum(1).flip(0)
        part = line_range(self.rule, block)
        self.dline[part.start : part.stop] += sheared_sums(dx.mul_(rows)[None])[0]

    def _of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """x and 1; the hidden layer: (channels, pairs), in the buffers."""
        pairs = values.shape[1] * values.shape[2]
        return self.inputs[: 2 * pairs].view(2, pairs), self.units[: self.width * pairs].view(-1, pairs)

    def _factors(self, block: Block) -> tuple[Tensor, Tensor]:
        """x is the product of (rows, keys) and (rows, 1)."""
        rows = self.rows[block.rows.start : block.rows.stop].flip(0)[:, None]
        return strip(self.line[None], self.rule, block)[0, 0], rows
