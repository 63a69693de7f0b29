"""Attention with the masks that torch's modules take: O(L) where that is possible, else by the formula."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .biases.bias import Bias
from .biases.dape import DAPE
from .checks import MAX_HEAD_DIM

HIDDEN = float("-inf")


def attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | None,
    *,
    key_mask: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    query_start: int,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out, and the weights if the formula was needed for it; arguments as in `attend_densely`.

    key_mask (B, Lk), of the same two kinds as mask, is for every query. Without mask and need_weights memory is O(L).
    """
    keys = None if key_mask is None else counting_keys(key_mask)
    column = None
    fits = query.shape[3] < MAX_HEAD_DIM and scale != 0 and not isinstance(bias, DAPE)
    if key_mask is not None and keys is None and fits:
        column, keys = key_mask, key_mask > HIDDEN
    if mask is None and not need_weights and (key_mask is None or keys is not None):
        if column is not None:
            query, key = _with_column(query, key, column, scale)
        out = attention(
            query,
            key,
            value,
            bias,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            key_padding_mask=keys,
            dropout_p=dropout_p,
            query_start=query_start,
        )
        assert isinstance(out, Tensor)
        return out, None
    if key_mask is not None:
        mask = _both(mask, key_mask[:, None, None])
    return attend_densely(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        query_start=query_start,
    )


def attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | None,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    query_start: int,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv) and the weights (B, Hq, Lq, Lk), after dropout, both of value's dtype.

    query (B, Hq, Lq, D), key (B, Hk, Lk, D), value (B, Hk, Lk, Dv), Hq a multiple of Hk. mask broadcasts to
    (B, Hq, Lq, Lk): bool, True for a pair that counts, or floating, added to the score after the bias, -inf for
    a pair that does not count. query i stands at ``query_start + i``, key j at j; is_causal hides keys after the
    query. Scores and softmax are in fp32 (fp64 for fp64 tensors). A row that sees nothing gives 0.

    Raises ValueError for a DAPE with prefix_consistent=False without is_causal, for which it is not defined, and for
    one with a mask that hides by head.
    """
    query_length, key_length = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    score = scale * (query @ key.mT).to(dtype)
    offset = torch.arange(key_length, device=query.device) - torch.arange(
        query_start, query_start + query_length, device=query.device
    ).unsqueeze(1)
    causal = offset <= 0
    visible = causal if is_causal else torch.ones_like(causal)
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask > HIDDEN)

    if query_length > 0 and key_length > 0:
        at = (query_length, key_length, query_start, 0)
        if isinstance(bias, DAPE):
            if not bias.prefix_consistent and not is_causal:
                raise ValueError("a DAPE with prefix_consistent=False is defined for is_causal=True only")
            if visible.dim() == 4 and visible.shape[1] > 1:
                raise ValueError("attn_mask must be one for all heads with a DAPE, which mixes them")
            seen = visible if bias.prefix_consistent else causal
            score = bias.mixed(score, None if bias.base is None else bias.base.dense(*at), seen)
        elif bias is not None:
            dense = bias.dense(*at)
            visible = visible & (dense > -1e29)  # what biases hide by
            score = score + dense.to(dtype)
    if mask is not None and mask.dtype != torch.bool:
        score = score + mask.to(dtype).masked_fill(mask == HIDDEN, 0.0)

    # Finite, so that a row without any key is 0 and not NaN, in its gradient too.
    score = score.masked_fill(~visible, torch.finfo(dtype).min)
    weights = torch.softmax(score, dim=-1).masked_fill(~visible, 0.0)
    weights = F.dropout(weights, dropout_p).to(value.dtype)
    return weights @ value, weights


def counting_keys(mask: Tensor) -> Tensor | None:
    """The keys that count, bool, of a mask that does nothing but hide keys; None of any other mask.

    A bool mask, True for what counts, is that. A floating one is where all of it is 0 or -inf, which takes a
    look at its values.
    """
    if mask.dtype == torch.bool:
        return mask
    if not can_look(mask):
        return None
    counts = mask == 0
    return counts if bool((counts | (mask == HIDDEN)).all()) else None


def can_look(mask: Tensor) -> bool:
    """Whether the values of a mask can decide what is done: not for torch.compile, CUDA graphs and gradients.

    Looking waits for the device.
    """
    if torch.compiler.is_compiling() or mask.requires_grad:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def split_mask(
    mask: Tensor, lead: tuple[int, ...], heads: int, query_length: int, key_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """A mask (batch, Lk) if one row holds for all queries and heads, else a mask (batch, heads, Lq, Lk), as a pair."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool or floating point, got {mask.dtype}")
    full = (*lead, heads, query_length, key_length)
    sizes = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if len(sizes) > len(full) or any(size not in (1, whole) for size, whole in zip(sizes, full)):
        raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(mask.shape)}")
    mask = mask[(None,) * (len(full) - mask.dim())]
    one_row, one_head = (mask.shape[d] == 1 or mask.stride(d) == 0 for d in (-2, -3))
    if one_row and (one_head or (query_length > 1 and _same_heads(mask))):
        return mask[..., 0, 0, :].expand(*lead, key_length).reshape(math.prod(lead), key_length), None
    shared = all(size == 1 for size in sizes[:-3])
    batch = (1,) * len(lead) if shared else lead
    return None, mask.expand(*batch, *mask.shape[-3:]).reshape(math.prod(batch), *mask.shape[-3:])


def _same_heads(mask: Tensor) -> bool:
    """Whether the heads of a mask of one row are equal, as `torch.nn.MultiheadAttention` repeats them."""
    if not can_look(mask):
        return False
    return bool((mask[..., :1, :] == mask[..., :1, :1, :]).all())


def _with_column(query: Tensor, key: Tensor, added: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query and key with one more dimension, whose product times scale is added (B, Lk); 0 where that is -inf."""
    device = key.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    limits = torch.finfo(
        torch.get_autocast_dtype(device) if autocast and key.dtype != torch.float64 else key.dtype
    )
    added = added.masked_fill(added == HIDDEN, 0.0)[:, None, :, None] / scale
    added = added.clamp(limits.min, limits.max).to(key.dtype)
    ones = torch.ones_like(query[..., :1])
    return torch.cat([query, ones], dim=-1), torch.cat([key, added.expand(*key.shape[:3], 1)], dim=-1)


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    """Two masks as one."""
    if mask is None:
        return other
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    return _additive(mask) + _additive(other)


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, HIDDEN)
