"""What FLOATER refuses and how it says so: arguments, dynamics that do not fit."""

from __future__ import annotations

import pytest
import torch
from floater_cases import Tanh
from torch import nn

from posattn import FLOATER
from posattn.floater import MLPDynamics

INF, NAN = float("inf"), float("nan")

BAD = [
    (ValueError, "dim must be an integer, got 2.5", dict(dim=2.5)),
    (ValueError, "dim must be an integer", dict(dim="8")),
    (ValueError, "dim must be an integer", dict(dim=True)),
    (ValueError, "dim must be .*got 0", dict(dim=0)),
    (ValueError, "dim must be .*got -3", dict(dim=-3)),
    (ValueError, "num_layers must be an integer", dict(num_layers=1.0)),
    (ValueError, "num_layers must be an integer", dict(num_layers=None)),
    (ValueError, "num_layers must be .*got 0", dict(num_layers=0)),
    (TypeError, "streams must be", dict(streams="query")),  # five streams of one letter, otherwise
    (TypeError, "streams must be", dict(streams=3)),
    (ValueError, "streams must", dict(streams=("query", 1))),
    (ValueError, "streams must", dict(streams=())),
    (ValueError, "streams must", dict(streams=("query", "key", "query"))),
    (TypeError, "dynamics must be .*nn.Module", dict(dynamics=torch.tanh)),
    (TypeError, "dynamics must be .*nn.Module", dict(dynamics=MLPDynamics)),
    (TypeError, "dynamics must be", dict(dynamics="mlp")),
    (TypeError, "delta_t must be a number", dict(delta_t="0.1")),
    (TypeError, "delta_t must be a number", dict(delta_t=True)),
    (TypeError, "delta_t must be a number", dict(delta_t=torch.tensor(0.1))),
    (ValueError, "delta_t must be .*got 0", dict(delta_t=0.0)),
    (ValueError, "delta_t must be .*got -0.1", dict(delta_t=-0.1)),
    (ValueError, "delta_t must be .*got inf", dict(delta_t=INF)),
    (ValueError, "delta_t must be .*got nan", dict(delta_t=NAN)),
    (ValueError, "method must be .*dopri5.*got 'rk45'", dict(method="rk45")),
    ((TypeError, ValueError), "method must be", dict(method=5)),
    ((TypeError, ValueError), "method must be", dict(method=["dopri5"])),
    (TypeError, "rtol must be a number", dict(rtol=None)),
    (ValueError, "rtol must be .*got -0.001", dict(rtol=-1e-3)),
    (ValueError, "rtol must be .*got nan", dict(rtol=NAN)),
    (TypeError, "atol must be a number", dict(atol="small")),
    (ValueError, "atol must be .*got -1", dict(atol=-1)),
    (ValueError, "atol must be .*got inf", dict(atol=INF)),
    (TypeError, "step_size must be a number", dict(method="rk4", step_size="0.1")),
    (ValueError, "step_size must be .*got 0", dict(method="rk4", step_size=0)),
    (ValueError, "step_size .*dopri5", dict(step_size=0.1)),
    (ValueError, "gradient must be .*checkpoint.*got 'full'", dict(gradient="full")),
    ((TypeError, ValueError), "gradient must be", dict(gradient=True)),
    (ValueError, "max_steps must be an integer", dict(max_steps=10.0)),
    (ValueError, "max_steps must be .*got 0", dict(max_steps=0)),
    (TypeError, "gain must be a number", dict(gain="none")),
    (ValueError, "gain must be .*got -1", dict(gain=-1.0)),
    (ValueError, "gain must be .*got nan", dict(gain=NAN)),
    (ValueError, "gain .*dynamics", dict(gain=1.0, dynamics=Tanh(8))),
    (ValueError, "dtype must be .*torch.int64", dict(dtype=torch.int64)),
    (TypeError, "dtype must be", dict(dtype="float32")),
]


@pytest.mark.parametrize(("error", "message", "options"), BAD)
def test_arguments(error, message, options):
    with pytest.raises(error, match=message):
        FLOATER(**(dict(dim=8, num_layers=2) | options))


@pytest.mark.parametrize(("error", "message", "options"), [
    (ValueError, "dim must be an integer", dict(dim=8.0)),
    (ValueError, "dim must be", dict(dim=0)),
    (ValueError, "hidden must be an integer", dict(hidden="8")),
    (ValueError, "hidden must be", dict(hidden=0)),
    (TypeError, "gain must be", dict(gain=None)),
    (ValueError, "gain must be", dict(gain=INF)),
])  # fmt: skip
def test_arguments_of_the_dynamics(error, message, options):
    with pytest.raises(error, match=message):
        MLPDynamics(**(dict(dim=8) | options))


@pytest.mark.parametrize("length", [2.0, "3", True, None, -1])
def test_lengths(length):
    encoder = FLOATER(8, 2)
    with pytest.raises(ValueError, match=r"length must be an integer"):
        encoder(length)


def test_length_zero():
    encoder = FLOATER(8, 2)
    assert encoder(0).shape == (3, 2, 0, 8)
    with torch.no_grad():
        assert encoder(0).shape == (3, 2, 0, 8)
    assert encoder.last_solve is None
    encoder(0).sum().backward()


@pytest.mark.parametrize(("error", "message", "positions"), [
    (TypeError, "positions must be a Tensor.*list", [1.0, 2.0]),
    (TypeError, "positions must be a Tensor", 3),
    (ValueError, "positions must be .*-0.5", torch.tensor([2.0, -0.5])),
    (ValueError, "positions must be .*-1", torch.tensor([2, -1])),
    (ValueError, "positions must be .*nan", torch.tensor([2.0, NAN])),
    (ValueError, "positions must be .*inf", torch.tensor([INF, 1.0])),
    ((TypeError, ValueError), "positions must be .*bool", torch.tensor([True])),
    ((TypeError, ValueError), "positions must be .*complex", torch.tensor([1j])),
])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_positions(mode, error, message, positions):
    encoder = FLOATER(8, 2)
    with mode(), pytest.raises(error, match=message):
        encoder.at(positions)


def test_tolerances_below_what_the_dtype_resolves():
    """They would need ever more steps for nothing."""
    encoder = FLOATER(8, 2, rtol=1e-9)
    with pytest.raises(ValueError, match=r"rtol must be .*float32.*1e-09"):
        encoder(5)
    assert encoder.double()(5).shape == (3, 2, 5, 8)


# ----------------------------------------------------------------------------------------- dynamics that do not fit


class Answer(nn.Module):
    """dp/dt = whatever `make` makes of p."""

    def __init__(self, make):
        super().__init__()
        self.make, self.weight = make, nn.Parameter(torch.ones(()))

    def forward(self, t, p):
        return self.make(self.weight * p)


@pytest.mark.parametrize(("error", "message", "make"), [
    (ValueError, r"dynamics must return .*\(3, 2, 8\).*got .*\(3, 2, 7\)", lambda p: p[..., :-1]),
    (ValueError, r"dynamics must return .*\(8,\)", lambda p: p[0, 0]),  # would broadcast
    (ValueError, r"dynamics must return .*\(1, 2, 8\)", lambda p: p[:1]),
    (ValueError, r"dynamics must return .*float32.*float64", lambda p: p.double()),
    (ValueError, r"dynamics must return .*float32.*int64", lambda p: p.long()),
    (TypeError, r"dynamics must return .*tuple", lambda p: (p, p)),
    (TypeError, r"dynamics must return .*None", lambda p: None),
])  # fmt: skip
@pytest.mark.parametrize(
    "options", [{}, dict(method="rk4"), dict(gradient="direct"), dict(gradient="adjoint")]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_dynamics_that_return_something_else(mode, options, error, message, make):
    encoder = FLOATER(8, 2, dynamics=Answer(make), **options)
    with mode(), pytest.raises(error, match=message):
        encoder(5)


class Broken(nn.Module):
    def forward(self, t, p):
        raise KeyError("my own mistake") if t > 1 else AssertionError("my own assertion")


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_errors_of_the_dynamics_are_theirs(method):
    with pytest.raises(AssertionError, match="my own assertion"):
        FLOATER(8, 2, dynamics=Broken(), method=method)(5)
