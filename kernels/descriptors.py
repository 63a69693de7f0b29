"""Attention by tensor descriptors: which calls forward_specialised.py and backward_cols_specialised.py serve, and how.

Schedules of the forward: "specialised"; "persistent", the same over a loop of tiles; and "descriptors", the same
without specialised warps. dK and dV have the first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .backward_cols_specialised import attend_backward_cols_specialised
from .forward_specialised import attend_forward_specialised
from .linear import Distance, Linear
from .problem import Problem
from .rule import Plain
from .schedules import Schedules
from .toeplitz import Toeplitz, prepare


class Described(Schedules):
    """16 bits, head dim 64, 128 or 256 of keys and values, aligned tensors; a bias of the offset, or none."""

    slopes: Tensor | None
    near: Tensor | None

    def takes(self, *tensors: Tensor) -> bool:
        p = self.p
        if p.mask is not None or p.sequences is not None or p.seed is not None or p.softcap or p.keys == 0:
            return False
        if type(p.rule) not in (Plain, Toeplitz, Linear, Distance):
            return False
        if p.q.element_size() != 2 or p.head_dim != p.value_dim or p.head_dim not in (64, 128, 256):
            return False
        return all(map(aligned, tensors))

    def has_table(self) -> bool:
        """Without a bias, only where something is masked."""
        p = self.p
        return not isinstance(p.rule, Plain) or p.low > 1 - p.queries or p.high < p.keys - 1

    def rule(self) -> Plain | Toeplitz:
        """The call's rule with the mask in its table."""
        p = self.p
        if not self.has_table():
            return p.rule
        if isinstance(p.rule, Toeplitz):
            return p.rule._replace(span=None, heads=1, split=1)
        offset = torch.arange(1 - p.queries, p.keys, dtype=torch.float32, device=p.q.device)[None] + p.shift
        if self.slopes is None:
            table = offset.new_zeros(()).expand(1, offset.shape[1])
        else:
            table = self.slopes.float()[:, None] * (offset if isinstance(p.rule, Linear) else -offset.abs())
        made = prepare(table, None, p.queries, p.shift, True, p.low, p.high)
        # One row serves all heads of no bias.
        return made._replace(heads=1, stride=made.stride if self.slopes is not None else 0)

    def common(self, config: configs.Config) -> dict[str, Any]:
        p = self.p
        return dict(
            NEAR=self.near, rule=self.rule(), Lq=p.queries, Lk=p.keys, low=p.low, high=p.high, B=p.batch, H=p.heads,
            GROUP=p.group, D=p.head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SPECIALISE=config.schedule != "descriptors", num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


class Forward(Described):
    """-> out, lse; with sinks too."""

    direction, kernel = "forward", attend_forward_specialised

    def __init__(
        self, p: Problem, out: Tensor, lse: Tensor, sinks: Tensor | None, near: Tensor | None, slopes: Tensor | None
    ):
        self.p, self.outputs, self.sinks, self.near, self.slopes = p, (out, lse), sinks, near, slopes

    def serves(self, config: configs.Config) -> bool:
        p = self.p
        # Keys from Lk on are read as zeros: no row that exists may see them.
        if (p.high > p.keys - p.queries or not self.has_table()) and p.keys % config.block_n:
            return False
        return self.takes(p.q, p.k, p.v, self.outputs[0]) and rows_of(p.q) is not None

    def options(self) -> str:
        made = (("table", self.has_table()), ("sinks", self.sinks is not None), ("near", self.near is not None))
        return "+".join(name for name, there in made if there)

    def tiles(self, config: configs.Config) -> int:
        return triton.cdiv(self.p.queries, config.block_m) * self.p.batch * self.p.heads

    def programs(self, config: configs.Config) -> int:
        tiles = self.tiles(config)
        return min(tiles, processors(self.p.q.device)) if config.schedule == "persistent" else tiles

    def arguments(self, config: configs.Config, *outputs: Tensor) -> dict[str, Any]:
        p, (out, lse) = self.p, outputs
        q_b, q_h, q_c = rows_of(p.q)
        strides = named(k=p.k, v=p.v) | {name: s // 8 for name, s in named(o=out).items()}
        return self.common(config) | strides | dict(
            Q=p.q, K=p.k, V=p.v, OUT=out, LSE=lse, SINKS=self.sinks, scale=p.scale2, tiles=self.tiles(config),
            q_rows=(p.batch - 1) * q_b + (p.heads - 1) * q_h + p.queries, q_b=q_b, q_h=q_h, q_c=q_c,
            q_l=steps(p.q)[2], PERSISTENT=config.schedule == "persistent",
        )  # fmt: skip


class Columns(Described):
    """-> dk, dv, of lse in base 2 and delta as backward_rows.py leaves them, with kept_h places a head."""

    direction, kernel = "cols", attend_backward_cols_specialised

    def __init__(
        self, p: Problem, do: Tensor, lse2: Tensor, delta: Tensor, kept_h: int, dk: Tensor, dv: Tensor,
        near: Tensor | None, slopes: Tensor | None, scale: float,
    ):  # fmt: skip
        self.p, self.outputs, self.near, self.slopes, self.scale = p, (dk, dv), near, slopes, scale
        self.do, self.lse2, self.delta, self.kept_h = do, lse2, delta, kept_h

    def serves(self, config: configs.Config) -> bool:
        if self.p.group > 1 and self.near is not None:
            return False
        return self.takes(self.p.q, self.p.k, self.p.v, self.do, *self.outputs)

    def options(self) -> str:
        made = (("table", self.has_table()), ("near", self.near is not None), ("groups", self.p.group > 1))
        return "+".join(name for name, there in made if there)

    def programs(self, config: configs.Config) -> int:
        return triton.cdiv(self.p.keys, config.block_n) * self.p.batch * (self.p.heads // self.p.group)

    def arguments(self, config: configs.Config, *outputs: Tensor) -> dict[str, Any]:
        p, (dk, dv) = self.p, outputs
        strides = named(q=p.q, k=p.k, v=p.v, do=self.do)
        strides |= {name: s // 8 for name, s in named(dk=dk, dv=dv).items()}
        return self.common(config) | strides | dict(
            Q=p.q, K=p.k, V=p.v, DO=self.do, LSE2=self.lse2, DELTA=self.delta, DK=dk, DV=dv,
            kept_h=self.kept_h, scale=self.scale, scale2=p.scale2, GROUPED=p.group > 1,
        )  # fmt: skip


def aligned(x: Tensor) -> bool:
    """What tensor descriptors need: multiples of 16 bytes, and rows that lie apart; and one kernel: 32-bit numbers."""
    return x.data_ptr() % 16 == 0 and all(0 < s < 2**31 and s * x.element_size() % 16 == 0 for s in steps(x))


def steps(x: Tensor) -> list[int]:
    """Strides of batch, head and row; that of a dimension of one entry is never taken, and may not fit otherwise."""
    return [s if n > 1 else x.shape[3] for n, s in zip(x.shape, x.stride()[:3])]


def rows_of(q: Tensor) -> tuple[int, int, int] | None:
    """Rows from one batch entry to the next and from one head to the next, and columns from one head to the next, in
    the matrix of all rows; None where there is no such matrix."""
    batch, heads, _, d = q.shape
    b, h, row = steps(q)
    if row < d or (batch > 1 and b % row):
        return None
    b = b // row if batch > 1 else 0
    if heads == 1 or h % row == 0:
        return b, h // row if heads > 1 else 0, 0
    return (b, 0, h) if h * (heads - 1) + d <= row else None


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def named(**tensors: Tensor) -> dict[str, int]:
    """{"k": k} -> k_b, k_h, k_l: what `steps` has, by the names that kernels know."""
    return {f"{name}_{axis}": s for name, x in tensors.items() for axis, s in zip("bhl", steps(x))}
