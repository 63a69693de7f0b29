"""Attention with relative logits, sinks, dropout, sequences: dense, in float64; shares no code with the package."""

from __future__ import annotations

import math
from itertools import groupby, pairwise

import torch
from oracle import attention_oracle
from torch import Tensor


def features_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    relative: Tensor | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
    left: int = -1,
    right: int = -1,
    shift: int | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse); arguments as in attention_oracle, bias (Hq, Lq, Lk).

    relative (B, Hq, Lq, W) adds relative[b, h, i, -o] at the offsets -W < o <= 0. sinks (Hq,): one more key of
    zeros, whose bias is the sink, whose value is 0 and which everybody sees. kept (B, Hq, Lq, Lk) bool.
    """
    q, k, v = q.double(), k.double(), v.double()
    (batch, heads, queries, dim), (_, key_heads, keys, _) = q.shape, k.shape
    shift = queries - keys if shift is None else shift
    offset = torch.arange(keys)[None] - torch.arange(queries)[:, None] + shift
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if left >= 0:
        seen = seen & (offset >= -left)
    if right >= 0:
        seen = seen & (offset <= right)
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None, :]
    dense = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    if bias is not None:
        dense = dense + bias.double()
    if relative is not None:
        near = (offset <= 0) & (offset > -relative.shape[3])
        index = torch.where(near, -offset, 0).expand(dense.shape)
        dense = dense + torch.where(near, relative.double().gather(3, index), 0.0)
    dense = torch.where(seen, dense, -math.inf)
    if sinks is not None:
        k = torch.cat([k, k.new_zeros(batch, key_heads, 1, dim)], 2)
        dense = torch.cat([dense, sinks.double()[:, None, None].expand(batch, heads, queries, 1)], 3)
    # With a value of its own for each key, attention gives the probabilities.
    eye = torch.eye(k.shape[2], dtype=torch.float64).expand(batch, key_heads, -1, -1)
    weight, lse = attention_oracle(q, k, eye, dense, scale=scale, softcap=softcap)
    weight = weight[..., :keys]
    if kept is not None:
        weight = weight * kept / (1 - dropout_p)
    return weight @ v.repeat_interleave(heads // key_heads, dim=1), lse


def varlen_oracle(q, k, v, cu_q, cu_k, bias=None, *, relative=None, **said) -> tuple[Tensor, Tensor]:
    """(out (Tq, Hq, Dv), lse (Hq, Tq)), sequence by sequence; bias(queries, keys) -> (Hq, queries, keys)."""
    outs, lses = [], []
    ends = list(zip(cu_q.tolist(), cu_k.tolist()))
    for (q0, k0), (q1, k1) in pairwise(ends):
        if q1 == q0:
            continue
        tensors = (t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        dense = None if bias is None or k1 == k0 else bias(q1 - q0, k1 - k0)
        row_bias = None if relative is None else relative[q0:q1].transpose(0, 1)[None]
        out, lse = _or_nothing(*tensors, dense, relative=row_bias, **said)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def documents_oracle(
    q, k, v, ids, bias=None, *, relative=None, key_padding_mask=None, **said
) -> tuple[Tensor, Tensor]:
    """(out, lse) of padded tensors, document by document."""
    entries = []
    for b, row in enumerate(ids.tolist()):
        parts, start = [], 0
        for _, run in groupby(row):
            end = start + len(list(run))
            part = (slice(b, b + 1), slice(None), slice(start, end))
            mask = None if key_padding_mask is None else key_padding_mask[b : b + 1, start:end]
            dense = None if bias is None else bias(end - start, end - start)
            row_bias = None if relative is None else relative[part]
            made = features_oracle(
                q[part], k[part], v[part], dense, relative=row_bias, key_padding_mask=mask, **said
            )
            parts.append(made)
            start = end
        entries.append([torch.cat(t, 2) for t in zip(*parts)])
    out, lse = (torch.cat(t) for t in zip(*entries))
    return out, lse


def _or_nothing(q, k, v, dense, **said) -> tuple[Tensor, Tensor]:
    if k.shape[2] > 0 or said.get("sinks") is not None:
        return features_oracle(q, k, v, dense, **said)
    return q.new_zeros((*q.shape[:3], v.shape[3])).double(), torch.full(q.shape[:3], -math.inf).double()


# ---------------------------------------------------------------------------------------- dropout, bit by bit

WORD = 2**32


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in integers without a limit (Salmon et al., SC 2011, sec. 4)."""
    a, b, c, d = counter
    k0, k1 = seed % WORD, seed // WORD % WORD
    for _ in range(10):
        low, high = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = high // WORD ^ b ^ k0, high % WORD, low // WORD ^ d ^ k1, low % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return a, b, c, d


def kept_pair(p: float, seed: list[int], b: int, h: int, row: int, column: int) -> bool:
    """seed: [seed, first row, first key, first head]."""
    w0, w1, *_ = philox(seed[0], ((seed[1] + row) % WORD, (seed[3] + h) % WORD, b, 0))
    x = (w0 + (seed[2] + column) * 0x9E3779B1) % WORD
    x ^= x >> 16
    x = x * 0x85EBCA6B % WORD
    x ^= x >> 13
    x = x * (w1 | 1) % WORD
    return x >= round(p * WORD)


def kept_pairs(p: float, seed: list[int], batch: int, heads: int, rows: int, columns: int) -> Tensor:
    """(batch, heads, rows, columns)."""
    return torch.tensor(
        [
            [
                [[kept_pair(p, seed, b, h, i, j) for j in range(columns)] for i in range(rows)]
                for h in range(heads)
            ]
            for b in range(batch)
        ]
    )
