"""The bias of a block that is a piecewise linear function of line[j - i] * rows[i], and the way back for its parts.

Blocks are those of strips.py, last row first. All heads see the same x, so that x and its segment are made once.
rows is (1, Lq), or (B, Lq) where the batch entries of a block, which is one then, have rows of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .biases.bias import Scaled
from .strips import Block, Rule, diagonal_sums, line_range, strip


def values(scaled: Scaled, rule: Rule, block: Block) -> Tensor:
    """(1, heads, rows, keys): slope * x + intercept, of the segment that x is in."""
    line, factor, segment = _position(scaled, rule, block)
    pieces = scaled.pieces[block.heads]
    bias = pieces[..., 0][:, segment].mul_(line).mul_(factor).add_(pieces[..., 1][:, segment])
    return bias[None]


def add_gradients(
    into: tuple[Tensor, ...], dS: Tensor, scratch: Tensor, scaled: Scaled, rule: Rule, block: Block
) -> None:
    """Adds to those of (line, rows, pieces) what the logit gradients dS (batch, heads, rows, keys) give.

    With s the segment of x = line * rows: dline[j - i] sums dS * slope[s] * rows over heads and the diagonal,
    drows dS * slope[s] * line over heads and keys; slope[s] and intercept[s] get the sums of dS * x and dS.
    """
    dline, drows, dpieces = into
    line, factor, segment = _position(scaled, rule, block)
    slope = scaled.pieces[block.heads, :, 0]
    dS = dS.sum(0)
    along = slope[:, segment].mul_(dS).sum(0).mul_(factor)
    # By row first: no long sum is made one number after the other.
    by_segment = dS.new_zeros((*dS.shape[:2], slope.shape[1]))  # (heads, rows, F + 1)
    index = segment.expand(dS.shape)
    dpieces[block.heads, :, 1] += by_segment.scatter_add_(2, index, dS).sum(1)
    by_segment.zero_().scatter_add_(2, index, dS.mul_(line))
    _rows_of(drows, block).add_((by_segment * slope[:, None]).sum((0, 2)).flip(0))
    dpieces[block.heads, :, 0] += by_segment.mul_(factor).sum(1)
    part = line_range(rule, block)
    dline[part.start : part.stop] += diagonal_sums(along[None, None], scratch)[0]


def _position(scaled: Scaled, rule: Rule, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """line (rows, keys), a view; rows (rows, 1); the number of knots below their product, (rows, keys)."""
    line = strip(scaled.line[None], rule, block)[0, 0]
    factor = _rows_of(scaled.rows, block).flip(0)[:, None]
    return line, factor, torch.searchsorted(scaled.knots, (line * factor).contiguous())


def _rows_of(rows: Tensor, block: Block) -> Tensor:
    return rows[block.batch.start if len(rows) > 1 else 0, block.rows.start : block.rows.stop]
