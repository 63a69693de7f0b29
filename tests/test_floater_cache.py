"""The table that FLOATER keeps at evaluation: what it costs, what ends it, modes of autograd."""

from __future__ import annotations

import pytest
import torch
from floater_cases import CASES, Counted, Tanh, close
from floater_cases import counted as build
from torch import nn
from torch.func import functional_call

METHODS = ["dopri5", "bosh3", "rk4", "midpoint", "euler"]


def fresh(encoder, length):
    """What an encoder with these parameters says that has never been asked before."""
    other = build(encoder.initial.dtype)
    other.load_state_dict(encoder.state_dict())
    return other(length)


# ------------------------------------------------------------------------------------------------- one solve


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [(40, 200), (1, 200), (199, 200), (2, 3, 4, 5, 60, 61, 200)])
def test_extensions_are_one_solve(lengths, method):
    """Bit by bit, and each length on the way is what it is alone."""
    encoder, whole = build(method=method), build(method=method)(200)
    for length in lengths:
        assert torch.equal(encoder(length), whole[:, :, :length])
    assert torch.equal(encoder(33), whole[:, :, :33])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gradient", ["checkpoint", "direct", "adjoint"])
def test_shorter_lengths_are_slices_in_training_too(name, gradient):
    """What is kept is what training has: bit by bit, but for what torchdiffeq's adjoint solves for itself."""
    encoder = CASES[name].encoder(torch.float32, gradient=gradient)
    whole = encoder(127)
    assert whole.requires_grad
    with torch.no_grad():
        kept = encoder(127)
    for length in (1, 2, 63, 126, 127):
        part = encoder(length)
        if gradient == "adjoint":
            close(part, kept[:, :, :length], 1e-3)
        else:
            assert torch.equal(part, whole[:, :, :length])
    if gradient == "checkpoint":
        assert torch.equal(kept, whole)
    close(kept, whole.detach(), 1e-3 if gradient == "adjoint" else 1e-5)


def test_at_reads_the_same_table():
    encoder = build()
    whole, calls = encoder(200), encoder.dynamics.calls
    assert torch.equal(encoder.at(torch.arange(200)), whole)
    positions = torch.tensor([150.5, 3.25])
    between = encoder.at(positions)
    assert encoder.dynamics.calls == calls
    assert torch.equal(between, build().at(positions))
    further = encoder.at(torch.tensor([700.5]))
    assert torch.equal(further, build().at(torch.tensor([700.5])))
    assert torch.equal(encoder(701), build()(701))


def test_nothing_is_solved_twice():
    encoder = build()
    assert encoder.last_solve is None
    first, solve = encoder(200), encoder.last_solve
    assert solve.evaluations == encoder.dynamics.calls > 0
    for length in (200, 1, 77, 200):
        again = encoder(length)
        assert again.data_ptr() == first.data_ptr()  # a view, no copy
        assert torch.equal(again, first[:, :, :length])
    assert encoder.dynamics.calls == solve.evaluations
    assert encoder.last_solve == solve


def test_an_extension_costs_what_is_added():
    """No more than the steps of the stretch itself, and one to begin with."""
    encoder = build()
    encoder(2000)
    whole = encoder.last_solve
    encoder(2200)
    added = encoder.last_solve
    alone = build()
    alone(2200)
    assert whole.evaluations + added.evaluations == encoder.dynamics.calls
    assert added.end >= 219.9 > whole.end
    assert 0 < added.evaluations <= alone.last_solve.evaluations - whole.evaluations + 2 * 6
    assert added.evaluations < whole.evaluations / 5


def test_lengths_within_the_last_step_cost_nothing():
    """Steps are longer than positions are apart: most lengths need no evaluation at all."""
    encoder, extensions = build(delta_t=0.01), 0
    for length in range(1, 400):
        before = encoder.dynamics.calls
        encoder(length)
        extensions += encoder.dynamics.calls > before
    assert extensions < 60


# --------------------------------------------------------------------------------------------------- what ends it


def optimizer_step(encoder):
    encoder.requires_grad_(True)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder(20).square().sum().backward()
    optimizer.step()
    encoder.requires_grad_(False)


def fused_step(encoder):
    """Parameters do not count it."""
    encoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)
    encoder(20).square().sum().backward()
    optimizer.step()
    encoder.requires_grad_(False)


def in_place(encoder):
    with torch.no_grad():
        encoder.dynamics.inner.matrix.mul_(1.5)


def initial_in_place(encoder):
    with torch.no_grad():
        encoder.initial[1, 1, 3] += 1


def load(encoder):
    encoder.load_state_dict({name: 1.25 * value for name, value in encoder.state_dict().items()})


def load_and_assign(encoder):
    encoder.load_state_dict({name: 1.25 * value for name, value in encoder.state_dict().items()}, assign=True)


def data(encoder):
    encoder.dynamics.inner.shift.data = torch.randn(12)


def data_twice(encoder):
    """The second may lie where the first lay before."""
    for _ in range(2):
        encoder.dynamics.inner.shift.data = torch.randn(12)


def another_parameter(encoder):
    encoder.dynamics.inner.slope = nn.Parameter(torch.randn(12), requires_grad=False)


def another_parameter_twice(encoder):
    for _ in range(2):
        del encoder.initial
        encoder.initial = nn.Parameter(torch.randn(3, 2, 12), requires_grad=False)


def another_dynamics(encoder):
    encoder.dynamics = Counted(Tanh(12)).requires_grad_(False)


CHANGES = [
    optimizer_step, fused_step, in_place, initial_in_place, load, load_and_assign, data, data_twice, another_parameter,
    another_parameter_twice, another_dynamics,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters(change):
    encoder = build()
    before = encoder(50).clone()
    change(encoder)
    after = encoder(50)
    assert torch.equal(after, fresh(encoder, 50))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(dtype):
    encoder = build()
    encoder(50)
    calls = encoder.dynamics.calls
    out = encoder.to(dtype)(50)
    assert out.dtype == dtype
    assert encoder.dynamics.calls > calls  # solved again, not converted
    assert torch.equal(out, fresh(encoder, 50))
    assert torch.equal(encoder.float()(50), fresh(encoder, 50))


@pytest.mark.parametrize("change", ["train", "eval", "clear", "train and eval"])
def test_solved_anew(change):
    encoder = build()
    before = encoder(50)
    if change == "train":
        encoder.eval()
        encoder(50)
    calls = encoder.dynamics.calls
    {
        "train": encoder.train, "eval": encoder.eval, "clear": encoder.clear,
        "train and eval": lambda: encoder.train(not encoder.training).train(not encoder.training),
    }[change]()  # fmt: skip
    assert torch.equal(encoder(50), before)
    assert encoder.dynamics.calls > calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "write", [lambda view: view.zero_(), lambda view: view[1, 0, 3].add_(1), torch.relu_]
)
def test_a_write_into_what_was_returned(write, mode):
    encoder, want = build(), build()(60)
    with mode():
        write(encoder(50))
        assert torch.equal(encoder(50), want[:, :, :50])
        write(encoder(20))
        assert torch.equal(encoder(60), want)
        assert torch.equal(encoder.at(torch.arange(60)), want)


def test_parameters_given_for_one_call():
    """functional_call between kept calls: neither sees the other's table."""
    encoder = build()
    before = encoder(50).clone()
    given = {name: value * 1.5 for name, value in encoder.state_dict().items()}
    for _ in range(2):
        with torch.no_grad():
            out = functional_call(encoder, given, (50,))
        assert not torch.equal(out, before)
        assert torch.equal(encoder(50), before)


# ------------------------------------------------------------------------------------------------- modes of autograd


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_normal_mode_after_others(first):
    """What inference_mode left behind can be used where autograd saves it."""
    encoder, want = build(), build()(60)
    with first():
        assert torch.equal(encoder(50), want[:, :, :50])
    x = torch.randn(3, 2, 60, 12, requires_grad=True)
    for length in (50, 60, 20):
        (x[:, :, :length] * encoder(length)).sum().backward()
        assert torch.equal(x.grad[:, :, :length], want[:, :, :length])
        assert not x.grad[:, :, length:].any()
        x.grad = None
    with first():
        encoder(90)
    assert torch.equal(encoder(60), want)


def test_gradients_after_a_kept_evaluation():
    encoder = build(torch.float64).requires_grad_(True)
    for evaluation in (torch.no_grad, torch.inference_mode):
        with evaluation():
            kept = encoder.eval()(50).clone()
        out = encoder(50)
        assert out.requires_grad
        assert torch.equal(out, kept)
        encoder.zero_grad()
        out.square().sum().backward()
        assert all(p.grad.any() for p in encoder.parameters())


def test_parameters_made_in_inference_mode():
    """They have no version counter; the encoder answers, and never with an old table."""
    with torch.inference_mode():
        encoder = build()
        before = encoder(50).clone()
        assert torch.equal(before, build()(50))
        encoder.initial.add_(1)
        assert torch.equal(encoder(50), fresh(encoder, 50))
        assert not torch.equal(encoder(50), before)
