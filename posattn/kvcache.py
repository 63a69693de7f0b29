"""Attention of a few new tokens against a cache of keys and values, also one that is kept in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, option_checks
from .biases.bias import Bias
from .biases.dape import DAPE
from .decode import MAX_QUERIES, NO_GRADIENT, decode, transformed, wants_gradient


def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    bias: Bias | DAPE | Tensor | None = None,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`posattn.attention` of up to 16 queries a sequence against a cache of its keys and values; no gradient.

    Of sequence b the first ``n = cache_seqlens[b]`` keys of the cache count, those of the queries themselves among
    them: write the new keys and values into the cache first. The last query stands on the last of these keys, query i
    at the position ``n - Lq + i``, so every sequence has positions of its own. Scores, bias, softmax and arguments are
    otherwise those of `posattn.attention`, as if it were called for each sequence with the keys ``[:n]``. A sequence
    with n = 0 gets out = 0, lse = -inf.

    On a GPU the keys are split over all its multiprocessors and read once for all query heads that share them. What
    grows (cache_seqlens) is data on the device: nothing is compiled again, nothing waits for the device, and a CUDA
    graph may hold the call. The table of a bias of this package is made at the first call under ``torch.no_grad()`` in
    evaluation (``bias.eval()``), for the whole length of the cache, and kept while the parameters stay what they are:
    call once before a graph is captured. A graph goes on reading that table. A change through ``parameter.data`` shows
    after a switch of ``train()`` and ``eval()``, or ``posattn.kept_table.forget(bias)``. Other biases, and all in
    training, make their table at every call.

    Args:
        query: (B, Hq, Lq, D), Lq 1 to 16, float16, bfloat16, float32 or float64; D at most 256.
        key_cache: (B, Hk, Lmax, D), or with block_table pages (blocks, block_size, Hk, D), as vLLM keeps them
            (Kwon et al., SOSP 2023, arXiv 2309.06180); of query's dtype and device.
        value_cache: (B, Hk, Lmax, Dv), or (blocks, block_size, Hk, Dv).
        bias: a `posattn.Bias` or a `posattn.DAPE` with Hq heads, or a table (Hq, Lmax + Lq - 1), the offset o at
            ``[h, o + Lmax - 1]``; with pages ``Lmax = max_blocks * block_size``.
        cache_seqlens: (B,) int32 on query's device, 0 to Lmax, the numbers of keys; Lmax by default. On a CPU numbers
            out of this range are refused, elsewhere cut off.
        block_table: (B, max_blocks) int32; key j of sequence b is row ``j % block_size`` of the page
            ``block_table[b, j // block_size]``. Entries beyond its keys (or before its window) are not read. Needs
            cache_seqlens, and a block_size that is a multiple of 16.
        is_causal: hide keys that stand after the query (only with Lq > 1 are there any).
        scale, enable_gqa, window, softcap, sinks: as in `posattn.attention`.
        key_padding_mask: (B, Lmax) bool, True for a key that counts.
        return_lse: also return lse.
        backend: "triton", "blockwise" or None, as in `posattn.attention`. "blockwise" on a GPU waits for cache_seqlens.

    Returns:
        out (B, Hq, Lq, Dv), of query's dtype; with return_lse the pair (out, lse), lse (B, Hq, Lq) in float32
        (float64 for float64 tensors).

    Raises:
        TypeError: an argument is not of its Python type.
        ValueError: a shape, dtype, device or number that is not accepted; the message says which.
        RuntimeError: under grad mode, when an argument, a parameter of the bias or what it makes requires grad; within
            forward-mode differentiation and torch.func's transforms.

        >>> import torch, posattn
        >>> bias = posattn.TISA(num_heads=4)
        >>> query, (keys, values) = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 4, 100, 16)
        >>> lengths = torch.tensor([100, 37], dtype=torch.int32)
        >>> with torch.no_grad():
        ...     out = posattn.attention_with_kvcache(query, keys, values, bias, cache_seqlens=lengths)
        ...     same = posattn.attention(query[1:], keys[1:, :, :37], values[1:, :, :37], bias, is_causal=True)
        >>> out.shape, torch.allclose(out[1:], same, atol=1e-5)
        (torch.Size([2, 4, 1, 16]), True)
    """
    checks.check_tensor("query", query)
    given = query
    if query.dtype != torch.float64:
        query = _autocast(query)
    room = _check_caches(query, key_cache, value_cache, block_table, cast=query.dtype != given.dtype)
    _check_heads(query, key_cache.shape[1 if block_table is None else 2], enable_gqa)
    queries = query.shape[2]
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(
            f"query must have 1 to {MAX_QUERIES} queries a sequence, got {queries}; posattn.attention takes more"
        )
    checks.check_bias(bias, query, queries, room)
    _check_seqlens(cache_seqlens, query, room)
    if block_table is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with block_table, got None")
    _check_mask(key_padding_mask, query, room)
    option_checks.check_sinks(sinks, query, query.shape[1])
    checks.check_return_lse(return_lse)
    rule = checks.check_rule(
        query,
        query,
        is_causal=is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
        query_start=room - queries,
        key_start=0,
    )
    if isinstance(bias, DAPE):
        checks.check_dape(bias, query, rule, is_causal)
    if not torch.compiler.is_compiling() and transformed():
        raise RuntimeError(
            "attention_with_kvcache has no rules for forward-mode differentiation and torch.func's transforms: call it "
            "outside of them"
        )
    if wants_gradient(query, key_cache, value_cache, bias, sinks):
        raise RuntimeError(NO_GRADIENT)
    backend = checks.choose_backend(backend, query, value_cache, bias)
    out, lse = decode(
        query,
        key_cache,
        value_cache,
        bias,
        rule,
        backend,
        key_padding_mask,
        sinks,
        None,
        block_table,
        cache_seqlens,
    )
    return (out, lse) if return_lse else out


def _autocast(query: Tensor) -> Tensor:
    device_type = query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast
        return query
    return query.to(torch.get_autocast_dtype(device_type))


def _check_caches(query: Tensor, key: Tensor, value: Tensor, block_table: Tensor | None, cast: bool) -> int:
    """How many keys a sequence may have; cast: autocast has changed the query's dtype."""
    for name, cache in (("key_cache", key), ("value_cache", value)):
        if not isinstance(cache, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {checks._kind(cache)}")
        if cache.layout != torch.strided or cache.is_nested or cache.dim() != 4:
            paged = block_table is not None
            shape = "(blocks, block_size, heads, head_dim)" if paged else "(batch, heads, length, head_dim)"
            raise ValueError(f"{name} must be a dense 4-D Tensor, {shape}, got {checks._shape(cache)}")
        if cache.dtype != query.dtype or cache.device != query.device:
            why = (
                f" ({query.dtype} is what torch.autocast casts the query to: keep the cache in it)"
                if cast
                else ""
            )
            raise ValueError(
                f"{name} must be of query's dtype and device, {query.dtype} on {query.device}, got {cache.dtype} on "
                f"{cache.device}{why}"
            )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"value_cache must have key_cache's shape but for head_dim, {tuple(key.shape)}, got {checks._shape(value)}"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key_cache must have query's head_dim {query.shape[3]}, got {checks._shape(key)}")
    for name, cache in (("key_cache", key), ("value_cache", value)):
        if not 1 <= cache.shape[3] <= checks.MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head_dim of 1 to {checks.MAX_HEAD_DIM}, got {checks._shape(cache)}"
            )
    if block_table is None:
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"key_cache must have query's batch size {query.shape[0]}, got {checks._shape(key)}"
            )
        return key.shape[2]
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table must be a Tensor or None, got {checks._kind(block_table)}")
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"block_table must be int32 of shape (batch, max_blocks) = ({query.shape[0]}, max_blocks), got "
            f"{checks._shape(block_table)} of {block_table.dtype}"
        )
    if block_table.device != query.device:
        raise ValueError(f"block_table must be on query's device {query.device}, got {block_table.device}")
    if key.shape[1] < 16 or key.shape[1] % 16:
        raise ValueError(
            f"key_cache must have a block_size that is a multiple of 16, got {checks._shape(key)}"
        )
    return block_table.shape[1] * key.shape[1]


def _check_heads(query: Tensor, key_heads: int, enable_gqa: bool) -> None:
    heads = query.shape[1]
    checks._check_flag("enable_gqa", enable_gqa)
    if heads < 1 or key_heads < 1:
        raise ValueError(f"query and key_cache must have at least one head, got {heads} and {key_heads}")
    if heads != key_heads and not enable_gqa:
        raise ValueError(
            f"query and key_cache must have the same number of heads, got {heads} and {key_heads}; "
            "pass enable_gqa=True to let several query heads share a key head"
        )
    if heads % key_heads != 0:
        raise ValueError(
            f"enable_gqa needs query's heads to be a multiple of key_cache's, got {heads} and {key_heads}"
        )


def _check_seqlens(seqlens: Tensor | None, query: Tensor, room: int) -> None:
    if seqlens is None:
        return
    if not isinstance(seqlens, Tensor):
        raise TypeError(f"cache_seqlens must be a Tensor or None, got {checks._kind(seqlens)}")
    if seqlens.dtype != torch.int32 or seqlens.dim() != 1 or seqlens.shape[0] != query.shape[0]:
        raise ValueError(
            f"cache_seqlens must be int32 of shape (batch,) = ({query.shape[0]},), got {checks._shape(seqlens)} of "
            f"{seqlens.dtype}"
        )
    if seqlens.device != query.device:
        raise ValueError(f"cache_seqlens must be on query's device {query.device}, got {seqlens.device}")
    if seqlens.device.type != "cpu" or torch.compiler.is_compiling() or option_checks.is_fake(seqlens):
        return
    lengths = seqlens.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= room:
        raise ValueError(f"cache_seqlens must be 0 to {room}, the length of the cache, got {lengths}")


def _check_mask(mask: Tensor | None, query: Tensor, room: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a Tensor or None, got {checks._kind(mask)}")
    if mask.dtype != torch.bool or mask.shape != (query.shape[0], room) or mask.device != query.device:
        raise ValueError(
            f"key_padding_mask must be bool, True for a key that counts, of shape (batch, Lmax) = "
            f"{(query.shape[0], room)} on {query.device}, got {mask.dtype}, {checks._shape(mask)}, {mask.device}"
        )
