"""Gradients through the solve: finite differences, the oracle's, each other's."""

from __future__ import annotations

import oracle_floater as oracle
import pytest
import torch
from floater_cases import CASES, SMALL, close, gradients, small, truth
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from posattn import FLOATER

EXACT = ["checkpoint", "direct"]
KINDS = [*EXACT, "adjoint"]


def as_function(encoder: FLOATER, *argument, method=None):
    """A function of all parameters, and they."""
    names = [name for name, _ in encoder.named_parameters()]

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, *args):
            return (self.encoder if method is None else getattr(self.encoder, method))(*args)

    call = Call()
    function = lambda *values: functional_call(
        call, {f"encoder.{name}": value for name, value in zip(names, values)}, argument
    )
    return function, tuple(p.detach().clone().requires_grad_() for p in encoder.parameters())


# ------------------------------------------------------------------------------------------- finite differences


def test_no_unit_changes_sides_at_the_point_of_the_checks():
    encoder = small("published")
    with torch.no_grad():
        p, t = truth(encoder, 12), torch.arange(12).double()[:, None] * 0.1
        before = oracle.with_time(p, 0.0) @ encoder.dynamics.linear1.weight.T + encoder.dynamics.linear1.bias
        before = before + encoder.dynamics.linear1.weight[:, -1] * t
    assert ((before > 0.1).all((0, 1, 2)) | (before < -0.1).all((0, 1, 2))).all()
    assert before.amax() > 0 > before.amin()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("gradient", EXACT)
def test_finite_differences(gradient, name):
    """`initial` and every parameter of the dynamics, positions in order; torch's own tolerances."""
    function, parameters = as_function(small(name, gradient=gradient), 7)
    assert gradcheck(function, parameters)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("gradient", EXACT)
def test_finite_differences_at_any_positions(gradient, name):
    positions = torch.tensor([[2.5, 0.0], [5.25, 2.5]], dtype=torch.float64)
    function, parameters = as_function(small(name, gradient=gradient), positions, method="at")
    assert gradcheck(function, parameters)


@pytest.mark.parametrize("method", ["bosh3", "rk4", "midpoint", "euler"])
@pytest.mark.parametrize("gradient", EXACT)
def test_finite_differences_of_every_method(gradient, method):
    """Coarse steps too: of fixed steps, it is the gradient of what was computed, however far that is from the truth.

    Steps of adaptive methods depend on the parameters, which gradients leave out: their error has to be small.
    """
    options = dict(step_size=0.25) if method in ("rk4", "midpoint", "euler") else dict(rtol=1e-6, atol=1e-8)
    function, parameters = as_function(small("tanh", gradient=gradient, method=method, **options), 6)
    assert gradcheck(function, parameters)


def test_second_derivatives_of_direct():
    function, parameters = as_function(small("tanh", gradient="direct", method="rk4", step_size=0.25), 4)
    assert gradgradcheck(function, parameters)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_second_derivatives_of_others_are_refused(gradient):
    """At the second pass, or already where the first is asked for a graph; never zeros in silence."""
    encoder = small("tanh", gradient=gradient)

    def second():
        first = torch.autograd.grad(encoder(5).square().sum(), encoder.initial, create_graph=True)[0]
        torch.autograd.grad(first.square().sum() + 0 * encoder.initial.sum(), encoder.initial)

    with pytest.raises(RuntimeError, match=r'gradient="direct"'):
        second()


class Clock(nn.Module):
    """dp/dt = cos t: neither parameters nor p."""

    def forward(self, t, p):
        return torch.cos(t).expand_as(p)


@pytest.mark.parametrize("gradient", KINDS)
def test_dynamics_without_parameters_or_state(gradient):
    encoder = FLOATER(3, 2, dynamics=Clock(), gradient=gradient).double()
    weights = torch.randn(3, 2, 20, 3).double()
    (encoder(20) * weights).sum().backward()
    close(encoder.initial.grad, weights.sum(2), 1e-9)


# -------------------------------------------------------------------------------------------- the three and the oracle


@pytest.mark.parametrize(
    ("gradient", "name"),
    [
        (gradient, name)
        for gradient in KINDS
        for name in CASES
        if (gradient, name) != ("adjoint", "published, slow")
    ],
)  # that one takes the adjoint thousands of steps
def test_the_oracles_gradient(gradient, name):
    """Solves at 1e-9: within 1e-7 for smooth dynamics, over some hundred steps.

    Slopes of ReLU's gradients jump at a kink, so that a step errs there by its size: about the root of rtol, where the
    solver sees the kink at all. Where it cannot, as nothing moves yet, steps of one size, 0.01, are taken.
    """
    options = dict(method="rk4", step_size=0.01) if name == "published, still" else {}
    encoder = CASES[name].encoder(gradient=gradient, **options)
    want = gradients(truth(encoder, 24), encoder)
    got = gradients(encoder(24), encoder)
    for parameter in want:
        close(got[parameter], want[parameter], 1e-3 if name.startswith("published") else 1e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rtol", [1e-3, 1e-10])
def test_checkpoint_is_direct(name, rtol):
    """The same sums in another order, whatever the tolerance of the solve."""
    positions = torch.tensor([[2.5, 0.0], [17.25, 2.5]], dtype=torch.float64)
    one, other = (CASES[name].encoder(gradient=g, rtol=rtol, atol=rtol / 10) for g in EXACT)
    for function in (lambda e: e(24), lambda e: e.at(positions)):
        values = function(one), function(other)
        close(*values, 1e-14)
        ours, theirs = gradients(values[0], one), gradients(values[1], other)
        for parameter in theirs:
            close(ours[parameter], theirs[parameter], 1e-12)


@pytest.mark.parametrize("rtol", [1e-4, 1e-6, 1e-8])
def test_adjoint_is_direct_within_the_tolerance(rtol):
    """30 rtol, as for values (test_floater.py)."""
    for name in ("tanh", "rotation", "wave"):
        one, other = (
            CASES[name].encoder(gradient=g, rtol=rtol, atol=rtol / 10) for g in ("adjoint", "direct")
        )
        ours, theirs = gradients(one(24), one), gradients(other(24), other)
        for parameter in theirs:
            close(ours[parameter], theirs[parameter], 30 * rtol)


@pytest.mark.parametrize("gradient", KINDS)
def test_gradients_in_float32(gradient):
    """A default solve in float32, rtol 1e-4: within 30 rtol of the oracle, as for values (test_floater_cost.py)."""
    for name in ("tanh", "rotation", "wave"):
        encoder = CASES[name].encoder(torch.float32, gradient=gradient)
        want, got = gradients(truth(encoder, 32), encoder), gradients(encoder(32), encoder)
        for parameter in want:
            assert got[parameter].dtype == torch.float32
            close(got[parameter], want[parameter], 3e-3)


def test_gradients_of_the_published_dynamics_in_float32():
    """Where some hundred units of ReLU change sides within a few steps: the right direction, to 1e-3 of its length."""
    encoder = CASES["published, slow"].encoder(torch.float32)
    want, got = gradients(truth(encoder, 64), encoder), gradients(encoder(64), encoder)
    for parameter in want:
        close(got[parameter], want[parameter], 1e-2)
        assert (
            torch.cosine_similarity(got[parameter].flatten().double(), want[parameter].flatten(), dim=0)
            > 0.999
        )


@pytest.mark.parametrize("gradient", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bits(dtype, gradient):
    """Those of float32, rounded: where the weights of the mean are numbers of 16 bits."""
    small_, large = (CASES["tanh"].encoder(dtype, gradient=gradient) for _ in range(2))
    large.float()
    weights = torch.randint(-2, 3, (4, 4, 24, 33)).double()
    got, want = gradients(small_(24) * 24, small_, weights), gradients(large(24) * 24, large, weights)
    for parameter in want:
        assert got[parameter].dtype == dtype
        close(got[parameter], want[parameter], 2 * torch.finfo(dtype).eps)
