"""One solve for several backward passes: the gradients are those of a solve a pass."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import posattn


@pytest.fixture
def encoder():
    made = posattn.FLOATER(8, 2, gain=0.3, dtype=torch.float64)
    torch.nn.init.normal_(made.initial)
    return made


def gradients(encoder):
    made = [parameter.grad for parameter in encoder.parameters()]
    encoder.zero_grad()
    return made


def test_gradients_are_those_of_a_solve_a_pass(encoder):
    """Lengths fall and grow; sums in another order: rounding of float64."""
    weights = [torch.randn(3, 2, length, 8, dtype=torch.float64) for length in (5, 9, 7, 33, 9)]
    for weight in weights:
        (encoder(weight.shape[2]) * weight).sum().backward()
    want = gradients(encoder)
    with encoder.hold():
        for weight in weights:
            (encoder(weight.shape[2]) * weight).sum().backward()
            assert all(parameter.grad is None for parameter in encoder.parameters())
    for got, wanted in zip(gradients(encoder), want):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))


def test_one_solve(encoder):
    with encoder.hold():
        first = encoder(40)
        solved = encoder.last_solve
        second = encoder(30)
        assert second.data_ptr() == first.data_ptr()
        assert encoder.last_solve is solved
    assert encoder(40).data_ptr() != first.data_ptr()


def test_optimizers_leave_the_parameters_alone(encoder):
    """Adam, whose momentum would move them with gradients of zero; and move them once after the block."""
    weight = torch.nn.Parameter(torch.randn(8, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight, *encoder.parameters()], lr=0.1)
    before = [parameter.detach().clone() for parameter in encoder.parameters()]
    for _ in range(2):
        with encoder.hold():
            for _ in range(3):
                optimizer.zero_grad()
                kept = weight.detach().clone()
                (encoder(9) @ weight).square().sum().backward()
                optimizer.step()
                assert not torch.equal(weight, kept)
                assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before))
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(list(encoder.parameters())[:1], before))
        before = [parameter.detach().clone() for parameter in encoder.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_changed_within_are_an_error(encoder, dtype):
    encoder = encoder.to(dtype)

    def train():
        with encoder.hold():
            encoder(5).sum().backward()
            with torch.no_grad():
                encoder.initial.add_(1)

    with pytest.raises(RuntimeError, match="have changed within a block of hold"):
        train()
    encoder(5).sum().backward()  # the block is over
    assert encoder.initial.grad is not None


def test_a_backward_pass_after_the_block_is_an_error(encoder):
    with encoder.hold():
        loss = encoder(5).sum()
    with pytest.raises(RuntimeError, match="after the block of hold"):
        loss.backward()


def test_several_processes_have_to_say_so(encoder, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="local=True"), encoder.hold():
        pass
    with encoder.hold(local=True):
        encoder(5).sum().backward()
    assert encoder.initial.grad is not None


def test_blocks_are_not_nested(encoder):
    with encoder.hold(), pytest.raises(RuntimeError, match="cannot be nested"), encoder.hold():
        pass


def test_an_error_within_passes_and_ends_the_block(encoder):
    def train():
        with encoder.hold():
            encoder(5).sum().backward()
            raise KeyError("of the training loop")

    with pytest.raises(KeyError):
        train()
    assert encoder.initial.grad is None
    encoder(5).sum().backward()
    assert encoder.initial.grad is not None


def test_evaluation_within(encoder):
    with encoder.hold():
        trained = encoder(9)
        with torch.no_grad():
            assert torch.equal(encoder(9), trained)


def test_copies_hold_nothing(encoder):
    with encoder.hold():
        encoder(9)
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            other(9).sum().backward()
            assert other.initial.grad is not None


def test_models_with_encoders():
    """An encoder and a decoder with three FLOATERs: the block's gradients are those of a solve a pass, in float64."""
    model = torch.nn.Transformer(16, 2, 1, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    attachment = posattn.floater.attach(model)
    for encoder in attachment.encoders.values():
        torch.nn.init.normal_(encoder.dynamics.linear2.weight, std=0.1)
    source, target = torch.randn(2, 2, 7, 16, dtype=torch.float64)

    def backward():
        for length in (7, 5):
            model(source[:, :length], target).square().sum().backward()

    backward()
    want = gradients(attachment)
    with attachment.hold():
        backward()
        assert all(parameter.grad is None for parameter in attachment.parameters())
    for got, wanted in zip(gradients(attachment), want):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
