"""What the kernels of one call share: its shapes, its rule, its visible range, and how a kernel is launched on it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .dropout import constants
from .linear import Distance, Linear
from .relative import Relative
from .rule import Plain
from .scaled import Scaled
from .scaled import prepare as prepare_scaled
from .sequences import clear_behind, fold_rows
from .toeplitz import OPEN, lift_table, prepare

LEAST_SCALE = 1e-6  # by which a bias may be divided


class Problem:
    """What forward and backward of one call share: the rule, the visible range in terms of j - i, launch arguments."""

    def __init__(
        self, q, k, v, table, support, slopes, scaled, relative, key_mask, scale, softcap, shift, left, right,
        symmetric, sequences, dropout,
    ):  # fmt: skip
        self.q, self.k, self.v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.keys, self.value_dim = v.shape[2], v.shape[3]
        self.group = self.heads // k.shape[1] if k.shape[1] else 1
        self.low = max(-left - shift, -OPEN) if left >= 0 else -OPEN
        self.high = min(right - shift, OPEN) if right >= 0 else OPEN
        self.scale, self.softcap, self.shift = scale, softcap, shift
        self.width = max(64, padded(self.head_dim), padded(self.value_dim))
        if softcap:
            # A softcap keeps one more tile in registers: it runs with the row of the next head dim.
            self.width = min(2 * self.width, configs.widest(q.element_size() * 8))
        # In base 2; behind a softcap c the raw score becomes c * tanh(score * scale / c).
        self.scale2 = (scale / softcap if softcap else scale) * math.log2(math.e)
        self.cap2 = softcap * math.log2(math.e)
        self.mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.mask_stride = 0 if key_mask is None else self.mask.stride(0)
        self.sequences = sequences
        # How far offsets reach to either side.
        self.behind, self.ahead = self.queries, self.keys
        if sequences is not None:
            self.behind, self.ahead = sequences.max_k, sequences.max_q
        self.seed, (self.threshold, self.kept) = None, (0, 1.0)
        if dropout is not None and dropout.p > 0:
            self.seed, (self.threshold, self.kept) = dropout.seed, constants(dropout.p)
        if scaled is not None:
            first = 0 if sequences is None else sequences.max_q
            self.rule = prepare_scaled(*scaled, self.behind, first, shift, sequences is not None)
        elif table is not None:
            self.rule = prepare(table, support, self.behind, shift, sequences is not None, self.low, self.high)
            if support is not None and not softcap and self.scale2 > LEAST_SCALE:
                self.rule = self.rule._replace(lift=lift_table)
        elif relative is not None:
            relative = rows_contiguous(relative)
            self.rule = Relative(relative, *relative.stride()[:3], relative.shape[3], shift)
        elif slopes is not None:
            past_only = right == 0 or not symmetric
            self.rule = (Linear if past_only else Distance)(slopes.contiguous() * math.log2(math.e), shift)
        else:
            self.rule = Plain() if self.scale2 > 0 and not softcap else Plain(unscaled=None)

    def launch(self, direction: str, kernel, programs, *tensors: Any, reset=None, other=None, **arguments: Any) -> None:
        """Run `kernel` with the config of its direction; `programs(config)` is its number of programs.

        `other`, if given, runs the configs of other schedules (schedules.py).
        """
        rule = type(arguments["rule"]).__name__

        def run(config: configs.Config) -> None:
            if config.schedule != "plain":
                return other.run(config, lambda: run(configs.shipped(direction, self.q, self.width, rule)))
            configs.ran[direction] = config
            blocks = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n)
            if direction == "diagonals":
                blocks = dict(BLOCK=config.block_m, SUM_PRECISION=configs.sum_precision(self.q.device))
            with on(self.q):
                kernel[(programs(config),)](
                    *tensors,
                    **arguments,
                    **blocks,
                    Lq=self.queries,
                    Lk=self.keys,
                    low=self.low,
                    high=self.high,
                    H=self.heads,
                    GROUP=self.group,
                    PAD=self.mask,
                    p_b=self.mask_stride,
                    CU_Q=None if self.sequences is None else self.sequences.cu_q,
                    CU_K=None if self.sequences is None else self.sequences.cu_k,
                    count=self.count,
                    SEED=self.seed,
                    threshold=self.threshold,
                    kept=self.kept,
                    softcap=self.cap2,
                    SOFTCAP=self.softcap > 0,
                    D=self.head_dim,
                    DV=self.value_dim,
                    HEAD_DIM=padded(self.head_dim),
                    VALUE_DIM=padded(self.value_dim),
                    PRECISION=configs.dot_precision(self.q, config),
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )

        configs.run(direction, self.q, self.width, rule, self.keys, run, reset, other and other.serves)

    @property
    def count(self) -> int:
        return 0 if self.sequences is None else len(self.sequences.cu_q) - 1

    def in_one_pass(self) -> bool:
        """dQ can be added up beside dK and dV, and POSATTN_BACKWARD=once asks for it."""
        apart = self.softcap or self.sequences is not None or isinstance(self.rule, (Scaled, Relative))
        return not apart and configs.one_pass(self.q, self.width)

    def row_programs(self, config: configs.Config) -> int:
        return self.tiles(self.queries, config.block_m) * self.groups(self.heads)

    def key_programs(self, config: configs.Config) -> int:
        return self.tiles(self.keys, config.block_n) * self.groups(self.heads // self.group)

    def groups(self, heads: int) -> int:
        """Packed, the batch is part of the rows."""
        return heads if self.sequences is not None else self.batch * heads

    def tiles(self, length: int, block: int) -> int:
        """Programs that share a group's rows."""
        if self.sequences is None:
            return triton.cdiv(length, block)
        return self.batch * length // block + self.count

    def by_position(self, by_row: Tensor, positions: int) -> Tensor:
        """[B, Lq] of rows, in base 2 -> [positions], the sum over the rows that stand there."""
        if self.sequences is None:
            return by_row.sum(0) * math.log(2.0)
        made = by_row.new_empty(positions)
        fold_rows[(triton.cdiv(positions, 128),)](
            by_row, made, self.sequences.cu_q, self.sequences.cu_k, self.count, -self.ahead, positions, BLOCK=128
        )
        return made * math.log(2.0)

    def clear(self, made: Tensor, keys: bool = False, values: Tensor | None = None) -> None:
        """0, or a value a head, in the rows (or keys) of [1, H, L, ...] behind the last sequence."""
        if self.sequences is None or self.batch != 1 or made.numel() == 0:
            return  # several batch entries end with a sequence
        rows = made if made.dim() == 4 else made[..., None]
        cu = self.sequences.cu_k if keys else self.sequences.cu_q
        with on(self.q):
            clear_behind[(triton.cdiv(rows.shape[2], 32), rows.shape[1])](
                rows, cu, values, self.count, rows.shape[2], rows.stride(1), rows.stride(2), D=rows.shape[3],
                WIDTH=triton.next_power_of_2(rows.shape[3]), BLOCK=32,
            )  # fmt: skip

    def tile_diagonals(self, config: configs.Config) -> int:
        behind, ahead = (triton.cdiv(n, config.block_m) for n in (self.behind, self.ahead))
        return (behind + ahead - (self.sequences is None)) * self.heads


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the GPU that x lives on; the interpreter's tensors have none."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def on_its_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """All launches of a function on the GPU of its first argument."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any, **more: Any) -> Any:
        with on(first):
            return function(first, *rest, **more)

    return run


def padded(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels read rows of unit stride; everything else about the strides is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """{"q": q} -> q_b, q_h, q_l: batch, head and row strides by the names kernels know."""
    return {f"{name}_{axis}": x.stride(n) for name, x in tensors.items() for n, axis in enumerate("bhl")}
