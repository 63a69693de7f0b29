"""What DAPE must compute, dense, in float64, from the papers' formulas; shares no code with the package.

Zheng et al., arXiv 2405.14722 (kernel size 1) and arXiv 2410.04798 (3, 5, 7).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dape_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    base: Tensor | None = None,
    *,
    scale: float | None = None,
    left: int = -1,
    right: int = -1,
    shift: int | None = None,
    key_padding_mask: Tensor | None = None,
    published: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse); q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), base (Hq, Lq, Lk) or None.

    w1 (hidden, channels, kernel), b1 (hidden,), w2 (Hq, hidden, kernel), b2 (Hq,). Visibility, shift and rows
    that see nothing are those of `attention_oracle`.
    """
    q, k, v, w1, b1, w2, b2 = (t.double() for t in (q, k, v, w1, b1, w2, b2))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    query_length, key_length = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    shift = query_length - key_length if shift is None else shift

    score = scale * (q @ k.transpose(-2, -1))
    i = torch.arange(query_length, device=q.device)[:, None]
    j = torch.arange(key_length, device=q.device)[None, :]
    offset = j - i + shift
    visible = torch.ones(q.shape[0], 1, query_length, key_length, dtype=torch.bool, device=q.device)
    if left >= 0:
        visible = visible & (offset >= -left)
    if right >= 0:
        visible = visible & (offset <= right)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    heard = (offset <= 0).expand_as(visible) if published else visible

    z = score
    if base is not None:
        bias = base.double().expand(score.shape)
        z = torch.cat([score, bias], dim=1)
        score = score + bias
    score = score + dape_network(z, w1, b1, w2, b2, heard, zero_hidden=not published)

    score = torch.where(visible, score, 0.0)
    top = torch.where(visible, score, -math.inf).amax(-1, keepdim=True).detach()
    seen = visible.any(-1, keepdim=True)
    top = torch.where(seen, top, 0.0)
    weight = torch.where(visible, torch.exp(torch.where(visible, score - top, 0.0)), 0.0)
    total = torch.where(seen, weight.sum(-1, keepdim=True), 1.0)
    out = (weight / total) @ v
    lse = torch.where(seen, top + total.log(), -math.inf).squeeze(-1)
    return out, lse


def dape_network(
    z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, visible: Tensor, zero_hidden: bool
) -> Tensor:
    """b2 + sum_t w2_t . hid(j + t), hid(j) = LeakyReLU(b1 + sum_u w1_u . z(j + u)); z (B, C, Lq, Lk).

    z, and with zero_hidden hid too, count as 0 where not visible, (B, 1, Lq, Lk), and beyond the keys.
    """
    middle = w1.shape[2] // 2
    z = torch.where(visible, z, 0.0)
    hidden = b1[:, None, None]
    for u in range(-middle, middle + 1):
        hidden = hidden + torch.einsum("wc,bcij->bwij", w1[:, :, u + middle], moved(z, u))
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    if zero_hidden:
        hidden = torch.where(visible, hidden, 0.0)
    out = b2[:, None, None]
    for t in range(-middle, middle + 1):
        out = out + torch.einsum("hw,bwij->bhij", w2[:, :, t + middle], moved(hidden, t))
    return out


def moved(x: Tensor, by: int) -> Tensor:
    """[..., j] -> x[..., j + by], 0 where there is no such column."""
    zeros = torch.zeros_like(x[..., : min(abs(by), x.shape[-1])])
    return torch.cat([x[..., by:], zeros], -1) if by >= 0 else torch.cat([zeros, x[..., :by]], -1)
