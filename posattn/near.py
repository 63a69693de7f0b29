r"""Which keys matter to which queries: with a bias that decays, those near enough.

A pair is negligible where a bound of its weight is: with s_ij = scale q_i . k_j + b(o), o the offset of key j from
query i, and Z_i = sum_j exp(s_ij) over the visible keys (and the sink),

    U_i  = |scale| |q_i| max_j |k_j|                so that  s_ij <= U_i + b(o)                     (Cauchy-Schwarz)
    E(o) = max of b over o and all offsets on the same side of 0 that are farther away,  so that    b(o) <= E(o)
    L_i  <= log Z_i: in forward the logsumexp of some visible keys (the nearest; the sink), in backward that of all

and a key is left out where it and all keys beyond it are negligible:  E(o) < L_i - U_i - (BITS + ceil(log2 Lk)) ln 2.

Why this is exact to rounding.  Each pair left out has p_ij = exp(s_ij) / Z_i <= exp(U_i + E(o) - L_i) < 2^-BITS / Lk,
and a row has at most Lk of them: what a row lacks of its Z_i is w_i < 2^-BITS.  With 26 bits in single precision that is
a quarter of a unit roundoff 2^-24 (and 2^-55 beside 2^-53 in double precision), so

    lse:  falls by -log(1 - w_i) < 2^-BITS (1 + 2^-BITS)
    out_i = (1 - w_i) kept_i + w_i left_i, averages of values:  |out_i - kept_i| <= 2 w_i max|v| < 2^(1-BITS) max_j |v_j|

(with dropout times 1 / (1 - p), as the values themselves).  In backward p_ij < 2^-BITS / Lk, and for the logits
dS_ij = p_ij (g_i . v_j - delta_i) with delta_i = g_i . out_i - glse_i, so |dS_ij| < 2^-BITS / Lk (2 |g_i| max|v| + |glse_i|)
=: 2^-BITS / Lk G_i.  Leaving pairs out changes, beside what the small changes of out and lse above make of the others,

    dV_j by less than 2^-BITS mean_i |g_i| Lq / Lk      dK_j by less than 2^-BITS |scale| mean_i (G_i |q_i|) Lq / Lk
    dQ_i by less than 2^-BITS |scale| G_i max|k|        the bias at an offset by 2^-BITS / Lk times the sum of G_i over rows

These are absolute bounds: a key whose whole weight is negligible gets a gradient of exactly 0.

Rounding.  With u the unit roundoff, a norm is off by a factor of 1 + (D/2 + 2) u, a product of D terms by
(D + 2) u |q| |k|, the sums and the logsumexp of n <= 32 numbers by less than (n + 8) u of the largest magnitude in them,
|b| <= |L_i| + U_i.  In all that is below (2 D + 32) u (U_i + |L_i| + margin), margin being (BITS + ...) ln 2 > 18: this much is
taken off the threshold.  A square that underflows lacks sqrt(tiny) at most, which is added to each element of the
norm.  (Products in less precision than the tensors', TF32, are off by more, here and in all other scores alike.)

What is not a number is never left out: a NaN or inf in q or k makes U_i or the threshold NaN or inf, and a comparison
must say "less" for a key to go.  The same holds for the bias: NaN counts as +inf.  A row without a visible key near
it has L_i = -inf and keeps all.  Hidden offsets (window, -inf in a table) have b = -1e30, and only help.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .strips import DEAD, INVISIBLE, Rule

ROWS = 16  # of a group: its rows share the bound, and the range of keys
NEAR = 16  # keys beside those of the group itself, from which the lower bound of the logsumexp is
# Less than 2^-BITS of each row is left out, by the dtype of the scores.
BITS = {torch.float32: 26, torch.float64: 55}
SCRATCH = 1 << 20  # numbers at a time


class Needed(NamedTuple):
    """Per batch entry, query head and group of ROWS rows the keys [first, last): (B, Hq, ceil(Lq / ROWS)) int64."""

    first: Tensor
    last: Tensor


@torch.no_grad()
def needed_keys(
    q: Tensor,
    k: Tensor,
    line: Tensor,
    rule: Rule,
    *,
    key_mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Needed:
    """The keys that matter, one range with offset 0 in or next to it for each group of rows: see above.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), not empty; line (Hq or 1, Lq + Lk - 1), that of `strips.make_line`; key_mask
    (B, Lk) bool; sinks (Hq,); lse (B, Hq, Lq) of forward, in backward. O(B Hq (Lq + Lk)) memory; waits for nothing.
    Keys that are not visible may be in a range.
    """
    dtype, (batch, heads, length, dim) = line.dtype, q.shape
    key_length, groups = k.shape[2], -(-length // ROWS)
    margin = (BITS[dtype] + math.ceil(math.log2(key_length))) * math.log(2)
    if line.shape[0] != heads:
        line = line.expand(heads, -1)

    # The rows of group g are among the `size` from start[g] on, which the last groups may share.
    size = min(ROWS, length)
    start = (torch.arange(groups, device=q.device) * ROWS).clamp(max=length - size)
    rows = start[:, None] + torch.arange(size, device=q.device)

    reach = abs(scale) * _norm(k, dtype, key_mask).amax(-1)  # (B, Hk)
    upper = _norm(q, dtype) * reach.repeat_interleave(heads // k.shape[1], 1)[..., None]  # (B, Hq, Lq)
    if lse is None:
        lower = _near_logsumexp(q, k, line, rule, start, size, key_mask, scale)
    else:
        lower = lse[:, :, rows]
    if sinks is not None:
        lower = torch.maximum(lower, sinks.to(dtype)[:, None, None])
    lower = lower.masked_fill(lower <= DEAD, -math.inf)
    upper = upper[:, :, rows]
    slack = (dim + 16) * torch.finfo(dtype).eps
    least = (lower - upper - margin - slack * (upper + lower.abs() + margin)).amin(-1)  # NaN stays
    least = least.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    offset = rule.shift - (length - 1)  # of number 0 of the line
    zero = min(max(-offset, 0), line.shape[1] - 1)
    left = _first_reaching(line[:, : zero + 1], least) + offset
    right = line.shape[1] - 1 + offset - _first_reaching(line[:, zero:].flip(1), least)
    begin = torch.arange(groups, device=q.device) * ROWS - rule.shift
    end = (torch.arange(1, groups + 1, device=q.device) * ROWS).clamp(max=length) - rule.shift
    first = (begin + left.clamp(max=0)).clamp(0, key_length)
    last = (end + right.clamp(min=0)).clamp(0, key_length)
    return Needed(first, torch.maximum(first, last))


def _first_reaching(line: Tensor, least: Tensor) -> Tensor:
    """Where the largest number so far first is `least` or more: line (Hq, n), least (B, Hq, groups)."""
    largest = line.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).cummax(1).values
    batch, heads, groups = least.shape
    wanted = least.transpose(0, 1).reshape(heads, batch * groups).contiguous()
    return torch.searchsorted(largest, wanted).view(heads, batch, groups).transpose(0, 1)


def _norm(t: Tensor, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """(B, H, L): the norms, not less than they are but for rounding; 0 where masked."""
    tiny = math.sqrt(t.shape[-1] * torch.finfo(dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(t, dim=-1, dtype=dtype) + tiny
    return norm if mask is None else norm.masked_fill(~mask[:, None], 0.0)


def _near_logsumexp(
    q: Tensor,
    k: Tensor,
    line: Tensor,
    rule: Rule,
    start: Tensor,
    size: int,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The logsumexp over some keys near to each row, those that are visible: (B, Hq, groups, size)."""
    dtype, (batch, heads, length, dim) = line.dtype, q.shape
    key_heads, key_length = k.shape[1], k.shape[2]
    group, width = heads // key_heads, min(size + NEAR, key_length)
    made = torch.empty((batch, heads, len(start), size), dtype=dtype, device=q.device)
    step = max(1, SCRATCH // (batch * heads * size * max(width, dim)))
    back = NEAR if rule.right == 0 else NEAR // 2
    for g in range(0, len(start), step):
        first_row = start[g : g + step]
        n = len(first_row)
        first_key = (first_row - rule.shift - back).clamp(0, key_length - width)
        rows = first_row[:, None] + torch.arange(size, device=q.device).flip(0)  # the last one first
        keys = first_key[:, None] + torch.arange(width, device=q.device)
        # Number d of row r of the bias of a group is number r + d of the line from `base` on.
        base = first_key - first_row + length - size
        numbers = base[:, None] + torch.arange(size + width - 1, device=q.device)
        part = line.index_select(1, numbers.view(-1)).view(heads, n, -1).unfold(2, width, 1)
        # (B, Hk, group, n, size, width)
        bias = part.view(1, key_heads, group, n, size, width).expand(batch, -1, -1, -1, -1, -1)
        if key_mask is not None:
            hidden = ~key_mask[:, keys]
            bias = bias.masked_fill(hidden[:, None, None, :, None], INVISIBLE)
        scores = bias.transpose(2, 3).reshape(batch * key_heads * n, group * size, width)
        asking = q.index_select(2, rows.view(-1)).view(batch, key_heads, group, n, size, dim).transpose(2, 3)
        asked = k.index_select(2, keys.view(-1)).to(dtype).view(-1, width, dim)
        scores = scores.baddbmm(asking.to(dtype).reshape(-1, group * size, dim), asked.mT, alpha=scale)
        found = scores.logsumexp(-1).view(batch, key_heads, n, group, size).transpose(2, 3)
        made[:, :, g : g + step] = found.reshape(batch, heads, n, size).flip(-1)
    return made
