"""Attention written as its formula: dense, O(Lq * Lk) memory, differentiable any number of times."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, option_checks
from .biases.bias import Bias
from .biases.dape import DAPE


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    relative_logits: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_start: int | None = None,
    key_start: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`posattn.attention` in plain PyTorch, to explain it and to compare with; same arguments and errors.

    Scores and softmax are computed in float32 (float64 for float64 tensors), products in the tensors' dtype. With a
    dropout_p other pairs are dropped than `posattn.attention` drops.

        >>> query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
        >>> out, lse = attention_reference(query, key, value, is_causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 2, 4, 8]), torch.Size([1, 2, 4]))
        >>> torch.equal(out[:, :, 0], value[:, :, 0])
        True
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, tensor)
    checks.check_together(query, key, value, enable_gqa)
    checks.check_bias(bias, query, query.shape[2], key.shape[2])
    checks.check_key_padding_mask(key_padding_mask, query, key)
    option_checks.check_relative_logits(relative_logits, bias, tuple(query.shape[:3]), query)
    option_checks.check_sinks(sinks, query, query.shape[1])
    option_checks.check_dropout(dropout_p, bias)
    option_checks.check_document_ids(document_ids, query, key, query_start, key_start)
    rule = checks.check_rule(
        query,
        key,
        is_causal=is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
        query_start=query_start,
        key_start=key_start,
    )

    if document_ids is not None and document_ids.numel() > 0:
        call = partial(
            attention_reference, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, window=window,
            softcap=softcap, sinks=sinks, dropout_p=dropout_p, return_lse=True,
        )  # fmt: skip
        out, lse = _each_document(call, query, key, value, bias, key_padding_mask, relative_logits, document_ids)
        return (out, lse) if return_lse else out

    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    query_length, key_length = query.shape[2], key.shape[2]
    i = rule.query_start + torch.arange(query_length, device=query.device)[:, None]
    j = rule.key_start + torch.arange(key_length, device=query.device)[None, :]
    visible = torch.ones_like(j - i, dtype=torch.bool)  # (Lq, Lk)
    if rule.left >= 0:
        visible = visible & (j - i >= -rule.left)
    if rule.right >= 0:
        visible = visible & (j - i <= rule.right)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]

    score = rule.scale * (query @ key.mT).to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    if rule.softcap:
        score = rule.softcap * torch.tanh(score / rule.softcap)
    if isinstance(bias, DAPE):
        checks.check_dape(bias, query, rule, is_causal)
        if query_length > 0 and key_length > 0:
            at = (query_length, key_length, rule.query_start, rule.key_start)
            heard = visible if bias.prefix_consistent else j <= i
            score = bias.mixed(score, None if bias.base is None else bias.base.dense(*at), heard)
    elif bias is not None and query_length > 0 and key_length > 0:
        if isinstance(bias, Bias):
            dense = bias.dense(query_length, key_length, rule.query_start, rule.key_start)
        else:  # window s of the table holds the row of query Lq - 1 - s
            dense = bias.unfold(1, key_length, 1).flip(1)
        visible = visible & ~(dense <= -1e29)
        score = score + dense.to(score.dtype)

    if relative_logits is not None:
        width = relative_logits.shape[-1]
        near = (i - j >= 0) & (i - j < width)
        distance = (i - j).clamp(0, width - 1).expand(*query.shape[:2], -1, -1)
        score = score + relative_logits.to(score.dtype).gather(3, distance).masked_fill(~near, 0.0)

    # Finite, so that a row without any key is 0 and not NaN, in its gradient too.
    score = score.masked_fill(~visible, -1e30)
    seen = visible.any(-1).expand(score.shape[:-1])
    if sinks is not None:
        column = sinks.to(score.dtype)[:, None, None].expand(*score.shape[:-1], 1)
        score, seen = torch.cat([score, column], -1), torch.ones_like(seen)
    weight = torch.softmax(score, dim=-1)[..., :key_length].masked_fill(~visible, 0.0)
    out = F.dropout(weight, dropout_p).to(value.dtype) @ value
    lse = torch.logsumexp(score, dim=-1).masked_fill(~seen, -math.inf)
    return (out, lse) if return_lse else out


def _each_document(
    call: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None,
    mask: Tensor | None,
    relative: Tensor | None,
    document_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    outs = []
    for b, row in enumerate(document_ids.tolist()):
        ends = [n for n in range(1, len(row) + 1) if n == len(row) or row[n] != row[n - 1]]
        entry = slice(b, b + 1)
        for start, end in zip([0, *ends], ends):
            n, part = end - start, slice(start, end)
            made = call(
                query[entry, :, part],
                key[entry, :, part],
                value[entry, :, part],
                bias[:, len(row) - n : len(row) + n - 1] if isinstance(bias, Tensor) else bias,
                key_padding_mask=None if mask is None else mask[entry, part],
                relative_logits=None if relative is None else relative[entry, :, part],
            )
            outs.append(made)
    out, lse = (torch.cat(parts, 2)[0].unflatten(1, (len(query), -1)).transpose(0, 1) for parts in zip(*outs))
    return out, lse
