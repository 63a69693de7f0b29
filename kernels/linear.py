"""Rules: a bias linear in the offset (ALiBi).  l = s + slope_h * (j - i + shift), or s - slope_h * |j - i + shift|.

No table. Where every visible key is in the past both forms agree, and the first costs nothing: its row term leaves the
softmax, its column term rides on the multiplication by the scale. SLOPE is fp32 [H] in base 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rule import all_along, no_finish, no_row_term, no_setup, no_start, no_table, nothing


@triton.jit
def minus_slope_rows(rule, h, i, m0, origin):
    return tl.load(rule.slope + h) * (origin + rule.shift - i).to(tl.float32)


@triton.jit
def slope_cols(rule, h, j, n0, origin):
    # As a sum: the first part leaves the loop, and what is left per score is one multiply-add with the scale.
    slope = tl.load(rule.slope + h)
    return slope * (j - n0).to(tl.float32) + slope * (n0 - origin).to(tl.float32)


@triton.jit
def sign_of_slope(rule, b, h, row, end):
    return (tl.where(tl.load(rule.slope + h) < 0, -1.0, 1.0),)


@triton.jit
def add_columns(s, scale, S, R, C, j, first, last, rule):
    return s * scale + C


@triton.jit
def subtract_distance(s, scale, S, R, C, j, first, last, rule):
    return s * scale - tl.abs(C + R) * S[0]


class Linear(NamedTuple):
    slope: Any
    shift: Any
    unscaled: Any = None
    lift: Any = None
    setup: Any = no_setup
    row_term: Any = minus_slope_rows
    rows: Any = nothing
    cols: Any = slope_cols
    score: Any = add_columns
    start: Any = no_start
    table: Any = no_table
    finish: Any = no_finish
    along: Any = all_along


class Distance(NamedTuple):
    slope: Any
    shift: Any
    unscaled: Any = None
    lift: Any = None
    setup: Any = sign_of_slope
    row_term: Any = no_row_term
    rows: Any = minus_slope_rows
    cols: Any = slope_cols
    score: Any = subtract_distance
    start: Any = no_start
    table: Any = no_table
    finish: Any = no_finish
    along: Any = all_along
