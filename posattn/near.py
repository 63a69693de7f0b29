r"""Which keys matter to which queries: with a bias that decays, those near enough.

Of query i and the key at the offset o let s = scale q . k + b(o), and Z_i the sum of exp(s) over the visible keys (and
the sink). A key is left out where it and all keys beyond it are negligible, which a bound says:

    E(o) < L_i - U_i - (BITS + ceil(log2 Lk)) ln 2

    U_i = |scale| |q_i| max_j |k_j|      so that s <= U_i + b(o)                                      (Cauchy-Schwarz)
    E(o) = the largest b at o or farther from 0 on that side: b(o) <= E(o), and E is monotone
    L_i <= log Z_i: in forward the logsumexp of the visible among the nearest keys (and the sink), in backward lse_i

Why this is exact to rounding. A pair that is left out has p = exp(s) / Z_i <= exp(U_i + E(o) - L_i) < 2^-BITS / Lk, and
a row has at most Lk of them: the part w_i of a row that is left out is below 2^-BITS. In float32 that is 2^-26, a
quarter of the unit roundoff; in float64 2^-55. So lse_i falls by -log(1 - w_i) < 2^-BITS (1 + 2^-BITS), and because
out_i is (1 - w_i) times an average of the values kept and w_i times one of those left out,

    |change of out_i| <= 2 w_i max_j |v_j| < 2^(1 - BITS) max_j |v_j|            (1 / (1 - dropout_p) times as much)

In backward, with the gradients g_i of out_i and l_i of lse_i, the logit of such a pair has the gradient
p (g_i . v_j - g_i . out_i + l_i), below 2^-BITS / Lk G_i with G_i = 2 |g_i| max|v| + |l_i|. What is left out of

    dV_j        is below 2^-BITS / Lk times the sum of |g_i| over the rows
    dK_j        is below 2^-BITS / Lk |scale| times the sum of G_i |q_i|
    dQ_i        is below 2^-BITS |scale| G_i max|k|
    the bias's  is at each offset below 2^-BITS / Lk times the sum of G_i

These bounds are absolute: a key or an offset that nobody gives weight gets a gradient of exactly 0.

Rounding. With the unit roundoff u, a norm is off by a factor 1 + (D / 2 + 2) u, a product of D terms by
(D + 2) u |q| |k|, sums and a logsumexp of n <= 32 numbers by (n + 8) u of the largest of them, and |b| <= |L_i| + U_i.
The threshold is lowered by (2 D + 32) u (U_i + |L_i| + margin), margin = (BITS + ceil(log2 Lk)) ln 2 > 18, which is
more than all of them. Squares that underflow take at most sqrt(D tiny) from a norm, which is added. (Products in less
precision than that of the tensors, as TF32, are off by more: here, and in every score.)

What is not a number is kept: with NaN or inf in q or k the threshold is NaN or -inf and nothing is below it; a NaN of
the bias counts as inf. Of v and the gradients nothing is asked: a NaN among values left out does not reach the row.
A row that sees none of the keys near it has L_i = -inf, and keeps all. What a window or -inf in a table hides is at
-1e30 and helps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .strips import INVISIBLE, Rule

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
    dtype, (_, heads, length, dim) = line.dtype, q.shape
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
