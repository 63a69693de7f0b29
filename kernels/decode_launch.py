"""Decoding from tensors to kernels: `forward`, and `mix_forward` for DAPE; arguments as in posattn/decode_ops.py.

The grid follows from shapes alone (splits from the keys there is room for), so that a CUDA graph may hold the call
while its cache fills; nothing waits for the device. Its first axis is that of entries, heads and rows, which may be
many: the others take 65535 at most.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import decode_configs as table_of
from .configs import arch, dot_precision
from .decode import decode_combine, decode_split
from .decode_mix import decode_mix, decode_scores
from .problem import OPEN, on, padded

NONE, TABLE, SLOPES, DISTANCES, STRIP, RELATIVE = range(6)  # decode.py


def tensor_strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """Of the axes before the last; 0 for what has one entry, so that odd strides of those compile nothing new."""
    if tensor is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    return {f"{name}_{axis}": tensor.stride(n) if tensor.shape[n] > 1 else 0 for n, axis in enumerate(axes)}


class Decoding:
    """One call: lengths, tiles, and the arguments that its kernels share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None, seqlens: Tensor | None,
        bias: tuple[int, Tensor | None], zero: int, start: int, left: int, right: int,
    ):  # fmt: skip
        self.q, self.k, self.v = q, k, v
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.value_dim = v.shape[3]
        paged = block_table is not None
        self.key_heads = k.shape[2 if paged else 1]
        self.page = k.shape[1] if paged else 0
        self.keys = block_table.shape[1] * self.page if block_table is not None else k.shape[2]
        self.group = self.heads // self.key_heads
        # Of a window the splits share what it shows, wherever it stands.
        self.most_seen = min(self.keys, left + right + self.queries) if min(left, right) >= 0 else self.keys
        rows = self.group * self.queries
        self.chip = arch(q.device)
        width = max(padded(self.head_dim), padded(self.value_dim))
        self.config = table_of.pick_decode(self.chip, q.element_size() * 8, width)
        self.block_m = min(max(16, triton.next_power_of_2(rows)), self.config.block_m)
        self.row_blocks = triton.cdiv(rows, self.block_m)
        self.programs = self.batch * self.key_heads * self.row_blocks
        self.one = rows == 1
        kind, values = bias
        by_last = values.shape[-1] if values is not None else 0
        self.bias = dict(BIAS=values, KIND=kind, zero=zero, length=by_last, **bias_strides(kind, values))
        self.seen = dict(
            SEQLENS=seqlens, Lq=self.queries, Lk=self.keys, start=start,
            low=-left if left >= 0 else -OPEN, high=right if right >= 0 else OPEN,
        )  # fmt: skip
        axes = "blh" if paged else "bhl"
        self.cache = dict(PAGES=block_table, PAGE=self.page, **tensor_strides("pages", block_table, "b"))
        self.key_strides, self.value_strides = tensor_strides("k", k, axes), tensor_strides("v", v, axes)
        self.sizes = dict(H=self.heads, GROUP=self.group, row_blocks=self.row_blocks)

    def tile(self) -> dict[str, Any]:
        return dict(
            BLOCK_M=self.block_m, BLOCK_N=self.config.block_n, PRECISION=dot_precision(self.q, self.config),
            num_warps=self.config.num_warps,
            # Pages are looked up a stage before their keys are loaded.
            num_stages=self.config.num_stages + (2 if self.page and self.config.num_stages > 2 else 0),
        )  # fmt: skip

    def splits(self, programs: int, block_n: int) -> int:
        slots = table_of.PROGRAMS * table_of.multiprocessors(self.q.device)
        return table_of.choose_splits(programs, triton.cdiv(self.most_seen, block_n), slots)

    def attend(
        self,
        logits: Tensor | None,
        sinks: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        q, v = self.q, self.v
        out = (
            torch.empty_like(q)
            if self.value_dim == self.head_dim
            else q.new_empty(*q.shape[:3], self.value_dim)
        )
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        splits = self.splits(self.programs, self.config.block_n)
        acc = state = lse  # written by splits only; a pointer all the same, so that there is one kernel
        if splits > 1:
            acc = torch.empty(*q.shape[:3], splits, self.value_dim, dtype=torch.float32, device=q.device)
            state = torch.empty(2, *q.shape[:3], splits, dtype=torch.float32, device=q.device)
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        bias = self.bias
        if logits is not None:
            bias = dict(BIAS=logits, KIND=STRIP, zero=0, length=self.keys, **bias_strides(STRIP, logits))
        log2e = math.log2(math.e)
        with on(q):
            decode_split[self.programs, splits](
                Q=q, K=None if logits is not None else self.k, V=v, OUT=out, LSE=lse, ACC=acc, STATE=state,
                SINKS=sinks, PAD=mask, scale=(scale / softcap if softcap else scale) * log2e, softcap=softcap * log2e,
                splits=splits, **self.cache, **self.seen, **self.sizes, **bias, **self.key_strides,
                **self.value_strides, **tensor_strides("q", q, "bhl"), **tensor_strides("o", out, "bhl"),
                **tensor_strides("p", mask, "b"), ONE=self.one, SOFTCAP=softcap > 0, D=self.head_dim,
                DV=self.value_dim, HEAD_DIM=padded(self.head_dim), VALUE_DIM=padded(self.value_dim), **self.tile(),
            )  # fmt: skip
            if splits > 1:
                block = min(table_of.COMBINE_DIM, padded(self.value_dim))
                decode_combine[lse.numel(), triton.cdiv(self.value_dim, block)](
                    acc, state, out, lse, sinks, Lq=self.queries, H=self.heads, splits=splits,
                    **tensor_strides("o", out, "bhl"), DV=self.value_dim, BLOCK_D=block,
                    BLOCK_S=table_of.COMBINE_SPLITS, num_warps=4, num_stages=1,
                )  # fmt: skip
        return out, lse


def bias_strides(kind: int, values: Tensor | None) -> dict[str, int]:
    t = [0, 0, 0]
    if values is not None and kind == TABLE:
        t[1] = values.stride(0)
    elif values is not None and kind >= STRIP:
        t = [values.stride(n) if values.shape[n] > 1 else 0 for n in range(3)]
    return dict(zip(("t_b", "t_h", "t_l"), t))


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, block_table: Tensor | None, seqlens: Tensor | None, table: Tensor | None,
    slopes: Tensor | None, strip: Tensor | None, relative: Tensor | None, sinks: Tensor | None,
    key_mask: Tensor | None, scale: float, softcap: float, zero: int, start: int, left: int, right: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kinds = (TABLE, table), (DISTANCES if symmetric else SLOPES, slopes), (STRIP, strip), (RELATIVE, relative)
    bias = next(((kind, values) for kind, values in kinds if values is not None), (NONE, None))
    p = Decoding(q, k, v, block_table, seqlens, bias, zero, start, left, right)
    return p.attend(None, sinks, key_mask, scale, softcap)


def mix_forward(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, block_table: Tensor | None,
    seqlens: Tensor | None, table: Tensor | None, strip: Tensor | None, sinks: Tensor | None,
    key_mask: Tensor | None, scale: float, zero: int, start: int, left: int, right: int, published: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kinds = (TABLE, table), (STRIP, strip)
    bias = next(((kind, values) for kind, values in kinds if values is not None), (NONE, None))
    p = Decoding(q, k, v, block_table, seqlens, bias, zero, start, left, right)
    heads, hidden, taps = w2.shape
    width = triton.cdiv(p.keys, 16) * 16
    scores, logits = (
        torch.empty(p.batch, p.heads, p.queries, width, dtype=torch.float32, device=q.device)
        for _ in range(2)
    )
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    # Published: hidden units of keys that the query does not see count, and read their neighbours' scores.
    margin = 2 * (taps // 2)
    tile = p.tile()
    block_n, warps = table_of.pick_mix(p.chip, q.element_size() * 8, padded(heads) + padded(hidden))
    with on(q):
        splits = p.splits(p.programs, p.config.block_n)
        decode_scores[p.programs, splits](
            Q=q, K=k, S=scores, scale=scale, margin=margin, splits=splits, W=width, **p.cache, **p.seen, **p.sizes,
            **p.key_strides, **tensor_strides("q", q, "bhl"), D=p.head_dim, HEAD_DIM=padded(p.head_dim), **tile,
        )  # fmt: skip
        splits = p.splits(p.batch * p.queries, block_n)
        decode_mix[p.batch * p.queries, splits](
            S=scores, L=logits, PAD=mask, W1=w1, B1=b1, W2=w2, B2=b2, splits=splits, W=width, **p.seen, **p.bias,
            **tensor_strides("p", mask, "b"), H=heads, HIDDEN=hidden, K=taps, HEADS=padded(heads),
            UNITS=padded(hidden), PUBLISHED=published, DTYPE=tl.float32 if q.dtype == torch.float32 else tl.float16,
            BLOCK_N=block_n, PRECISION=tile["PRECISION"], num_warps=warps, num_stages=1,
        )  # fmt: skip
    return p.attend(logits, sinks, key_mask, scale, 0.0)
