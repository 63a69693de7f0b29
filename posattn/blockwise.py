"""Attention in plain PyTorch, a block of query rows at a time: CPU and every device without Triton.

Nothing of size Lq * Lk exists, forward or backward: beyond copies of the size of the tensors there are a few
buffers of about SCRATCH numbers each (of MIN_ROWS rows, where that is more). All sums have a fixed order, so
that the result is always deterministic. Arguments and results are those of ops.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scaled_blocks
from .biases.bias import Scaled
from .strips import DEAD, Block, Rule, blocks, diagonal_sums, line_range, make_line, same_keys, strip

SCRATCH = 1 << 20  # numbers: a few MB, which stay in the cache from one pass to the next
MIN_ROWS = 32
ROWS = 128  # of a block whose scores are stored
FUSED_ROWS = 256  # of a block that goes to PyTorch's kernel; more keep more beyond the diagonal of causality
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
) -> tuple[Tensor, Tensor]:
    """Attention and its natural logsumexp: by PyTorch's CPU kernel; elsewhere and with a softcap by `_scores`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    value_dim = v.shape[-1]
    out = torch.empty_like(q) if value_dim == q.shape[-1] else q.new_empty((*q.shape[:-1], value_dim))
    lse = torch.empty(q.shape[:-1], dtype=dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf)

    rule = Rule(q.shape[2], k.shape[2], shift, left, right)
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    line = make_line(rule, table, slopes, symmetric, q, dtype)
    groups = same_keys(key_mask, q.shape[0], k.shape[2], dtype)
    positional = not (table is None and slopes is None and scaled is None)
    fused = _kernel_serves(q, softcap)
    if fused:
        width = max(q.shape[-1], value_dim)  # the kernel knows one for all, and no stride inside a row
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    else:
        k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()

    todo: list[Block] = []
    for batches in groups:
        causal = rule.hides_future(batches.last)
        # The kernel multiplies its own -inf by the scale.
        plain = not positional and rule.is_plain(batches) and (scale > 0 or not causal)
        if fused and plain:
            b, seen = slice(batches.start, batches.end), slice(batches.first, batches.last)
            part, total = _fused(q[b], k[b, :, seen], v[b, :, seen], is_causal=causal, scale=scale)
            out[b], lse[b] = part[..., :value_dim], total
        elif fused:
            # The bias of a table is a view of it; sums of biases take memory.
            scratch = None if batches.padding is None and scaled is None else SCRATCH
            most = rule.most_keys(FUSED_ROWS, batches.last - batches.first)
            count = LONG_ROWS if most > LONG else FUSED_ROWS
            todo += blocks(rule, batches, key_heads, group, count, MIN_ROWS, scratch)
        else:
            todo += blocks(rule, batches, key_heads, group, ROWS, MIN_ROWS, SCRATCH)

    buffers = [] if fused else _buffers(todo, 2 if softcap else 1, line)
    for block in todo:
        if not block.keys:
            block.fill(out, 0.0)
            block.fill(lse, -math.inf)
            continue
        keys, values = block.keys_of(k), block.keys_of(v)
        if fused:
            mask = _bias(line, scaled, rule, block)
            if block.padding is not None:
                mask = mask + block.padding[block.keys.start : block.keys.stop]
            part, total = _fused(block.rows_of(q), keys, values, attn_mask=mask, scale=scale)
        else:
            rows = block.rows_of(q).to(dtype)
            weight = _scores(block, rule, line, scaled, rows, keys, scale, softcap, buffers)
            top = weight.amax(-1, keepdim=True)
            norm = weight.sub_(top).exp_().sum(-1, keepdim=True)
            part = (
                torch.bmm(_by_key_head(weight, keys), values.flatten(0, 1)).view(*rows.shape[:3], -1) / norm
            )
            total = (top + norm.log()).squeeze(-1)
        dead = total <= DEAD
        block.write(out, part[..., :value_dim].masked_fill(dead[..., None], 0.0))
        block.write(lse, total.masked_fill(dead, -math.inf))
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
    tails_need_grad: bool,
    need_q: bool,
    need_kv: bool,
    need_table: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the table; where tails need none, the table's is 0 outside the support.

    With P = exp(logit - lse), delta = rowsum(out * grad_out) - grad_lse and dS = P * (grad_out V^T - delta):
    dV = P^T grad_out, the table's is the sum of dS along each diagonal, and with dS times the derivative of
    the softcap, dQ = scale dS K and dK = scale dS^T Q.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    nothing = q.new_empty(0)
    dq = torch.empty_like(q) if need_q else nothing
    dk, dv = (torch.empty_like(k), torch.empty_like(v)) if need_kv else (nothing, nothing)
    dtable = torch.zeros_like(table) if need_table and table is not None else nothing
    parts = () if scaled is None else (scaled.line, scaled.rows, scaled.pieces)
    dscaled = tuple(torch.zeros_like(part) if need_table else nothing for part in parts)
    if not (need_q or need_kv or need_table) or q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dtable, *dscaled

    rule = Rule(q.shape[2], k.shape[2], shift, left, right)
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    line = make_line(rule, table, slopes, symmetric, q, dtype)
    k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()
    sum_k, sum_v = (_accumulator(gradient, dtype) for gradient in (dk, dv))
    lowest, highest = rule.shift - rule.query_length, rule.shift + rule.key_length  # every offset is between
    if support is not None and not tails_need_grad:
        lowest, highest = int(support[0].min()), int(support[1].max())

    todo: list[Block] = []
    for batches in same_keys(key_mask, q.shape[0], k.shape[2], dtype):
        todo += blocks(rule, batches, key_heads, group, ROWS, MIN_ROWS, SCRATCH)
    buffers = _buffers(todo, 3 if softcap else 2, line)
    for block in todo:
        if not block.keys:
            if need_q:
                block.fill(dq, 0.0)
            continue
        keys, values = block.keys_of(k), block.keys_of(v)
        rows, total = block.rows_of(q).to(dtype), block.rows_of(lse)
        dead = total == -math.inf
        total = total.masked_fill(dead, math.inf)  # exp(logit - inf) = 0
        grad = block.rows_of(grad_out).to(dtype).masked_fill(dead[..., None], 0.0)
        delta = (grad * block.rows_of(out).to(dtype)).sum(-1)
        if grad_lse is not None:
            delta -= block.rows_of(grad_lse).masked_fill(dead, 0.0)

        weight = _scores(block, rule, line, scaled, rows, keys, scale, softcap, buffers, total).exp_()
        flat_rows, flat_grad = _by_key_head(rows, keys), _by_key_head(grad, keys)
        flat = _by_key_head(weight, keys)  # becomes dS
        if need_kv:
            into = block.keys_of(sum_v)
            into.view(flat.shape[0], *into.shape[2:]).baddbmm_(flat.mT, flat_grad)
        slope = buffers[1][: weight.numel()].view(weight.shape)
        slope.copy_(-delta[..., None])
        _by_key_head(slope, keys).baddbmm_(flat_grad, values.flatten(0, 1).mT)
        weight.mul_(slope)
        if dtable.numel():
            _add_to_table(dtable, weight, buffers[1], rule, block, lowest, highest)  # overwrites slope
        if scaled is not None and need_table:
            scaled_blocks.add_gradients(dscaled, weight, buffers[1], scaled, rule, block)
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
    return dq, dk, dv, dtable, *dscaled


def _kernel_serves(q: Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and not softcap


def _scores(
    block: Block,
    rule: Rule,
    line: Tensor,
    scaled: Scaled | None,
    rows: Tensor,
    keys: Tensor,
    scale: float,
    softcap: float,
    buffers: list[Tensor],
    less: Tensor | None = None,
) -> Tensor:
    """softcap(scale * q.k) + bias - less, (batch, heads, rows, keys), in the first buffer; tanh in the last."""
    scores = buffers[0][: math.prod(block.shape())].view(block.shape())
    bias = _bias(line, scaled, rule, block)
    if less is None:
        scores.copy_(bias)
    else:
        torch.sub(bias, less[..., None], out=scores)
    if block.padding is not None:
        scores += block.padding[block.keys.start : block.keys.stop]
    flat, rows, keys = _by_key_head(scores, keys), _by_key_head(rows, keys), keys.flatten(0, 1)
    if softcap:
        squashed = buffers[-1][: scores.numel()].view(flat.shape)
        torch.bmm(rows, keys.mT, out=squashed).mul_(scale / softcap).tanh_()
        flat.add_(squashed, alpha=softcap)
    else:
        flat.baddbmm_(rows, keys.mT, alpha=scale)
    return scores


def _bias(line: Tensor, scaled: Scaled | None, rule: Rule, block: Block) -> Tensor:
    """(1, heads or 1, rows, keys), last row first."""
    bias = strip(line, rule, block)
    return bias if scaled is None else scaled_blocks.values(scaled, rule, block).add_(bias)


def _by_key_head(rows: Tensor, keys: Tensor) -> Tensor:
    """(batch, heads, C, n) -> (batch * key heads, group * C, n), which one product takes with its key head."""
    return rows.reshape(keys.shape[0] * keys.shape[1], -1, rows.shape[-1])


def _buffers(todo: list[Block], count: int, line: Tensor) -> list[Tensor]:
    """Room for the scores of any block, and for as many rows more that `diagonal_sums` pads with."""
    shapes = [block.shape() for block in todo]
    size = max((b * h * c * (c + n) for b, h, c, n in shapes if n), default=0)
    return [torch.empty(size, dtype=line.dtype, device=line.device) for _ in range(count)]


def _accumulator(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros to sum in: the gradient itself where it can be."""
    if gradient.dtype == dtype and gradient.is_contiguous():
        return gradient.zero_()
    return gradient.new_zeros(gradient.shape, dtype=dtype)


def _add_to_table(
    dtable: Tensor, slope: Tensor, scratch: Tensor, rule: Rule, block: Block, lowest: int, highest: int
) -> None:
    """Adds the diagonal sums of slope, with columns that hold no offset in [lowest, highest] left out."""
    first = max(block.keys.start, block.rows.start + lowest - rule.shift)
    last = min(block.keys.stop, block.rows.stop + highest - rule.shift)
    if first < last:
        start = block.keys.start
        sums = diagonal_sums(slope[..., first - start : last - start], scratch)
        part = line_range(rule, block._replace(keys=range(first, last)))
        dtable[block.heads, part.start : part.stop] += sums
