"""Dynamics of all kinds as modules: shared parts, 16 bits, dropout, wrappers; and who may use them meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from posattn import FLOATER, MLPDynamics


class Shared(nn.Module):
    """One layer under two names, and a buffer."""

    def __init__(self, dim):
        super().__init__()
        self.first = nn.Linear(dim, dim)
        self.second = self.first
        self.register_buffer("size", torch.tensor(0.1))

    def forward(self, t, p):
        return self.size * (torch.tanh(self.second(p)) + self.first(p))


@pytest.mark.parametrize("gradient", ["checkpoint", "direct", "adjoint"])
def test_shared_modules_in_16_bits(gradient):
    """Solved in fp32 with gradients rounded to bf16: those of fp32 parameters to bf16's precision, 8 bits."""
    encoder = FLOATER(6, 2, dynamics=Shared(6), gradient=gradient, dtype=torch.bfloat16)
    nn.init.normal_(encoder.initial)
    encoder(9).float().square().sum().backward()
    got = {name: parameter.grad.float() for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    encoder.float()(9).bfloat16().float().square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (got[name] - parameter.grad).norm() <= 2e-2 * parameter.grad.norm(), name


def test_the_module_is_left_alone():
    """By a solve of 16-bit parameters, in forward and backward, whatever other threads do with it at the time."""
    encoder = FLOATER(6, 2, gain=0.1, dtype=torch.bfloat16)
    parameters, errors = list(encoder.dynamics.parameters()), []

    def evaluate():
        with torch.no_grad():
            for length in range(200, 230):
                encoder(length)

    def train():
        for _ in range(4):
            encoder(30).float().sum().backward()

    def run(what):
        try:
            what()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(what,)) for what in (evaluate, evaluate, train, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(a is b for a, b in zip(encoder.dynamics.parameters(), parameters))


def test_dropout_is_refused_in_training_mode_only():
    encoder = FLOATER(4, 1, dynamics=nn.Module())
    encoder.dynamics = type("Dropped", (MLPDynamics,), {"forward": lambda self, t, p: self.drop(p)})(4)
    encoder.dynamics.drop = nn.Dropout(0.5)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(ValueError, match=r"dynamics\.drop is Dropout.* in training mode"):
            encoder.train()(3)
    assert torch.equal(encoder.eval()(3), torch.zeros(3, 1, 3, 4))


@pytest.mark.parametrize("kind", ["weight_norm", "compiled"])
def test_wrapped_dynamics(kind):
    dynamics = MLPDynamics(6, gain=0.1)
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(dynamics.linear2)
    else:
        dynamics = torch.compile(dynamics, backend="eager")
    encoder = FLOATER(6, 2, dynamics=dynamics)
    nn.init.normal_(encoder.initial)
    made = encoder(9)
    made.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    if kind == "compiled":
        with pytest.raises(RuntimeError, match="forward is its own"):
            encoder.to(torch.bfloat16)(9)
    else:
        exact = encoder.bfloat16()(9).float()
        torch.testing.assert_close(exact, made, rtol=2**-6, atol=2**-6 * float(made.detach().abs().max()))


def test_frozen_vectors_stay_valid_for_backward():
    """A table that grows between a forward and its backward."""
    encoder = FLOATER(4, 1, gain=1.0).requires_grad_(False)
    weight = torch.ones(4, requires_grad=True)
    first = encoder(10)
    loss = (weight * first).sum()
    encoder(20)
    loss.backward()
    torch.testing.assert_close(weight.grad, first.sum((0, 1, 2)))


def test_what_is_no_integer_but_counts_as_one():
    numpy = pytest.importorskip("numpy")
    assert FLOATER(4, 2)(numpy.int64(3)).shape == (3, 2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float16, torch.float64])
def test_dtypes_of_positions(dtype):
    encoder = FLOATER(4, 2, gain=0.1)
    positions = torch.tensor([5, 0, 2]).to(dtype)
    assert torch.equal(encoder.at(positions), encoder(6)[:, :, [5, 0, 2]])
    assert torch.equal(encoder(positions), encoder.at(positions))


def test_nothing_to_solve_has_gradients_of_zero():
    """As DistributedDataParallel waits for all."""
    encoder = FLOATER(4, 2)
    for made in (encoder(0), encoder.at(torch.zeros(0, 3)), encoder(1) * 0):
        encoder.zero_grad()
        made.sum().backward()
        assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in encoder.parameters())


def test_on_the_meta_device():
    encoder = FLOATER(4, 2, device="meta")
    assert encoder(7).is_meta
    assert encoder(7).shape == (3, 2, 7, 4)
    assert encoder.at(torch.zeros(2, 3)).shape == (3, 2, 2, 3, 4)


def test_functorch_is_refused():
    encoder = FLOATER(4, 2)
    call = lambda given: torch.func.functional_call(encoder, given, (5,)).sum()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(call)(dict(encoder.named_parameters()))


def test_too_many_fixed_steps_are_refused_at_once():
    encoder = FLOATER(4, 1, method="rk4", max_steps=50)
    assert encoder(51).shape[2] == 51
    with pytest.raises(RuntimeError, match=r"would take 1000 steps .* max_steps = 50"):
        encoder(1001)


def test_a_change_of_mode_within_the_dynamics():
    encoder = FLOATER(4, 1, gain=0.5)
    nn.init.normal_(encoder.initial)
    with torch.no_grad():
        first = encoder(9)
        assert encoder(9).data_ptr() == first.data_ptr()
        encoder.dynamics.eval()
        assert encoder(9).data_ptr() != first.data_ptr()
