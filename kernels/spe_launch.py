"""From tensors to kernels: the features of SineSPE and ConvSPE, forward and backward.

q [B, H, Lq, D] and k [B, H, Lk, D] of one dtype give features [B, H, L, R]; rows stand at start, start + 1, ...
Inputs are taken as checked.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from . import configs, linear_configs
from .conv import filter_backward, filter_forward, filter_gradient
from .problem import on, padded, rows_contiguous, strides
from .sine import prepare_sines
from .sine import sine_backward as sine_backward_kernel
from .sine import sine_forward as sine_forward_kernel


class Sines:
    """What the kernels read instead of position codes, made once a call: nothing here grows with the length."""

    def __init__(self, kind: str, q: Tensor, length: int, turns, phases, gains, noise, gate_gains, gate_noise):
        self.heads, self.dim, self.sines = turns.shape
        self.realizations = noise.shape[-1]
        self.slots = max(8, triton.next_power_of_2(self.sines + (gate_gains is not None)))
        self.config = linear_configs.pick(q, kind, self.slots if kind == "sine forward" else self.realizations)
        # A short sequence, or one token, takes a short block.
        self.rows = min(self.config.block_m, max(16, triton.next_power_of_2(length)))
        shape = self.heads, self.dim, self.slots
        self.turns, self.phases = turns.new_empty(2, *shape, dtype=torch.int64).unbind()
        self.gains = gains.new_empty(shape, dtype=torch.float32)
        self.noise = q.new_empty(self.heads, self.dim, 2 * self.slots, self.realizations)
        self.local = q.new_empty(self.heads, self.dim, self.rows, 2 * self.slots)
        gate = (None, None) if gate_gains is None else (gate_gains.contiguous(), gate_noise.contiguous())
        codes = (x.contiguous() for x in (turns, phases / (2 * math.pi), gains, noise))
        with on(q):
            prepare_sines[(self.heads * self.dim,)](
                *codes, *gate, self.turns, self.phases, self.gains, self.noise, self.local, SINES=self.sines,
                R=self.realizations, ROWS=self.rows, KP=self.slots, BLOCK_R=16, num_warps=4,
            )  # fmt: skip

    def launch(self, kernel, q: Tensor, programs: int, **arguments) -> None:
        config = self.config
        with on(q):
            kernel[(programs,)](
                LOCAL=self.local, NOISE=self.noise, GAINS=self.gains, TURNS=self.turns, **arguments, B=q.shape[0],
                H=self.heads, D=self.dim, R=self.realizations, KP=self.slots, BLOCK_M=self.rows,
                PRECISION=configs.dot_precision(q, config), num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip


def sine_forward(
    q: Tensor, k: Tensor, *, turns: Tensor, phases: Tensor, gains: Tensor, noise: Tensor, gate_gains: Tensor | None,
    gate_noise: Tensor | None, query_start: int, key_start: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> features of q and of k, in their dtype."""
    length = max(q.shape[2], k.shape[2])
    p = Sines("sine forward", q, length, turns, phases, gains, noise, gate_gains, gate_noise)
    q, k = rows_contiguous(q), rows_contiguous(k)
    made = tuple(x.new_empty(*x.shape[:3], p.realizations) for x in (q, k))
    block_r = min(p.config.block_r, padded(p.realizations))
    programs = q.shape[0] * p.heads * triton.cdiv(length, p.rows) * triton.cdiv(p.realizations, block_r)
    p.launch(
        sine_forward_kernel, q, programs, Q=q, K=k, QHAT=made[0], KHAT=made[1], PHASES=p.phases,
        **strides(q=q, k=k), q_start=query_start, k_start=key_start, Lq=q.shape[2], Lk=k.shape[2], BLOCK_R=block_r,
    )  # fmt: skip
    return made


def sine_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, *, turns: Tensor, phases: Tensor, gains: Tensor,
    noise: Tensor, gate_gains: Tensor | None, gate_noise: Tensor | None, query_start: int, key_start: int,
    need_inputs: bool, need_codes: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dq, dk, dturns, dphases, dgains, dgate_gains, the last four in float64; what is not needed is empty."""
    length = max(q.shape[2], k.shape[2])
    p = Sines("sine backward", q, length, turns, phases, gains, noise, gate_gains, gate_noise)
    inputs, sums = [], []
    for x, grad, start, phase in ((q, grad_q, query_start, p.phases), (k, grad_k, key_start, None)):
        x, grad = rows_contiguous(x), rows_contiguous(grad)
        batch, _, length, _ = x.shape
        blocks = triton.cdiv(length, p.rows)
        run = linear_configs.run_of(x, batch * p.heads * blocks)
        runs = triton.cdiv(blocks, run)
        dx = torch.empty_like(x) if need_inputs else None
        part = gains.new_empty(batch, runs, p.heads, p.dim, 3, p.slots, dtype=torch.float32) if need_codes else None
        p.launch(
            sine_backward_kernel, x, batch * p.heads * runs, X=x, G=grad, DX=dx, PART=part, PHASES=phase,
            **strides(x=x, g=grad, d=x if dx is None else dx), start=start, L=length, runs=runs, RUN=run,
            DIMS=max(1, p.config.block_r // p.slots), WIDTH=padded(p.realizations),
        )  # fmt: skip
        inputs.append(x.new_empty(0) if dx is None else dx)
        if part is not None:
            gained, turn, moment = part.unbind(-2)
            gained, moment = (each.sum((0, 1), dtype=torch.float64) for each in (gained, moment))
            turn = turn.sum(0, dtype=torch.float64)
            base = start + torch.arange(runs, device=x.device, dtype=torch.float64) * (run * p.rows)
            sums.append((gained, turn.sum(0), moment + turn.mul(base[:, None, None, None]).sum(0)))
    if not need_codes:
        return *inputs, *(gains.new_empty(0) for _ in range(4))
    (gained, turn, moment), (gained_k, _, moment_k) = sums
    gained, moment = gained + gained_k, moment + moment_k
    dturns = 2 * math.pi * gains * moment[..., : p.sines]
    dgate = gains.new_empty(0) if gate_gains is None else gained[..., p.sines].clone()
    return *inputs, dturns, gains * turn[..., : p.sines], gained[..., : p.sines].clone(), dgate


class Filters:
    """One side of ConvSPE: its filters with zeros around them, its noise or seed, its gate."""

    def __init__(self, x: Tensor, filters: Tensor, noise: Tensor, realizations: int, gate_gains, gate_noise, start):
        self.heads, self.dim, self.taps = filters.shape
        self.realizations, self.start = realizations, start
        self.noise = noise if noise.dtype == torch.int64 else noise.to(x.dtype).contiguous()
        self.positions = noise.shape[2] if noise.dim() == 4 else 0
        self.gate = None
        if gate_gains is not None:
            self.gate = (gate_gains[..., None] * gate_noise).float().contiguous()
        self.filters = filters

    def launch(self, kernel, x: Tensor, programs, kind: str, width: str, length: int, **arguments) -> None:
        """`width` names the kernel's number of realizations a program; programs(config, that number) its programs."""
        config = linear_configs.pick(x, kind, self.realizations)
        wide = padded(self.realizations)
        wide = min(config.block_r, wide) if width == "BLOCK_R" else wide
        zeros = config.block_m + config.block_n
        filters = torch.nn.functional.pad(self.filters.float().flatten(0, 1), (zeros, zeros))
        with on(x):
            kernel[(programs(config, wide),)](
                **arguments, **{width: wide}, FILTER=filters, NOISE=self.noise, GATE=self.gate, start=self.start,
                L=length, T=self.positions, taps=self.taps, PITCH=filters.shape[1], B=x.shape[0], H=self.heads,
                D=self.dim, R=self.realizations, ROWS=config.block_m, BLOCK_N=config.block_n,
                PRECISION=configs.dot_precision(x, config), num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    def features(self, x: Tensor) -> Tensor:
        x = rows_contiguous(x)
        batch, heads, length, _ = x.shape
        made = x.new_empty(batch, heads, length, self.realizations)

        def programs(config, wide: int) -> int:
            return batch * heads * triton.cdiv(length, config.block_m) * triton.cdiv(self.realizations, wide)

        self.launch(filter_forward, x, programs, "filter forward", "BLOCK_R", length, X=x, XHAT=made, **strides(x=x))
        return made

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        dx = torch.empty_like(x)

        def programs(config, wide: int) -> int:
            return x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], config.block_m)

        self.launch(
            filter_backward, grad, programs, "filter backward", "WIDTH", x.shape[2], G=grad, DX=dx,
            **strides(g=grad, d=dx),
        )  # fmt: skip
        return dx

    def filter_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        config = linear_configs.pick(x, "filter gradient", self.realizations)
        rows = config.block_m
        shifts = triton.cdiv(self.taps + rows - 1, rows)
        slots = 16 if 2 * rows <= 136 else 32
        blocks = x.new_empty(self.heads * self.dim, shifts, 64, slots, dtype=torch.float32)
        with on(x):
            filter_gradient[(self.heads * self.dim * shifts,)](
                x, grad, self.noise, blocks, *x.stride()[:3], *grad.stride()[:3], self.start, x.shape[2],
                self.positions, x.shape[0], self.heads, D=self.dim, R=self.realizations,
                WIDTH=padded(self.realizations), ROWS=rows, SHIFTS=shifts,
                PRECISION=configs.dot_precision(x, config), SUM_PRECISION=configs.sum_precision(x.device),
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        # Entry [shift, 8 p + q, slot] holds the lag rows * shift + 8 (slot - rows / 8 + 1) + q - p: a lag has up to two
        # shifts, and eight p in each. Gathered and added in one order, so that equal inputs give equal bits.
        lag = torch.arange(self.taps, device=x.device)[:, None, None]
        shift = lag // rows + torch.arange(2, device=x.device)[:, None]
        p = torch.arange(8, device=x.device)
        q = (lag + p) % 8
        slot = (lag - rows * shift + p - q) // 8 + rows // 8 - 1
        exists = (slot >= 0) & (slot < 2 * (rows // 8) - 1) & (shift < shifts)
        entry = torch.where(exists, (shift * 64 + 8 * p + q) * slots + slot, 0).flatten(1)
        made = blocks.flatten(1)[:, entry].double() * exists.flatten(1)
        return made.sum(-1).view(self.heads, self.dim, self.taps)


def conv_forward(
    q: Tensor, k: Tensor, *, filter_q: Tensor, filter_k: Tensor, noise: Tensor, realizations: int,
    gate_gains: Tensor | None, gate_noise: Tensor | None, query_start: int, key_start: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> features of q and of k, in their dtype; noise [H, D, T, R], or int64 [1], a seed."""
    sides = (q, filter_q, query_start), (k, filter_k, key_start)
    rest = noise, realizations, gate_gains, gate_noise
    made = [Filters(x, filters, *rest, start).features(x) for x, filters, start in sides]
    return made[0], made[1]


def conv_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, *, filter_q: Tensor, filter_k: Tensor, noise: Tensor,
    realizations: int, gate_gains: Tensor | None, gate_noise: Tensor | None, query_start: int, key_start: int,
    need_inputs: bool, need_codes: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dq, dk, dfilter_q, dfilter_k, dgate_gains; what is not needed is empty."""
    inputs, codes = [], []
    dgate = filter_q.new_empty(0)
    if need_codes and gate_gains is not None:
        dgate = torch.zeros_like(gate_gains)
    for x, grad, filters, start in ((q, grad_q, filter_q, query_start), (k, grad_k, filter_k, key_start)):
        x, grad = rows_contiguous(x), rows_contiguous(grad)
        p = Filters(x, filters, noise, realizations, gate_gains, gate_noise, start)
        inputs.append(p.input_gradient(x, grad) if need_inputs else x.new_empty(0))
        codes.append(p.filter_gradient(x, grad).to(filters.dtype) if need_codes else filters.new_empty(0))
        if need_codes and gate_gains is not None:
            projected = grad @ gate_noise.to(grad.dtype).transpose(1, 2)
            dgate += torch.linalg.vecdot(projected.float(), x.float(), dim=2).sum(0, dtype=torch.float64)
    return *inputs, *codes, dgate
