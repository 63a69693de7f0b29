"""The operators for one pair of pieces: what each takes of the bias of the whole sequence, and where gradients go.

A bias is made once, for every offset of the sequence: table and line (..., 2 N - 1) at offset + N - 1, FIRE's rows at
the positions 0 .. N - 1. A pair reads the part that its own positions say.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mix_ops import mix_backward, mix_forward
from ..ops import attend_backward, attend_forward
from .layout import Pair

# How a part of a bias is cut for a pair: by offset, by the query's position, by the query's place here, or not.
OFFSETS, POSITIONS, ROWS, WHOLE = "offsets", "positions", "rows", "whole"
ATTEND = dict(
    table=OFFSETS,
    support=WHOLE,
    slopes=WHOLE,
    line=OFFSETS,
    rows=POSITIONS,
    knots=WHOLE,
    pieces=WHOLE,
    relative=ROWS,
)
MIX = dict(
    w1=WHOLE,
    b1=WHOLE,
    w2=WHOLE,
    b2=WHOLE,
    table=OFFSETS,
    line=OFFSETS,
    rows=POSITIONS,
    first=WHOLE,
    last=WHOLE,
    last_bias=WHOLE,
)
Parts = dict[str, Tensor | None]


class Numbers(NamedTuple):
    """What the operators take beside tensors."""

    length: int
    scale: float
    softcap: float
    left: int
    right: int
    symmetric: bool
    tails_need_grad: bool
    negative_slope: float
    published: bool
    dropout_p: float
    keep: bool  # for a backward pass
    deterministic: bool
    backend: str


class Needs(NamedTuple):
    q: bool
    kv: bool
    parts: dict[str, bool]


def cut(tensor: Tensor, place: str, pair: Pair, length: int) -> Tensor:
    """The view of a part of the bias, or of its gradient, that belongs to a pair."""
    if place == OFFSETS:
        start = pair.keys.start - pair.queries.stop + length
        return tensor[..., start : start + len(pair.queries) + len(pair.keys) - 1]
    if place == POSITIONS:
        return tensor[pair.queries.start : pair.queries.stop]
    return tensor[:, :, pair.rows] if place == ROWS else tensor


def _of_pair(parts: Parts, places: dict[str, str], pair: Pair, length: int) -> Parts:
    made: Parts = {}
    for name, place in places.items():
        part = parts.get(name)
        if part is not None:
            part = cut(part, place, pair, length)
            part = part.contiguous() if place == OFFSETS else part
        made[name] = part
    return made


def _seed(seed: Tensor | None, pair: Pair) -> Tensor | None:
    """Rows and keys of a pair are counted in the whole sequence, as one process would."""
    if seed is None:
        return None
    moved = seed.clone()
    moved[1] += pair.queries.start
    moved[2] += pair.keys.start
    return moved


class Attend:
    """Scores plus a bias of the position: attend_forward, attend_backward."""

    places = ATTEND

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        parts: Parts,
        seed: Tensor | None,
        pair: Pair,
        n: Numbers,
    ) -> tuple[Tensor, Tensor]:
        """out and lse of the queries, as if there were no other keys."""
        out, lse = attend_forward(
            q, k, v, **_of_pair(parts, ATTEND, pair, n.length), key_mask=mask, scale=n.scale, softcap=n.softcap,
            shift=pair.shift, left=n.left, right=n.right, symmetric=n.symmetric, backend=n.backend,
            dropout_p=n.dropout_p, seed=_seed(seed, pair),
        )  # fmt: skip
        return out, lse

    @staticmethod
    def outputs(exact: Tensor, q: Tensor, n: Numbers) -> tuple[Tensor, ...]:
        """What backward takes as out, of the exact one."""
        return (exact.to(q.dtype),)

    @staticmethod
    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, outputs: tuple[Tensor, ...],
        lse: Tensor, mask: Tensor | None, parts: Parts, seed: Tensor | None, pair: Pair, n: Numbers, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """What this pair adds to the gradients, with out and lse of all keys."""
        dq, dk, dv, dtable, dline, drows, dpieces, drelative, _ = attend_backward(
            grad_out, grad_lse, q, k, v, outputs[0], lse, **_of_pair(parts, ATTEND, pair, n.length), key_mask=mask,
            scale=n.scale, softcap=n.softcap, shift=pair.shift, left=n.left, right=n.right, symmetric=n.symmetric,
            tails_need_grad=n.tails_need_grad, need_q=needs.q, need_kv=needs.kv, need_table=any(needs.parts.values()),
            deterministic=n.deterministic, backend=n.backend, dropout_p=n.dropout_p, seed=_seed(seed, pair),
        )  # fmt: skip
        return dq, dk, dv, dict(table=dtable, line=dline, rows=drows, pieces=dpieces, relative=drelative)


class Mix:
    """Scores mixed over the heads at each pair (a DAPE of kernel size 1): mix_forward, mix_backward."""

    places = MIX

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        parts: Parts,
        seed: Tensor | None,
        pair: Pair,
        n: Numbers,
    ) -> tuple[Tensor, Tensor]:
        out, lse, rest = mix_forward(
            q, k, v, **_of_pair(parts, MIX, pair, n.length), key_mask=mask, scale=n.scale, shift=pair.shift,
            left=n.left, right=n.right, negative_slope=n.negative_slope, published=n.published, keep_rest=n.keep,
            backend=n.backend,
        )  # fmt: skip
        return (out.to(lse.dtype) + rest if rest.numel() else out), lse

    @staticmethod
    def outputs(exact: Tensor, q: Tensor, n: Numbers) -> tuple[Tensor, ...]:
        """out and rest. Of a 16-bit out the blocks would take delta from the keys of the pair alone: give them all."""
        if n.backend == "blockwise" or q.dtype == exact.dtype:
            return exact, q.new_empty(0)
        out = exact.to(q.dtype)
        return out, (exact - out).to(q.dtype)

    @staticmethod
    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, outputs: tuple[Tensor, ...],
        lse: Tensor, mask: Tensor | None, parts: Parts, seed: Tensor | None, pair: Pair, n: Numbers, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """As Attend's. The gradient of b2, which lse's alone makes, is `of_last_bias`."""
        out, rest = outputs
        base = ("table", "line", "rows", "first", "last", "last_bias")
        dq, dk, dv, dw1, db1, dw2, _, *dbase = mix_backward(
            grad_out, grad_lse, q, k, v, out, lse, rest, **_of_pair(parts, MIX, pair, n.length), key_mask=mask,
            scale=n.scale, shift=pair.shift, left=n.left, right=n.right, negative_slope=n.negative_slope,
            published=n.published, need_q=needs.q, need_kv=needs.kv,
            need_weights=any(needs.parts[name] for name in ("w1", "b1", "w2", "b2")),
            need_base=any(needs.parts[name] for name in base), backend=n.backend,
        )  # fmt: skip
        return dq, dk, dv, dict(w1=dw1, b1=db1, w2=dw2, **dict(zip(base, dbase)))


def of_last_bias(grad_lse: Tensor, lse: Tensor) -> Tensor:
    """The gradient of a number that is added to every score of a head: it moves lse, and nothing else."""
    gradient: Tensor = grad_lse.masked_fill(lse == -torch.inf, 0.0).sum((0, 2))
    return gradient


FAMILIES: dict[str, Any] = {"attend": Attend, "mix": Mix}
