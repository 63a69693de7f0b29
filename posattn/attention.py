"""The call: what a user writes instead of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from torch import Tensor

from . import checks, decode, option_checks
from .biases.bias import Bias
from .biases.dape import DAPE
from .dispatch import attend, autocast, documents


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
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    relative_logits: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_start: int | None = None,
    key_start: int | None = None,
    return_lse: bool = False,
    skip_negligible: bool | None = None,
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
        sinks: (Hq,), one more logit of each head's softmax, without a value (OpenAI, gpt-oss, 2025; Xiao et al.,
            ICLR 2024, arXiv 2309.17453, sec. 3.2): out shrinks, lse includes it. Learned where it requires grad.
        dropout_p: probability to drop a pair from the softmax, the others divided by ``1 - dropout_p`` (lse
            does not change). Which pairs is a function of a seed from torch's generator and of the place, so no
            mask is kept for backward. Unlike a module's it acts in evaluation, too.
        relative_logits: (B, Hq, Lq, W), logits by distance that the model made for each query (Shaw et al., 2018,
            arXiv 1803.02155; Huang et al., Music Transformer, 2018): ``relative_logits[b, h, i, -o]`` is added at
            the offsets ``-W < o <= 0`` and nothing elsewhere, after the softcap. Not together with a bias.
        document_ids: (B, L) integers, Lq = Lk = L: neighbours with one number are a document, and each document is
            attended by itself, positions from 0 on. Waits for the device once.
        query_start: position of the first query; ``key_start + Lk - Lq`` by default.
        key_start: position of the first key; 0 by default. Only ``key_start - query_start`` matters, except to
            `posattn.FIRE`.
        return_lse: also return lse.
        skip_negligible: True: keys so far away that the bias leaves them no weight are not computed, forward and
            backward, which is exact to rounding: all that is left out for a query has together less than 2^-26 of
            its weights' sum (2^-55 in float64), by a bound from the norms of query and keys (near.py). It depends
            on all keys, and so may the last bit of a result. False: everything is computed. None: True where it
            should pay, for a bias that decays (`posattn.ALiBi`) over 2048 keys or more. A softcap, relative_logits,
            document_ids, `posattn.FIRE` and `posattn.DAPE` leave out nothing.
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
    first key (``query_start=0`` does that); there is no dense attn_mask; a query that sees
    nothing gives 0, not NaN; tensors have 4 dimensions and do not broadcast.

    Under torch.autocast query, key and value are cast to the autocast dtype; a bias keeps its precision.
    query, key and value may be DTensors, sharded by batch or heads; `posattn.distributed` has what else they need.
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
    if type(query).__name__ == "DTensor":  # without importing it
        from .distributed.dtensors import attention_of_dtensors

        return attention_of_dtensors(
            query,
            key,
            value,
            bias,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            key_padding_mask=key_padding_mask,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            relative_logits=relative_logits,
            document_ids=document_ids,
            query_start=query_start,
            key_start=key_start,
            return_lse=return_lse,
            skip_negligible=skip_negligible,
            backend=backend,
        )
    checks.check_tensor("query", query)
    checks.check_tensor("key", key)
    checks.check_tensor("value", value)
    query, key, value = autocast(query, key, value)
    checks.check_together(query, key, value, enable_gqa)
    checks.check_bias(bias, query, query.shape[2], key.shape[2])
    checks.check_key_padding_mask(key_padding_mask, query, key)
    option_checks.check_relative_logits(relative_logits, bias, tuple(query.shape[:3]), query)
    option_checks.check_sinks(sinks, query, query.shape[1])
    option_checks.check_dropout(dropout_p, bias)
    option_checks.check_document_ids(document_ids, query, key, query_start, key_start)
    checks.check_return_lse(return_lse)
    option_checks.check_skip_negligible(skip_negligible)
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
    if isinstance(bias, DAPE):
        checks.check_dape(bias, query, rule, is_causal)
    backend = checks.choose_backend(backend, query, value, bias)

    extra = sinks, relative_logits
    if dropout_p == 0.0 and document_ids is None and decode.serves(query, key, value, bias, backend, *extra):
        out, lse = decode.decode(query, key, value, bias, rule, backend, key_padding_mask, *extra)
        return (out, lse) if return_lse else out
    decode.begin(query, key, bias)

    mask, sequences = key_padding_mask, documents(document_ids) if document_ids is not None else None
    options = sinks, relative_logits, dropout_p, sequences, skip_negligible
    out, lse = attend(query, key, value, bias, rule, backend, mask, *options)
    return (out, lse) if return_lse else out
