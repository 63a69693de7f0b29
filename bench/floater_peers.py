"""The ways to FLOATER's position vectors that are timed side by side, and what they are checked against."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posattn.floater import FLOATER, MLPDynamics

from . import floater_published as published
from .contest import DIRECTIONS
from .measure import peak_memory

TOLERANCE = (1e-4, 1e-5)  # rtol, atol: posattn's defaults
OURS, SAME = "posattn", "posattn, same error"
PUBLISHED, ADJOINT = "published", "published, adjoint"
TOGETHER, FIVE, DENSE = "rk4, all layers", "rk4, all layers, 5 steps", "dopri5, all positions"
OF_DIRECTION = {
    DIRECTIONS[0]: (PUBLISHED, OURS, SAME, TOGETHER, FIVE, DENSE),  # the published first: its error is a target
    DIRECTIONS[1]: (OURS, SAME, PUBLISHED, ADJOINT, TOGETHER, DENSE),
}
A_LAYER = (PUBLISHED, ADJOINT)  # one solve a layer: one of them tells the time of all
SAMPLES = 257  # positions at which errors are taken, evenly spread from first to last
Pair = tuple[float, float]
Vectors = Tensor | list[Tensor]


class Place(NamedTuple):
    gain: float  # of the dynamics
    length: int
    dim: int = 512
    layers: int = 6
    delta_t: float = 0.1

    def __str__(self) -> str:
        return f"gain {self.gain:g} N {self.length}"


def make_parts(place: Place, device: str) -> tuple[nn.Module, Tensor]:
    """The published dynamics, and initial vectors (3, layers, dim) that are Xavier-uniform as published."""
    torch.manual_seed(0)
    dynamics = MLPDynamics(place.dim, gain=place.gain)
    initial = nn.init.xavier_uniform_(torch.empty(3, place.layers, place.dim))
    return dynamics.to(device), initial.to(device)


def make_encoder(place: Place, device: str, tolerance: Pair = TOLERANCE, **options: Any) -> Any:
    dynamics, initial = make_parts(place, device)
    options = {"delta_t": place.delta_t, "rtol": tolerance[0], "atol": tolerance[1], **options}
    encoder = FLOATER(place.dim, place.layers, dynamics=dynamics, **options).to(device)
    with torch.no_grad():
        encoder.initial.copy_(initial)
    return encoder


class Made(NamedTuple):
    """A contestant: `positions()` makes (3, layers, length, dim), or a list of the layers', from `leaves`;
    `evaluations()` says at what cost."""

    positions: Callable[[], Vectors]
    leaves: list[Tensor]
    forget: Callable[[], None]
    evaluations: Callable[[], int]


def make(peer: str, place: Place, device: str, layers: int, tolerance: Pair = TOLERANCE) -> Made:
    if peer in (OURS, SAME):
        encoder = make_encoder(place, device, tolerance)
        leaves = list(encoder.parameters())
        return Made(lambda: encoder(place.length), leaves, encoder.clear, lambda: encoder.last_solve.evaluations)
    dynamics, initial = make_parts(place, device)
    field = published.Counted(published.PublishedDynamics(dynamics) if peer in A_LAYER else dynamics)
    initial = initial[:, :layers].clone().requires_grad_()
    times = published.times_of(place.length, place.delta_t, initial)
    solve: dict[str, Callable[..., Vectors]] = {
        PUBLISHED: published.one_by_one,
        ADJOINT: partial(published.one_by_one, adjoint=True),
        TOGETHER: published.together,
        FIVE: partial(published.together, steps=5),
        DENSE: partial(published.adaptive, rtol=tolerance[0], atol=tolerance[1]),
    }

    def forget() -> None:
        field.calls = 0

    leaves = [initial, *dynamics.parameters()]
    return Made(lambda: solve[peer](field, initial, times), leaves, forget, lambda: field.calls)


def make_cotangent(place: Place, device: str, layers: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, layers, place.length, place.dim, generator=generator).to(device)


def run(direction: str, made: Made, cotangent: Tensor | None) -> Any:
    made.forget()
    if direction == DIRECTIONS[0]:
        with torch.no_grad():
            return made.positions()
    assert cotangent is not None
    out = made.positions()
    pairs = (out, cotangent.unbind(1)) if isinstance(out, list) else ([out], [cotangent])
    return out, torch.autograd.grad(pairs[0], made.leaves, pairs[1])


def sampled(length: int, device: str | torch.device = "cpu") -> Tensor:
    """Indices of the positions at which errors are taken."""
    count = min(length, SAMPLES)
    return torch.linspace(0, length - 1, count, dtype=torch.float64, device=device).round().long()


def samples(out: Vectors) -> Tensor:
    """(3, layers, at most SAMPLES, dim) float64 on the CPU."""
    if isinstance(out, list):
        return torch.cat([samples(layer[:, None]) for layer in out], 1)
    return out[:, :, sampled(out.shape[2], out.device)].double().cpu()


def error_of(got: Tensor, expected: Tensor) -> float:
    """The largest error of any entry as a part of the largest entry of its vector, worst of all vectors; of as many
    layers as `got` has."""
    expected = expected[:, : got.shape[1]]
    return float(((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


class Truths:
    """float64 solves at tight tolerance, read at the sampled positions; each is made when it is asked for."""

    def __init__(self) -> None:
        self.made: dict[Place, Tensor] = {}

    def __getitem__(self, place: Place) -> Tensor:
        if place not in self.made:
            dynamics, initial = make_parts(place, "cpu")
            field = published.PublishedDynamics(copy.deepcopy(dynamics).double())
            self.made[place] = published.truth(field, initial, sampled(place.length).double() * place.delta_t)
        return self.made[place]


def by_itself(peer: str, place: Place, direction: str, layers: int, tolerance: Pair) -> tuple[int, float, int, Any]:
    """Peak bytes on the CPU, seconds, evaluations, and samples as an array, of one run; called in a process of its own,
    after a small call that brings threads and code."""
    small = place._replace(length=16)
    run(direction, make(peer, small, "cpu", layers, tolerance), make_cotangent(small, "cpu", layers))
    made = make(peer, place, "cpu", layers, tolerance)
    backward = direction == DIRECTIONS[1]
    cotangent = make_cotangent(place, "cpu", layers) if backward else None
    kept: list[Any] = []

    def timed() -> None:
        start = time.perf_counter()
        out = run(direction, made, cotangent)
        kept.extend([time.perf_counter() - start, out])

    peak = 0
    if layers < place.layers:
        timed()  # no memory is given for these, and measuring it makes large blocks slow to get
    else:
        peak = peak_memory(timed, "cpu")
    return peak, kept[0], made.evaluations(), None if backward else samples(kept[1]).numpy()
