"""DAPE from tensors to kernels: `forward` and `backward`, cell after cell (mix_cells.py).

Forward, each cell: its scores are stored (mix_products.py), turned into logits in place (mix.py, mix_conv.py), and
weigh V; the sums of a row wait in fp32 for its next cell. Backward makes the scores again. 16-bit tensors have their
scores stored in fp16, not bf16: a score of 10 is kept to 0.005; gradients are stored in the tensors' own dtype. dK and
dV are added up in fp32 where several rows of cells add to them. Arguments are those of posattn/mix_ops.py, taken as
checked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import mix
from .configs import dot_precision
from .mix import mix_forward
from .mix_backward import add_strips, mix_backward
from .mix_cells import Cell, Grid
from .mix_configs import channels, pick_mixing, pick_products
from .mix_conv import MARGIN, conv_forward, conv_hidden, conv_softmax_backward
from .mix_conv_backward import conv_hidden_backward, conv_scores_backward
from .mix_products import attend_stored, row_sums, store_scores, stored_columns, stored_rows
from .problem import Problem, on, padded, rows_contiguous, strides

STEP = mix.STEP.value


class Mixing:
    """One call: the problem, the cut, the weights as kernels take them; and a method for each launch."""

    def __init__(
        self, backward, q, k, v, w1, b1, w2, b2, base, key_mask, scale, shift, left, right, negative_slope, published
    ):  # fmt: skip
        self.p = p = Problem(
            q, k, v, None, None, None, None, None, key_mask, scale, 0.0, shift, left, right, True, None, None
        )  # fmt: skip
        table, line, rows, first, last, last_bias = base
        self.base = 1 if table is not None else 2 if line is not None else 0
        self.heads, self.units, self.taps = w2.shape
        self.fire = 0 if first is None else first.shape[1]
        self.sizes = tuple(map(padded, (self.heads, self.units, self.fire)))
        self.convolved = self.taps > 1
        self.backward = backward
        direction = ("conv" if self.convolved else "mix") + (" backward" if backward else "")
        self.config = pick_mixing(q, direction, channels(self.sizes[: 3 if self.base == 2 else 2]))
        self.weights: dict[str, Any] = dict(
            W1=w1, B1=b1, W2=w2, B2=b2, TABLE=table, LINE=line, ROWS=rows, FIRST=first, LAST=last, LAST_BIAS=last_bias,
            fire_slope=negative_slope, t_h=0 if table is None else table.stride(0),
            H=self.heads, HIDDEN=self.units, FIRE=self.fire, BASE=self.base, HEADS=self.sizes[0], UNITS=self.sizes[1],
            FIRE_UNITS=self.sizes[2], BLOCK_N=self.config.block_n, PRECISION=dot_precision(q, self.config),
            num_warps=self.config.num_warps, num_stages=self.config.num_stages,
        )  # fmt: skip
        self.stored = torch.float32 if q.dtype == torch.float32 else torch.float16
        if self.convolved:
            self.weights.update(K=self.taps, PUBLISHED=published)
        planes = (3 if self.convolved else 2) * self.heads if self.backward else self.heads
        planes += self.units if self.convolved else 0
        beyond = self.taps // 2 if published else 0
        self.grid = Grid(p, planes * self.stored.itemsize, MARGIN if self.convolved else 0, beyond, backward)

    def scratch(self, planes: int, dtype: torch.dtype) -> Tensor:
        """Zeros, for what no program writes must be finite."""
        return torch.zeros(self.grid.shape(planes), dtype=dtype, device=self.p.q.device)

    def place(self, cell: Cell) -> dict[str, int]:
        place = dict(m0=cell.m0, m1=cell.m1, n0=cell.n0, KEYS=cell.keys, C=self.grid.rows, W=self.grid.width)
        return dict(Lk=self.p.keys, low=self.p.low, high=self.p.high, **place)

    def programs(self, cell: Cell) -> tuple[int, int, int]:
        """(programs along the keys of a cell, along its rows, rows each of them takes)."""
        steps = triton.cdiv(cell.m1 - cell.m0, STEP)
        run = min(steps, self.config.run)
        return triton.cdiv(cell.keys + STEP * (run - 1), self.config.block_n), triton.cdiv(steps, run) * STEP, run

    def mix(self, kernel: Any, cell: Cell, **arguments: Any) -> None:
        along_keys, along_rows, run = self.programs(cell)
        kernel[along_keys * along_rows, cell.batch](
            Lq=self.p.queries, RUN=run, **self.place(cell), **arguments, **self.weights
        )

    def pairwise(self, cell: Cell) -> dict[str, Any]:
        """What kernels that look at visibility also get."""
        return dict(PAD=self.p.mask, p_b=self.p.mask_stride, b0=cell.b0)

    def product(self, name: str, kernel: Any, cell: Cell, sizes: str, programs: Any, **arguments: Any) -> None:
        """A kernel of mix_products.py; `programs(config)` is how many of them a head has."""
        p = self.p
        config = pick_products(p.q, name, max(padded(p.head_dim), padded(p.value_dim)))
        dims = dict(D=p.head_dim, HEAD_DIM=padded(p.head_dim)) if "k" in sizes else {}
        if "v" in sizes:
            dims.update(DV=p.value_dim, VALUE_DIM=padded(p.value_dim))
        heads = p.k.shape[1] if kernel is stored_columns else p.heads
        kernel[programs(config), cell.batch * heads](
            **self.place(cell), b0=cell.b0, H=p.heads, GROUP=p.group, **arguments, **dims, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, PRECISION=dot_precision(p.q, config), num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip

    def scores(
        self, cell: Cell, S: Tensor, X: Tensor | None = None, do: Tensor | None = None, delta: Tensor | None = None
    ) -> None:
        p = self.p
        do = p.q if do is None else do
        run = 512  # keys, enough to hide where a program starts and ends
        self.product(
            "scores", store_scores, cell, "kv",
            lambda c: triton.cdiv(cell.m1 - cell.m0, c.block_m) * triton.cdiv(cell.keys, run),
            Q=p.q, K=p.k, DO=do, V=p.v, DELTA=delta, S=S, X=X, scale=p.scale, Lq=p.queries, RUN=run,
            **strides(q=p.q, k=p.k, v=p.v, do=do),
        )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, table: Tensor | None,
    line: Tensor | None, rows: Tensor | None, first: Tensor | None, last: Tensor | None, last_bias: Tensor | None,
    key_mask: Tensor | None, scale: float, shift: int, left: int, right: int, negative_slope: float, published: bool,
    keep_rest: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """-> out [B, Hq, Lq, Dv] in q's dtype and, where the shapes agree, q's strides; lse [B, Hq, Lq] fp32; rest."""
    base = (table, line, rows, first, last, last_bias)
    call = (key_mask, scale, shift, left, right, negative_slope, published)
    mixing = Mixing(False, q, k, v, w1, b1, w2, b2, base, *call)
    p, grid = mixing.p, mixing.grid
    out = torch.empty_like(q) if p.value_dim == p.head_dim else q.new_empty(*q.shape[:3], p.value_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rest = torch.empty_like(out) if keep_rest else None
    S = mixing.scratch(p.heads, mixing.stored)
    hidden = mixing.scratch(mixing.units, mixing.stored) if mixing.convolved else None
    sums = torch.empty(*grid.shape(p.heads)[:3], p.value_dim + 2, dtype=torch.float32, device=q.device)
    acc, state = sums.view(-1).split([S[..., 0].numel() * p.value_dim, S[..., 0].numel() * 2])
    with on(mixing.p.q):
        for cell in grid.cells():
            wide = cell.wider(grid.margin, p.keys)
            mixing.scores(wide, S)
            if hidden is None:
                mixing.mix(mix_forward, cell, S=S)
            else:
                more = dict(ACT=hidden, margin=MARGIN, **mixing.pairwise(cell))
                mixing.mix(conv_hidden, wide, S=S, **more)
                mixing.mix(conv_forward, wide, S=S, **more)
            mixing.product(
                "attend", attend_stored, cell, "v", lambda c: triton.cdiv(cell.m1 - cell.m0, c.block_m),  # noqa: B023
                S=S[..., cell.n0 - wide.n0 :], V=p.v, OUT=out, REST=rest, LSE=lse, ACC=acc, STATE=state, PAD=p.mask,
                first=int(cell.first), last=int(cell.last), Lq=p.queries, p_b=p.mask_stride, **strides(v=p.v, o=out),
            )  # fmt: skip
    return out, lse, rest


class Sums:
    """Where a backward pass adds up what its cells find: the weights' gradients by program, the bias's by offset."""

    def __init__(self, mixing: Mixing, cells: list[Cell]):
        self.mixing = mixing
        p, grid = mixing.p, mixing.grid
        heads, units, fire = mixing.sizes
        planes = 2 if mixing.base else 1
        # dW1 (by tap, scores and then bias), db1, dW2, db2, and FIRE's: last, first, last bias.
        self.parts = [mixing.taps * planes * heads * units, units, mixing.taps * heads * units, heads]
        if mixing.base == 2:
            self.parts += [heads * fire, 16 * fire, heads]
        counts = [mixing.programs(cell) for cell in cells]
        self.slots = max(along_keys * along_rows for along_keys, along_rows, _ in counts)
        new = dict(dtype=torch.float32, device=p.q.device)
        self.part = torch.zeros(grid.batch * self.slots, sum(self.parts), **new)
        self.strips = self.offsets = self.row_part = self.rows = None
        if mixing.base:
            self.strip_heads = p.heads if mixing.base == 1 else 1
            self.strips = torch.empty(grid.batch * self.slots * mixing.config.block_n * self.strip_heads, **new)
            self.offsets = torch.zeros(self.strip_heads, p.queries + p.keys - 1, **new)
        if mixing.base == 2:
            self.row_part = torch.empty(grid.batch * max(count[0] for count in counts), grid.rows, **new)
            self.rows = torch.zeros(p.queries, **new)

    def arguments(self, first: int = 0) -> dict[str, Any]:
        """PART from the given part on."""
        start = sum(self.parts[:first])
        return dict(PART=self.part.view(-1)[start:], slots=self.slots, PARTS=sum(self.parts))

    def to_bias(self) -> dict[str, Any]:
        if self.row_part is not None:
            self.row_part.zero_()
        return dict(STRIPS=self.strips, DROWS=self.row_part, r_x=self.mixing.grid.rows)

    def add(self, cell: Cell) -> None:
        """Take over what the programs of one cell found."""
        if self.strips is None:
            return
        along_keys, along_rows, run = self.mixing.programs(cell)
        block = self.mixing.config.block_n
        span = along_keys * block + along_rows * run  # from the first offset of the last program's to the other end
        add_strips[triton.cdiv(span, 128), self.strip_heads](
            self.strips, self.offsets, self.mixing.p.queries, self.offsets.shape[1], cell.m0, cell.n0, cell.keys, run,
            cell.batch * along_rows, along_rows, self.offsets.stride(0), BLOCK_N=block, BLOCK=128,
        )  # fmt: skip
        if self.row_part is not None:
            rows = cell.m1 - cell.m0
            self.rows[cell.m0 : cell.m1] += self.row_part[: cell.batch * along_keys, :rows].sum(0)

    def gradients(self, db2: Tensor) -> list[Tensor]:
        """dw1, db1, dw2, db2, dtable, dline, drows, dfirst, dlast, dlast_bias; empty where there is none."""
        mixing = self.mixing
        H, HIDDEN, FIRE, taps = mixing.heads, mixing.units, mixing.fire, mixing.taps
        heads, units, fire = mixing.sizes
        parts = self.part.sum(0).split(self.parts)
        dw1 = parts[0].view(taps, -1, heads, units)[:, :, :H, :HIDDEN].permute(3, 1, 2, 0).reshape(HIDDEN, -1, taps)
        dw2 = parts[2].view(taps, heads, units)[:, :H, :HIDDEN].permute(1, 2, 0)
        made = [dw1, parts[1][:HIDDEN], dw2, db2]
        if mixing.base == 1:
            made.append(self.offsets)
        if mixing.base == 2:
            last, first, last_bias = parts[4].view(heads, fire), parts[5].view(16, fire), parts[6]
            made += [self.part.new_empty(0), self.offsets[0], self.rows]
            made += [first[:2, :FIRE], last[:H, :FIRE], last_bias[:H]]
        made = [gradient.clone(memory_format=torch.contiguous_format) for gradient in made]
        return made + [self.part.new_empty(0) for _ in range(10 - len(made))]


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, table: Tensor | None, line: Tensor | None, rows: Tensor | None,
    first: Tensor | None, last: Tensor | None, last_bias: Tensor | None, key_mask: Tensor | None, scale: float,
    shift: int, left: int, right: int, negative_slope: float, published: bool, need_q: bool, need_kv: bool,
    need_weights: bool, need_base: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dq, dk, dv, dw1, db1, dw2, db2, dtable, dline, drows, dfirst, dlast, dlast_bias; empty where not needed."""
    base = (table, line, rows, first, last, last_bias)
    call = (key_mask, scale, shift, left, right, negative_slope, published)
    mixing = Mixing(True, q, k, v, w1, b1, w2, b2, base, *call)
    p, grid = mixing.p, mixing.grid
    do, out, rest = rows_contiguous(grad_out), rows_contiguous(out), rows_contiguous(rest)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    with on(mixing.p.q):
        row_sums[triton.cdiv(p.queries, 64), p.batch * p.heads](
            out, rest if rest.numel() else None, do, lse, grad_lse, lse2, delta, p.queries, p.heads,
            **strides(o=out, do=do), DV=p.value_dim, VALUE_DIM=padded(p.value_dim), BLOCK_M=64,
        )  # fmt: skip
    cells = list(grid.cells())
    dq = torch.empty_like(q) if need_q else q.new_empty(0)
    dk, dv = (torch.empty_like(t) if need_kv else t.new_empty(0) for t in (k, v))
    # One row of cells that sees every key writes each gradient once; else they are added up in fp32.
    once = grid.rows >= p.queries and sum(cell.keys for cell in cells if cell.b0 == 0) >= p.keys
    sum_k, sum_v, sum_q = dk, dv, dq
    if need_kv and not once:
        sum_k, sum_v = (
            t.zero_() if t.dtype == torch.float32 else torch.zeros_like(t, dtype=torch.float32) for t in (dk, dv)
        )
    waits = not all(cell.first and cell.last for cell in cells)
    if need_q and waits:
        sum_q = torch.empty(*grid.shape(p.heads)[:3], p.head_dim, dtype=torch.float32, device=q.device)
    S, X = mixing.scratch(p.heads, mixing.stored), mixing.scratch(p.heads, q.dtype)
    weights = mixing.scratch(p.heads, q.dtype) if mixing.convolved else X
    hidden = mixing.scratch(mixing.units, mixing.stored) if mixing.convolved else None
    sums = Sums(mixing, [cell.wider(grid.margin, p.keys) for cell in cells])
    with on(mixing.p.q):
        for cell in cells:
            wide = cell.wider(grid.margin, p.keys)
            mixing.scores(wide, S, X, do, delta)
            # Products read whole tiles, so pairs near the visible ones must hold zeros.
            more = dict(margin=256, **mixing.pairwise(cell))
            if not mixing.convolved:
                DS = S.view(q.dtype)
                mixing.mix(mix_backward, cell, S=S, DS=DS, X=X, LSE2=lse2, **more, **sums.arguments(), **sums.to_bias())
            else:
                DS, DU = X, hidden.view(q.dtype)
                more.update(own0=cell.n0, own1=cell.n0 + cell.keys)
                mixing.mix(conv_hidden, wide, S=S, ACT=hidden, margin=256, **mixing.pairwise(cell))
                mixing.mix(
                    conv_softmax_backward, wide, S=S, X=X, P=weights, ACT=hidden, LSE2=lse2, **more, **sums.arguments(2)
                )
                mixing.mix(conv_hidden_backward, wide, S=S, DL=X, ACT=hidden, DU=DU, **more, **sums.arguments(0))
                mixing.mix(
                    conv_scores_backward, wide, DL=X, DU=DU, **more, **sums.arguments(4), **sums.to_bias(),
                )  # fmt: skip
            sums.add(wide)
            own = slice(cell.n0 - wide.n0, None)
            if need_q:
                into = sum_q[cell.b0 :] if sum_q is dq else sum_q
                mixing.product(
                    "stored rows", stored_rows, cell, "k",
                    lambda c: triton.cdiv(cell.m1 - cell.m0, c.block_m),  # noqa: B023
                    DS=DS[..., own], K=p.k, DQ=into, first=int(cell.first), scale=scale,
                    dq_row=0 if sum_q is dq else cell.m0, **strides(k=p.k, dq=into),
                )  # fmt: skip
                if waits and cell.last:
                    batch = slice(cell.b0, cell.b0 + cell.batch)
                    dq[batch, :, cell.m0 : cell.m1] = sum_q[: cell.batch, :, : cell.m1 - cell.m0]
            if need_kv:
                mixing.product(
                    "stored columns", stored_columns, cell, "kv",
                    lambda c: triton.cdiv(cell.keys, c.block_n),  # noqa: B023
                    DS=DS[..., own], P=weights[..., own], Q=p.q, DO=do, DK=sum_k, DV_OUT=sum_v, add=int(not once),
                    scale=scale, **strides(q=p.q, do=do, dk=sum_k, dv=sum_v),
                )  # fmt: skip
    if sum_k is not dk:
        dk.copy_(sum_k)
        dv.copy_(sum_v)
    # b2 moves the logits of a row alike, hence lse and nothing else: no noise of rounding for an optimiser to follow.
    db2 = torch.zeros_like(b2) if grad_lse is None else grad_lse.masked_fill(lse == -math.inf, 0.0).sum((0, 2))
    return dq, dk, dv, *sums.gradients(db2)
