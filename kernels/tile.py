"""What every kernel needs of a tile: how memory is read, how logits are masked, and which base they are in.

Inside kernels logits are in base 2: scores and biases arrive multiplied by log2(e), so that a softmax costs one `ex2`
a score. A logit that must not count is HIDDEN, a finite number: -inf minus -inf is NaN, and a row that sees nothing
would spread it. A running maximum at or below DEAD means that the row saw nothing.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1.0e30)
DEAD = tl.constexpr(-1.0e29)
# Where a running maximum starts: above what is hidden, however a multiply-add rounds that, so that its p is 0.
START = tl.constexpr(-0.99e30)
# Inline PTX exists neither in the interpreter nor on AMD; there a plain load gives the same values.
ASM_LOADS = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
def load_scattered(pointers):
    """One fp32 per score, loaded straight into the layout in which it is added.

    A plain `tl.load` of such a tile is staged through shared memory, one 4-byte copy a score, and costs as much as the
    rest of the softmax; a load inside assembly is left where it is.
    """
    if ASM_LOADS:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(pointers)


@triton.jit
def uniform(x):
    """A number that was loaded, and that all threads have: the compiler does not see that, and keeps each address made
    of it in registers of every thread, unless it comes from one of them."""
    if ASM_LOADS:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return x


@triton.jit
def load_rows(
    base, first, stride, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    SIGNED: tl.constexpr = False,
):  # fmt: skip
    """Rows first .. first + ROWS - 1 of a [length, D] matrix -> [ROWS, HEAD_DIM]; zero beyond its edges.

    The tile's own pointers do not depend on `first`, so a loop advances one number. Negative rows need SIGNED.
    """
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, HEAD_DIM)[None, :]
    mask = r < length - first
    if SIGNED:
        mask = mask & (r >= -first)
    if D != HEAD_DIM:
        mask = mask & (d < D)
    return tl.load(base + tl.cast(first, tl.int64) * stride + (r.to(tl.int64) * stride + d), mask=mask, other=0.0)


@triton.jit
def load_columns(base, first, stride, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The same rows transposed -> [HEAD_DIM, ROWS]."""
    r = tl.arange(0, ROWS)[None, :]
    d = tl.arange(0, HEAD_DIM)[:, None]
    mask = r < length - first
    if D != HEAD_DIM:
        mask = mask & (d < D)
    return tl.load(base + tl.cast(first, tl.int64) * stride + (r.to(tl.int64) * stride + d), mask=mask, other=0.0)


@triton.jit
def store_rows(base, first, stride, length, value, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Write [ROWS, HEAD_DIM] into rows first .. of a [length, D] matrix."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, HEAD_DIM)[None, :]
    mask = r < length - first
    if D != HEAD_DIM:
        mask = mask & (d < D)
    pointers = base + tl.cast(first, tl.int64) * stride + (r.to(tl.int64) * stride + d)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def saw(top, total):
    """Whether rows with this running maximum and sum saw a key; logits that are all NaN are in the sum alone."""
    return (top > DEAD) | (total != total)


@triton.jit
def load_lse(LSE, DLSE, delta, row, i, length):
    """Base-2 lse and delta - dlse of rows row + i; a row that saw nothing gets an lse that makes every p of it zero.

    With a sink as good as none, such a row's lse is that sink and not -inf.
    """
    lse = tl.load(LSE + row + i, mask=i < length, other=-float("inf"))
    if DLSE is not None:
        delta -= tl.load(DLSE + row + i, mask=i < length, other=0.0)
    dead = lse <= DEAD
    return tl.where(dead, -HIDDEN, lse * LOG2E), tl.where(dead, 0.0, delta)


@triton.jit
def load_kept(LSE2, DELTA, row, i):
    """What backward_rows.py kept of rows row + i, for products of which they are columns.

    Behind the last row of a sequence stands what makes p zero. A plain load of such vectors may be copied ahead one
    number at a time (Triton 3.6: 40 % more instructions a tile).
    """
    return load_scattered(LSE2 + row + i), load_scattered(DELTA + row + i)


@triton.jit
def capped(s, scale):
    """tanh(s * scale / log2 e) = 1 - 2 / (1 + exp(2x)), which cannot overflow into NaN; scale is in base 2."""
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(s * (2.0 * scale)))
