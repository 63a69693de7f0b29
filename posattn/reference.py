"""Attention written as its formula: dense, O(Lq * Lk) memory, differentiable any number of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
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
    query_start: int | None = None,
    key_start: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`posattn.attention` in plain PyTorch, to explain it and to compare with; same arguments and errors.

    Scores and softmax are computed in float32 (float64 for float64 tensors), products in the tensors' dtype.

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
    checks.check_bias(bias, query, key)
    checks.check_key_padding_mask(key_padding_mask, query, key)
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
        visible = visible & (dense > -1e29)
        score = score + dense.to(score.dtype)

    # Finite, so that a row without any key is 0 and not NaN, in its gradient too.
    score = score.masked_fill(~visible, -1e30)
    weight = torch.softmax(score, dim=-1).masked_fill(~visible, 0.0)
    out = weight.to(value.dtype) @ value
    lse = torch.logsumexp(score, dim=-1).masked_fill(~visible.any(-1), -math.inf)
    return (out, lse) if return_lse else out
