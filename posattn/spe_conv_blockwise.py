"""Codes by convolution in plain PyTorch, a head and some positions at a time; see spe_blockwise.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import normal

POSITIONS = 64  # at a time: products of P filter taps take P + POSITIONS - 1 instead


class _Side(NamedTuple):
    """What is done at the positions start to start + length: queries, keys, or both."""

    start: int
    length: int
    members: tuple[int, ...]  # 0: query, 1: key


def _sides(q: Tensor, k: Tensor, query_start: int, key_start: int) -> list[_Side]:
    """One walk for both where positions agree: making the noise takes most of the time."""
    lengths = q.shape[2], k.shape[2]
    if query_start == key_start and lengths[0] == lengths[1]:
        return [_Side(query_start, lengths[0], (0, 1))]
    return [_Side(query_start, lengths[0], (0,)), _Side(key_start, lengths[1], (1,))]


class _Noise:
    """The noise of one head, (D, times, R), a window at a time that moves on."""

    def __init__(self, noise: Tensor, head: int, dims: int, realizations: int, like: Tensor):
        self.noise = noise[head] if noise.is_floating_point() else None
        self.seed = 0 if noise.is_floating_point() else int(noise)
        self.rows = range(head * dims, (head + 1) * dims)
        self.realizations = realizations
        self.like = like
        self.first = 0
        self.window: Tensor | None = None

    def at(self, first: int, count: int) -> Tensor:
        if self.noise is not None:
            return self.noise[:, first : first + count].to(self.like.dtype)
        kept, start = None, first
        if self.window is not None and self.first <= first < self.first + self.window.shape[1]:
            kept = self.window[:, first - self.first :][:, :count]
            start = first + kept.shape[1]
        made = normal(self.seed, self.rows, range(start, first + count), self.realizations, self.like)
        self.first, self.window = first, made if kept is None else torch.cat([kept, made], dim=1)
        return self.window


def _toeplitz(taps: Tensor, positions: int) -> Tensor:
    """taps (..., D, P) -> (D, ... * positions, positions + P - 1): row i holds the taps from column i on."""
    padded = torch.nn.functional.pad(taps, (positions - 1, positions - 1))
    rows = padded.unfold(-1, positions + taps.shape[-1] - 1, 1).flip(-2)  # ..., D, positions, columns
    return rows.transpose(0, 1).flatten(1, 2)


def _chunks(side: _Side) -> Iterator[slice]:
    for start in range(0, side.length, POSITIONS):
        yield slice(start, min(start + POSITIONS, side.length))


@torch.no_grad()
def conv_forward(
    q: Tensor,
    k: Tensor,
    *,
    filter_q: Tensor,
    filter_k: Tensor,
    noise: Tensor,
    realizations: int,
    gate_gains: Tensor | None,
    gate_noise: Tensor | None,
    query_start: int,
    key_start: int,
) -> tuple[Tensor, Tensor]:
    inputs = q, k
    qhat, khat = outputs = [x.new_empty(*x.shape[:3], realizations) for x in inputs]
    taps = filter_q.shape[-1]
    for side in _sides(q, k, query_start, key_start):
        if q.shape[0] == 0:
            break
        for head in range(q.shape[1]):
            source = _Noise(noise, head, q.shape[3], realizations, filter_q)
            filters = torch.stack([(filter_q, filter_k)[member][head] for member in side.members])
            gate = None
            if gate_gains is not None and gate_noise is not None:
                gate = gate_gains[head][:, None] * gate_noise[head]
            toeplitz = None
            for chunk in _chunks(side):
                count = chunk.stop - chunk.start
                if toeplitz is None or toeplitz.shape[1] != count * len(side.members):
                    toeplitz = _toeplitz(filters, count)
                z = source.at(side.start + chunk.start, count + taps - 1)
                codes = torch.bmm(toeplitz, z).unflatten(1, (-1, count))  # D, members, count, R
                for place, member in enumerate(side.members):
                    x = inputs[member][:, head, chunk].to(codes.dtype)
                    found = torch.bmm(x.transpose(0, 1), codes[:, place].transpose(0, 1))  # count, B, R
                    if gate is not None:
                        found += x.transpose(0, 1) @ gate
                    outputs[member][:, head, chunk] = found.transpose(0, 1)
    return qhat, khat


@torch.no_grad()
def conv_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    filter_q: Tensor,
    filter_k: Tensor,
    noise: Tensor,
    realizations: int,
    gate_gains: Tensor | None,
    gate_noise: Tensor | None,
    query_start: int,
    key_start: int,
    need_inputs: bool,
    need_codes: bool,
) -> tuple[Tensor, ...]:
    inputs, gradients = (q, k), (grad_q, grad_k)
    dq, dk = made = [torch.empty_like(x) if need_inputs else x.new_empty(0) for x in inputs]
    dfilters = [torch.zeros_like(f) for f in (filter_q, filter_k)]
    dgate = None if gate_gains is None else torch.zeros_like(gate_gains, dtype=torch.float64)
    taps = filter_q.shape[-1]
    for side in _sides(q, k, query_start, key_start):
        if q.shape[0] == 0:
            break
        for head in range(q.shape[1]):
            source = _Noise(noise, head, q.shape[3], realizations, filter_q)
            filters = torch.stack([(filter_q, filter_k)[member][head] for member in side.members])
            toeplitz, sums = None, dict[int, Tensor]()
            for chunk in _chunks(side):
                count = chunk.stop - chunk.start
                z = source.at(side.start + chunk.start, count + taps - 1)
                codes = None
                if need_inputs:
                    if toeplitz is None or toeplitz.shape[1] != count * len(side.members):
                        toeplitz = _toeplitz(filters, count)
                    codes = torch.bmm(toeplitz, z).unflatten(1, (-1, count))  # D, members, count, R
                back = []
                for place, member in enumerate(side.members):
                    x = inputs[member][:, head, chunk].to(z.dtype).transpose(0, 1)  # count, B, D
                    g = gradients[member][:, head, chunk].to(z.dtype).transpose(0, 1)  # count, B, R
                    by_gate = None if gate_noise is None else g @ gate_noise[head].T
                    if codes is not None:
                        found = torch.bmm(g, codes[:, place].permute(1, 2, 0))
                        if by_gate is not None and gate_gains is not None:
                            found.addcmul_(by_gate, gate_gains[head])
                        made[member][:, head, chunk] = found.transpose(0, 1).to(q.dtype)
                    if need_codes:
                        back.append(torch.bmm(x.transpose(1, 2), g).transpose(0, 1))  # D, count, R
                        if dgate is not None and by_gate is not None:
                            dgate[head] += (x * by_gate).sum((0, 1)).double()
                if need_codes:
                    pairs = torch.bmm(
                        torch.cat(back, dim=1), z.transpose(1, 2)
                    )  # D, members * count, columns
                    total = sums.get(count)
                    sums[count] = pairs.double() if total is None else total.add_(pairs)
            for count, pairs in sums.items():
                # Tap a of row i stands in column i + a.
                rows = pairs.unflatten(1, (-1, count))
                size, columns = rows.stride(), rows.shape[-1]
                diagonals = rows.as_strided(
                    (*rows.shape[:3], taps), (size[0], size[1], columns + 1, 1)
                )  # D, members, count, taps
                for place, member in enumerate(side.members):
                    dfilters[member][head] += diagonals[:, place].sum(1).to(filter_q.dtype)
    if not need_codes:
        dfilters = [f.new_empty(0) for f in dfilters]
    return dq, dk, *dfilters, q.new_empty(0) if dgate is None else dgate.to(filter_q.dtype)
