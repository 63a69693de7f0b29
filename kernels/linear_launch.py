"""From tensors to kernels: `forward` and `backward` of linear attention.

Shapes: q [B, H, Lq, R], k [B, H, Lk, R] before the feature map, v [B, H, Lk, DV], of one dtype; a state [B, H, R, DV]
with sums [B, H, R], fp32. The sequence is cut in chunks; a chunk keeps R (DV + 1) fp32 numbers, so that with chunks of
CHUNK positions the states of all are R (DV + 1) / CHUNK numbers a position. Inputs are taken as checked.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import configs, linear_configs
from .chunk_read import read_by_feature, read_by_value
from .chunk_states import chunk_states, row_products, scan_chunks
from .problem import on, padded, rows_contiguous, strides


class Chunks:
    """What the launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str, causal: bool):
        self.q, self.k, self.v = (rows_contiguous(x) for x in (q, k, v))
        self.batch, self.heads, _, self.features = q.shape
        self.values = v.shape[3]
        self.mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.mask_stride = 0 if key_mask is None else self.mask.stride(0)
        self.map, self.causal = feature_map, causal
        # More numbers a state, fewer states: together they stay below the size of q, k, v and out.
        self.chunk = 128 if padded(self.features) * padded(self.values) <= 4096 else 256
        if configs.arch(q.device) == "interpreter":
            self.chunk = 32

    def run(self, kernel: Any, kind: str, programs, like: Tensor, *, blocks: tuple[str, ...], **arguments: Any) -> None:
        config = linear_configs.pick(like, kind, max(padded(self.features), padded(self.values)))
        sizes = dict(
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=min(config.block_r, padded(self.features)),
            BLOCK_V=min(config.block_v, padded(self.values)), WIDTH=padded(self.features),
            VALUE_DIM=padded(self.values),
        )  # fmt: skip
        with on(like):
            kernel[(programs(sizes),)](
                **arguments, **{name: sizes[name] for name in blocks}, H=self.heads, R=self.features, DV=self.values,
                CHUNK=self.chunk, MAP=self.map, PRECISION=configs.dot_precision(like, config),
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    def states(
        self, x: Tensor, y: Tensor, mask: Tensor | None, start: Tensor | None, start_sums: Tensor | None,
        weights: tuple[Tensor, Tensor] | None = None, reverse: bool = False, totals: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What stands before (behind) each chunk [BH, chunks, R, DV], [BH, chunks, R], and with `totals` all of it.

        Without causality there is one chunk that sees everything: the totals.
        """
        length = x.shape[2]
        chunks = triton.cdiv(length, self.chunk)
        heads = self.batch * self.heads
        states = x.new_empty(heads, chunks, self.features, self.values, dtype=torch.float32)
        sums = x.new_empty(heads, chunks, self.features, dtype=torch.float32)
        w, y0 = weights or (None, None)

        def programs(sizes: dict[str, int]) -> int:
            return heads * chunks * (sizes["WIDTH"] // sizes["BLOCK_R"]) * triton.cdiv(self.values, sizes["BLOCK_V"])

        self.run(
            chunk_states, "states", programs, x, blocks=("BLOCK_N", "WIDTH", "BLOCK_R", "BLOCK_V"), X=x, Y=y, W=w,
            Y0=y0, MASK=mask, STATES=states, SUMS=sums, **strides(x=x, y=y), p_b=self.mask_stride, L=length,
            chunks=chunks,
        )  # fmt: skip
        all_states = all_sums = None
        if totals or not self.causal:
            all_states, all_sums = torch.empty_like(states[:, 0]), torch.empty_like(sums[:, 0])
        for made, first, total in ((states, start, all_states), (sums, start_sums, all_sums)):
            size = made[0, 0].numel()
            first = None if first is None else first.contiguous()
            with on(x):
                scan_chunks[(triton.cdiv(size, 64) * heads,)](
                    made, first, total, chunks, size, REVERSE=reverse, BLOCK_C=16, BLOCK_E=64, num_warps=4
                )
        if not self.causal:
            return all_states[:, None], all_sums[:, None], all_states, all_sums
        return states, sums, all_states, all_sums


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None, state: Tensor | None, sums: Tensor | None,
    feature_map: str, eps: float, causal: bool, want_state: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> out [B, H, Lq, DV] in v's dtype, den [B, H, Lq] fp32, and with want_state the state behind the last key."""
    p = Chunks(q, k, v, key_mask, feature_map, causal)
    states, rows, all_states, all_sums = p.states(p.k, p.v, p.mask, state, sums, totals=want_state)
    out = v.new_empty(*q.shape[:3], p.values)
    den = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    read_features(p, p.q, p.k, p.v, None, None, p.mask, states, rows, out, den, eps)
    if not want_state:
        return out, den, den.new_empty(0), den.new_empty(0)
    shape = p.batch, p.heads, p.features
    return out, den, all_states.view(*shape, p.values), all_sums.view(shape)


def read_features(p, x, z, y, w, x_mask, z_mask, states, sums, out, den, eps=0.0, reverse=False) -> None:
    def programs(sizes: dict[str, int]) -> int:
        return p.batch * p.heads * triton.cdiv(x.shape[2], sizes["BLOCK_M"]) * triton.cdiv(p.values, sizes["BLOCK_V"])

    p.run(
        read_by_feature, "features", programs, x, blocks=("BLOCK_M", "BLOCK_N", "WIDTH", "BLOCK_V"), X=x, Z=z, Y=y,
        W=w, XMASK=x_mask, ZMASK=z_mask, STATES=states, SUMS=sums, OUT=out, DEN=den, **strides(x=x, z=z, y=y, o=out),
        p_b=p.mask_stride, L=x.shape[2], chunks=states.shape[1], eps=eps, CAUSAL=p.causal, FUTURE=reverse,
    )  # fmt: skip


def read_values(p, x, y, z, w, x0, wy, y0, x_mask, z_mask, states, sums, raw, out, reverse=False) -> None:
    def programs(sizes: dict[str, int]) -> int:
        return p.batch * p.heads * triton.cdiv(x.shape[2], sizes["BLOCK_M"]) * triton.cdiv(p.features, sizes["BLOCK_R"])

    p.run(
        read_by_value, "values", programs, x, blocks=("BLOCK_M", "BLOCK_N", "BLOCK_R", "VALUE_DIM"), X=x, Y=y, Z=z,
        RAW=raw, WX=w, X0=x0, WY=wy, Y0=y0, XMASK=x_mask, ZMASK=z_mask, STATES=states, SUMS=sums, OUT=out,
        **strides(x=x, y=y, z=z, r=raw, o=out), p_b=p.mask_stride, L=x.shape[2], chunks=states.shape[1],
        CAUSAL=p.causal, FUTURE=reverse,
    )  # fmt: skip


def backward(
    grad_out: Tensor | None, grad_state: Tensor | None, grad_sums: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, den: Tensor, *, key_mask: Tensor | None, state: Tensor | None, sums: Tensor | None,
    feature_map: str, causal: bool, need_q: bool, need_kv: bool, need_state: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dq, dk, dv, dstate, dsums; what is not needed is empty. No atomics: equal inputs, equal bits."""
    p = Chunks(q, k, v, key_mask, feature_map, causal)
    dq = torch.empty_like(q) if need_q else q.new_empty(0)
    dk, dv = (torch.empty_like(x) if need_kv else x.new_empty(0) for x in (k, v))
    do = rows_contiguous(torch.zeros_like(out) if grad_out is None else grad_out)
    w, y0 = torch.empty_like(den), torch.empty_like(den)
    rows = den.numel()
    with on(q):
        row_products[(triton.cdiv(rows, 32),)](
            out, do, den, w, y0, *out.stride()[:3], *do.stride()[:3], den.shape[2], rows, p.heads, BLOCK=32,
            DV=p.values, VALUE_DIM=padded(p.values),
        )  # fmt: skip
    if need_q:
        states, totals, _, _ = p.states(p.k, p.v, p.mask, state, sums)
        read_values(p, do, p.v, p.k, w, y0, None, None, None, p.mask, states, totals, p.q, dq)
        del states
    dstate = dsums = den.new_empty(0)
    if need_kv or need_state:
        states, totals, all_states, all_sums = p.states(
            p.q, do, None, grad_state, grad_sums, weights=(w, y0), reverse=True, totals=need_state
        )
        if need_state:
            dstate = all_states.view(p.batch, p.heads, p.features, p.values)
            dsums = all_sums.view(p.batch, p.heads, p.features)
        if need_kv:
            read_features(p, p.k, p.q, do, w, p.mask, None, states, totals, dv, None, reverse=True)
            read_values(p, p.v, do, p.q, None, None, w, y0, p.mask, None, states, totals, p.k, dk, reverse=True)
    return dq, dk, dv, dstate, dsums
