"""Rule: a function of a scaled distance (FIRE).  l = s + b_h(x), x = line[j - i] * factor[i], b_h piecewise linear.

In a tile x lies between two scalars, and so few knots of b_h lie inside the tile, mostly none: what every score costs
is one load and one multiply-add more than a table. With s the segment of the tile's smallest x,

    b_h(x) = slope[s] x + intercept[s] + sum over the knots t inside of jump[t] * max(x - t, 0).

dl/dline[j - i] sums slope(x) factor[i] along diagonals, dl/dfactor[i] sums slope(x) line[j - i] over keys, and the
segment of x gets dl/dslope = x, dl/dintercept = 1. `line` must grow with the distance |j - i - now|, `factor` must not
grow with i: the corners of a tile then bound its x. Knots, line and intercepts are in base 2 (times log2 e), factors
and slopes are not, and `add_up` brings sums of x back.

`base` is `line` as a table of one head (toeplitz.py); `pieces` fp32 [H, SEGMENTS, 4] holds slope and intercept of a
segment and jump and knot at its right end, none (0, FAR) from the last one on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .diagonals import add_diagonals
from .knots import HINGE, STEP, over_knots
from .rule import no_finish, no_row_term, no_start, no_table, nothing
from .tile import LOG2E, load_scattered
from .toeplitz import OPEN, ROOM, minus_rows, pad_table

FAR = tl.constexpr(2.0e38)  # in base 2 still finite
# Rows of a program of the backward by rows are at least these: it has its own place among the partial sums.
LEAST_ROWS = tl.constexpr(32)
# Factors are padded to a multiple of these: a tile may reach over the last one.
MOST_ROWS = 128


@triton.jit
def load_knots(rule, b, h, row, end):
    pieces = rule.pieces + h.to(tl.int64) * (8 * rule.units)
    return (pieces, tl.load(pieces + 4 * tl.arange(0, rule.units) + 3))


@triton.jit
def line_and_factor(rule, h, i, m0, origin):
    rows: tl.constexpr = i.shape[0] * i.shape[1]
    pointers = minus_rows(rule.base + rule.zero, i, m0, rule.split)
    least = tl.load(rule.factor + m0 + (rows - 1))
    return (pointers, load_scattered(rule.factor + i), least, tl.load(rule.factor + m0))


@triton.jit
def locate(S, R, first, last, rule):
    """Segment of the tile's smallest x, and the number of knots inside of the tile."""
    line = rule.base + rule.zero
    least = tl.load(line + tl.minimum(tl.maximum(rule.now, first), last)) * R[2]
    most = tl.maximum(tl.load(line + first), tl.load(line + last)) * R[3]
    below = tl.sum((S[1] < least).to(tl.int32) + ((S[1] < most).to(tl.int32) << 16), 0)
    return (below & 0xFFFF, (below >> 16) - (below & 0xFFFF))


@triton.jit
def add_function(s, scale, S, R, C, j, first, last, rule):
    segment, inside = locate(S, R, first, last, rule)
    piece = S[0] + 4 * segment
    line = load_scattered(R[0] + j.to(tl.int64))
    l = s * scale + tl.load(piece + 1)
    l += line * (tl.load(piece) * R[1])
    return over_knots(l, line, R[1], piece, inside, HINGE)


@triton.jit
def derivative(ds, S, R, j, first, last, rule):
    """ds * db/dline."""
    segment, inside = locate(S, R, first, last, rule)
    line = load_scattered(R[0] + j.to(tl.int64))
    piece = S[0] + 4 * segment
    return ds * over_knots(tl.load(piece) * R[1], line, R[1], piece, inside, STEP)


@triton.jit
def sums_start(rule, BLOCK_M: tl.constexpr):
    segment = tl.full((), 0, tl.int32)
    by_row = tl.zeros([BLOCK_M], tl.float32)  # of the gradients in that segment, so far
    by_row_line = tl.zeros([BLOCK_M], tl.float32)  # times line
    dfactor = tl.zeros([BLOCK_M], tl.float32)
    dintercept = tl.zeros([2 * rule.units], tl.float32)
    dslope = tl.zeros([2 * rule.units], tl.float32)
    return (segment, by_row, by_row_line, dfactor, dintercept, dslope)


@triton.jit
def over_rows(x):
    """Sum of a vector; of a matrix, because sums of vectors fail in a pass of Triton 3.7 for tensor memory (sm_100)."""
    return tl.sum(x[:, None], 0).item()


@triton.jit
def enter(sums, segment, amount):
    return sums + tl.where(tl.arange(0, sums.shape[0]) == segment, amount, 0.0)


@triton.jit
def move(sums, segment, amount):
    """What stands past the knot belongs to the next segment."""
    n = tl.arange(0, sums.shape[0])
    return sums + tl.where(n == segment + 1, amount, tl.where(n == segment, -amount, 0.0))


@triton.jit
def function_gradient(ds, dl, T, S, R, m0, n0, first, last, h, rule, PRECISION: tl.constexpr):
    current, by_row, by_row_line, dfactor, dintercept, dslope = T
    segment, inside = locate(S, R, first, last, rule)
    piece = S[0] + 4 * segment
    j = n0 + tl.arange(0, ds.shape[1])[None, :]
    line = load_scattered(R[0] + j.to(tl.int64))
    if rule.grad is not None:
        along = ds * over_knots(tl.load(piece) * R[1], line, R[1], piece, inside, STEP)
        add_diagonals(along.to(dl.dtype), rule, m0, n0, h, PRECISION)
    factor = tl.sum(R[1], 1)
    if segment != current:
        dfactor += tl.load(S[0] + 4 * current) * by_row_line
        dintercept = enter(dintercept, current, over_rows(by_row))
        dslope = enter(dslope, current, over_rows(by_row_line * factor))
        by_row = tl.zeros_like(by_row)
        by_row_line = tl.zeros_like(by_row_line)
    by_row += tl.sum(ds, 1)
    by_row_line += tl.sum(ds * line, 1)
    if inside > 0:
        # By branches, not by a loop: the loop over keys is pipelined only where it holds no other.
        for n in tl.static_range(0, rule.units):
            if inside > n:
                past = tl.where(line * R[1] > tl.load(piece + 4 * n + 3), ds, 0.0)
                dintercept = move(dintercept, segment + n, over_rows(tl.sum(past, 1)))
                past_line = tl.sum(past * line, 1)
                dfactor += tl.load(piece + 4 * n + 2) * past_line
                dslope = move(dslope, segment + n, over_rows(past_line * factor))
    return (segment, by_row, by_row_line, dfactor, dintercept, dslope)


@triton.jit
def sums_finish(T, S, R, rule, head, n, row, length):
    segment, by_row, by_row_line, dfactor, dintercept, dslope = T
    dfactor += tl.load(S[0] + 4 * segment) * by_row_line
    dintercept = enter(dintercept, segment, over_rows(by_row))
    dslope = enter(dslope, segment, over_rows(by_row_line * tl.sum(R[1], 1)))
    i = tl.arange(0, dfactor.shape[0])
    tl.store(rule.dfactor + row + i, dfactor, mask=i < length)
    program = head.to(tl.int64) * rule.programs_stride + n
    pair = rule.dpieces + program * (4 * rule.units) + 2 * tl.arange(0, dslope.shape[0])
    tl.store(pair, dslope)
    tl.store(pair + 1, dintercept)


class Scaled(NamedTuple):
    """Logits only."""

    base: Any
    zero: Any
    factor: Any
    pieces: Any
    now: Any
    units: Any
    split: Any
    span: Any = None
    unscaled: Any = None
    lift: Any = None
    setup: Any = load_knots
    row_term: Any = no_row_term
    rows: Any = line_and_factor
    cols: Any = nothing
    score: Any = add_function
    start: Any = no_start
    table: Any = no_table
    finish: Any = no_finish
    along: Any = derivative


class ScaledGradient(NamedTuple):
    """Logits, and the gradients of line (unless `grad` is None), factor and pieces."""

    base: Any
    zero: Any
    factor: Any
    pieces: Any
    now: Any
    units: Any
    split: Any
    grad: Any
    grad_stride: Any
    dfactor: Any
    dpieces: Any
    programs_stride: Any
    span: Any = None
    unscaled: Any = None
    lift: Any = None
    setup: Any = load_knots
    row_term: Any = no_row_term
    rows: Any = line_and_factor
    cols: Any = nothing
    score: Any = add_function
    start: Any = sums_start
    table: Any = function_gradient
    finish: Any = sums_finish
    along: Any = derivative


@triton.jit(do_not_specialize=["F"])
def pack_pieces(KNOTS, PIECES, PACKED, F, SEGMENTS: tl.constexpr):
    """PACKED[h, s] = slope, intercept in base 2, jump of the slope and knot in base 2 at the right end."""
    h = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SEGMENTS)
    piece = PIECES + h * (2 * (F + 1)) + 2 * s
    slope = tl.load(piece, mask=s <= F, other=0.0)
    knot = tl.load(KNOTS + s, mask=s < F, other=FAR)
    packed = PACKED + (h * SEGMENTS + s) * 4
    tl.store(packed, slope)
    tl.store(packed + 1, tl.load(piece + 1, mask=s <= F, other=0.0) * LOG2E)
    tl.store(packed + 2, tl.where(s < F, tl.load(piece + 2, mask=s < F, other=0.0) - slope, 0.0))
    tl.store(packed + 3, tl.minimum(tl.maximum(knot, -FAR), FAR) * LOG2E)


def prepare(
    line: Tensor, rows: Tensor, knots: Tensor, pieces: Tensor, behind: int, first: int, shift: int,
    packed: bool,
) -> Scaled:  # fmt: skip
    """The rule of line [behind + ahead - 1] of j - i from 1 - behind up, rows [positions] of positions from `first` up,
    knots [F] and pieces [H, F + 1, 2], offsets being j - i + shift.
    """
    length, heads = len(line), len(pieces)
    zero = (behind - 1 + ROOM + 15) // 16 * 16
    stride = (zero + length - behind + ROOM + 16) // 16 * 16
    units = max(16, triton.next_power_of_2(len(knots)))
    base = line.new_empty(stride, dtype=torch.float32)
    joined = line.new_empty(heads, 2 * units, 4, dtype=torch.float32)
    # Position 0 is aligned. Rows of packed sequences do not begin at multiples of a tile.
    front = -first % 4
    over = MOST_ROWS if packed else -len(rows) % MOST_ROWS
    factor = torch.nn.functional.pad(rows[None], (front, over), mode="replicate")[0, front + first :]
    pad_table[(triton.cdiv(stride, 1024), 1)](
        line, base, 0, line.stride(0), stride, length, zero, 1 - behind, -OPEN, OPEN, BLOCK=1024
    )
    pack_pieces[(heads,)](knots.contiguous(), pieces.contiguous(), joined, len(knots), SEGMENTS=2 * units)
    return Scaled(base, zero, factor, joined, -shift, tl.constexpr(units), 1 if packed else None)


def room_for_sums(rule: Scaled, lse: Tensor, heads: int, programs: int) -> tuple[Tensor, Tensor]:
    """Where programs leave their sums: [B, H, Lq] of factor, [heads, programs, segments, 2] of pieces."""
    units: int = rule.units.value
    return torch.zeros_like(lse), lse.new_zeros(heads, programs, 2 * units, 2)


def add_up(dpieces: Tensor, heads: int, knots: int) -> Tensor:
    """-> dpieces [H, F + 1, 2]; what was summed with line is in base 2."""
    made = dpieces.unflatten(0, (-1, heads))[..., : knots + 1, :].sum((0, 2))
    made[..., 0] *= math.log(2.0)
    return made
