"""Decoding in plain PyTorch, an entry of the batch at a time (all together where they see the same keys).

Memory is O(Lq Lk Hq), beside a copy of the keys of one entry where they are paged. Arguments and results are those of
decode_ops.py. PyTorch's CPU kernel serves float32 and float64; of 16-bit keys it converts one number at a time where
there is one query, so these are converted here, CHUNK keys at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decode_parts
from .ops import empty_outputs
from .strips import DEAD, INVISIBLE

SLOPE = 0.01  # of the LeakyReLU in a DAPE
CHUNK = 1024
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_table: Tensor | None,
    seqlens: Tensor | None,
    table: Tensor | None,
    slopes: Tensor | None,
    strip: Tensor | None,
    relative: Tensor | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    zero: int,
    start: int,
    left: int,
    right: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    made = []
    for part in decode_parts.parts(q, k, v, block_table, seqlens, start, left, right, whole=False):
        rows = q[part.batch]
        if part.first >= part.last:
            made.append(_nothing(rows, v, dtype))
            continue
        bias = _bias(part, q, table, slopes, strip, relative, zero, symmetric, dtype)
        hidden = decode_parts.hidden(part, q.shape[2], left, right, q.device)
        bias = _add_mask(bias, hidden, decode_parts.padding(part, key_mask), dtype)
        batch, heads, queries, head_dim = rows.shape
        packed = rows.reshape(batch, part.keys.shape[1], -1, head_dim)
        if bias is not None:
            bias = bias.expand(-1, heads, queries, -1)
            bias = bias.reshape(bias.shape[0], packed.shape[1], packed.shape[2], bias.shape[3])
        if softcap == 0.0 and q.device.type == "cpu" and q.dtype == dtype and dtype == torch.float32:
            made.append(_by_kernel(packed, part, bias, scale))
        else:
            scores = _scores(packed, part.keys, dtype)
            if softcap:
                scores.mul_(scale / softcap).tanh_().mul_(softcap)
            else:
                scores.mul_(scale)
            if bias is not None:
                scores.add_(bias)
            made.append(_softmax(scores, part.values))
    return _joined(made, q, v, sinks, dtype)


@torch.no_grad()
def mix_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    block_table: Tensor | None,
    seqlens: Tensor | None,
    table: Tensor | None,
    strip: Tensor | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    zero: int,
    start: int,
    left: int,
    right: int,
    published: bool,
) -> tuple[Tensor, Tensor]:
    dtype = w1.dtype
    made = []
    for part in decode_parts.parts(q, k, v, block_table, seqlens, start, left, right, whole=published):
        rows = q[part.batch]
        if part.first >= part.last:
            made.append(_nothing(rows, v, dtype))
            continue
        batch, heads, queries, head_dim = rows.shape
        base = _bias(part, q, table, None, strip, None, zero, True, dtype)
        hidden = decode_parts.hidden(part, queries, left, right, q.device)
        padding = decode_parts.padding(part, key_mask)
        packed = rows.reshape(batch, part.keys.shape[1], -1, head_dim)
        scores = _scores(packed, part.keys, dtype).mul_(scale).view(batch, heads, queries, -1)
        unheard = decode_parts.either(hidden, None if published else padding)
        scores = _mixed(scores, base, unheard, w1, b1, w2, b2, published)
        unseen = decode_parts.either(hidden, padding)
        if unseen is not None:
            scores.masked_fill_(unseen, INVISIBLE)
        made.append(_softmax(scores.view(*packed.shape[:3], -1), part.values))
    return _joined(made, q, v, sinks, dtype)


# -------------------------------------------------------------------------------------------- the bias


def _bias(
    part: decode_parts.Part,
    q: Tensor,
    table: Tensor | None,
    slopes: Tensor | None,
    strip: Tensor | None,
    relative: Tensor | None,
    zero: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """(batch or 1, Hq, Lq, keys): for one query and a table a view of it."""
    queries, count = q.shape[2], part.last - part.first
    if table is not None:
        begin = zero + part.first - (part.position + queries - 1)
        end = zero + part.last - part.position
        if begin < 0 or end > table.shape[1]:  # of pairs that are not visible
            table = F.pad(table, (max(0, -begin), max(0, end - table.shape[1])))
            begin, end = max(0, begin), end + max(0, -begin)
        if queries == 1:
            return table[None, :, None, begin:end]
        return table[:, begin:end].unfold(1, count, 1).flip(1)[None]
    if strip is not None:
        return (strip if strip.shape[0] == 1 else strip[part.batch])[..., part.first : part.last]
    if slopes is None and relative is None:
        return None
    i = torch.arange(part.position, part.position + queries, device=q.device)[:, None]
    offset = torch.arange(part.first, part.last, device=q.device) - i
    if slopes is not None:
        distance = (-offset.abs() if symmetric else offset).to(dtype)
        return (slopes[:, None, None] * distance)[None]
    assert relative is not None
    band = relative[part.batch]
    index = (-offset).clamp(0, band.shape[-1] - 1).expand(*band.shape[:2], -1, -1)
    inside = (offset <= 0) & (offset > -band.shape[-1])
    return band.gather(3, index).to(dtype).masked_fill_(~inside, 0.0)


def _add_mask(
    bias: Tensor | None, hidden: Tensor | None, padding: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    unseen = decode_parts.either(hidden, padding)
    if unseen is None:
        return bias
    if bias is None:
        return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, INVISIBLE)
    return bias.masked_fill(unseen, INVISIBLE)


# ------------------------------------------------------------------------------------------ the results


def _by_kernel(
    packed: Tensor, part: decode_parts.Part, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    keys, values, value_dim = part.keys, part.values, part.values.shape[3]
    if keys.shape[3] != value_dim:  # the kernel knows one for all
        width = max(keys.shape[3], value_dim)
        packed, keys, values = (F.pad(t, (0, width - t.shape[3])) for t in (packed, keys, values))
    packed, keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (packed, keys, values))
    out, lse = _fused(packed, keys, values, attn_mask=bias, scale=scale)
    return out[..., :value_dim], lse


def _scores(packed: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Hk, rows, D) and (B, Hk, keys, D) -> (B, Hk, rows, keys)."""
    packed = packed.to(dtype)
    if keys.dtype == dtype or keys.shape[2] <= CHUNK:
        return packed @ keys.to(dtype).mT
    scores = packed.new_empty((*packed.shape[:3], keys.shape[2]))
    for n in range(0, keys.shape[2], CHUNK):
        scores[..., n : n + CHUNK] = packed @ keys[:, :, n : n + CHUNK].to(dtype).mT
    return scores


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites scores."""
    top = scores.amax(-1, keepdim=True)
    norm = scores.sub_(top).exp_().sum(-1, keepdim=True)
    if values.dtype == scores.dtype or values.shape[2] <= CHUNK:
        out = scores @ values.to(scores.dtype)
    else:
        out = scores.new_zeros((*scores.shape[:3], values.shape[3]))
        for n in range(0, values.shape[2], CHUNK):
            out += scores[..., n : n + CHUNK] @ values[:, :, n : n + CHUNK].to(scores.dtype)
    return out / norm, (top + norm.log()).squeeze(-1)


def _nothing(rows: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.zeros((*rows.shape[:3], v.shape[3]), dtype=dtype, device=v.device)
    return out, torch.full(rows.shape[:3], INVISIBLE, dtype=dtype, device=v.device)


def _joined(
    made: list[tuple[Tensor, Tensor]], q: Tensor, v: Tensor, sinks: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The entries after each other, rows that saw nothing set to 0 and -inf, and what a sink makes of all that."""
    shape = q.shape[:3]
    whole = [(out.reshape(-1, *shape[1:], v.shape[3]), lse.reshape(-1, *shape[1:])) for out, lse in made]
    if len(whole) == 1:
        out, lse = whole[0]
    else:
        out, lse = (torch.cat(parts) for parts in zip(*whole))
    dead = lse <= DEAD
    if q.device.type != "cpu" or bool(dead.any()):
        out = out.masked_fill(dead[..., None], 0.0)
        lse = lse.masked_fill(dead, -math.inf)
    if sinks is not None:
        sinks = sinks[:, None]
        out = out * torch.sigmoid(lse - sinks.clamp(min=INVISIBLE))[..., None]
        lse = torch.logaddexp(lse, sinks.expand_as(lse))
    lse = lse.contiguous()
    if out.dtype == q.dtype and q.is_contiguous():
        return out.contiguous(), lse
    into = empty_outputs(q, v)[0]
    return into.copy_(out), lse


# ------------------------------------------------------------------------------------------------- DAPE


def _mixed(
    scores: Tensor,
    base: Tensor | None,
    unheard: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    published: bool,
) -> Tensor:
    """(B, H, Lq, keys) scores -> with base and network; what is not heard counts as 0 in it."""
    channels = scores
    if base is not None:
        base = base.expand(scores.shape)
        channels = torch.cat([scores, base], 1)
        scores = scores + base
    if unheard is not None:
        channels = channels.masked_fill(unheard, 0.0)
    hidden = F.leaky_relu_(_taps(channels, w1) + b1[:, None, None], SLOPE)
    if unheard is not None and not published:
        hidden = hidden.masked_fill_(unheard, 0.0)
    return _taps(hidden, w2).add_(scores).add_(b2[:, None, None])


def _taps(channels: Tensor, weight: Tensor) -> Tensor:
    """The cross-correlation along the keys: (B, C, Lq, keys) and (out, C, taps) -> (B, out, Lq, keys)."""
    batch, _, queries, count = channels.shape
    middle = weight.shape[2] // 2
    if middle:
        channels = F.pad(channels, (middle, middle))
    total = None
    for tap in range(weight.shape[2]):
        read = channels[..., tap : tap + count].reshape(batch, -1, queries * count)
        made = weight[:, :, tap] @ read
        total = made if total is None else total.add_(made)
    assert total is not None
    return total.view(batch, -1, queries, count)
