"""Rule: a bias that depends on j - i only, read from a table.  l = s + T[h, j - i];  dl/dT[h, x] sums along diagonals.

`base` is fp32 [H, stride] in base 2 with T[h, x] at zero + x for what is visible, and ROOM on both sides, HIDDEN: no
tile is bounds-checked.
`split` is 1 or None, see `minus_rows`.
`span`, if given, is int32 [2, H] in terms of j - i: outside [span[0, h], span[1, h]] the table is constant on either
side, and a tile that lies there adds one number (a head's first two entries hold both) and touches no table. With
`lift` (rule.py), that number goes to the rows' maxima or sums, and the tile costs what one without a bias does.

The gradient goes to `grad`, fp32 [H, grad_stride], at the same places as the table's entries (diagonals.py). What a
constant tail receives is summed by rows and kept in `tails`, fp32 [heads, tails_stride, 2], if given: entries of a tail
have one cause, so one sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .diagonals import add_diagonals
from .rule import all_along, no_finish, no_row_term, no_start, no_table, nothing
from .tile import HIDDEN, LOG2E, load_scattered

# A tile that holds a visible pair reaches beyond what is visible by less than its rows and columns together.
ROOM = 256
OPEN = 2**30  # beyond any j - i


@triton.jit
def load_span(rule, b, h, row, end):
    if rule.span is None:
        return ()
    else:
        head = rule.base + h.to(tl.int64) * rule.stride
        low = tl.load(rule.span + h)
        high = tl.load(rule.span + rule.heads + h)
        return (low, high, tl.load(head), tl.load(head + 1))


@triton.jit
def table_rows(rule, h, i, m0, origin):
    return minus_rows(rule.base + h.to(tl.int64) * rule.stride + rule.zero, i, m0, rule.split)


@triton.jit
def minus_rows(base, i, m0, SPLIT):
    """base - i. Split, i is taken off in two parts, for kernels in which the compiler would not see otherwise that rows
    of a tile are a fixed distance apart, and that half of its entries of the table are the other half.
    """
    if SPLIT is None:
        return base - i.to(tl.int64)
    else:
        return (base - m0) - (i - m0).to(tl.int64)


@triton.jit
def add_table(s, scale, S, R, C, j, first, last, rule):
    if rule.span is None:
        return s * scale + load_scattered(R + j.to(tl.int64))
    else:
        # Scaled before the branch: the pipeliner of Triton 3.6 fails where a product is first used inside of one.
        l = s * scale
        if (last >= S[0]) & (first <= S[1]):
            l += load_scattered(R + j.to(tl.int64))
        else:
            l += tl.where(last < S[0], S[2], S[3])
        return l


@triton.jit
def lift_table(s, scale, S, R, C, j, first, last, rule):
    lift = tl.where(last < S[0], S[2], S[3])
    if (last >= S[0]) & (first <= S[1]):
        s += load_scattered(R + j.to(tl.int64)) * (1.0 / scale)
        lift = 0.0
    return s, lift


@triton.jit
def tails_start(rule, BLOCK_M: tl.constexpr):
    if rule.tails is None:
        return ()
    else:
        return (tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32))


@triton.jit
def table_gradient(ds, dl, T, S, R, m0, n0, first, last, h, rule, PRECISION: tl.constexpr):
    if rule.span is None:
        add_diagonals(dl, rule, m0, n0, h, PRECISION, rule.turned is not None)
        return T
    else:
        near = (last >= S[0]) & (first <= S[1])
        if rule.grad is not None:  # noqa: SIM102 - known when compiled; the other only when run
            if near:
                add_diagonals(dl, rule, m0, n0, h, PRECISION, rule.turned is not None)
        if rule.tails is None:
            return T
        else:
            left = T[0]
            right = T[1]
            if not near:
                total = tl.sum(ds, 1)
                left += tl.where(last < S[0], total, 0.0)
                right += tl.where(last < S[0], 0.0, total)
            elif rule.grad is None:
                # In fixed order only the span is summed elsewhere; a near tile has pairs on both sides of its ends.
                x = (n0 + tl.arange(0, ds.shape[1]))[None, :] - (m0 + tl.arange(0, ds.shape[0]))[:, None]
                left += tl.sum(tl.where(x < S[0], ds, 0.0), 1)
                right += tl.sum(tl.where((x > S[1]) & (x >= S[0]), ds, 0.0), 1)
            return (left, right)


@triton.jit
def tails_finish(T, S, R, rule, head, n, row, length):
    if rule.tails is not None:
        pair = rule.tails + (head.to(tl.int64) * rule.tails_stride + n) * 2
        tl.store(pair, tl.sum(T[0], 0))
        tl.store(pair + 1, tl.sum(T[1], 0))


class Toeplitz(NamedTuple):
    """Logits only: forward, and every backward that owes the table nothing."""

    base: Any
    stride: Any
    zero: Any
    span: Any
    heads: Any
    split: Any
    unscaled: Any = None
    lift: Any = None
    setup: Any = load_span
    row_term: Any = no_row_term
    rows: Any = table_rows
    cols: Any = nothing
    score: Any = add_table
    start: Any = no_start
    table: Any = no_table
    finish: Any = no_finish
    along: Any = all_along


class ToeplitzGradient(NamedTuple):
    """Logits, and the table's gradient; with `turned`, of tiles [BLOCK_N, BLOCK_M], where tails owe nothing."""

    base: Any
    stride: Any
    zero: Any
    span: Any
    heads: Any
    split: Any
    grad: Any
    grad_stride: Any
    tails: Any
    tails_stride: Any
    turned: Any = None
    unscaled: Any = None
    lift: Any = None
    setup: Any = load_span
    row_term: Any = no_row_term
    rows: Any = table_rows
    cols: Any = nothing
    score: Any = add_table
    start: Any = tails_start
    table: Any = table_gradient
    finish: Any = tails_finish
    along: Any = all_along


@triton.jit(do_not_specialize=["length", "zero", "lowest", "low", "high"])
def pad_table(TABLE, BASE, table_h, table_x, stride, length, zero, lowest, low, high, BLOCK: tl.constexpr):
    """BASE[h, zero + x] = TABLE[h, x - lowest] in base 2, the ends repeated; both ends once more in front.

    HIDDEN where x < low or x > high.
    """
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.minimum(tl.maximum(t - zero - lowest, 0), length - 1)
    x = tl.where(t == 0, 0, tl.where(t == 1, length - 1, x))
    value = tl.load(TABLE + h * table_h + x.to(tl.int64) * table_x, mask=t < stride, other=0.0)
    seen = ((t - zero >= low) & (t - zero <= high)) | (t < 2)
    value = tl.maximum(value * LOG2E, HIDDEN, propagate_nan=tl.PropagateNan.ALL)
    tl.store(BASE + h * stride + t, tl.where(seen, value, HIDDEN), mask=t < stride)


def seen_offsets(behind: int, length: int, low: int, high: int) -> tuple[int, int]:
    """The first and the last j - i that is visible, of a table from 1 - behind up; only they have room in a copy."""
    first = min(max(1 - behind, low), length - behind)
    return first, max(first, min(length - behind, high))


def prepare(
    table: Tensor, support: Tensor | None, behind: int, shift: int, split: bool, low: int = -OPEN, high: int = OPEN
) -> Toeplitz:
    """The rule of a table [H, behind + ahead - 1] of j - i from 1 - behind up; support is in terms of j - i + shift.

    What no query sees, below low and above high, is HIDDEN in the copy: a kernel that reads it needs no other mask.
    """
    heads, length = table.shape
    first, last = seen_offsets(behind, length, low, high)
    # Multiples of 16 throughout: Triton compiles one kernel for them, and so one for all lengths.
    zero = (ROOM - first + 15) // 16 * 16
    stride = (zero + last + ROOM + 16) // 16 * 16
    base = torch.empty(heads, stride, dtype=torch.float32, device=table.device)
    pad_table[(triton.cdiv(stride, 1024), heads)](
        table, base, *table.stride(), stride, length, zero, 1 - behind, low, high, BLOCK=1024
    )
    span = None if support is None else (support - shift).to(torch.int32).contiguous()
    return Toeplitz(base, stride, zero, span, heads, 1 if split else None)
