"""Positional codes in plain PyTorch, some positions at a time: CPU and every device without Triton.

No tensor holds the code of every position, which would be (N, H, D, R): beyond copies of the size of the inputs and
outputs there are a few buffers of about SCRATCH numbers. Arguments and results are those of spe_ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .spe_conv_blockwise import conv_backward, conv_forward

__all__ = ["conv_backward", "conv_forward", "sine_backward", "sine_forward"]

ROWS = 256  # positions times batch entries: so many that turning the noise costs little beside their product
SCRATCH = 1 << 19  # numbers: 2 MB in float32, which stay in the cache


class _Sines:
    """Sines of some heads, c = 2 K + 1 rows a dimension with a gate (else 2 K): K cosines, K sines, the gate.

    A position is base + i with i < positions. The table holds cos and sin of i alone; the base's angle turns the
    noise, by an angle that float64 makes and reduces to one turn, so that it is exact however far the position.
    """

    def __init__(
        self,
        heads: slice,
        x: Tensor,
        positions: int,
        turns: Tensor,
        phases: Tensor,
        gains: Tensor,
        noise: Tensor,
        gate_gains: Tensor | None,
        gate_noise: Tensor | None,
    ):
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # h, K, D
        self.turns, self.phases, self.gains = (t[heads].transpose(1, 2) for t in (turns, phases, gains))
        self.sines = self.turns.shape[1]
        z = noise[heads].to(self.dtype).transpose(1, 2)
        self.z = torch.cat([z[:, 0::2], z[:, 1::2]], dim=1)  # h, 2 K, D, R
        steps = torch.arange(positions, dtype=torch.float64, device=x.device)
        angle = self._angle(self.turns[:, None] * steps[:, None, None]).to(self.dtype)
        parts = [angle.cos(), angle.sin()]
        if gate_noise is not None:
            parts.append(torch.ones_like(angle[:, :, :1]))
        self.table = torch.cat(parts, dim=2)  # h, positions, c, D
        heads_here, _, rows, dims = self.table.shape
        self.turned = torch.empty(heads_here, rows, dims, z.shape[-1], dtype=self.dtype, device=x.device)
        self.gate: Tensor | None = None
        self.gate_gains = gate_gains
        if gate_gains is not None and gate_noise is not None:
            self.gate_gains = gate_gains[heads].to(self.dtype)
            self.gate = gate_noise[heads].to(self.dtype)

    @staticmethod
    def _angle(turns: Tensor) -> Tensor:
        return turns.remainder(1.0).mul_(2 * math.pi)

    def turn(self, base: int, shifted: bool, scaled: bool) -> Tensor:
        """The noise at a base, (h, c D, R): with the phases if shifted, times the gains if scaled."""
        angle = self._angle(self.turns * base)
        if shifted:
            angle += self.phases
        size = self.gains if scaled else 1.0
        cos, sin = ((t * size).to(self.dtype)[..., None] for t in (angle.cos(), angle.sin()))
        K = self.sines
        z_cos, z_sin = self.z[:, :K], self.z[:, K:]
        torch.mul(z_cos, cos, out=self.turned[:, :K]).addcmul_(z_sin, sin)
        torch.mul(z_sin, cos, out=self.turned[:, K : 2 * K]).addcmul_(z_cos, sin, value=-1)
        if self.gate is not None and self.gate_gains is not None:
            gate = self.turned[:, 2 * K]
            gate.copy_(self.gate if not scaled else self.gate * self.gate_gains[..., None])
        return self.turned.flatten(1, 2)


class _Chunks:
    """Which heads and positions are done at a time, and the buffers for it."""

    def __init__(self, q: Tensor, k: Tensor, width: int):
        batch, self.heads = q.shape[:2]
        longest = max(q.shape[2], k.shape[2])
        self.positions = max(1, min(longest, ROWS // max(1, batch)))
        self.group = max(1, min(self.heads, SCRATCH // max(1, batch * self.positions * width)))

    def head_groups(self) -> Iterator[slice]:
        for start in range(0, self.heads, self.group):
            yield slice(start, min(start + self.group, self.heads))

    def of(self, length: int) -> Iterator[slice]:
        for start in range(0, length, self.positions):
            yield slice(start, min(start + self.positions, length))


class _Buffer:
    """Memory that tensors of several shapes, one at a time, lie in."""

    def __init__(self, like: Tensor):
        self.flat = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.flat.numel() < size:
            self.flat = self.flat.new_empty(size)
        return self.flat[:size].view(shape)


def _rows(x: Tensor, heads: slice, chunk: slice, dtype: torch.dtype) -> Tensor:
    """(B, H, L, X) -> (h, B, positions, X)"""
    return x[:, heads, chunk].transpose(0, 1).to(dtype)


@torch.no_grad()
def sine_forward(
    q: Tensor,
    k: Tensor,
    *,
    turns: Tensor,
    phases: Tensor,
    gains: Tensor,
    noise: Tensor,
    gate_gains: Tensor | None,
    gate_noise: Tensor | None,
    query_start: int,
    key_start: int,
) -> tuple[Tensor, Tensor]:
    realizations = noise.shape[-1]
    rows = noise.shape[2] + (gate_noise is not None)
    qhat, khat = (x.new_empty(*x.shape[:3], realizations) for x in (q, k))
    chunks = _Chunks(q, k, rows * q.shape[-1])
    buffer = product = None
    for heads in chunks.head_groups():
        codes = _Sines(heads, q, chunks.positions, turns, phases, gains, noise, gate_gains, gate_noise)
        if buffer is None or product is None:
            buffer, product = _Buffer(codes.table), _Buffer(codes.table)
        for x, out, start, shifted in ((q, qhat, query_start, True), (k, khat, key_start, False)):
            for chunk in chunks.of(x.shape[2]):
                part = _rows(x, heads, chunk, codes.dtype)
                h, batch, positions, dims = part.shape
                z = codes.turn(start + chunk.start, shifted, scaled=True)
                A = buffer(h, batch, positions, rows, dims)
                torch.mul(part[:, :, :, None], codes.table[:, None, :positions], out=A)
                found = product(h, batch * positions, realizations)
                torch.bmm(A.view(h, batch * positions, rows * dims), z, out=found)
                out[:, heads, chunk] = found.view(h, batch, positions, realizations).transpose(0, 1)
    return qhat, khat


@torch.no_grad()
def sine_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    turns: Tensor,
    phases: Tensor,
    gains: Tensor,
    noise: Tensor,
    gate_gains: Tensor | None,
    gate_noise: Tensor | None,
    query_start: int,
    key_start: int,
    need_inputs: bool,
    need_codes: bool,
) -> tuple[Tensor, ...]:
    realizations = noise.shape[-1]
    K = turns.shape[2]
    rows = 2 * K + (gate_noise is not None)
    dq, dk = (torch.empty_like(x) if need_inputs else x.new_empty(0) for x in (q, k))
    # By head, of the gains, of the angle, of the turns.
    sums = turns.new_zeros(turns.shape[0], 3, K, turns.shape[1])
    gate_sum = None if gate_gains is None else torch.zeros_like(gate_gains)
    chunks = _Chunks(q, k, rows * q.shape[-1])
    buffers = None
    for heads in chunks.head_groups():
        codes = _Sines(heads, q, chunks.positions, turns, phases, gains, noise, gate_gains, gate_noise)
        if buffers is None:
            buffers = [_Buffer(codes.table) for _ in range(3)]
        sizes = codes.gains.to(codes.dtype)[:, None, None]  # h, 1, 1, K, D
        sides = (q, grad_q, dq, query_start, True), (k, grad_k, dk, key_start, False)
        for x, grad, dx, start, shifted in sides:
            for chunk in chunks.of(x.shape[2]):
                part = _rows(x, heads, chunk, codes.dtype)
                g = _rows(grad, heads, chunk, codes.dtype)
                h, batch, positions, dims = part.shape
                base = start + chunk.start
                z = codes.turn(base, shifted, scaled=False)
                U = buffers[0](h, batch, positions, rows, dims)
                g = g.reshape(h, batch * positions, realizations)
                torch.bmm(g, z.transpose(1, 2), out=U.view(h, batch * positions, rows * dims))
                table = codes.table[:, None, :positions, : 2 * K]
                waves, gate = U[:, :, :, : 2 * K], U[:, :, :, 2 * K :]
                # Through the sum of cosine and sine: what times the gain is dx and times x is dgain.
                both = torch.mul(waves, table, out=buffers[1](h, batch, positions, 2 * K, dims))
                total = both[:, :, :, :K].add_(both[:, :, :, K:])
                work = buffers[2](h, batch, positions, K, dims)
                if need_inputs:
                    found = torch.mul(total, sizes, out=work).sum(3)
                    if codes.gate is not None and codes.gate_gains is not None:
                        found.addcmul_(gate[:, :, :, 0], codes.gate_gains[:, None, None])
                    dx[:, heads, chunk] = found.transpose(0, 1).to(dx.dtype)
                if not need_codes:
                    continue
                column = part[:, :, :, None]
                weights = torch.ones(2, batch, positions, dtype=codes.dtype, device=q.device)
                weights[1] = torch.arange(positions, dtype=codes.dtype, device=q.device)
                weights = weights.view(1, 2, -1).expand(h, -1, -1)
                flat = work.view(h, batch * positions, K * dims)
                torch.mul(total, column, out=work)
                by_gain = torch.bmm(weights[:, :1], flat).view(h, K, dims).double()
                torch.mul(table[:, :, :, :K], waves[:, :, :, K:], out=work)
                work.addcmul_(table[:, :, :, K:], waves[:, :, :, :K], value=-1).mul_(column)
                by_angle, by_step = torch.bmm(weights, flat).view(h, 2, K, dims).double().unbind(1)
                sums[heads, 0] += by_gain
                sums[heads, 1] += by_angle if shifted else 0.0
                sums[heads, 2] += by_angle * base + by_step
                if gate_sum is not None:
                    gate_sum[heads] += (gate[:, :, :, 0] * part).sum((1, 2)).double()
    if not need_codes:
        none = sums.new_empty(0)
        return dq, dk, none, none, none, none
    by_gain, by_angle, by_turn = (torch.empty_like(gains).copy_(t) for t in sums.transpose(2, 3).unbind(1))
    dgate = sums.new_empty(0) if gate_sum is None else gate_sum
    return dq, dk, by_turn.mul_(gains).mul_(2 * math.pi), by_angle.mul_(gains), by_gain, dgate
