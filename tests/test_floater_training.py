"""When gradients flow through FLOATER: training steps, accumulation, frozen and borrowed parameters; their memory."""

from __future__ import annotations

import pytest
import torch
from floater_cases import STREAMS, Case, close, gradients, small, truth
from torch import nn
from torch.func import functional_call

from posattn import FLOATER
from posattn.floater import MLPDynamics

EXACT = ["checkpoint", "direct"]
KINDS = [*EXACT, "adjoint"]


@pytest.mark.parametrize(("mode", "steps"), [("train", 4), ("eval", 2)])
def test_every_training_step_has_its_gradient(mode, steps):
    """The authors' code gives none on 399 steps of 400. Kinks, as above."""
    encoder = getattr(Case(None, 6, 2, 3, gain=0.3, delta_t=0.05).encoder(), mode)()
    optimizer, target = torch.optim.Adam(encoder.parameters(), lr=0.01), torch.randn(3, 2, 12, 6).double()
    losses = []
    for _ in range(steps):
        want = gradients(truth(encoder, 12), encoder, target)
        optimizer.zero_grad()
        out = encoder(12)
        ((out * target).sum() / 12).backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad.abs().max() > 1e-3, name
            close(parameter.grad, want[name], 1e-3)
        optimizer.step()
        losses.append((out * target).mean().item())
        with torch.no_grad():
            encoder(30)  # evaluation in between changes nothing
    assert losses == sorted(losses, reverse=True)


def test_a_still_flow_begins_to_move():
    """At the warm start `initial` and the second layer have gradients, and after one step all have."""
    encoder = FLOATER(8, 2).double()
    nn.init.normal_(encoder.initial)
    optimizer, weights = torch.optim.SGD(encoder.parameters(), lr=1.0), torch.randn(3, 2, 20, 8).double()
    for step in range(2):
        optimizer.zero_grad()
        (encoder(20) * weights).mean().backward()
        moved = {name for name, p in encoder.named_parameters() if p.grad.any()}
        first = {"initial", "dynamics.linear2.weight", "dynamics.linear2.bias"}
        assert moved == (first if step == 0 else {name for name, _ in encoder.named_parameters()})
        optimizer.step()


@pytest.mark.parametrize("gradient", KINDS)
def test_accumulation_and_positions_read_twice(gradient):
    encoder = small("tanh", gradient=gradient)
    weights = torch.randn(2, 2, 2, 12, 3).double()
    first, second = (gradients(encoder(12), encoder, w) for w in weights)
    both = gradients(encoder(12), encoder, weights.sum(0))
    one, other = encoder(12), encoder(12)
    ((one * weights[0]).sum() / 12).backward()
    ((other * weights[1]).sum() / 12).backward()
    for name, parameter in encoder.named_parameters():
        close(parameter.grad, first[name] + second[name], 1e-12)
        close(parameter.grad, both[name], 1e-6 if gradient == "adjoint" else 1e-12)


@pytest.mark.parametrize("gradient", KINDS)
@pytest.mark.parametrize("frozen", ["dynamics", "initial", "one weight"])
def test_frozen_parameters(frozen, gradient):
    whole, encoder = (small("tanh", gradient=gradient) for _ in range(2))
    want = gradients(whole(12), whole)
    stopped = {
        "dynamics": encoder.dynamics, "initial": encoder.initial, "one weight": encoder.dynamics.matrix
    }[frozen].requires_grad_(False)  # fmt: skip
    stopped = {id(p) for p in (stopped.parameters() if isinstance(stopped, nn.Module) else [stopped])}
    got = gradients(encoder(12), encoder)
    assert got.keys() == {name for name, p in encoder.named_parameters() if id(p) not in stopped}
    for name, value in got.items():
        close(value, want[name], 1e-7 if gradient == "adjoint" else 1e-12)
    encoder.requires_grad_(False)
    assert not encoder(12).requires_grad


@pytest.mark.parametrize("gradient", KINDS)
@pytest.mark.parametrize("name", ["initial", "dynamics.matrix"])
def test_a_parameter_changed_before_the_backward_pass(name, gradient):
    encoder = small("tanh", gradient=gradient)
    out = encoder(12)
    with torch.no_grad():
        encoder.get_parameter(name).mul_(2)
    if (
        name == "dynamics.matrix" or gradient == "checkpoint"
    ):  # others hold a copy of `initial`, and are right
        with pytest.raises(RuntimeError, match=r"in-?place"):
            out.sum().backward()


@pytest.mark.parametrize("gradient", KINDS)
def test_functional_call(gradient):
    """Values and gradients are of the parameters given, and the module's own are as before."""
    encoder = small("tanh", gradient=gradient)
    with torch.no_grad():
        before = encoder(12).clone()
    given = {name: (1.5 * p).detach().requires_grad_() for name, p in encoder.named_parameters()}
    other = small("tanh", gradient=gradient)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    out = functional_call(encoder, given, (12,))
    assert torch.equal(out, other(12))
    out.square().mean().backward()
    other(12).square().mean().backward()
    for name, p in other.named_parameters():
        close(given[name].grad, p.grad, 1e-12)
    assert all(p.grad is None for p in encoder.parameters())
    with torch.no_grad():
        assert torch.equal(functional_call(encoder, given, (12,)), other(12))
        assert torch.equal(encoder(12), before)


# ------------------------------------------------------------------------------------------------------- memory


def held(encoder: FLOATER, length: int) -> tuple[int, int]:
    """Bytes that autograd keeps of one call, parameters and output apart, and the steps of its solve."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = encoder(length)
    assert out.requires_grad
    return sum(kept.values()), encoder.last_solve.steps


def test_memory_grows_by_a_state_a_step():
    """Of checkpoint: one state and one slope at most a step; direct keeps ten times as much and more."""
    state = 3 * 6 * 64 * 4
    sizes = {}
    for gradient in EXACT:
        made = MLPDynamics(64, gain=0.2)
        encoder = FLOATER(64, 6, STREAMS[3], made, rtol=1e-6, atol=1e-7, gradient=gradient)
        nn.init.normal_(encoder.initial)
        sizes[gradient] = [held(encoder, length) for length in (32, 256)]
    (short, few), (long, many) = sizes["checkpoint"]
    assert many - few > 20
    assert long - short < 2.1 * state * (many - few) + 8 * (256 - 32)
    (short_, few_), (long_, many_) = sizes["direct"]
    assert (long_ - short_) / (many_ - few_) > 10 * state
