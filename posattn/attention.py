"""The call: what a user writes instead of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import checks
from .biases.bias import Bias
from .biases.dape import DAPE
from .dropout import draw
from .mix_ops import Mix
from .ops import Attend, Sequences


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
    query, key, value = autocast(query, key, value)
    checks.check_together(query, key, value, enable_gqa)
    checks.check_bias(bias, query, query.shape[2], key.shape[2])
    checks.check_key_padding_mask(key_padding_mask, query, key)
    checks.check_relative_logits(relative_logits, bias, tuple(query.shape[:3]), query)
    checks.check_sinks(sinks, query, query.shape[1])
    checks.check_dropout(dropout_p, bias)
    checks.check_document_ids(document_ids, query, key, query_start, key_start)
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
    if isinstance(bias, DAPE):
        checks.check_dape(bias, query, rule, is_causal)
    backend = checks.choose_backend(backend, query, value, bias)

    mask, sequences = key_padding_mask, documents(document_ids) if document_ids is not None else None
    out, lse = attend(query, key, value, bias, rule, backend, mask, sinks, relative_logits, dropout_p, sequences)
    return (out, lse) if return_lse else out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None,
    rule: checks.Rule,
    backend: str,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    relative: Tensor | None,
    dropout_p: float,
    sequences: Sequences | None,
) -> tuple[Tensor, Tensor]:
    """out and lse of arguments that are checked; with sequences, those of `ops.attend_forward`, rule has no starts."""
    query, key, value = (readable(t) for t in (query, key, value))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sinks = None if sinks is None else sinks.to(dtype).contiguous()
    if isinstance(bias, DAPE):
        if sequences is None:
            out, lse = _mix(query, key, value, bias, key_mask, rule, backend)
        else:
            out, lse = _mix_sequences(query, key, value, bias, key_mask, rule, backend, sequences)
        return (out, lse) if sinks is None else with_sinks(out, lse, sinks)

    table = support = slopes = scaled = None
    symmetric = tails_need_grad = True
    if isinstance(bias, Tensor):
        table = bias
    elif bias is not None and query.shape[2] > 0 and key.shape[2] > 0:
        symmetric, tails_need_grad = bias.symmetric, bias.tails_need_grad
        if sequences is None:
            lengths, starts = (query.shape[2], key.shape[2]), (rule.query_start, rule.key_start)
        else:
            lengths = (max(1, sequences.max_q), max(1, sequences.max_k))
            starts = lengths[1] - lengths[0], 0
        width = lengths[0] + lengths[1] - 1
        scaled = bias.scaled(*lengths, *starts)
        slopes = bias.slopes() if scaled is None else None
        if scaled is not None:
            if sequences is not None:  # of every position that a query of some sequence can have
                every = bias.scaled(sum(lengths), 1, -lengths[0], 0)
                assert every is not None
                scaled = scaled._replace(rows=every.rows)
            rows = query.shape[2] if sequences is None else sum(lengths)
            checks.check_scaled(bias, scaled, query, width, rows)
        elif slopes is None:
            table = bias.table(*lengths, *starts)
            checks.check_made(bias, "a table", table, (query.shape[1], width), query)
            support = bias.support()
        else:
            checks.check_made(bias, "slopes", slopes, (query.shape[1],), query)
    # Not query's dtype: in half precision a bias would be off by 2^-9 of itself, which scores would show.
    if table is not None:
        table = table.to(dtype).contiguous()
    parts = (None,) * 4 if scaled is None else tuple(part.to(dtype).contiguous() for part in scaled)
    if relative is not None and (relative.dtype == torch.float64) != (dtype == torch.float64):
        relative = relative.to(dtype)
    cu_q, cu_k, max_q, max_k = (None, None, 0, 0) if sequences is None else sequences
    dropout = draw(dropout_p, rule.query_start, rule.key_start, query.device)

    out, lse = Attend.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        table,
        support,
        slopes,
        *parts,
        relative,
        sinks,
        key_mask,
        cu_q,
        None if cu_k is cu_q else cu_k,
        max_q,
        max_k,
        dropout_p,
        None if dropout is None else dropout.seed,
        rule.scale,
        rule.softcap,
        rule.key_start - rule.query_start,
        rule.left,
        rule.right,
        symmetric,
        tails_need_grad,
        backend,
    )
    return out, lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What one more logit a head, without a value, makes of attention without it."""
    sinks = sinks[:, None]
    share = torch.sigmoid(lse - sinks)
    return (out * share[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)


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


def _mix_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: DAPE,
    key_mask: Tensor | None,
    rule: checks.Rule,
    backend: str,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: a DAPE's scratch is that of one problem. Waits for the device."""
    ends = list(zip(sequences.cu_q.tolist(), sequences.cu_k.tolist()))
    query_length, key_length = query.shape[2], key.shape[2]
    outs: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    lses: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for (q0, k0), (q1, k1) in pairwise(ends):
        if q1 == q0:
            continue
        b = q0 // query_length
        rows, keys = (
            slice(q0 - b * query_length, q1 - b * query_length),
            slice(k0 - b * key_length, k1 - b * key_length),
        )
        own = rule._replace(query_start=(k1 - k0) - (q1 - q0), key_start=0)
        mask = None if key_mask is None else key_mask[b : b + 1, keys]
        parts = query[b : b + 1, :, rows], key[b : b + 1, :, keys], value[b : b + 1, :, keys]
        out, lse = _mix(*parts, bias, mask, own, backend)
        outs[b].append(out)
        lses[b].append(lse)
    return torch.cat([torch.cat(o, 2) for o in outs]), torch.cat([torch.cat(o, 2) for o in lses])


def documents(document_ids: Tensor) -> Sequences:
    """A sequence for each run of equal numbers in a row of document_ids (B, L). Waits for the device."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    torch.ne(document_ids[:, 1:], document_ids[:, :-1], out=starts[:, 1:])
    first = starts.flatten().nonzero().flatten().int()
    cu = torch.cat([first, first.new_full((1,), document_ids.numel())])
    return Sequences(cu, cu, document_ids.shape[1], document_ids.shape[1])


def readable(tensor: Tensor) -> Tensor:
    """Rows of unit stride that do not overlap, as kernels read them; every other stride is free."""
    rows = tensor.stride(-1) == 1 and tensor.stride(-2) >= tensor.shape[-1]
    return tensor if rows else tensor.contiguous()


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.autocast does to the arguments of scaled_dot_product_attention, which spares float64 too."""
    device_type = query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)
    query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    return query, key, value
