"""Attention in plain PyTorch, a block of query rows at a time: CPU and every device without Triton.

Nothing of size Lq * Lk exists, forward or backward: beyond copies of the size of the tensors there are a few
buffers of about SCRATCH numbers each (of MIN_ROWS rows, where that is more). All sums have a fixed order, so
that the result is always deterministic. Arguments and results are those of ops.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .biases.bias import Scaled
from .blockwise_bias import BlockBias
from .blockwise_scores import by_key_head, kept_pairs, make_buffers, make_scores
from .near_blocks import NearBlocks, some_blocks
from .strips import DEAD, Block

if TYPE_CHECKING:
    from .dropout import Dropout
    from .ops import Sequences

SCRATCH = 1 << 20  # numbers: a few MB, which stay in the cache from one pass to the next
MIN_ROWS = 32
ROWS = 128  # of a block whose scores are stored
FUSED_ROWS = 256  # of a block that goes to PyTorch's kernel; more keep more beyond the diagonal of causality
PACK = 64  # rows, and keys, of short sequences that are computed together
LONG_ROWS, LONG = 768, 4096  # the same where a block sees more than LONG keys: the kernel takes larger tiles

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None,
    support: Tensor | None,
    slopes: Tensor | None,
    scaled: Scaled | None = None,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    shift: int,
    left: int,
    right: int,
    symmetric: bool,
    relative: Tensor | None = None,
    sinks: Tensor | None = None,
    sequences: Sequences | None = None,
    dropout: Dropout | None = None,
    skip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention and its natural logsumexp: by PyTorch's CPU kernel, or where it does not serve by stored scores.

    skip: without the pairs that near.py finds negligible; ignored where it does not serve.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    value_dim = v.shape[-1]
    out = torch.empty_like(q) if value_dim == q.shape[-1] else q.new_empty((*q.shape[:-1], value_dim))
    lse = torch.empty(q.shape[:-1], dtype=dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        lse.copy_(torch.full_like(lse, -math.inf) if sinks is None else sinks[:, None].expand_as(lse))
        return out.zero_(), lse

    fused = _kernel_serves(q, softcap) and dropout is None
    biased = any(part is not None for part in (table, slopes, scaled, relative))
    bias = BlockBias(
        q, k, table=table, slopes=slopes, scaled=scaled, relative=relative, sequences=sequences,
        key_mask=key_mask, shift=shift, left=left, right=right, symmetric=symmetric,
        pack=PACK if biased or not fused else 0,
    )  # fmt: skip
    rule = bias.rule
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    near = None
    if skip and bias.by_offset and not softcap:
        near = NearBlocks(q, k, bias, key_mask=key_mask, scale=scale, sinks=sinks)
    if fused:
        width = max(q.shape[-1], value_dim)  # the kernel knows one for all, and no stride inside a row
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    else:
        k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()

    todo: list[Block] = []
    for part in bias.parts:
        # The kernel multiplies its own -inf by the scale.
        causal = part.hides_future(rule)
        if fused and not biased and part.is_plain(rule) and (scale > 0 or not causal):
            b, seen = slice(part.batch.start, part.batch.stop), slice(part.keys.start, part.keys.stop)
            asking = slice(part.rows.start, part.rows.stop)
            some, total = _fused(q[b, :, asking], k[b, :, seen], v[b, :, seen], is_causal=causal, scale=scale)
            if sinks is not None:
                some, total = _with_sinks(some, total, sinks)
            out[b, :, asking], lse[b, :, asking] = some[..., :value_dim], total
        elif fused:
            # The bias of a table is a view of it; sums of biases take memory.
            scratch = None if bias.is_view(part) else SCRATCH
            most = rule.most_keys(FUSED_ROWS, len(part.keys))
            count = LONG_ROWS if most > LONG else FUSED_ROWS
            todo += some_blocks(near, rule, part, key_heads, group, count, MIN_ROWS, scratch)
        else:
            todo += some_blocks(near, rule, part, key_heads, group, ROWS, MIN_ROWS, SCRATCH)

    count = 1 + (relative is not None) + bool(softcap)
    buffers = make_buffers([block for block in todo if not (fused and bias.is_view(block))], count, bias)
    for block in todo:
        heads_sinks = None if sinks is None else sinks[block.heads]
        if not block.keys:
            block.fill(out, 0.0)
            block.fill(lse, -math.inf if heads_sinks is None else heads_sinks[:, None])
            continue
        keys, values = block.keys_of(k), block.keys_of(v)
        if fused:
            mask = bias.of(block, buffers)
            some, total = _fused(block.rows_of(q), keys, values, attn_mask=mask, scale=scale)
        else:
            rows = block.rows_of(q).to(dtype)
            weight = make_scores(block, bias, rows, keys, scale, softcap, buffers)
            top = weight.amax(-1, keepdim=True)
            norm = weight.sub_(top).exp_().sum(-1, keepdim=True)
            total = (top + norm.log()).squeeze(-1)
            if dropout is not None:
                weight.mul_(kept_pairs(dropout, block, q.device))
                norm *= 1 - dropout.p
            some = torch.bmm(by_key_head(weight, keys), values.flatten(0, 1)).view(*rows.shape[:3], -1)
            some /= norm
        dead = total <= DEAD
        total = total.masked_fill_(dead, -math.inf)
        if heads_sinks is not None:
            some, total = _with_sinks(some, total, heads_sinks)
        block.write(out, some[..., :value_dim].masked_fill(dead[..., None], 0.0))
        block.write(lse, total)
    return out, lse


@torch.no_grad()
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    table: Tensor | None,
    support: Tensor | None,
    slopes: Tensor | None,
    scaled: Scaled | None = None,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    shift: int,
    left: int,
    right: int,
    symmetric: bool,
    relative: Tensor | None = None,
    sinks: Tensor | None = None,
    sequences: Sequences | None = None,
    dropout: Dropout | None = None,
    tails_need_grad: bool,
    need_q: bool,
    need_kv: bool,
    need_table: bool,
    deterministic: bool,
    skip: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the bias; where the table's tails need none, it is 0 outside the support.

    With P = exp(logit - lse), delta = rowsum(out * grad_out) - grad_lse and dS = P * (grad_out V^T - delta):
    dV = P^T grad_out, the table's is the sum of dS along each diagonal, and with dS times the derivative of
    the softcap, dQ = scale dS K and dK = scale dS^T Q. With dropout, what is kept of P stands in dV, and
    of grad_out V^T in dS, both divided by 1 - p.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    nothing = q.new_empty(0)
    dq = torch.empty_like(q) if need_q else nothing
    dk, dv = (torch.empty_like(k), torch.empty_like(v)) if need_kv else (nothing, nothing)
    parts = (table, *(() if scaled is None else (scaled.line, scaled.rows, scaled.pieces)))
    parts += () if relative is None else (relative,)
    if not (need_q or need_kv or need_table) or q.numel() == 0 or k.numel() == 0:
        zeros = (torch.zeros_like(t) if t is not None and need_table else nothing for t in parts)
        return dq.zero_(), dk.zero_(), dv.zero_(), *zeros

    bias = BlockBias(
        q, k, table=table, slopes=slopes, scaled=scaled, relative=relative, sequences=sequences,
        key_mask=key_mask, shift=shift, left=left, right=right, symmetric=symmetric, pack=PACK,
    )  # fmt: skip
    if need_table:
        bias.make_gradients(support, tails_need_grad)
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()
    sum_k, sum_v = (_accumulator(gradient, dtype) for gradient in (dk, dv))

    near = None
    if skip and bias.by_offset and not softcap:
        near = NearBlocks(q, k, bias, key_mask=key_mask, scale=scale, sinks=sinks, lse=lse)
    todo: list[Block] = []
    for part in bias.parts:
        todo += some_blocks(near, bias.rule, part, key_heads, group, ROWS, MIN_ROWS, SCRATCH)
    buffers = make_buffers(todo, 3 if softcap else 2, bias)
    for block in todo:
        if not block.keys:
            if need_q:
                block.fill(dq, 0.0)
            continue
        keys, values = block.keys_of(k), block.keys_of(v)
        rows, total = block.rows_of(q).to(dtype), block.rows_of(lse)
        dead = total <= DEAD  # with a sink, even a row without keys has a finite one
        total = total.masked_fill(dead, math.inf)  # exp(logit - inf) = 0
        grad = block.rows_of(grad_out).to(dtype).masked_fill(dead[..., None], 0.0)
        delta = (grad * block.rows_of(out).to(dtype)).sum(-1)
        if grad_lse is not None:
            delta -= block.rows_of(grad_lse).masked_fill(dead, 0.0)

        weight = make_scores(block, bias, rows, keys, scale, softcap, buffers, total).exp_()
        slope = buffers[1][: weight.numel()].view(weight.shape)
        flat, flat_slope = by_key_head(weight, keys), by_key_head(slope, keys)  # flat becomes dS
        kept = None
        if dropout is not None:
            kept = kept_pairs(dropout, block, q.device)
            grad = grad / (1 - dropout.p)
        flat_rows, flat_grad = by_key_head(rows, keys), by_key_head(grad, keys)
        if need_kv:
            into = block.keys_of(sum_v)
            seen = flat if kept is None else by_key_head(torch.mul(weight, kept, out=slope), keys)
            into.view(flat.shape[0], *into.shape[2:]).baddbmm_(seen.mT, flat_grad)
        if kept is None:
            slope.copy_(-delta[..., None])
            flat_slope.baddbmm_(flat_grad, values.flatten(0, 1).mT)
        else:
            torch.bmm(flat_grad, values.flatten(0, 1).mT, out=flat_slope)
            slope.mul_(kept).sub_(delta[..., None])
        weight.mul_(slope)
        if need_table:
            bias.add_gradients(weight, block, buffers[1])  # overwrites slope
        if softcap:
            squashed = buffers[2][: weight.numel()].view(weight.shape)
            weight.addcmul_(weight, squashed.square_(), value=-1)
        if need_q:
            block.write(dq, torch.bmm(flat, keys.flatten(0, 1)).mul_(scale))
        if need_kv:
            into = block.keys_of(sum_k)
            into.view(flat.shape[0], *into.shape[2:]).baddbmm_(flat.mT, flat_rows, alpha=scale)
    if sum_k is not dk:
        dk.copy_(sum_k)
    if sum_v is not dv:
        dv.copy_(sum_v)
    gradients = bias.gradients() if need_table else (nothing,) * len(parts)
    return dq, dk, dv, *gradients


def _kernel_serves(q: Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and not softcap


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink only takes from the others: out (batch, heads, rows, Dv) and lse with one more logit a head."""
    sinks = sinks[:, None]
    return out.to(lse.dtype) * torch.sigmoid(lse - sinks)[..., None], torch.logaddexp(lse, sinks)


def _accumulator(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros to sum in: the gradient itself where it can be."""
    if gradient.dtype == dtype and gradient.is_contiguous():
        return gradient.zero_()
    return gradient.new_zeros(gradient.shape, dtype=dtype)
