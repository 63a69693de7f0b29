"""How the tests call attention, by each backend, what with, and how they compare."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import posattn
from posattn import attention

HEADS = 3


def blockwise(*args, **kwargs):
    return attention(*args, backend="blockwise", **kwargs)


def triton(*args, **kwargs):
    """On the GPU, or interpreted; the results come back to the CPU."""
    place = partial(move, device="cuda" if torch.cuda.is_available() else "cpu")
    args, kwargs = map(place, args), {name: place(value) for name, value in kwargs.items()}
    out = attention(*args, backend="triton", **kwargs)
    return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()


def move(value, device):
    return value.to(device) if isinstance(value, (torch.Tensor, torch.nn.Module)) else value


TRITON = pytest.param(triton, marks=pytest.mark.triton)


def qkv(
    batch=2, heads=HEADS, key_heads=None, queries=9, keys=None, dim=8, value_dim=None, dtype=torch.float32
):
    key_heads, keys, value_dim = key_heads or heads, keys or queries, value_dim or dim
    shapes = (batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def dense(table: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """The table's formula, entry by entry: [h, i, j] = table[h, j - i + Lq - 1]."""
    j, i = torch.arange(keys), torch.arange(queries)
    return table[:, j[None, :] - i[:, None] + queries - 1]


def same(got, expected, inputs, **tolerance):
    """Equal outputs and equal gradients; lse = -inf of blind rows is compared but not differentiated."""
    torch.testing.assert_close(got, expected, check_dtype=False, **tolerance)
    weights = [torch.randn_like(o) for o in got]

    def gradients(outs):
        loss = sum((torch.where(o.isfinite(), o, 0.0) * w).sum() for o, w in zip(outs, weights))
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    for a, b in zip(gradients(got), gradients(expected)):
        limit = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a / limit, b / limit, check_dtype=False, **tolerance)


def gradients(out, inputs):
    """Of a sum that uses out, and lse where there is one, unevenly."""
    outs = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs)


class Layer(torch.nn.Module):
    """A projection and attention: the smallest model that has weights below and above."""

    def __init__(self, bias: posattn.Bias | None = None) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 3 * 8 * HEADS)
        self.bias = bias

    def forward(self, x, **kwargs):
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4).unbind()
        return attention(query, key, value, self.bias, is_causal=True, **kwargs).transpose(1, 2).flatten(2)
