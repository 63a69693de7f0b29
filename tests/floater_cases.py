"""Encoders to run every test of FLOATER over, each with its dynamics stated again for the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import oracle_floater as oracle
import torch
from torch import Tensor, nn

from posattn import FLOATER
from posattn.floater import MLPDynamics

STREAMS = {
    1: ("input",),
    2: ("cross_key", "cross_value"),
    3: ("query", "key", "value"),
    4: ("cross_query", "query", "key", "value"),
}


class Tanh(nn.Module):
    """dp/dt = tanh(A p + a t + b): smooth, and bounded slopes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.slope, self.shift = nn.Parameter(torch.randn(dim) / 4), nn.Parameter(torch.randn(dim))

    def forward(self, t: Tensor, p: Tensor) -> Tensor:
        return torch.tanh(p @ self.matrix.T + self.slope * t + self.shift)


class Rotation(nn.Module):
    """dp/dt = (G - G^T) p: the norm of every vector stays."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.generator = nn.Parameter(torch.randn(dim, dim) / (2 * dim) ** 0.5)

    def forward(self, t: Tensor, p: Tensor) -> Tensor:
        return p @ (self.generator - self.generator.T).T


class Wave(nn.Module):
    """dp/dt = a cos(w t + c), whatever p: nothing but time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.height, self.turn, self.phase = (nn.Parameter(torch.randn(dim)) for _ in range(3))

    def forward(self, t: Tensor, p: Tensor) -> Tensor:
        return (self.height * torch.cos(self.turn * t + self.phase)).expand_as(p)


class Counted(nn.Module):
    """Counts its calls, those of copies that stand for it in 16 bits included."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.tally = inner, [0]

    @property
    def calls(self) -> int:
        return self.tally[0]

    def forward(self, t: Tensor, p: Tensor) -> Tensor:
        self.tally[0] += 1
        return self.inner(t, p)


class Case(NamedTuple):
    """`dynamics` makes them, `gain` for MLPDynamics; the encoder's `initial` is random, of standard deviation 1/2."""

    dynamics: Callable[[int], nn.Module] | None
    dim: int
    layers: int
    streams: int
    gain: float = 0.0
    delta_t: float = 0.1

    def encoder(self, dtype: torch.dtype = torch.float64, **options) -> FLOATER:
        """Parameters are those of float64, rounded: the same for every dtype; solved tightly where that is float64."""
        torch.manual_seed(3)
        options = (
            {"delta_t": self.delta_t}
            | (dict(rtol=1e-9, atol=1e-11) if dtype == torch.float64 else {})
            | options
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            given = (
                MLPDynamics(self.dim, gain=self.gain) if self.dynamics is None else self.dynamics(self.dim)
            )
            if self.dynamics is None:  # biases too: the published start has none
                for layer in (given.linear1, given.linear2):
                    nn.init.normal_(layer.bias, std=self.gain)
            encoder = FLOATER(self.dim, self.layers, STREAMS[self.streams], given, **options)
            nn.init.normal_(encoder.initial, std=0.5)
        finally:
            torch.set_default_dtype(before)
        return encoder.to(dtype)


CASES = {
    "published, still": Case(None, 8, 2, 3),
    "published, slow": Case(None, 12, 3, 3, gain=0.1, delta_t=0.05),
    "published, xavier": Case(None, 8, 1, 2, gain=1.0, delta_t=0.01),
    "tanh": Case(Tanh, 33, 4, 4),
    "rotation": Case(Rotation, 12, 2, 3, delta_t=0.05),
    "wave": Case(Wave, 5, 1, 1, delta_t=0.05),
}
SMOOTH = [name for name in CASES if not name.startswith("published")]
# 30 rtol, as test_floater_cost.py has it. A kink of ReLU within a step is beyond any order of the method: its error is
# what the solver happens to see of it.
TOLERANCE = {name: 3e-8 if name in SMOOTH else 1e-7 for name in CASES}


TABLE = Case(Tanh, 12, 2, 3)


def counted(dtype: torch.dtype = torch.float32, **options) -> FLOATER:
    """Frozen, so that what it says is kept; its dynamics count their calls. Default tolerances."""
    encoder = TABLE.encoder(dtype, **(dict(rtol=1e-4, atol=1e-5) | options))
    encoder.dynamics = Counted(encoder.dynamics)
    return encoder.requires_grad_(False)


SMALL = {
    "published": Case(None, 3, 1, 2, gain=0.5),
    "tanh": Case(Tanh, 3, 2, 2),
    "rotation": Case(Rotation, 3, 2, 1),
    "wave": Case(Wave, 2, 1, 1),
}


def small(name: str, **options) -> FLOATER:
    """Few parameters; the published network at a point where no unit of ReLU changes sides within the length."""
    encoder = SMALL[name].encoder(**options)
    if name == "published":
        with torch.no_grad():
            encoder.dynamics.linear1.bias.copy_(torch.tensor([4.0, -4.0, 5.0]))
    return encoder


def field(encoder: FLOATER) -> oracle.Field:
    """The encoder's dynamics in float64, by formula; gradients reach the encoder's parameters."""
    made = encoder.dynamics
    made = made.inner if isinstance(made, Counted) else made
    if isinstance(made, MLPDynamics):
        first, second = made.linear1, made.linear2
        return oracle.published(first.weight, first.bias, second.weight, second.bias)
    p = {name: value.double() for name, value in made.named_parameters()}
    if isinstance(made, Tanh):
        return lambda t, x: torch.tanh(x @ p["matrix"].T + p["slope"] * t + p["shift"])
    if isinstance(made, Rotation):
        return lambda t, x: x @ p["generator"].T - x @ p["generator"]
    assert isinstance(made, Wave)
    return lambda t, x: x * 0 + p["height"] * torch.cos(p["turn"] * t + p["phase"])


def truth(encoder: FLOATER, length: int) -> Tensor:
    return oracle.positions(field(encoder), encoder.initial, length, encoder.delta_t)


def truth_at(encoder: FLOATER, positions: Tensor) -> Tensor:
    return oracle.at(field(encoder), encoder.initial, positions.double() * encoder.delta_t)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest number in `want`, or of 1 where that is larger."""
    assert got.shape == want.shape
    scale = max(want.abs().max().item(), 1.0) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance * scale)


def gradients(out: Tensor, encoder: FLOATER, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Of a fixed random mean of `out`, by parameter; nothing is accumulated."""
    if weights is None:
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    names, parameters = zip(*((n, p) for n, p in encoder.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad((out * weights.to(out)).sum() / out.shape[2], parameters, allow_unused=True)
    return {name: g if g is not None else torch.zeros_like(p) for name, p, g in zip(names, parameters, grads)}
