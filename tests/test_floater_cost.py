"""What FLOATER's tolerances promise, what a solve costs, and its numbers in 32 and 16 bits."""

from __future__ import annotations

import functools

import pytest
import torch
from floater_cases import CASES, SMOOTH, STREAMS, Case, Counted, Rotation, truth, truth_at
from torch import nn

from posattn import FLOATER

LONGEST = 127


@functools.cache
def expected(name: str) -> torch.Tensor:
    with torch.no_grad():
        return truth(CASES[name].encoder(), LONGEST)


# ------------------------------------------------------------------------------------------ tolerances and cost


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_tolerances_are_honoured(name, method):
    """Local errors of rtol add up to at most 30 rtol over these lengths, and fall with it."""
    errors = []
    for rtol in (1e-3, 1e-4, 1e-5, 1e-6):
        encoder = CASES[name].encoder(method=method, rtol=rtol, atol=rtol / 10)
        with torch.no_grad():
            error = (encoder(LONGEST) - expected(name)).abs().max() / expected(name).abs().max()
        assert error < 30 * rtol
        errors.append(error)
    assert errors[3] < errors[1] / 20  # a hundredth is asked for
    assert errors[2] < errors[0] / 20


def test_every_vector_counts_for_itself():
    """One vector that turns beside 199 that are zero and stay: steps and values are those of that vector alone."""
    alone = Case(Rotation, 12, 1, 1).encoder(rtol=1e-6, atol=1e-9)
    many = FLOATER(12, 50, STREAMS[4], alone.dynamics, rtol=1e-6, atol=1e-9).double()
    with torch.no_grad():
        many.initial[2, 30] = alone.initial[0, 0]
        want, got = alone(64)[0, 0], many(64)
    torch.testing.assert_close(got[2, 30], want, rtol=1e-12, atol=1e-12)
    assert got.abs().sum() == got[2, 30].abs().sum()
    assert many.last_solve[:3] == alone.last_solve[:3]  # evaluations, steps taken and rejected


def evaluations(encoder, length):
    """By the module's own count, which is what last_solve says."""
    encoder.dynamics = Counted(encoder.dynamics)
    encoder(length)
    assert encoder.last_solve.evaluations == encoder.dynamics.calls
    assert encoder.last_solve.end >= (length - 1) * encoder.delta_t
    return encoder.dynamics.calls


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("name", ["tanh", "rotation"])
def test_cost_depends_on_time_not_on_positions(name, method):
    """65 positions or 2561 over the same time; the first step is delta_t, so a few more until steps have grown."""
    options = dict(method=method, rtol=1e-4, atol=1e-5)
    few, many = (
        evaluations(CASES[name].encoder(delta_t=delta_t, **options).requires_grad_(False), length)
        for delta_t, length in ((0.1, 65), (0.1 / 40, 64 * 40 + 1))
    )
    assert abs(many - few) <= 4 * 6
    assert many < 64 * 40 / 2


class Settling(nn.Module):
    """dp/dt = tanh(A p) / (1 + t): ever slower, as a logarithm."""

    def __init__(self, dim):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(dim, dim) / dim**0.5)

    def forward(self, t, p):
        return torch.tanh(p @ self.matrix.T) / (1 + t)


@pytest.mark.parametrize(
    "case", [Case(Settling, 12, 2, 3), Case(None, 12, 2, 3, gain=1e-4), Case(None, 12, 2, 3)]
)
def test_cost_hardly_grows_with_the_length(case):
    """512 to 65536 positions, 128 times the time: under 4 times the evaluations, and under 1 in 500 positions."""
    short, long = (
        evaluations(case.encoder(torch.float32).requires_grad_(False), length) for length in (512, 65536)
    )
    assert long < 4 * short
    assert long < 65536 / 500


# --------------------------------------------------------------------------------------------- float32 and 16 bits


OFFICIAL = Case(None, 8, 2, 3, gain=1.0, delta_t=0.01)


@functools.cache
def official_positions() -> tuple[torch.Tensor, torch.Tensor]:
    """The authors' 255 positions, and what they would be a step of 0.002 late."""
    with torch.no_grad():
        encoder = OFFICIAL.encoder(torch.float32)
        return truth(encoder, 255), truth_at(encoder, torch.arange(255) + 0.2)


@pytest.mark.parametrize("options", [dict(rtol=3e-7, atol=1e-8), dict(method="rk4", step_size=0.002)])
def test_no_state_is_late(options):
    """In float32 the authors' solver gives 132 of these 255 positions one step of 0.002 late.

    A state that is late is off by 0.002 |h|, here over 40 times the tolerance for most positions.
    """
    want, late = official_positions()
    with torch.no_grad():
        got = OFFICIAL.encoder(torch.float32, **options)(255).double()
    tolerance = 2e-5 * want.abs().amax((0, 1, 3))  # of each position
    assert ((got - want).abs().amax((0, 1, 3)) < tolerance).all()
    assert ((late - want).abs().amax((0, 1, 3)) > 40 * tolerance).double().mean() > 0.9


@pytest.mark.parametrize("name", ["published, slow", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_16_bits(name, dtype):
    """Solved in float32 with what the parameters are, and rounded once."""
    small = CASES[name].encoder(dtype)
    large = CASES[name].encoder(dtype).float()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            out = small(65)
            assert out.dtype == dtype
            assert torch.equal(out, large(65).to(dtype))
            assert torch.equal(
                small.at(torch.tensor([2.5, 1.25])), large.at(torch.tensor([2.5, 1.25])).to(dtype)
            )
    assert small.initial.dtype == dtype
    assert all(p.dtype == dtype for p in small.dynamics.parameters())


@pytest.mark.parametrize("name", ["published, slow", "tanh"])
def test_autocast_changes_nothing(name):
    """Forward and backward, with and without the cache."""
    plain, cast = (CASES[name].encoder(torch.float32) for _ in range(2))
    plain(65).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = cast(65)
        out.square().mean().backward()
        with torch.no_grad():
            kept = cast(65)
    assert out.dtype == kept.dtype == torch.float32
    assert torch.equal(out, plain(65))
    assert torch.equal(kept, plain(65))
    for ours, theirs in zip(cast.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
