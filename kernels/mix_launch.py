"""DAPE from tensors to kernels: the matrix of scores in cells, one after the other, in a scratch of fixed size.

A cell is some rows times some keys of all heads, and of as many batch entries as fit. Forward, each cell: its scores are
stored (mix_products.py), mixed in place (mix.py), and weigh V; the sums of a row wait in fp32 for its next cell. Backward
recomputes the scores the same way. 16-bit tensors have their scores stored in fp16, which keeps 11 bits of them, and
their gradients in their own dtype. The scratch is at most SCRATCH bytes whatever the lengths; only dK and dV in fp32,
where several rows of cells add to them, grow with the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import configs
from .backward_rows import attend_backward_rows
from .launch import OPEN, Problem, padded, rows_contiguous, strides
from .mix import mix_forward
from .mix_backward import add_strips, mix_backward
from .mix_products import attend_stored, store_scores, stored_columns, stored_rows

SCRATCH = 48 << 20
# Rows of a cell whose programs are 8 rows of pairs apart.
STEP = 8


class Cell(NamedTuple):
    b0: int
    batch: int
    m0: int
    m1: int
    n0: int
    keys: int  # a multiple of 16; may reach over the end
    first: bool  # of its rows
    last: bool


class Grid:
    """How the matrix is cut: room for `batch` entries of C rows and W keys in `buffers` scratches."""

    def __init__(self, p: Problem, buffers: int, item: int):
        self.p = p
        pairs = SCRATCH // (buffers * item * p.heads)
        queries, keys = round_up(p.queries, 16), round_up(p.keys, 16)
        side = max(128, math.isqrt(pairs // 2) // 128 * 128)
        self.rows = min(queries, max(side, pairs // keys // 128 * 128))
        self.width = min(keys, max(128, pairs // self.rows // 128 * 128))
        self.batch = max(1, min(p.batch, pairs // (self.rows * self.width)))

    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.p.heads, self.rows, self.width

    def cells(self) -> Iterator[Cell]:
        """Every cell that holds a visible pair; rows that see none have one cell, so that someone writes them."""
        p = self.p
        for b0 in range(0, p.batch, self.batch):
            batch = min(self.batch, p.batch - b0)
            for m0 in range(0, p.queries, self.rows):
                m1 = min(m0 + self.rows, p.queries)
                start = min(max(0, m0 + p.low), p.keys - 1) // 16 * 16
                stop = max(start + 1, min(p.keys, m1 + p.high))
                for n0 in range(start, stop, self.width):
                    keys = min(self.width, round_up(stop - n0, 16))
                    yield Cell(b0, batch, m0, m1, n0, keys, n0 == start, n0 + self.width >= stop)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


class Mixing:
    """What forward and backward of one call share: the problem, the weights as kernels take them, the launches."""

    def __init__(self, direction, q, k, v, w1, b1, w2, b2, table, line, rows, first, last, last_bias, key_mask, scale, shift, left, right,
                 negative_slope):  # fmt: skip
        self.p = Problem(q, k, v, None, None, None, None, key_mask, scale, 0.0, shift, left, right, True)
        self.base = 1 if table is not None else 2 if line is not None else 0
        fire = 0 if first is None else first.shape[1]
        heads, units = w2.shape[0], w2.shape[1]
        self.config = configs.pick_mixing(q, direction, padded(heads), padded(units), padded(fire) if self.base == 2 else 0)
        self.weights = dict(
            W1=w1, B1=b1, W2=w2, B2=b2, TABLE=table, LINE=line, ROWS=rows, FIRST=first, LAST=last, LAST_BIAS=last_bias,
            fire_slope=negative_slope, t_h=0 if table is None else table.stride(0),
            H=heads, HIDDEN=units, FIRE=fire, BASE=self.base, HEADS=padded(heads), UNITS=padded(units),
            FIRE_UNITS=padded(fire), BLOCK_N=self.config.block_n,
            PRECISION=configs.dot_precision(q, self.config),
        )  # fmt: skip
        # fp16, not bf16: a score of 10 is kept to 0.005.
        self.stored = torch.float32 if q.dtype == torch.float32 else torch.float16

    def place(self, cell: Cell, grid: Grid) -> dict[str, int]:
        p = self.p
        return dict(Lk=p.keys, low=p.low, high=p.high, m0=cell.m0, m1=cell.m1, n0=cell.n0, KEYS=cell.keys, C=grid.rows,
                    W=grid.width, b0=cell.b0)  # fmt: skip

    def dims(self, direction: str, *names: str) -> tuple[dict[str, Any], Any]:
        """Head dims, tile and precision of a kernel of mix_products.py; and its config."""
        p = self.p
        config = configs.pick(configs.arch(p.q.device), direction, p.q.element_size() * 8,
                              max(padded(p.head_dim), padded(p.value_dim)))  # fmt: skip
        sizes = dict(D=p.head_dim, DV=p.value_dim, HEAD_DIM=padded(p.head_dim), VALUE_DIM=padded(p.value_dim))
        made = {name: sizes[name] for name in names}
        made.update(BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=configs.dot_precision(p.q, config),
                    num_warps=config.num_warps, num_stages=config.num_stages)  # fmt: skip
        return made, config

    def run(self, cell: Cell) -> tuple[int, int]:
        """(steps of a program, programs along the rows of a cell): enough of them for every multiprocessor."""
        steps = triton.cdiv(cell.m1 - cell.m0, STEP)
        run = max(1, min(steps, self.config.run))
        return run, triton.cdiv(steps, run) * STEP

    def scores(self, cell: Cell, grid: Grid, S: Tensor, X: Tensor | None, do: Tensor, delta: Tensor | None) -> None:
        p = self.p
        dims, config = self.dims("scores", "D", "DV", "HEAD_DIM", "VALUE_DIM")
        run = config.block_n * 4
        programs = triton.cdiv(cell.m1 - cell.m0, config.block_m) * triton.cdiv(cell.keys, run)
        store_scores[programs, cell.batch * p.heads](
            p.q, p.k, do, p.v, delta, S, X, p.scale, Lq=p.queries, **self.place(cell, grid), H=p.heads, GROUP=p.group, RUN=run,
            **strides(q=p.q, k=p.k, v=p.v, do=do), **dims,
        )  # fmt: skip

    def programs(self, cell: Cell) -> tuple[int, int, int]:
        """(programs along the keys of a cell, along its rows, steps of one)."""
        run, along_rows = self.run(cell)
        return triton.cdiv(cell.keys + STEP * (run - 1), self.config.block_n), along_rows, run


def forward(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, table: Tensor | None,
    line: Tensor | None, rows: Tensor | None, first: Tensor | None, last: Tensor | None, last_bias: Tensor | None,
    key_mask: Tensor | None, scale: float, shift: int, left: int, right: int, negative_slope: float, published: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out [B, Hq, Lq, Dv] in q's dtype and, where the shapes agree, q's strides; lse [B, Hq, Lq] fp32, natural."""
    mixing = Mixing("mix", q, k, v, w1, b1, w2, b2, table, line, rows, first, last, last_bias, key_mask, scale, shift,
                    left, right, negative_slope)  # fmt: skip
    p = mixing.p
    out = torch.empty_like(q) if p.value_dim == p.head_dim else q.new_empty(*q.shape[:3], p.value_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid = Grid(p, 1, mixing.stored.itemsize)
    # Zeros, for what no program writes must be finite.
    S = torch.zeros(grid.shape(), dtype=mixing.stored, device=q.device)
    acc = torch.empty(*grid.shape()[:3], p.value_dim, dtype=torch.float32, device=q.device)
    state = torch.empty(2, *grid.shape()[:3], dtype=torch.float32, device=q.device)
    dims, config = mixing.dims("attend", "DV", "VALUE_DIM")
    for cell in grid.cells():
        mixing.scores(cell, grid, S, None, p.q, None)
        blocks, along_rows, run = mixing.programs(cell)
        place = mixing.place(cell, grid)
        b0 = place.pop("b0")
        mix_forward[blocks * along_rows, cell.batch](
            S, Lq=p.queries, **place, RUN=run, **mixing.weights, num_warps=mixing.config.num_warps,
            num_stages=mixing.config.num_stages,
        )  # fmt: skip
        attend_stored[triton.cdiv(cell.m1 - cell.m0, config.block_m), cell.batch * p.heads](
            S, p.v, out, lse, acc, state, p.mask, int(cell.first), int(cell.last), Lq=p.queries, **place, b0=b0, H=p.heads,
            GROUP=p.group, **strides(v=p.v, o=out), p_b=p.mask_stride, **dims,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, w1: Tensor,
    b1: Tensor, w2: Tensor, b2: Tensor, *, table: Tensor | None, line: Tensor | None, rows: Tensor | None,
    first: Tensor | None, last: Tensor | None, last_bias: Tensor | None, key_mask: Tensor | None, scale: float, shift: int,
    left: int, right: int, negative_slope: float, published: bool, need_q: bool, need_kv: bool, need_weights: bool,
    need_base: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dq, dk, dv, dw1, db1, dw2, db2, dtable, dline, drows, dfirst, dlast, dlast_bias; what is not there is empty."""
    mixing = Mixing("mix backward", q, k, v, w1, b1, w2, b2, table, line, rows, first, last, last_bias, key_mask, scale,
                    shift, left, right, negative_slope)  # fmt: skip
    p, base = mixing.p, mixing.base
    device = q.device
    do, out = rows_contiguous(grad_out), rows_contiguous(out)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    p.launch(
        "rows", attend_backward_rows, p.row_programs, Q=p.q, K=p.k, V=p.v, OUT=out, DO=do, LSE=lse,
        DLSE=None if grad_lse is None else grad_lse.contiguous(), LSE2=lse2, DELTA=delta, DQ=None, rule=p.rule, scale=scale,
        scale2=p.scale2, LOOP=False, **strides(q=p.q, k=p.k, v=p.v, o=out, do=do, dq=p.q),
    )  # fmt: skip

    grid = Grid(p, 2, mixing.stored.itemsize)
    S, X = (torch.zeros(grid.shape(), dtype=dtype, device=device) for dtype in (mixing.stored, q.dtype))
    DS = S.view(q.dtype)
    cells = list(grid.cells())
    dq = torch.empty_like(q) if need_q else q.new_empty(0)
    dk, dv = (torch.empty_like(t) if need_kv else t.new_empty(0) for t in (k, v))
    one_row = grid.rows >= p.queries
    # One row of cells that sees every key writes each gradient once; else they are added up in fp32.
    sum_k, sum_v = dk, dv
    if need_kv and not (one_row and sum(c.keys for c in cells if c.b0 == 0) >= p.keys):
        sum_k, sum_v = (torch.zeros(t.shape, dtype=torch.float32, device=device) for t in (k, v))
        one_row = False
    part_dq = None
    if need_q and not all(cell.first and cell.last for cell in cells):
        part_dq = torch.empty(*grid.shape()[:3], p.head_dim, dtype=torch.float32, device=device)

    heads, units, fire = (mixing.weights[name] for name in ("HEADS", "UNITS", "FIRE_UNITS"))
    sizes = [heads * units, heads * units, units, heads]
    if base:
        sizes.append(heads * units)
    if base == 2:
        sizes += [heads * fire, 16 * fire, heads]
    shapes = {cell: mixing.programs(cell) for cell in cells}
    slots = max(blocks * along_rows for blocks, along_rows, _ in shapes.values())
    part = torch.zeros(grid.batch * slots, sum(sizes), dtype=torch.float32, device=device)
    strip_heads = p.heads if base == 1 else 1
    strips = drow = None
    dtable, dline, drows = (q.new_empty(0, dtype=torch.float32) for _ in range(3))
    target = None
    if base:
        size = max(blocks * along_rows for blocks, along_rows, _ in shapes.values()) * mixing.config.block_n
        strips = torch.empty(grid.batch * strip_heads * size, dtype=torch.float32, device=device)
        target = torch.zeros(strip_heads, p.queries + p.keys - 1, dtype=torch.float32, device=device)
    if base == 2:
        drow = torch.empty(grid.batch * max(shape[0] for shape in shapes.values()), grid.rows, dtype=torch.float32, device=device)
        drows = torch.zeros(p.queries, dtype=torch.float32, device=device)
    row_dims, row_config = mixing.dims("stored rows", "D", "HEAD_DIM")
    col_dims, col_config = mixing.dims("stored columns", "D", "DV", "HEAD_DIM", "VALUE_DIM")
    for cell in cells:
        mixing.scores(cell, grid, S, X, do, delta)
        blocks, along_rows, run = shapes[cell]
        place = mixing.place(cell, grid)
        if drow is not None:
            drow.zero_()
        mix_backward[blocks * along_rows, cell.batch](
            S, DS, X, lse2, p.mask, PART=part, STRIPS=strips, DROWS=drow, Lq=p.queries, **place, RUN=run, slots=slots,
            margin=row_config.block_m + row_config.block_n + col_config.block_m + col_config.block_n, p_b=p.mask_stride,
            r_x=grid.rows, **mixing.weights, PARTS=sum(sizes), num_warps=mixing.config.num_warps,
            num_stages=mixing.config.num_stages,
        )  # fmt: skip
        if target is not None:
            span = cell.keys + STEP * run * (along_rows // STEP) + STEP + mixing.config.block_n
            add_strips[triton.cdiv(span, 128), strip_heads](
                strips, target, p.queries, target.shape[1], cell.m0, cell.n0, cell.keys, run, cell.batch * along_rows,
                along_rows, target.stride(0), BLOCK_N=mixing.config.block_n, BLOCK=128,
            )  # fmt: skip
        if drow is not None:
            drows[cell.m0 : cell.m1] += drow[: cell.batch * blocks, : cell.m1 - cell.m0].sum(0)
        if need_q:
            into = dq if part_dq is None else part_dq
            # part_dq holds the entries b0 .. of the batch and the rows m0 .. of this row of cells.
            skip = dict(dq_b=into.stride(0), dq_h=into.stride(1), dq_l=into.stride(2))
            stored_rows[triton.cdiv(cell.m1 - cell.m0, row_config.block_m), cell.batch * p.heads](
                DS, p.k, into if part_dq is not None else into[cell.b0 :], int(cell.first), scale, **place, H=p.heads, GROUP=p.group,
                **strides(k=p.k), **skip, dq_row=0 if part_dq is None else cell.m0, **row_dims,
            )  # fmt: skip
            if part_dq is not None and cell.last:
                dq[cell.b0 : cell.b0 + cell.batch, :, cell.m0 : cell.m1] = part_dq[: cell.batch, :, : cell.m1 - cell.m0]
        if need_kv:
            stored_columns[triton.cdiv(cell.keys, col_config.block_n), cell.batch * p.k.shape[1]](
                DS, X, p.q, do, sum_k, sum_v, int(not one_row), scale, **place, H=p.heads, GROUP=p.group,
                **strides(q=p.q, do=do, dk=sum_k, dv=sum_v), **col_dims,
            )  # fmt: skip
    if need_kv and sum_k is not dk:
        dk.copy_(sum_k)
        dv.copy_(sum_v)

    H, HIDDEN, FIRE = (mixing.weights[name] for name in ("H", "HIDDEN", "FIRE"))
    parts = part.sum(0).split(sizes)
    dw1 = parts[0].view(heads, units)[:H, :HIDDEN].T
    dw2 = parts[1].view(heads, units)[:H, :HIDDEN]
    if base:
        dw1 = torch.cat([dw1, parts[4].view(heads, units)[:H, :HIDDEN].T], 1)
    gradients = [dw1[..., None].contiguous(), parts[2][:HIDDEN].clone(), dw2[..., None].contiguous(), parts[3][:H].clone()]
    empty = [q.new_empty(0, dtype=torch.float32) for _ in range(3)]
    if base == 1:
        dtable = target
    if base == 2:
        dline = target[0]
        dfirst = parts[6].view(16, fire)[:2, :FIRE].contiguous()
        empty = [dfirst, parts[5].view(heads, fire)[:H, :FIRE].contiguous(), parts[7][:H].clone()]
    return (dq, dk, dv, *gradients, dtable, dline, drows, *empty)
