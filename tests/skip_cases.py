"""Calls whose far keys are negligible, or just not; what a row loses by what is left out, from the dense formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from posattn import blockwise, near, near_blocks
from posattn.strips import Rule, make_line

SINGLE = 2.0**-26  # what a row may lose; written here once more, not read from the package
DOUBLE = 2.0**-55
MARGIN = 26 * math.log(2)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, and no head too cheap to be cut."""
    sizes = dict(ROWS=16, FUSED_ROWS=16, LONG_ROWS=16, MIN_ROWS=4, SCRATCH=3000, PACK=16)
    for name, size in sizes.items():
        monkeypatch.setattr(blockwise, name, size)
    monkeypatch.setattr(near_blocks, "CALL", 0)
    monkeypatch.setattr(near_blocks, "WORTH", 1.0)
    monkeypatch.setattr(near, "SCRATCH", 5000)


def normal(batch=1, heads=2, key_heads=None, queries=200, keys=None, dim=8, dtype=torch.float64, size=1.0):
    """q, k, v."""
    keys, key_heads = keys or queries, key_heads or heads
    shapes = (batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim)
    return [size * torch.randn(shape, dtype=dtype) for shape in shapes]


def keywords(
    table: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float = 1.0,
    shift: int = 0,
    left: int = -1,
    right: int = -1,
    symmetric: bool = True,
    key_mask: Tensor | None = None,
) -> dict[str, Any]:
    """Those of blockwise.forward and backward."""
    return dict(
        table=table, support=None, slopes=slopes, key_mask=key_mask, scale=scale, softcap=0.0, shift=shift,
        left=left, right=right, symmetric=symmetric,
    )  # fmt: skip


def backward(
    grad: Tensor, grad_lse: Tensor | None, tensors: Any, made: Any, given: dict[str, Any], **more: Any
):
    more = dict(need_q=True, need_kv=True, need_table=given["table"] is not None) | more
    return blockwise.backward(
        grad, grad_lse, *tensors, *made, **given, tails_need_grad=True, deterministic=False, **more
    )


def ranges(tensors: Any, given: dict[str, Any], sinks: Tensor | None = None, lse: Tensor | None = None):
    """near.needed_keys of a call."""
    q, k = tensors[:2]
    rule = Rule(q.shape[2], k.shape[2], given["shift"], given["left"], given["right"])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    line = make_line(rule, given["table"], given["slopes"], given["symmetric"], q, dtype)
    return near.needed_keys(
        q, k, line, rule, key_mask=given["key_mask"], scale=given["scale"], sinks=sinks, lse=lse
    )


def left_out(needed: near.Needed, length: int, key_length: int) -> Tensor:
    """(B, Hq, Lq, Lk): the pairs outside of the ranges."""
    first, last = (t.repeat_interleave(near.ROWS, 2)[:, :, :length, None] for t in needed)
    j = torch.arange(key_length)
    return (j < first) | (j >= last)


def weights(tensors: Any, given: dict[str, Any], sinks: Tensor | None = None) -> Tensor:
    """(B, Hq, Lq, Lk) probabilities in float64, 0 for what is hidden, written out."""
    q, k = (t.double() for t in tensors[:2])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    index = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    offset = index + given["shift"]
    score = given["scale"] * q @ k.mT
    if given["table"] is not None:
        bias = given["table"].double()[:, index + q.shape[2] - 1]
    else:
        bias = given["slopes"].double()[:, None, None] * (-offset.abs() if given["symmetric"] else offset)
    seen = (bias > -1e29).expand(score.shape).clone()
    if given["left"] >= 0:
        seen &= offset >= -given["left"]
    if given["right"] >= 0:
        seen &= offset <= given["right"]
    if given["key_mask"] is not None:
        seen &= given["key_mask"][:, None, None]
    score = torch.where(seen, score + torch.where(seen, bias, 0.0), -math.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(*score.shape[:3], 1)
        return torch.cat([score, sink], -1).softmax(-1)[..., :-1].nan_to_num(0.0)
    return score.softmax(-1).nan_to_num(0.0)


def lost(needed: near.Needed, probabilities: Tensor) -> float:
    """The largest part of a row that is outside of the ranges."""
    return (probabilities * left_out(needed, *probabilities.shape[2:])).sum(-1).max().item()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pairs that blockwise multiplies, a number a block."""
    pairs: list[int] = []
    fused, scores = blockwise._fused, blockwise.make_scores

    def counting_fused(q: Tensor, k: Tensor, *args: Any, **more: Any) -> Any:
        pairs.append(math.prod(q.shape[:3]) * k.shape[2])
        return fused(q, k, *args, **more)

    def counting_scores(block: Any, *args: Any) -> Any:
        pairs.append(math.prod(block.shape()))
        return scores(block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "_fused", counting_fused)
        patch.setattr(blockwise, "make_scores", counting_scores)
        yield pairs


def at_the_bound(excess: float, dtype: torch.dtype = torch.float64, own: float = 0.0):
    """One head; every far key (j < 20) is as strong as Cauchy-Schwarz allows, and stands `excess` above the threshold.

    Each row sees but one key that is near, its own, of logit `own`: L_i = 0, exactly, unless it is hidden. Rows see
    far keys from the 40th on.
    """
    length, reach = 64, 3.0
    q = torch.zeros(1, 1, length, 4, dtype=dtype)
    k = torch.zeros(1, 1, length, 4, dtype=dtype)
    q[..., 0] = reach
    k[0, 0, :20, 0] = reach
    threshold = -reach * reach - MARGIN - math.ceil(math.log2(length)) * math.log(2)
    offset = torch.arange(1 - length, length)
    table = torch.full((1, 2 * length - 1), -math.inf, dtype=dtype)
    table[0, offset == 0] = own
    table[0, offset <= 19 - 40] = threshold + excess
    q[0, 0, :20] = 0.0  # so that the own logit of all rows is 0
    v = torch.ones(1, 1, length, 4, dtype=dtype)
    v[0, 0, :20] = -1.0
    return [q, k, v], keywords(table)
