"""Biases and a layer for tests with heads spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import posattn

WORLD, HEADS, DIM = 4, 4, 8


class Ramp(posattn.Bias):
    """A bias of somebody's own: one parameter by head, one of all heads, heads counted in the formula."""

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.strength = nn.Parameter(torch.linspace(-1, 1, num_heads))
        self.power = nn.Parameter(torch.tensor(0.7))

    def values(self, offsets: Tensor) -> Tensor:
        distance = (offsets.abs() + 1).to(self.power.dtype) ** self.power
        return self.strength[:, None] * distance / self.num_heads


class Whole(Ramp):
    """One that makes all heads wherever it is asked."""

    def values(self, offsets: Tensor) -> Tensor:
        heads = torch.arange(self.num_heads)[:, None].to(self.power.dtype)
        return (heads - self.power) * torch.sin(self.strength.sum() * offsets)


BIASES = {
    "tisa": posattn.TISA,
    "tisa-0": lambda heads: posattn.TISA(heads, num_kernels=0),
    "alibi": posattn.ALiBi,
    "alibi-learnable": lambda heads: posattn.ALiBi(heads, learnable=True),
    "t5": lambda heads: posattn.T5Bias(heads, num_buckets=8, max_distance=20),
    "kerple": posattn.KERPLE,
    "sandwich": lambda heads: posattn.Sandwich(heads, embedding_dim=8),
    "relative-table": lambda heads: posattn.RelativeTable(heads, max_distance=3),
    "fire": lambda heads: posattn.FIRE(heads, hidden=6, init_length=4),
    "own": Ramp,
    "own, whole": Whole,
}
DIMS = {"own": {"strength": 0}}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    return BIASES[name](HEADS).double()


def mesh() -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))


def streams(key_heads: int = HEADS, length: int = 11) -> list[Tensor]:
    torch.manual_seed(4)
    shapes = (4, HEADS, length, DIM), (4, key_heads, length, DIM), (4, key_heads, length, 6)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def loss(out: Any) -> Tensor:
    """A sum over elements, so that the sum of the processes' losses is the loss."""
    return sum(o.sin().sum() for o in out) if isinstance(out, tuple) else out.sin().sum()


class Block(nn.Module):
    def __init__(self, bias: posattn.Bias) -> None:
        super().__init__()
        width = HEADS * DIM
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Linear(width, width)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        out = posattn.attention(*heads, self.bias, is_causal=True)
        return x + self.mix(out.transpose(1, 2).flatten(2))


def model(name: str) -> nn.Module:
    torch.manual_seed(6)
    return Block(BIASES[name](HEADS)).double()
