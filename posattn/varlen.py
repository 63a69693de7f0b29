"""Packed sequences: attention over tokens of many sequences without padding between them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, decode, option_checks
from .biases.bias import Bias
from .biases.dape import DAPE
from .dispatch import attend, autocast
from .ops import Sequences


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Bias | DAPE | Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    relative_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`posattn.attention` of sequences of any lengths, their tokens one after the other, each by itself.

    Sequence s has the queries ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1] - 1`` and the keys and values
    ``cu_seqlens_k[s]`` to ``cu_seqlens_k[s + 1] - 1``, and sees nothing of the others. Positions start anew in each:
    key j of a sequence stands at j, and its last query on its last key, for causality, window and bias. Nothing waits
    for a GPU, except for a `posattn.DAPE`, which goes sequence by sequence.

    Args:
        query: (Tq, Hq, D), float16, bfloat16, float32 or float64; D at most 256.
        key: (Tk, Hk, D). value: (Tk, Hk, Dv). Both of query's dtype and device.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 or int64, on query's device: 0, and where each sequence ends. Pass
            the same tensor twice for self-attention: backward then does less. A sequence may be empty. Tokens behind
            the last sequence, in a buffer of fixed size, get out = 0, lse = -inf and no gradient.
        max_seqlen_q, max_seqlen_k: the lengths of the longest, or more; it is a bias that is made so long. What these
            four hold is checked on a CPU only: with a number that is too small a GPU reads beyond the bias's table.
        bias: as for `posattn.attention`; a table is (Hq, max_seqlen_q + max_seqlen_k - 1), with the bias of the
            offset o at ``[h, o + max_seqlen_k - 1]``.
        is_causal, scale, enable_gqa, window, softcap, sinks, dropout_p, backend: as for `posattn.attention`.
        relative_logits: (Tq, Hq, W), as for `posattn.attention`.
        return_lse: also return lse.

    Returns:
        out (Tq, Hq, Dv), of query's dtype; with return_lse the pair (out, lse), lse (Hq, Tq) in float32 (float64 for
        float64 tensors), differentiable like out.

    Raises:
        TypeError, ValueError: as `posattn.attention` does.

        >>> import torch, posattn
        >>> query, key, value = torch.randn(3, 7, 2, 8).unbind()
        >>> cu_seqlens = torch.tensor([0, 3, 7])
        >>> bias = posattn.ALiBi(2)
        >>> out = posattn.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, 4, 4, bias, is_causal=True)
        >>> first = [x[None, :3].transpose(1, 2) for x in (query, key, value)]
        >>> torch.allclose(out[:3], posattn.attention(*first, bias, is_causal=True)[0].transpose(0, 1), atol=1e-6)
        True
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        option_checks.check_packed(name, tensor)
    option_checks.check_sequences("q", cu_seqlens_q, max_seqlen_q, query)
    option_checks.check_sequences("k", cu_seqlens_k, max_seqlen_k, key)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        came = f"{len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be of as many sequences, got {came}")
    shape = tuple(query.shape[:2])
    option_checks.check_relative_logits(relative_logits, bias, shape, query)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, tensor)
    query, key, value = autocast(query, key, value)
    checks.check_together(query, key, value, enable_gqa)
    checks.check_bias(bias, query, max_seqlen_q, max_seqlen_k)
    option_checks.check_sinks(sinks, query, query.shape[1])
    option_checks.check_dropout(dropout_p, bias)
    checks.check_return_lse(return_lse)
    rule = checks.check_rule(
        query,
        key,
        is_causal=is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
        query_start=0,
        key_start=0,
    )
    if isinstance(bias, DAPE):
        checks.check_dape(bias, query, rule, is_causal)
    backend = checks.choose_backend(backend, query, value, bias)
    decode.begin(query, query, bias)

    cu_q = cu_seqlens_q.to(torch.int32).contiguous()
    cu_k = cu_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.to(torch.int32).contiguous()
    sequences = Sequences(cu_q, cu_k, max_seqlen_q, max_seqlen_k)
    relative = None if relative_logits is None else relative_logits.transpose(0, 1)[None]
    out, lse = attend(query, key, value, bias, rule, backend, None, sinks, relative, dropout_p, sequences)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out
