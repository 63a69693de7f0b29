"""Attention that mixes the scores of all heads (DAPE), in plain PyTorch, a block of query rows at a time.

Nothing of size Lq * Lk exists, forward or backward: beyond copies of the size of the tensors there are buffers for
the SCRATCH pairs of a block (or for MIN_ROWS rows, where they are more). Arguments and results are those of
mix_ops.py; every sum has a fixed order. What a block computes, and how it stands in memory, is in mix_scores.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .mix_fire import FireBase
from .mix_scores import Scores
from .strips import DEAD, INVISIBLE, Batches, Block, Rule, same_keys

SCRATCH = 1 << 15  # pairs of a block
MIN_ROWS, MAX_ROWS = 8, 64


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    table: Tensor | None,
    line: Tensor | None,
    rows: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    last_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    shift: int,
    left: int,
    right: int,
    negative_slope: float,
    published: bool,
    keep_rest: bool,
) -> tuple[Tensor, Tensor, None]:
    """Attention and its natural logsumexp; backward needs no rest of it."""
    dtype = w1.dtype
    value_dim = v.shape[-1]
    out = torch.empty_like(q) if value_dim == q.shape[-1] else q.new_empty((*q.shape[:-1], value_dim))
    lse = torch.empty(q.shape[:-1], dtype=dtype, device=q.device)

    rule = Rule(q.shape[2], k.shape[2], shift, left, right)
    fire = _fire(rule, line, rows, first, last, last_bias, negative_slope, w1)
    scores = Scores(rule, w1, b1, w2, b2, table, fire, published)
    todo = list(_blocks(rule, key_mask, q, k, scores.middle, published, dtype))
    scores.make_buffers(todo, count=1)
    k, v = scores.beyond(k), scores.beyond(v)
    for block in todo:
        if not block.keys:
            block.fill(out, 0.0)
            block.fill(lse, -math.inf)
            continue
        keys, values = scores.keys_of(k, block), scores.keys_of(v, block)
        weight = scores.logits(block, block.rows_of(q).to(dtype).mul_(scale), keys)
        top = weight.amax(-1, keepdim=True)
        norm = weight.sub_(top).exp_().sum(-1, keepdim=True)
        part = torch.bmm(weight.view(keys.shape[0], -1, keys.shape[1]), values)
        part = part.view(*weight.shape[:2], value_dim) / norm
        total = (top + norm.log()).squeeze(-1)
        dead = total <= DEAD
        block.write(out, part.masked_fill_(dead[..., None], 0.0)[None])
        block.write(lse, total.masked_fill_(dead, -math.inf)[None])
    return out, lse, None


@torch.no_grad()
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    table: Tensor | None,
    line: Tensor | None,
    rows: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    last_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    shift: int,
    left: int,
    right: int,
    negative_slope: float,
    published: bool,
    need_q: bool,
    need_kv: bool,
    need_weights: bool,
    need_base: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the network and the base.

    With P = exp(S - lse), delta = rowsum(out * grad_out) - grad_lse and dS = P * (grad_out V^T - delta):
    dV = P^T grad_out, and `Scores.backward` leads dS through the network to dA and dB; dQ = scale dA K,
    dK = scale dA^T Q.
    """
    dtype = w1.dtype
    nothing = q.new_empty(0)
    dq = torch.empty_like(q) if need_q else nothing
    dk = dv = nothing

    rule = Rule(q.shape[2], k.shape[2], shift, left, right)
    fire = _fire(rule, line, rows, first, last, last_bias, negative_slope, w1)
    scores = Scores(rule, w1, b1, w2, b2, table, fire, published)
    scores.make_gradients(need_weights, need_base)
    if (
        need_weights and grad_lse is not None
    ):  # b2 moves the logits of a row alike, hence lse and nothing else
        scores.db2 += grad_lse.masked_fill(lse == -math.inf, 0.0).sum((0, 2))
    todo = list(_blocks(rule, key_mask, q, k, scores.middle, published, dtype))
    scores.make_buffers(todo, count=2)
    inner_k, inner_v = scores.beyond(k), scores.beyond(v)
    sum_k, sum_v = ((torch.zeros_like(t) if need_kv else t) for t in (inner_k, inner_v))
    for block in todo:
        if not block.keys:
            if need_q:
                block.fill(dq, 0.0)
            continue
        keys, values = scores.keys_of(inner_k, block), scores.keys_of(inner_v, block)
        queries, total = block.rows_of(q).to(dtype).contiguous().mul_(scale), block.rows_of(lse)[0]
        dead = total == -math.inf
        total = total.masked_fill(dead, math.inf)  # exp(logit - inf) = 0
        grad = block.rows_of(grad_out)[0].to(dtype).contiguous().masked_fill_(dead[..., None], 0.0)
        weight = scores.logits(block, queries, keys, total).exp_()
        flat = weight.view(keys.shape[0], -1, keys.shape[1])
        flat_grad = grad.view(keys.shape[0], -1, grad.shape[-1])
        if need_kv:
            scores.keys_of(sum_v, block).baddbmm_(flat.mT, flat_grad)
        slope = scores.second_buffer(block)
        torch.bmm(flat_grad, values.mT, out=slope.view(flat.shape))
        if out.dtype == dtype:
            delta = (grad * block.rows_of(out)[0]).sum(-1)
        else:  # an out of 16 bits is off by the same in all that a row adds to the gradients of the network
            delta = torch.linalg.vecdot(weight, slope)
        if grad_lse is not None:
            delta -= block.rows_of(grad_lse)[0].masked_fill(dead, 0.0)
        slope -= delta[..., None]
        into = scores.backward(block, weight, slope).view(flat.shape)
        if need_q:
            block.write(dq, torch.bmm(into, keys).mul_(scale)[None])
        if need_kv:
            scores.keys_of(sum_k, block).baddbmm_(into.mT, queries.view(*flat.shape[:2], -1))
    if need_kv:
        length = k.shape[2]
        dk, dv = (
            torch.empty_like(k).copy_(sum_k[:, :, :length]),
            torch.empty_like(v).copy_(sum_v[:, :, :length]),
        )
    return dq, dk, dv, *(nothing if gradient is None else gradient for gradient in scores.gradients())


def _fire(
    rule: Rule,
    line: Tensor | None,
    rows: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    last_bias: Tensor | None,
    negative_slope: float,
    w1: Tensor,
) -> FireBase | None:
    if line is None or rows is None or first is None or last is None or last_bias is None:
        return None
    return FireBase(rule, line, rows, first, last, last_bias, negative_slope, beyond=w1.shape[2] // 2)


def _blocks(
    rule: Rule,
    key_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    middle: int,
    published: bool,
    dtype: torch.dtype,
) -> Iterator[Block]:
    """A batch entry at a time, for its scores stand head by head; all heads; so many rows that SCRATCH holds them."""
    batch, heads, key_heads, key_length = q.shape[0], q.shape[1], k.shape[1], k.shape[2]
    groups = same_keys(key_mask, batch, key_length, dtype)
    if published and key_mask is not None:  # the network hears what the mask hides
        padding = torch.zeros_like(key_mask, dtype=dtype).masked_fill_(~key_mask, INVISIBLE)
        groups = [Batches(b, b + 1, 0, key_length, padding[b]) for b in range(batch)]
    for group in groups:
        for b in range(group.start, group.end):
            start = 0
            while start < rule.query_length:
                widest = len(rule.keys(range(start, min(start + MAX_ROWS, rule.query_length)), *group[2:4]))
                count = min(MAX_ROWS, max(MIN_ROWS, SCRATCH // max(1, widest)))
                span = range(start, min(start + count, rule.query_length))
                keys = rule.keys(span, group.first, group.last)
                if published and keys:  # the hidden layer of keys after the query, which its last scores hear
                    keys = range(keys.start, min(key_length, keys.stop + middle))
                yield Block(slice(b, b + 1), slice(0, key_heads), slice(0, heads), span, keys, group.padding)
                start += count
