"""Tables of biases are kept in evaluation only, and of biases that are known through and through."""

from __future__ import annotations

import pytest
import torch
from bias_cases import make
from decode_cases import K, Q, right
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import posattn
from posattn import KERPLE, TISA, kept_table
from posattn.changes import last_step


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_training_between_evaluations(kind):
    bias = TISA(2)
    optimizer = kind(bias.parameters(), lr=0.5, fused=True)
    seen = []
    for _ in range(3):
        seen.append(right(bias.eval()))
        with torch.enable_grad():
            posattn.attention(Q, K, K, bias.train()).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


def test_nothing_is_kept_in_training():
    """Checkpointing runs the forward pass of training without gradients."""
    bias = TISA(2)
    assert kept_table.kept_table(bias, 10, torch.float32) is None
    optimizer = torch.optim.AdamW(bias.parameters(), lr=0.5, fused=True)
    with torch.enable_grad():
        for _ in range(3):
            query = Q.clone().requires_grad_()
            out = checkpoint(posattn.attention, query, K, K, bias, use_reentrant=True)
            torch.testing.assert_close(
                out, posattn.attention_reference(query, K, K, bias), atol=1e-5, rtol=1e-5
            )
            out.square().sum().backward()
            optimizer.step()


def test_modes():
    bias = TISA(2).eval()
    assert kept_table.kept_table(bias, 10, torch.float32) is not None
    with torch.enable_grad():
        assert kept_table.kept_table(bias, 10, torch.float32) is None
    with torch.inference_mode():
        table, _ = kept_table.kept_table(bias, 10, torch.float32)
        assert not table.is_inference()
        young = TISA(2).eval()
        assert kept_table.kept_table(young, 10, torch.float32) is None  # its parameters count no changes


def test_steps_are_told_without_new_graphs():
    """One graph serves any number of them."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    graphs, seen = [], [last_step()]
    compiled = torch.compile(optimizer.step, backend=lambda graph, _: graphs.append(graph) or graph)
    for _ in range(4):
        parameter.grad = torch.ones(2)
        compiled()
        seen.append(last_step())
    assert len(graphs) == 1 and len(set(seen)) == 5
    optimizer.step()
    assert last_step() is not seen[-1]


class Schedule(torch.nn.Module):
    factor = 1.0

    def forward(self, x):
        return self.factor * x


class Own(posattn.Bias):
    """Of what nobody has registered."""

    def __init__(self):
        super().__init__(2)
        self.source, self.factor, self.plain = [torch.nn.Linear(1, 2)], 1.0, torch.ones(2)

    def values(self, offsets):
        return self.factor * self.plain[:, None] * self.source[0](offsets[:, None].float() / 8).T


def own_number(bias):
    bias.factor = 5.0


def own_tensor(bias):
    bias.plain.data.mul_(3.0)


def own_list(bias):
    bias.source[0].weight.data.add_(1.0)


@pytest.mark.parametrize("change", [own_number, own_tensor, own_list])
def test_a_bias_of_another_package(change):
    bias = Own().eval()
    before = right(bias)
    assert kept_table.facts_of(bias) is None
    change(bias)
    assert not torch.allclose(right(bias), before)


def test_parametrizations_and_attributes():
    bias = TISA(2).eval()
    right(bias)
    schedule = Schedule()
    parametrize.register_parametrization(bias, "amplitudes", schedule)
    before = right(bias)
    assert kept_table.facts_of(bias) is None
    schedule.factor = -2.0
    assert not torch.allclose(right(bias), before)
    bias, double = TISA(2).eval(), TISA(2)
    right(bias)
    bias.values = lambda offsets: 2.0 * double.values(offsets)
    assert kept_table.facts_of(bias) is None
    right(bias)


def test_parts_of_modules():
    """All of this package have facts; not a DAPE of somebody's base, and not what another class makes of them."""
    for module in (make("tisa"), make("t5"), posattn.FIRE(2), posattn.DAPE(2, KERPLE(2), 5)):
        assert kept_table.facts_of(module) is not None
    assert kept_table.facts_of(posattn.DAPE(2, Own(), 5)) is None
    assert (
        kept_table.facts_of(type("Sharded", (TISA,), {"__module__": "posattn.distributed.heads"})(2)) is None
    )
