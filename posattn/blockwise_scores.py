"""The scores of a block, in buffers that the blocks of a call share, and the rows of its products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import dropout as pairs
from .blockwise_bias import BlockBias
from .dropout import Dropout
from .strips import Block


def make_scores(
    block: Block,
    bias: BlockBias,
    rows: Tensor,
    keys: Tensor,
    scale: float,
    softcap: float,
    buffers: list[Tensor],
    less: Tensor | None = None,
) -> Tensor:
    """softcap(scale * q.k) + bias - less, (batch, heads, rows, keys), in the first buffer; tanh in the last."""
    scores = buffers[0][: math.prod(block.shape())].view(block.shape())
    bias.write(scores, block, buffers, less)
    flat, rows, keys = by_key_head(scores, keys), by_key_head(rows, keys), keys.flatten(0, 1)
    if softcap:
        squashed = buffers[-1][: scores.numel()].view(flat.shape)
        torch.bmm(rows, keys.mT, out=squashed).mul_(scale / softcap).tanh_()
        flat.add_(squashed, alpha=softcap)
    else:
        flat.baddbmm_(rows, keys.mT, alpha=scale)
    return scores


def kept_pairs(dropout: Dropout, block: Block, device: torch.device) -> Tensor:
    """Bool (batch, heads, rows, keys), last row first."""
    rows = torch.arange(block.rows.start, block.rows.stop, device=device).flip(0)
    columns = torch.arange(block.keys.start, block.keys.stop, device=device)
    return pairs.kept(dropout, block.batch, block.heads, rows, columns)


def by_key_head(rows: Tensor, keys: Tensor) -> Tensor:
    """(batch, heads, C, n) -> (batch * key heads, group * C, n), which one product takes with its key head."""
    return rows.reshape(keys.shape[0] * keys.shape[1], -1, rows.shape[-1])


def make_buffers(todo: list[Block], count: int, bias: BlockBias) -> list[Tensor]:
    """Room for the scores of any block, and for as many rows more that diagonals are read with."""
    shapes = [block.shape() for block in todo]
    size = max((b * h * c * (c + n) for b, h, c, n in shapes if n), default=0)
    return [torch.empty(size, dtype=bias.dtype, device=bias.line.device) for _ in range(count)]
