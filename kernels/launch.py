"""From tensors to kernels: `forward` and `backward` of attention, on whatever GPU Triton serves.

Shapes: q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv]; query head h reads key head h // (Hq // Hk). Offsets are
o = j - i + shift; a pair is visible where -left <= o <= right (-1: open) and key_mask[b, j]. The bias is a table
[Hq, Lq + Lk - 1] of o from the smallest up (with `support` [2, Hq], outside of which it is constant), or slopes [Hq],
or `scaled`: line [Lq + Lk - 1], rows [Lq], knots [F] and pieces [Hq, F + 1, 2] of a function of distance (scaled.py),
or `relative` [B, Hq, Lq, W] (relative.py). sinks [Hq] are fp32; dropout has p and seed [4] (dropout.py).

sequences has cu_q, cu_k [S + 1] int32, max_q and max_k (sequences.py): shift is 0 then, table and line have
max_q + max_k - 1 entries and begin at the offset 1 - max_k, rows has max_q + max_k and begins at the position -max_q.
Inputs are taken as checked (posattn/checks.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backward_cols import attend_backward_cols, turn_rows
from .backward_diagonals import attend_backward_diagonals
from .backward_rows import attend_backward_rows
from .descriptors import Columns, Forward
from .diagonals import fold, room
from .forward import attend_forward
from .near import near, turned
from .problem import Problem, on_its_gpu, padded, rows_contiguous, strides
from .relative import RelativeGradient
from .scaled import LEAST_ROWS, ScaledGradient, add_up, room_for_sums
from .tile import HIDDEN
from .toeplitz import ToeplitzGradient, seen_offsets

TURNED = 64  # rows of a tile of dQ that is transposed


def in_blocks(rows: int) -> int:
    """So many that no tile reaches beyond."""
    return -(-rows // 128) * 128


def kept_rows(p: Problem) -> tuple[Tensor, Tensor, int]:
    """Room for lse in base 2 and delta of all rows (sequences.py), and how many places a head has.

    Behind the last row of a sequence stands what makes p zero.
    """
    packed = p.sequences is not None
    places = (p.batch * p.queries // 128 + p.count + 1) * 128 if packed else in_blocks(p.queries)
    count = p.heads * places if packed else p.batch * p.heads * places
    if places == p.queries:
        lse2, delta = (torch.empty(count, dtype=torch.float32, device=p.q.device) for _ in range(2))
    else:
        lse2 = torch.full((count,), -HIDDEN.value, dtype=torch.float32, device=p.q.device)
        delta = torch.zeros_like(lse2)
    return lse2, delta, places


@on_its_gpu
def forward(
    q: Tensor, k: Tensor, v: Tensor, *, table: Tensor | None, support: Tensor | None, slopes: Tensor | None,
    key_mask: Tensor | None, scale: float, softcap: float, shift: int, left: int, right: int, symmetric: bool,
    scaled: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, relative: Tensor | None = None,
    sinks: Tensor | None = None, sequences: Any = None, dropout: Any = None, skip: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out [B, Hq, Lq, Dv] in q's dtype and, where the shapes agree, q's strides; lse [B, Hq, Lq] fp32, natural."""
    p = Problem(
        q, k, v, table, support, slopes, scaled, relative, key_mask, scale, softcap, shift, left, right, symmetric,
        sequences, dropout,
    )  # fmt: skip
    out = torch.empty_like(q) if p.value_dim == p.head_dim else q.new_empty(*q.shape[:3], p.value_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sinks = None if sinks is None else sinks.contiguous()
    if lse.numel():
        needed = near(p, table, slopes, symmetric) if skip else None
        p.launch(
            "forward", attend_forward, p.row_programs, Q=p.q, K=p.k, V=p.v, OUT=out, LSE=lse, SINKS=sinks, NEAR=needed,
            rule=p.rule, scale=p.scale2, **strides(q=p.q, k=p.k, v=p.v, o=out),
            other=Forward(p, out, lse, sinks, needed, slopes),
        )  # fmt: skip
        p.clear(out)
        if sequences is not None:
            p.clear(lse, values=lse.new_full((p.heads,), -math.inf) if sinks is None else sinks)
    return out, lse


@on_its_gpu
def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    table: Tensor | None, support: Tensor | None, slopes: Tensor | None, key_mask: Tensor | None, scale: float,
    softcap: float, shift: int, left: int, right: int, symmetric: bool, tails_need_grad: bool,
    need_q: bool, need_kv: bool, need_table: bool, deterministic: bool,
    scaled: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, relative: Tensor | None = None,
    sinks: Tensor | None = None, sequences: Any = None, dropout: Any = None, skip: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dq, dk, dv, dtable; with scaled, dline, drows, dpieces; with relative, drelative. What is not needed is empty.

    A constant tail's gradient stands on its outermost entry. lse includes the sinks, whose gradients are not made here.
    """
    p = Problem(
        q, k, v, table, support, slopes, scaled, relative, key_mask, scale, softcap, shift, left, right, symmetric,
        sequences, dropout,
    )  # fmt: skip
    # Outputs of an operator may not share memory: each that is not needed is an empty tensor of its own.
    dq = torch.empty_like(q) if need_q else q.new_empty(0)
    dk, dv = (torch.empty_like(x) if need_kv else x.new_empty(0) for x in (k, v))
    # Of a table, or of the line that all heads share: by head first.
    need_drelative, need_table = need_table and relative is not None, need_table and relative is None
    dtable = lse.new_empty(p.heads, max(p.behind + p.ahead - 1, 0)) if need_table else q.new_empty(0)
    drelative = torch.zeros_like(relative) if need_drelative else q.new_empty(0)
    if lse.numel() == 0 or p.keys == 0:
        made = [dq, dk, dv, dtable]
        if scaled is not None:
            line, rows, _, pieces = (torch.empty_like(x) if need_table else q.new_empty(0) for x in scaled)
            made = [dq, dk, dv, q.new_empty(0), line, rows, pieces]
        if relative is not None:
            made.append(drelative)
        return tuple(x.zero_() for x in made)

    do, out = rows_contiguous(grad_out), rows_contiguous(out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    lse2, delta, kept_h = kept_rows(p)
    words = None if p.seed is None else lse2.new_empty(2 * len(lse2))
    sums = target = tails = dfactor = dpieces = None
    # Each program has a place of its own, whatever its tile is: so the sum over programs has one order.
    groups, places = p.groups(p.heads), p.tiles(p.queries, 16)
    if need_table:
        if deterministic:
            blocks, zero = room(p.behind, p.ahead, sequences is not None)
            sums = torch.zeros(2, p.heads, blocks, 64, dtype=torch.float32, device=q.device)
        else:
            target = torch.zeros(p.heads, p.rule.base.shape[-1], dtype=torch.float32, device=q.device)
        if scaled is not None:
            places = p.tiles(p.queries, LEAST_ROWS.value)
            dfactor, dpieces = room_for_sums(p.rule, lse, groups, places)
        elif support is not None and tails_need_grad:
            tails = torch.zeros(groups, places, 2, dtype=torch.float32, device=q.device)
    rule, direction = p.rule, "rows"
    where = target, p.rule.base.shape[-1] if need_table else 0
    if dfactor is not None:
        rule, direction = ScaledGradient(*rule[:7], *where, dfactor, dpieces, places), "sums"
    elif tails is not None or target is not None:
        rule = ToeplitzGradient(*rule[:6], *where, tails, places, lift=rule.lift)
    elif need_drelative:
        # Its rows are contiguous, as those of `relative` need not be.
        target = drelative if rows_contiguous(drelative) is drelative else torch.zeros(relative.shape).to(drelative)
        rule = RelativeGradient(*rule[:6], target, *target.stride()[:3])
    loop = need_q or rule is not p.rule
    dqt = None
    if need_q and need_kv and not deterministic and tails is None and p.in_one_pass():
        dqt = lse.new_zeros(p.batch * p.heads * padded(p.head_dim) * in_blocks(p.queries))
        rule, loop = p.rule, False
    needed = near(p, table, slopes, symmetric, lse) if skip else None

    def reset() -> None:
        for made in (target, tails, dfactor, dpieces, dqt):
            if made is not None:
                made.zero_()

    passes = [(direction, rule, need_q and loop, loop)]
    if direction == "sums" and need_q and p.width * q.element_size() > 256:
        # The function's sums and dQ do not fit in registers together.
        passes = [("rows", p.rule, True, True), (direction, rule, False, True)]
    for direction, rule, with_q, loop in passes:
        p.launch(
            direction, attend_backward_rows, p.row_programs, Q=p.q, K=p.k, V=p.v, OUT=out, DO=do, LSE=lse,
            DLSE=grad_lse, LSE2=lse2, DELTA=delta, kept_h=kept_h, DQ=dq if with_q else None, WORDS=words, rule=rule,
            scale=scale, scale2=p.scale2, LOOP=loop, NEAR=needed, reset=reset,
            **strides(q=p.q, k=p.k, v=p.v, o=out, do=do, dq=dq if with_q else p.q),
        )  # fmt: skip
    if need_kv:
        needed = None if needed is None else turned(p, needed)
        rule_of_keys, other = p.rule, None
        if dqt is None:
            other = Columns(p, do, lse2, delta, kept_h, dk, dv, needed, slopes, scale)
        elif target is not None:
            rule_of_keys = ToeplitzGradient(*p.rule[:6], *where, None, None, turned=1, lift=p.rule.lift)
        p.launch(
            "cols" if dqt is None else "once", attend_backward_cols, p.key_programs, Q=p.q, K=p.k, V=p.v, DO=do,
            LSE2=lse2, DELTA=delta, kept_h=kept_h, DK=dk, DV_OUT=dv, DQT=dqt, t_l=in_blocks(p.queries), WORDS=words,
            rule=rule_of_keys, scale=scale, scale2=p.scale2, NEAR=needed, other=other,
            reset=None if dqt is None else reset, **strides(q=p.q, k=p.k, v=p.v, do=do, dk=dk, dv=dv),
        )  # fmt: skip
    if dqt is not None:
        turn_rows[(-(-p.queries // TURNED) * p.batch * p.heads,)](
            dqt, dq, scale, p.queries, p.heads, in_blocks(p.queries), *dq.stride()[:3], D=p.head_dim,
            HEAD_DIM=padded(p.head_dim), BLOCK=TURNED,
        )  # fmt: skip
    if need_table:
        if deterministic:
            p.launch(
                "diagonals", attend_backward_diagonals, p.tile_diagonals, Q=p.q, K=p.k, V=p.v, DO=do, LSE2=lse2,
                DELTA=delta, kept_h=kept_h, BLOCKS=sums, WORDS=words, rule=p.rule, scale2=p.scale2, B=p.batch,
                max_q=p.ahead, max_k=p.behind, g_copy=sums.stride(0), g_h=sums.stride(1), g_zero=zero,
                **strides(q=p.q, k=p.k, v=p.v, do=do),
            )  # fmt: skip
            fold(sums, dtable, zero, p.behind)
        else:
            first, last = seen_offsets(p.behind, dtable.shape[1], p.low, p.high)
            place = slice(first + p.behind - 1, last + p.behind)
            dtable.zero_()[:, place] = target[:, p.rule.zero + first : p.rule.zero + last + 1]
        if tails is not None:
            ends = tails.view(-1, p.heads, places, 2).sum((0, 2))
            dtable[:, 0] += ends[:, 0]
            dtable[:, -1] += ends[:, 1]
    p.clear(dq)
    p.clear(dk, keys=True)
    p.clear(dv, keys=True)
    if relative is not None:
        if need_drelative and rule.grad is not drelative:
            drelative.copy_(rule.grad)
        return dq, dk, dv, dtable, drelative
    if scaled is None:
        return dq, dk, dv, dtable
    if not need_table:
        return dq, dk, dv, dtable, *(q.new_empty(0) for _ in range(3))
    drows = p.by_position(dfactor.sum(1), len(scaled[1]))
    return dq, dk, dv, q.new_empty(0), dtable.sum(0), drows, add_up(dpieces, p.heads, len(scaled[2]))
