"""The call: what a user writes instead of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .biases.bias import Bias
from .biases.dape import DAPE
from .mix_ops import Mix
from .ops import Attend


def attention(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention with a bias by position, in O(Lq + Lk) memory forward and backward.

    For query i and key j, at the offset ``o = (key_start + j) - (query_start + i)`` (negative in the past)::

        score[i, j] = cap(scale * query[i] . key[j]) + bias(o)        cap(x) = softcap * tanh(x / softcap)
        out[i]      = sum_j softmax_j(score[i, j]) * value[j]         over the keys j that query i sees
        lse[i]      = log(sum_j exp(score[i, j]))

    Softcapping comes before the bias; `posattn.FIRE` depends on the query's position, too. Query i sees key j
    when ``o <= 0`` (with is_causal), ``-left <= o <= right`` (with a window), ``key_padding_mask[batch, j]``
    holds and the bias is above -1e29. A query that sees no key gets out = 0, lse = -inf and no gradient.

    Args:
        query: (B, Hq, Lq, D), float16, bfloat16, float32 or float64; D at most 256.
        key: (B, Hk, Lk, D), of query's dtype and device.
        value: (B, Hk, Lk, Dv), of query's dtype and device; Dv at most 256.
        bias: a `posattn.Bias` with Hq heads, or a table (Hq, Lq + Lk - 1), any floating dtype, that holds at
            ``[h, j - i + Lq - 1]`` what head h adds for query i and key j; or a `posattn.DAPE`, which makes the
            score in its own way. All are differentiated.
        is_causal: hide keys that stand after the query.
        scale: any finite number; ``1 / sqrt(D)`` by default.
        enable_gqa: allow Hq to be a multiple of Hk; query head h then uses key head ``h // (Hq // Hk)``.
        window: (left, right), how many positions a query sees to each side of its own; None is an open side.
        key_padding_mask: (B, Lk) bool, True for a key that counts (the sense of SDPA's masks, the opposite of
            `torch.nn.MultiheadAttention`'s).
        softcap: a positive number, as in Gemma 2 (Gemma Team, 2024, arXiv 2408.00118, sec. 2); None for none.
        query_start: position of the first query; ``key_start + Lk - Lq`` by default.
        key_start: position of the first key; 0 by default. Only ``key_start - query_start`` matters, except to
            `posattn.FIRE`.
        return_lse: also return lse.
        backend: "triton" (float16, bfloat16, and float32 with head dims to 128; on a GPU with compute capability
            8.0 or newer), "blockwise" (plain PyTorch, every dtype and device), or None: "triton" where it serves, else
            "blockwise". An explicit backend is taken or refused, never replaced.

    Returns:
        out (B, Hq, Lq, Dv), of query's dtype; with return_lse the pair (out, lse), lse (B, Hq, Lq) in float32
        (float64 for float64 tensors), differentiable like out.

    Raises:
        TypeError: an argument is not of its Python type.
        ValueError: a shape, dtype, device or number that is not accepted; the message says which.
        RuntimeError: in backward, when the gradient itself is differentiated; `attention_reference` can be.

    This replaces ``torch.nn.functional.scaled_dot_product_attention`` by a change of name, except: with
    is_causal and Lq != Lk the last query stands on the last key, where torch puts the first query on the
    first key (``query_start=0`` does that); there is no dropout and no dense attn_mask; a query that sees
    nothing gives 0, not NaN; tensors have 4 dimensions and do not broadcast.

    Under torch.autocast query, key and value are cast to the autocast dtype; a bias keeps its precision.
    Under torch.use_deterministic_algorithms(True) equal inputs give bitwise equal gradients.

        >>> import torch, posattn
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16).unbind()
        >>> bias = posattn.TISA(num_heads=4)
        >>> out = posattn.attention(query, key, value, bias, is_causal=True)
        >>> out.shape
        torch.Size([2, 4, 10, 16])
        >>> out.sum().backward()
        >>> bias.amplitudes.grad.shape
        torch.Size([4, 5])
        >>> same = posattn.attention_reference(query, key, value, bias, is_causal=True)
        >>> torch.allclose(out, same, atol=1e-5)
        True
    """
    checks.check_tensor("query", query)
    checks.check_tensor("key", key)
    checks.check_tensor("value", value)
    query, key, value = _autocast(query, key, value)
    checks.check_together(query, key, value, enable_gqa)
    checks.check_bias(bias, query, key)
    checks.check_key_padding_mask(key_padding_mask, query, key)
    checks.check_return_lse(return_lse)
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
    backend = checks.choose_backend(backend, query, value, bias)

    query, key, value = (readable(t) for t in (query, key, value))
    if isinstance(bias, DAPE):
        checks.check_dape(bias, query, rule, is_causal)
        mixed = _mix(query, key, value, bias, key_padding_mask, rule, backend)
        return mixed if return_lse else mixed[0]

    table = support = slopes = scaled = None
    symmetric = tails_need_grad = True
    query_length, key_length = query.shape[2], key.shape[2]
    if isinstance(bias, Tensor):
        table = bias
    elif bias is not None and query_length > 0 and key_length > 0:
        symmetric, tails_need_grad = bias.symmetric, bias.tails_need_grad
        scaled = bias.scaled(query_length, key_length, rule.query_start, rule.key_start)
        slopes = bias.slopes() if scaled is None else None
        if scaled is not None:
            checks.check_scaled(bias, scaled, query, key)
        elif slopes is None:
            table = bias.table(query_length, key_length, rule.query_start, rule.key_start)
            shape = (query.shape[1], query_length + key_length - 1)
            checks.check_made(bias, "a table", table, shape, query)
            support = bias.support()
        else:
            checks.check_made(bias, "slopes", slopes, (query.shape[1],), query)
    # Not query's dtype: in half precision a bias would be off by 2^-9 of itself, which scores would show.
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if table is not None:
        table = table.to(dtype).contiguous()
    parts = (None,) * 4 if scaled is None else tuple(part.to(dtype).contiguous() for part in scaled)

    out, lse = Attend.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        table,
        support,
        slopes,
        *parts,
        key_padding_mask,
        rule.scale,
        rule.softcap,
        rule.key_start - rule.query_start,
        rule.left,
        rule.right,
        symmetric,
        tails_need_grad,
        backend,
    )
    return (out, lse) if return_lse else out


def _mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: DAPE,
    key_padding_mask: Tensor | None,
    rule: checks.Rule,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lengths = query.shape[2], key.shape[2]
    network = bias.network(*lengths, rule.query_start, rule.key_start, double=query.dtype == torch.float64)
    if bias.base is not None and network.table is not None:
        shape = (query.shape[1], query.shape[2] + key.shape[2] - 1)
        checks.check_made(bias.base, "a table", network.table, shape, query)
    out, lse = Mix.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        *network[:-1],
        key_padding_mask,
        rule.scale,
        rule.key_start - rule.query_start,
        rule.left,
        rule.right,
        network.negative_slope,
        not bias.prefix_consistent,
        torch.is_grad_enabled(),
        backend,
    )
    return out, lse


def readable(tensor: Tensor) -> Tensor:
    """Rows of unit stride that do not overlap, as kernels read them; every other stride is free."""
    rows = tensor.stride(-1) == 1 and tensor.stride(-2) >= tensor.shape[-1]
    return tensor if rows else tensor.contiguous()


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.autocast does to the arguments of scaled_dot_product_attention, which spares float64 too."""
    device_type = query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)
    query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    return query, key, value
