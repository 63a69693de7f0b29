"""Which keys can matter to a group of rows, where a bias decays: the tiles of all others are not computed.

In base 2, with U_i = |scale| |q_i| max_j |k_j| and the envelope E(x) of the bias, the largest value that it has at
x = j - i or farther from the offset 0 on that side, no logit of row i at x is above U_i + E(x). Let L_i be at most the
row's lse. A key with

    U_i + E(x) < L_i - 26 - log2 Lk

has less than 2^-26 / Lk of the row's sum, so all of them together have less than 2^-26 of it: a quarter of the
distance between two fp32 numbers. E is monotone on either side: the keys that are left are one range.

L_i is the largest logit among the 64 keys at the row's own position (forward; -inf, and nothing is left out, if the
row sees none of them), or the saved lse (backward, where each p that is left out is below 2^-26 / Lk, and with it
what it would add to dV, dK, dQ and the bias's gradient). The key that L_i is from is never left out: its own logit is
at most U_i + E, and not below L_i - log2 Lk.

Rounding: a score is off by at most 2^-9 U_i, even from tf32 products that cut operands off; the bound, L_i and the
forward pass each have such an error, and U_i is raised by 2^-7 of itself. Biases are off by less than 2^-20 |L_i|.
Squares that underflow are less than TINY^2 together. A comparison with NaN is false, and false keeps a pair; maxima of
norms carry NaN and inf, so beside such a key nothing is left out.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .problem import Problem, padded, strides
from .tile import DEAD, LOG2E, load_columns, load_rows, uniform

ROWS = tl.constexpr(64)  # of a program
SHARED = tl.constexpr(16)  # rows that have one range: fewer than any kernel's tile
BITS = 26
SLACK = tl.constexpr(1 + 2**-7)
TINY = tl.constexpr(2.0**-58)
ROUNDED = tl.constexpr(2.0**-20)


@triton.jit(do_not_specialize=["Lq", "Lk", "low", "high", "H", "shift", "behind", "width", "steps", "bits"])
def near_keys(
    Q, K, LSE, PAD, NORMS, LEFT, RIGHT, NEAR, rule, scale, bits, Lq, Lk, low, high, shift, behind, width, steps,
    H, GROUP, q_b, q_h, q_l, k_b, k_h, k_l, p_b,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """NEAR[b, h, g] = first key and last key + 1 that rows 16 g .. 16 g + 15 need.

    LEFT and RIGHT [H, width] are E on either side of the offset 0, of x from 1 - behind up; None: no keys there.
    """
    blocks = tl.cdiv(Lq, ROWS)
    bh = tl.program_id(0) // blocks
    m0 = tl.program_id(0) % blocks * ROWS
    h = bh % H
    b = (bh // H).to(tl.int64)
    kv = (h // GROUP).to(tl.int64)
    i = m0 + tl.arange(0, ROWS)
    q = load_rows(Q + b * q_b + h.to(tl.int64) * q_h, m0, q_l, Lq, ROWS, HEAD_DIM, D)
    squares = q.to(tl.float32)
    norm = tl.sqrt(tl.sum(squares * squares, 1))
    keys = tl.load(NORMS + b * (H // GROUP) + kv)
    most = (norm + TINY) * (keys + TINY) * tl.abs(scale) * SLACK  # U
    if LSE is not None:
        least = tl.load(LSE + bh.to(tl.int64) * Lq + i, mask=i < Lq, other=0.0) * LOG2E
    else:
        n0 = tl.maximum(tl.minimum(m0 - shift, Lk - ROWS), 0)
        j = n0 + tl.arange(0, ROWS)
        k = load_columns(K + b * k_b + kv * k_h, n0, k_l, Lk, ROWS, HEAD_DIM, D)
        S = rule.setup(rule, b, h, 0, Lq)
        R = rule.rows(rule, h, i[:, None], m0, m0)
        C = rule.cols(rule, h, j[None, :], n0, m0)
        first = n0 - m0 - (ROWS - 1)
        last = n0 - m0 + (ROWS - 1)
        s = tl.dot(q, k, input_precision=PRECISION)
        s = rule.score(s, scale, S, R, C, j[None, :], first, last, rule)
        x = j[None, :] - i[:, None]
        seen = (x >= low) & (x <= high) & (j[None, :] < Lk)
        if PAD is not None:
            keep = tl.load(PAD + b * p_b + j, mask=j < Lk, other=0)
            seen = seen & (keep[None, :] != 0)
        least = tl.max(tl.where(seen, s, -float("inf")), 1)
        least = tl.where(least <= DEAD, -float("inf"), least + rule.row_term(rule, h, i, m0, m0))
    bound = least - bits - most - tl.abs(least) * ROUNDED
    start = tl.zeros([ROWS], tl.int32)
    stop = start + Lk
    if LEFT is not None:
        # The smallest x <= -shift at which the bound is reached; t counts x from 1 - behind.
        t = tl.zeros([ROWS], tl.int32)
        end = tl.zeros([ROWS], tl.int32) + tl.minimum(tl.maximum(behind - 1 - shift, 0), width - 1)
        for _ in tl.range(0, steps):
            middle = (t + end) // 2
            below = tl.load(LEFT + h.to(tl.int64) * width + middle) * LOG2E < bound
            t = tl.where(below & (t < end), middle + 1, t)
            end = tl.where(below, end, middle)
        start = tl.maximum(i + (t + 1 - behind), 0)
    if RIGHT is not None:
        # The largest x >= -shift.
        t = tl.zeros([ROWS], tl.int32) + tl.minimum(tl.maximum(behind - 1 - shift, 0), width - 1)
        end = tl.zeros([ROWS], tl.int32) + (width - 1)
        for _ in tl.range(0, steps):
            middle = (t + end + 1) // 2
            below = tl.load(RIGHT + h.to(tl.int64) * width + middle) * LOG2E < bound
            end = tl.where(below & (t < end), middle - 1, end)
            t = tl.where(below, t, middle)
        stop = tl.minimum(i + (t + 2 - behind), Lk)
    # Rows that do not exist need nothing.
    start = tl.where(i < Lq, start, Lk)
    stop = tl.where(i < Lq, stop, 0)
    group = tl.arange(0, ROWS // SHARED)
    groups = tl.cdiv(Lq, SHARED)
    pair = NEAR + (bh.to(tl.int64) * groups + m0 // SHARED + group) * 2
    exists = m0 // SHARED + group < groups
    tl.store(pair, tl.min(start.reshape(ROWS // SHARED, SHARED), 1), mask=exists)
    tl.store(pair + 1, tl.max(stop.reshape(ROWS // SHARED, SHARED), 1), mask=exists)


@triton.jit
def narrowed(NEAR, bh, x0, length, start, stop, BLOCK: tl.constexpr):
    """Of the keys start .. stop those that rows x0 .. x0 + BLOCK - 1 of `length` need; or the same of rows and keys."""
    group = x0 // SHARED + tl.arange(0, BLOCK // SHARED)
    groups = tl.cdiv(length, SHARED)
    pair = NEAR + (bh.to(tl.int64) * groups + group) * 2
    first = tl.min(tl.load(pair, mask=group < groups, other=2147483647), 0)
    last = tl.max(tl.load(pair + 1, mask=group < groups, other=0), 0)
    return uniform(tl.maximum(start, first)), uniform(tl.minimum(stop, last))


@triton.jit(do_not_specialize=["Lq", "Lk"])
def near_rows(NEAR, BACK, Lq, Lk, CHUNK: tl.constexpr):
    """BACK[b, h, g] = the first row and the last + 1 that need one of the keys 16 g .. 16 g + 15."""
    keys = tl.cdiv(Lk, SHARED)
    rows = tl.cdiv(Lq, SHARED)
    blocks = tl.cdiv(keys, 8)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    key = tl.program_id(0) % blocks * 8 + tl.arange(0, 8)
    first = tl.zeros([8], tl.int32) + rows
    last = tl.zeros([8], tl.int32)
    for g0 in tl.range(0, rows, CHUNK):
        row = g0 + tl.arange(0, CHUNK)
        pair = NEAR + (bh * rows + row) * 2
        start = tl.load(pair, mask=row < rows, other=2147483647)
        stop = tl.load(pair + 1, mask=row < rows, other=0)
        needs = (start[None, :] < (key * SHARED + SHARED)[:, None]) & (stop[None, :] > (key * SHARED)[:, None])
        first = tl.minimum(first, tl.min(tl.where(needs, row[None, :], rows), 1))
        last = tl.maximum(last, tl.max(tl.where(needs, row[None, :] + 1, 0), 1))
    pair = BACK + (bh * keys + key) * 2
    tl.store(pair, first * SHARED, mask=key < keys)
    tl.store(pair + 1, last * SHARED, mask=key < keys)


def near(
    p: Problem, table: Tensor | None, slopes: Tensor | None, symmetric: bool, lse: Tensor | None = None
) -> Tensor | None:
    """int32 [B, Hq, groups of rows, 2], or None where nothing can be told: the first key, and the last + 1."""
    if p.softcap or p.sequences is not None or p.keys == 0 or (table is None and slopes is None):
        return None
    width = p.queries + p.keys - 1
    if table is None:
        offset = torch.arange(1 - p.queries, p.keys, dtype=torch.float32, device=p.q.device) + p.shift
        line = slopes[:, None] * (-offset.abs() if symmetric else offset)
        # Where a bias grows with the distance, the farthest key bounds them all.
        left = torch.where((slopes >= 0)[:, None], line, line[:, :1])
        falls = slopes >= 0 if symmetric else slopes <= 0
        right = torch.where(falls[:, None], line, line[:, -1:])
    else:
        left = table.cummax(1).values
        right = table.flip(1).cummax(1).values.flip(1)
    made = torch.empty(p.batch, p.heads, triton.cdiv(p.queries, SHARED.value), 2, dtype=torch.int32, device=p.q.device)
    norms = torch.linalg.vector_norm(p.k, dim=-1, dtype=torch.float32).amax(-1)
    near_keys[(triton.cdiv(p.queries, ROWS.value) * p.batch * p.heads,)](
        p.q, p.k, lse, p.mask, norms,
        left.contiguous() if p.low < -p.shift else None, right.contiguous() if p.high > -p.shift else None,
        made, p.rule, p.scale2, float(BITS + math.ceil(math.log2(p.keys))), p.queries, p.keys, p.low, p.high,
        p.shift, p.queries, width, width.bit_length(), p.heads, p.group, **strides(q=p.q, k=p.k),
        p_b=p.mask_stride, HEAD_DIM=padded(p.head_dim), D=p.head_dim,
        PRECISION=configs.dot_precision(p.q, configs.Config(0, 0, 4, 1)), num_warps=4, num_stages=1,
    )  # fmt: skip
    return made


def turned(p: Problem, near: Tensor) -> Tensor:
    """int32 [B, Hq, groups of keys, 2]: the first row, and the last + 1, that need one of the keys."""
    keys = triton.cdiv(p.keys, SHARED.value)
    made = near.new_empty(*near.shape[:2], keys, 2)
    near_rows[(triton.cdiv(keys, 8) * p.batch * p.heads,)](near, made, p.queries, p.keys, CHUNK=256, num_warps=4)
    return made
