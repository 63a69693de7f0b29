"""Trajectories of FLOATER that cannot be followed: the error names stream, layer and position, nothing is silent."""

from __future__ import annotations

import oracle_floater as oracle
import pytest
import torch
from floater_cases import STREAMS, Rotation
from torch import nn

from posattn import FLOATER

INF, NAN = float("inf"), float("nan")


class Square(nn.Module):
    """dp/dt = p^2: p(t) = 1 / (1 / p(0) - t) is infinite at t = 1 / p(0)."""

    def forward(self, t, p):
        return p * p


class Gone(nn.Module):
    """dp/dt = 1, and no number from t = 2 on where p is above its mark."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, t, p):
        return torch.where((t >= 2) & (p > 100), self.value, 1.0)


CALLS = {
    "kept": (torch.no_grad, lambda encoder: encoder(400)),
    "gradients": (torch.enable_grad, lambda encoder: encoder(400)),
    "at": (torch.enable_grad, lambda encoder: encoder.at(torch.tensor([399.5, 2.0]))),
    "kept, at": (torch.no_grad, lambda encoder: encoder.at(torch.tensor([399.5, 2.0]))),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "options", [{}, dict(method="bosh3"), dict(gradient="direct"), dict(gradient="adjoint")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_layer_diverges(dtype, options, call):
    """The others stay at 0.001; this one is infinite at t = 2, position 20."""
    encoder = FLOATER(4, 3, dynamics=Square(), **options).to(dtype)
    nn.init.constant_(encoder.initial, 1e-3)
    with torch.no_grad():
        encoder.initial[1, 2, 3] = 0.5
    mode, ask = CALLS[call]
    with mode(), pytest.raises(RuntimeError, match=r'"key".*layer 2.*position (19|20)\b.*delta_t') as caught:
        ask(encoder)
    assert "query" not in str(caught.value)
    with mode():  # what can be had can still be had
        close_to_the_pole = encoder(17)
    assert close_to_the_pole.isfinite().all()
    torch.testing.assert_close(
        close_to_the_pole[1, 2, 16, 3].double().item(), 1 / (2 - 1.6), rtol=1e-2, atol=0
    )  # 1e-4 a step, grown (2 / 0.4)^2 = 25 times; 16 bits resolve 8e-3


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", ["rk4", "midpoint", "euler"])
def test_one_layer_diverges_at_fixed_steps(method, call):
    """Steps of 0.1 pass the pole and overflow soon after it."""
    encoder = FLOATER(4, 3, dynamics=Square(), method=method)
    nn.init.constant_(encoder.initial, 1e-3)
    with torch.no_grad():
        encoder.initial[2, 0, 1] = 0.5
    mode, ask = CALLS[call]
    with mode(), pytest.raises(RuntimeError, match=r'"value".*layer 0.*position (2\d|3\d)\b'):
        ask(encoder)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_dynamics_without_a_number(value, method, call):
    """From t = 2, position 20, on."""
    encoder = FLOATER(4, 3, STREAMS[4], dynamics=Gone(value), method=method)
    with torch.no_grad():
        encoder.initial[0, 1, 2] = 200.0
    mode, ask = CALLS[call]
    with mode(), pytest.raises(RuntimeError, match=r'"cross_query".*layer 1.*position (19|20|21)\b'):
        ask(encoder)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_parameters_without_a_number(method, value):
    encoder = FLOATER(4, 3, method=method)
    with torch.no_grad():
        encoder.initial[1, 1, 0] = value
    with pytest.raises(RuntimeError, match=r'"key".*layer 1.*position 0\b'):
        encoder(50)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_what_has_failed_fails_again(method):
    """And is not what is kept from then on."""
    encoder = FLOATER(4, 3, method=method)
    with torch.no_grad():
        encoder.initial[1, 1, 0] = NAN
        for _ in range(2):
            for ask in (lambda: encoder.at(torch.tensor([20.5])), lambda: encoder(10), lambda: encoder(30)):
                with pytest.raises(RuntimeError, match=r'"key".*layer 1'):
                    ask()


class Growth(nn.Module):
    """dp/dt = p: beyond the numbers of float32 at t = 88.7 + ln 2, position 894."""

    def forward(self, t, p):
        return p


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_last_numbers_there_are(method, mode):
    """Right to 3e-2, what hundreds of steps of rtol 1e-4 add up to, or an error: never what is not finite."""
    want = 0.5 * torch.exp(torch.arange(900).double() / 10)
    answered = 0
    for length in (850, 860, 870, 875, 880, 885, 890, 895):
        encoder = FLOATER(4, 1, ("input",), dynamics=Growth(), method=method)
        nn.init.constant_(encoder.initial, 0.5)
        try:
            with mode():
                out = encoder(length)[0, 0, :, 1].double()
        except RuntimeError as error:
            assert "layer 0" in str(error)  # noqa: PT017
            assert length > 860  # steps are as long as ten positions and more
        else:
            answered += 1
            torch.testing.assert_close(out, want[:length], rtol=3e-2, atol=0)
    assert answered >= 2


@pytest.mark.parametrize("method", ["rk4", "euler"])
def test_fixed_steps_on_the_way_to_overflow(method):
    """What these steps make of p' = p^2 beyond its pole at t = 2 is what they make of it, or an error."""
    square = lambda t, p: p * p
    encoder = FLOATER(4, 1, ("input",), dynamics=Square(), method=method)
    nn.init.constant_(encoder.initial, 0.5)
    for length in range(20, 32):
        times = [0.1 * i for i in range(length)]
        try:
            out = encoder(length).double()
        except RuntimeError:
            assert length > 22
        else:
            want = oracle.fixed_steps(method, square, encoder.initial, times, 0.1)
            torch.testing.assert_close(out, want, rtol=1e-2, atol=0)


def test_the_published_dynamics_diverge():
    """Three times Xavier-normal weights, dim 8: beyond the numbers of float32 within 4096 positions."""
    encoder = FLOATER(8, 2, gain=3.0)
    nn.init.xavier_uniform_(encoder.initial)
    with torch.no_grad():
        encoder.dynamics.linear1.weight.mul_(3)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"(query|key|value).*layer [01].*position \d+.*delta_t"),
    ):
        encoder(4096)


class Stiff(nn.Module):
    """dp/dt = -a (p - cos t) with one large a."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(3, 2, 1))
        with torch.no_grad():
            self.rate[2, 1] = 1e5

    def forward(self, t, p):
        return -self.rate * (p - torch.cos(t))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_stiff_trajectory(method, call):
    """Explicit steps of at most 3e-5: far more than 500 over 40 units of time."""
    encoder = FLOATER(4, 2, dynamics=Stiff(), max_steps=500, method=method)
    mode, ask = CALLS[call]
    with mode(), pytest.raises(RuntimeError, match=r'max_steps.*500.*position 0\b.*"value".*layer 1'):
        ask(encoder)


def test_a_failed_extension_leaves_the_table_as_it_was():
    encoder = FLOATER(4, 1, ("input",), dynamics=Square())
    nn.init.constant_(encoder.initial, 0.5)
    with torch.no_grad():
        before = encoder(17).clone()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="position"):
                encoder(400)
            assert torch.equal(encoder(17), before)
            assert encoder(18).isfinite().all()
        again = FLOATER(4, 1, ("input",), dynamics=Square())
        nn.init.constant_(again.initial, 0.5)
        assert torch.equal(encoder(19), again(19))


def test_max_steps_is_of_one_call():
    """As many positions as are wanted can be had piece by piece."""
    encoder = FLOATER(12, 1, dynamics=Rotation(12), max_steps=60).requires_grad_(False)
    nn.init.normal_(encoder.initial)
    with pytest.raises(RuntimeError, match="max_steps"):
        encoder(2000)
    for length in range(100, 2001, 100):
        encoder(length)
    assert encoder(2000).isfinite().all()
