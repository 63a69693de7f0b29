"""The operators of decoding: few queries against a cache of keys. They give no gradient, and say so when asked for one.

As in ops.py they are opaque. The same two functions, `forward` and `mix_forward`, exist in decode_blockwise.py and in
kernels/decode_launch.py; these docstrings hold for all of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .ops import empty_outputs, no_autocast

_CACHE = "Tensor q, Tensor k, Tensor v, Tensor? block_table, Tensor? seqlens"
_SEEN = "Tensor? sinks, Tensor? key_mask, float scale"
_PLACE = "SymInt zero, SymInt start, SymInt left, SymInt right"

torch.library.define(
    "posattn::decode_forward",
    f"({_CACHE}, Tensor? table, Tensor? slopes, Tensor? strip, Tensor? relative, {_SEEN}, float softcap, {_PLACE},"
    " bool symmetric, str backend) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "posattn::decode_mix_forward",
    f"({_CACHE}, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? table, Tensor? strip, {_SEEN}, {_PLACE},"
    " bool published, str backend) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("posattn::decode_forward", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seqlens: Tensor | None,
    table: Tensor | None,
    slopes: Tensor | None,
    strip: Tensor | None,
    relative: Tensor | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    zero: int,
    start: int,
    left: int,
    right: int,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention and its natural logsumexp, of at most 16 queries an entry.

    q (B, Hq, Lq, D); k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), or with block_table (B, n) int32 pages (blocks, P, Hk, D)
    and (blocks, P, Hk, Dv), key j of entry b being row j % P of the page block_table[b, j // P]. seqlens (B,) int32:
    how many keys of each entry count; its query i then stands at position seqlens[b] - Lq + i, otherwise at start + i,
    key j at j. At most one of: table (Hq, T), the offset o at zero + o; slopes (Hq,); strip (B or 1, Hq, Lq, at least
    Lk), by query and key; all fp32 (fp64 with fp64 q); relative (B, Hq, Lq, W), adds relative[b, h, i, -o]. sinks
    (Hq,), of the table's dtype. key_mask (B, Lk) bool. left, right and softcap as in attend_forward.
    """
    if q.numel() == 0 or k.numel() == 0:
        out, lse = empty_outputs(q, v)
        return out.zero_(), lse.fill_(-math.inf) if sinks is None else lse.copy_(
            sinks[:, None].expand(lse.shape)
        )
    with no_autocast(q.device.type):
        outputs: tuple[Tensor, Tensor] = _module(backend).forward(
            q,
            k,
            v,
            block_table=block_table,
            seqlens=seqlens,
            table=table,
            slopes=slopes,
            strip=strip,
            relative=relative,
            sinks=sinks,
            key_mask=key_mask,
            scale=scale,
            softcap=softcap,
            zero=zero,
            start=start,
            left=left,
            right=right,
            symmetric=symmetric,
        )
    return outputs


@torch.library.impl("posattn::decode_mix_forward", "default")
def _mix_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seqlens: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    table: Tensor | None,
    strip: Tensor | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    zero: int,
    start: int,
    left: int,
    right: int,
    published: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The same with the scores of mix_forward; the base is nothing, a table or a strip. O(Lq Lk Hq) memory."""
    if q.numel() == 0 or k.numel() == 0:
        out, lse = empty_outputs(q, v)
        return out.zero_(), lse.fill_(-math.inf) if sinks is None else lse.copy_(
            sinks[:, None].expand(lse.shape)
        )
    with no_autocast(q.device.type):
        outputs: tuple[Tensor, Tensor] = _module(backend).mix_forward(
            q,
            k,
            v,
            w1,
            b1,
            w2,
            b2,
            block_table=block_table,
            seqlens=seqlens,
            table=table,
            strip=strip,
            sinks=sinks,
            key_mask=key_mask,
            scale=scale,
            zero=zero,
            start=start,
            left=left,
            right=right,
            published=published,
        )
    return outputs


@torch.library.register_fake("posattn::decode_forward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


@torch.library.register_fake("posattn::decode_mix_forward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


def _module(backend: str) -> Any:
    if backend == "blockwise":
        from . import decode_blockwise

        return decode_blockwise
    from .kernels import decode_launch  # only here is Triton needed

    return decode_launch


decode_forward = torch.ops.posattn.decode_forward.default
decode_mix_forward = torch.ops.posattn.decode_mix_forward.default
