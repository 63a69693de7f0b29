"""FLOATER's position vectors as its paper and code make them, by torchdiffeq: what posattn's solve is compared with.

Liu et al., "Learning to Encode Position for Transformer with Continuous Dynamical Model", ICML 2020 (arXiv
2003.09229): rk4 (torchdiffeq's is the 3/8 rule) with a step at every position, or five; gradients by torchdiffeq's
adjoint in their translation models, by plain autograd in their RoBERTa. `one_by_one` has a solve a layer, `together`
all layers in one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint


class PublishedDynamics(nn.Module):
    """h = W2 [ReLU(W1 [x; t] + b1); t] + b2 with time concatenated, as published; with the two layers of another."""

    def __init__(self, dynamics: Any) -> None:
        super().__init__()
        self.linear1, self.linear2 = dynamics.linear1, dynamics.linear2

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        time = t.to(x.dtype).expand(*x.shape[:-1], 1)
        hidden = F.relu(self.linear1(torch.cat([x, time], -1)))
        return self.linear2(torch.cat([hidden, time], -1))


class Counted(nn.Module):
    """Another field; `calls` says how often it was called."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.field(t, x)


def times_of(length: int, delta_t: float, like: Tensor) -> Tensor:
    """0, delta_t, 2 delta_t, ... (length,)"""
    return torch.arange(length, device=like.device, dtype=like.dtype) * delta_t


def one_by_one(field: nn.Module, initial: Tensor, times: Tensor, adjoint: bool = False) -> list[Tensor]:
    """(streams, layers, dim) to a layer's (streams, length, dim) each: one rk4 solve a layer, a step a position."""
    solve = odeint_adjoint if adjoint else odeint
    return [solve(field, state, times, method="rk4").transpose(0, 1) for state in initial.unbind(1)]


def together(field: nn.Module, initial: Tensor, times: Tensor, steps: int = 1) -> Tensor:
    """(streams, layers, length, dim): all layers in one solve; `steps` between one position and the next."""
    options = None if steps == 1 else {"step_size": float(times[1]) / steps}
    return odeint(field, initial, times, method="rk4", options=options).permute(1, 2, 0, 3)


def adaptive(field: nn.Module, initial: Tensor, times: Tensor, rtol: float, atol: float) -> Tensor:
    """torchdiffeq's dopri5, all layers in one solve, asked for every position."""
    return odeint(field, initial, times, method="dopri5", rtol=rtol, atol=atol).permute(1, 2, 0, 3)


def truth(field: nn.Module, initial: Tensor, times: Tensor, tolerance: float = 1e-10) -> Tensor:
    """float64, dopri5 with rtol = atol = tolerance, at ascending float64 times from 0; field in float64, too."""
    with torch.no_grad():
        return adaptive(field, initial.double(), times.double(), tolerance, tolerance)
