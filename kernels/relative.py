"""Rule: a bias that the model computes for each query.  l = s + R[b, h, i, -o] where -W < o <= 0, o = j - i + shift.

R is [B, H, Lq, W] with its last stride 1, fp32 or 16 bit. A row owns its R, so dl/dR[b, h, i, -o] is the logit's own
gradient: plain stores, in any order the same. Tiles that lie outside of the band touch neither R nor its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rule import all_along, no_finish, no_row_term, no_start, no_table, nothing
from .tile import ASM_LOADS, LOG2E


@triton.jit
def load_band(pointers, index, width):
    """Elements whose index is in 0 .. width - 1 -> fp32, else 0; loaded into the layout in which they are added."""
    if not ASM_LOADS:
        return tl.load(pointers, mask=(index >= 0) & (index < width), other=0.0).to(tl.float32)
    elif pointers.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "{ .reg .pred in; setp.lt.u32 in, $2, $3; mov.f32 $0, 0f00000000; @in ld.global.nc.f32 $0, [$1]; }",
            "=&f,l,r,r", [pointers, index, width], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred in; setp.lt.u32 in, $2, $3; mov.b16 $0, 0; @in ld.global.nc.b16 $0, [$1]; }",
            "=&h,l,r,r", [pointers, index, width], dtype=tl.int16, is_pure=True, pack=1,
        )  # fmt: skip
        return bits.to(pointers.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def band_of_head(rule, b, h, row, end):
    """Where R has the query that stands at key 0, which is the last, and where the gradient has the first."""
    row += tl.cast(rule.shift, tl.int64)
    end -= rule.shift
    base = rule.base + b * rule.stride_b + h.to(tl.int64) * rule.stride_h + row * tl.cast(rule.stride_l, tl.int64)
    if rule.grad is None:
        return (base, end - 1)
    else:
        grad = rule.grad + b * rule.grad_b + h.to(tl.int64) * rule.grad_h + row * tl.cast(rule.grad_l, tl.int64)
        return (base, end - 1, grad)


@triton.jit
def band_rows(rule, h, i, m0, origin):
    """The keys at which the queries stand, and the first of them."""
    return (i - rule.shift, m0 - rule.shift)


@triton.jit
def band_pointers(base, S, R, j, stride):
    # In 32 bits but for what the tile has in common. Rows that reach over the last one read that.
    row = (tl.minimum(R[0], S[1]) - R[1]) * stride + (R[0] - R[1])
    return (base + R[1].to(tl.int64) * (stride + 1)) + row.to(tl.int64) - j.to(tl.int64)


@triton.jit
def add_band(s, scale, S, R, C, j, first, last, rule):
    l = s * scale
    if (last + rule.shift > -rule.width) & (first + rule.shift <= 0):
        l += load_band(band_pointers(S[0], S, R, j, rule.stride_l), R[0] - j, rule.width) * LOG2E
    return l


@triton.jit
def band_gradient(ds, dl, T, S, R, m0, n0, first, last, h, rule, PRECISION: tl.constexpr):
    if (last + rule.shift > -rule.width) & (first + rule.shift <= 0):
        j = n0 + tl.arange(0, ds.shape[1])[None, :]
        pointers = band_pointers(S[2], S, R, j, rule.grad_l)
        index = R[0] - j
        inside = (index >= 0) & (index < rule.width) & (S[1] >= R[0])
        tl.store(pointers, ds.to(rule.grad.dtype.element_ty), mask=inside)
    return T


class Relative(NamedTuple):
    """Logits only."""

    base: Any
    stride_b: Any
    stride_h: Any
    stride_l: Any
    width: Any
    shift: Any
    grad: Any = None
    unscaled: Any = None
    lift: Any = None
    setup: Any = band_of_head
    row_term: Any = no_row_term
    rows: Any = band_rows
    cols: Any = nothing
    score: Any = add_band
    start: Any = no_start
    table: Any = no_table
    finish: Any = no_finish
    along: Any = all_along


class RelativeGradient(NamedTuple):
    """Logits, and the gradient of R, which holds zeros before."""

    base: Any
    stride_b: Any
    stride_h: Any
    stride_l: Any
    width: Any
    shift: Any
    grad: Any
    grad_b: Any
    grad_h: Any
    grad_l: Any
    unscaled: Any = None
    lift: Any = None
    setup: Any = band_of_head
    row_term: Any = no_row_term
    rows: Any = band_rows
    cols: Any = nothing
    score: Any = add_band
    start: Any = no_start
    table: Any = band_gradient
    finish: Any = no_finish
    along: Any = all_along
