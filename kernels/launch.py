"""From tensors to kernels: `forward` and `backward` of attention, on whatever GPU Triton serves.

Shapes: q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv]; query head h reads key head h // (Hq // Hk). Offsets are
o = j - i + shift; a pair is visible where -left <= o <= right (-1: open) and key_mask[b, j]. The bias is a table
[Hq, Lq + Lk - 1] of o from the smallest up (with `support` [2, Hq], outside of which it is constant), or slopes [Hq],
or `scaled`: line [Lq + Lk - 1], rows [Lq], knots [F] and pieces [Hq, F + 1, 2] of a function of distance (scaled.py),
or `relative` [B, Hq, Lq, W] (relative.py). sinks [Hq] are fp32; dropout has p and seed [4] (dropout.py).

sequences has cu_q, cu_k [S + 1] int32, max_q and max_k (sequences.py): shift is 0 then, table and line have
max_q + max_k - 1 entries and begin at the offset 1 - max_k, rows has max_q + max_k and begins at the position -max_q.
Inputs are taken as checked (posattn/checks.py).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .backward_cols import attend_backward_cols
from .backward_diagonals import attend_backward_diagonals
from .backward_rows import attend_backward_rows
from .diagonals import fold, room
from .dropout import constants
from .forward import attend_forward
from .linear import Distance, Linear
from .relative import Relative, RelativeGradient
from .rule import Plain
from .scaled import LEAST_ROWS, ScaledGradient, add_up, room_for_sums
from .scaled import prepare as prepare_scaled
from .sequences import clear_behind, fold_rows
from .toeplitz import ToeplitzGradient, prepare

OPEN = 2**30


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
        self.scale, self.softcap = scale, softcap
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
            # One tensor for both: queries and keys of a sequence are then equally many.
            self.aligned = sequences.cu_q is sequences.cu_k or (
                sequences.cu_q.data_ptr() == sequences.cu_k.data_ptr() != 0
            )
        self.seed, (self.threshold, self.kept) = None, (0, 1.0)
        if dropout is not None and dropout.p > 0:
            self.seed, (self.threshold, self.kept) = dropout.seed, constants(dropout.p)
        if scaled is not None:
            first = 0 if sequences is None else sequences.max_q
            self.rule = prepare_scaled(*scaled, self.behind, first, shift, sequences is not None)
        elif table is not None:
            self.rule = prepare(table, support, self.behind, shift, sequences is not None)
        elif relative is not None:
            relative = rows_contiguous(relative)
            self.rule = Relative(relative, *relative.stride()[:3], relative.shape[3], shift)
        elif slopes is not None:
            past_only = right == 0 or not symmetric
            self.rule = (Linear if past_only else Distance)(slopes.contiguous() * math.log2(math.e), shift)
        else:
            self.rule = Plain() if self.scale2 > 0 and not softcap else Plain(unscaled=None)

    def launch(self, direction: str, kernel, programs, *tensors: Any, reset=None, **arguments: Any) -> None:
        """Run `kernel` with the config of its direction; `programs(config)` is its number of programs."""

        def run(config: configs.Config) -> None:
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

        configs.run(direction, self.q, self.width, type(arguments["rule"]).__name__, self.keys, run, reset)

    @property
    def count(self) -> int:
        return 0 if self.sequences is None else len(self.sequences.cu_q) - 1

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


def padded(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels read rows of unit stride; everything else about the strides is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """{"q": q} -> q_b, q_h, q_l: batch, head and row strides by the names kernels know."""
    return {f"{name}_{axis}": x.stride(n) for name, x in tensors.items() for n, axis in enumerate("bhl")}


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, table: Tensor | None, support: Tensor | None, slopes: Tensor | None,
    key_mask: Tensor | None, scale: float, softcap: float, shift: int, left: int, right: int, symmetric: bool,
    scaled: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, relative: Tensor | None = None,
    sinks: Tensor | None = None, sequences: Any = None, dropout: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out [B, Hq, Lq, Dv] in q's dtype and, where the shapes agree, q's strides; lse [B, Hq, Lq] fp32, natural."""
    p = Problem(
        q, k, v, table, support, slopes, scaled, relative, key_mask, scale, softcap, shift, left, right, symmetric,
        sequences, dropout,
    )  # fmt: skip
    out = torch.empty_like(q) if p.value_dim == p.head_dim else q.new_empty(*q.shape[:3], p.value_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sinks = None if sinks is None else sinks.contiguous()
    if lse.numel():
        p.launch(
            "forward", attend_forward, p.row_programs, Q=p.q, K=p.k, V=p.v, OUT=out, LSE=lse,
            SINKS=sinks,
            rule=p.rule, scale=p.scale2, **strides(q=p.q, k=p.k, v=p.v, o=out),
        )  # fmt: skip
        p.clear(out)
        p.clear(lse, values=lse.new_full((p.heads,), -math.inf) if sinks is None else sinks)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    table: Tensor | None, support: Tensor | None, slopes: Tensor | None, key_mask: Tensor | None, scale: float,
    softcap: float, shift: int, left: int, right: int, symmetric: bool, tails_need_grad: bool,
    need_q: bool, need_kv: bool, need_table: bool, deterministic: bool,
    scaled: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, relative: Tensor | None = None,
    sinks: Tensor | None = None, sequences: Any = None, dropout: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dq, dk, dv, dtable; with scaled, dline, drows, dpieces; with relative, drelative. What is not needed is empty.

    A constant tail's gradient stands on its outermost entry. lse includes the sinks, whose gradients are not made here.
    """
    p = Problem(
        q, k, v, table, support, slopes, scaled, relative, key_mask, scale, softcap, shift, left, right, symmetric,
        sequences, dropout,
    )  # fmt: skip
    # Outputs of an operator may not share memory: each that is not needed is an empty tensor of its own.
    dq = torch.empty_like(q) if need_q else q.new_empty(0)
    dk, dv = (torch.empty_like(x) if need_kv else x.new_empty(0) for x in (k, v))
    # Of a table, or of the line that all heads share: by head first.
    need_drelative, need_table = need_table and relative is not None, need_table and relative is None
    dtable = lse.new_zeros(p.heads, max(p.behind + p.ahead - 1, 0)) if need_table else q.new_empty(0)
    drelative = torch.zeros_like(relative) if need_drelative else q.new_empty(0)
    if lse.numel() == 0 or p.keys == 0:
        made = [dq, dk, dv, dtable]
        if scaled is not None:
            line, rows, _, pieces = (torch.empty_like(x) if need_table else q.new_empty(0) for x in scaled)
            made = [dq, dk, dv, q.new_empty(0), line, rows, pieces]
        if relative is not None:
            made.append(drelative)
        return tuple(x.zero_() for x in made)

    do, out = rows_contiguous(grad_out), rows_contiguous(out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    words = None if p.seed is None else torch.empty(*lse.shape, 2, dtype=torch.int32, device=q.device)
    blocks, zero = room(p.behind, p.ahead, sequences is not None)
    sums = tails = dfactor = dpieces = None
    # In fixed order tiles of any offset fall on multiples of their size; otherwise only where sequences do.
    shifted = sequences is not None and not p.aligned and not deterministic
    # Each program has a place of its own, whatever its tile is: so the sum over programs has one order.
    groups, places = p.groups(p.heads), p.tiles(p.queries, 16)
    if need_table:
        copies = 8 if shifted else 2 if deterministic else 1
        sums = torch.zeros(copies, p.heads, blocks, 64, dtype=torch.float32, device=q.device)
        if scaled is not None:
            places = p.tiles(p.queries, LEAST_ROWS.value)
            dfactor, dpieces = room_for_sums(p.rule, lse, groups, places)
        elif support is not None and tails_need_grad:
            tails = torch.zeros(groups, places, 2, dtype=torch.float32, device=q.device)
    rule, direction = p.rule, "rows"
    target = None if deterministic else sums
    where = target, blocks * 64, zero, sums.stride(0) if need_table and shifted else None
    if dfactor is not None:
        rule, direction = ScaledGradient(*rule[:7], *where, dfactor, dpieces, places), "sums"
    elif tails is not None or target is not None:
        rule = ToeplitzGradient(*rule[:6], *where, tails, places)
    elif need_drelative:
        # Its rows are contiguous, as those of `relative` need not be.
        target = drelative if rows_contiguous(drelative) is drelative else torch.zeros(relative.shape).to(drelative)
        rule = RelativeGradient(*rule[:6], target, *target.stride()[:3])
    loop = need_q or rule is not p.rule

    def reset() -> None:
        for made in (sums, tails, dfactor, dpieces):
            if made is not None:
                made.zero_()

    passes = [(direction, rule, need_q, loop)]
    if direction == "sums" and need_q and p.width * q.element_size() > 256:
        # The function's sums and dQ do not fit in registers together.
        passes = [("rows", p.rule, True, True), (direction, rule, False, True)]
    for direction, rule, with_q, loop in passes:
        p.launch(
            direction, attend_backward_rows, p.row_programs, Q=p.q, K=p.k, V=p.v, OUT=out, DO=do, LSE=lse,
            DLSE=grad_lse, LSE2=lse2, DELTA=delta, DQ=dq if with_q else None, WORDS=words, rule=rule, scale=scale,
            scale2=p.scale2, LOOP=loop, **strides(q=p.q, k=p.k, v=p.v, o=out, do=do, dq=dq if with_q else p.q),
            reset=reset,
        )  # fmt: skip
    if need_kv:
        p.launch(
            "cols", attend_backward_cols, p.key_programs, Q=p.q, K=p.k, V=p.v, DO=do, LSE2=lse2, DELTA=delta, DK=dk,
            DV_OUT=dv, WORDS=words, rule=p.rule, scale=scale, scale2=p.scale2,
            **strides(q=p.q, k=p.k, v=p.v, do=do, dk=dk, dv=dv),
        )  # fmt: skip
    if need_table:
        if deterministic:
            p.launch(
                "diagonals", attend_backward_diagonals, p.tile_diagonals, Q=p.q, K=p.k, V=p.v, DO=do, LSE2=lse2,
                DELTA=delta, BLOCKS=sums, WORDS=words, rule=p.rule, scale2=p.scale2, B=p.batch, max_q=p.ahead,
                max_k=p.behind, g_copy=sums.stride(0), g_h=sums.stride(1), g_zero=zero,
                **strides(q=p.q, k=p.k, v=p.v, do=do),
            )  # fmt: skip
        fold(sums, dtable, zero, p.behind, shifted)
        if tails is not None:
            ends = tails.view(-1, p.heads, places, 2).sum((0, 2))
            dtable[:, 0] += ends[:, 0]
            dtable[:, -1] += ends[:, 1]
    p.clear(dq)
    p.clear(dk, keys=True)
    p.clear(dv, keys=True)
    if relative is not None:
        if need_drelative and rule.grad is not drelative:
            drelative.copy_(rule.grad)
        return dq, dk, dv, dtable, drelative
    if scaled is None:
        return dq, dk, dv, dtable
    if not need_table:
        return dq, dk, dv, dtable, *(q.new_empty(0) for _ in range(3))
    drows = p.by_position(dfactor.sum(1), len(scaled[1]))
    return dq, dk, dv, q.new_empty(0), dtable.sum(0), drows, add_up(dpieces, p.heads, len(scaled[2]))
