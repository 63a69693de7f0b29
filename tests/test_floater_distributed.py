"""DDP over two gloo processes gives the gradients of one process; torch.compile gives what eager gives."""

from __future__ import annotations

import pytest
import torch
from floater_cases import Tanh
from processes import gloo, pass_in_processes
from torch import nn

from posattn import FLOATER, MLPDynamics

DIM, HEADS, LAYERS = 12, 3, 2
KINDS = ["checkpoint", "direct", "adjoint"]


class Model(nn.Module):
    """Layers of attention with the published injection, and one solve for all of them."""

    def __init__(self, positions: FLOATER) -> None:
        super().__init__()
        self.positions = positions
        self.project = nn.ModuleList(nn.Linear(DIM, 3 * DIM, bias=False) for _ in range(LAYERS))
        self.mix = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))

    def forward(self, x):
        vectors = self.positions(x.shape[1])
        for i, (project, mix) in enumerate(zip(self.project, self.mix)):
            heads = [
                (part + vectors[stream, i]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for stream, part in enumerate(project(x).chunk(3, -1))
            ]
            out = nn.functional.scaled_dot_product_attention(*heads)
            x = x + mix(out.transpose(1, 2).flatten(2))
        return x


def build(gradient: str, dynamics: str = "published", dtype=torch.float64) -> Model:
    torch.manual_seed(1)
    made = Tanh(DIM) if dynamics == "tanh" else MLPDynamics(DIM, gain=0.3)
    positions = FLOATER(DIM, LAYERS, dynamics=made, gradient=gradient)
    nn.init.normal_(positions.initial)
    return Model(positions).to(dtype)


def batch(dtype=torch.float64, length: int = 12) -> torch.Tensor:
    return torch.randn(4, length, DIM, generator=torch.Generator().manual_seed(2)).to(dtype)


def train(model: nn.Module, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The gradients of two steps; an evaluation between them leaves a table behind."""
    optimizer, gradients = torch.optim.SGD(model.parameters(), lr=0.1), []
    own = model.module if hasattr(model, "module") else model
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sin().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in own.named_parameters()})
        optimizer.step()
        with torch.no_grad():
            own(x)
    return gradients


def check(gradient: str, dynamics: str, rank: int) -> None:
    """To rounding: every process solves the same trajectory, and DDP means their gradients.

    The steps of torchdiffeq's adjoint depend on the gradient that arrives: it is right within the solver's tolerance.
    """
    tolerance = dict(rtol=1e-2, atol=1e-4) if gradient == "adjoint" else dict(rtol=1e-9, atol=1e-12)
    model = nn.parallel.DistributedDataParallel(build(gradient, dynamics))
    got = train(model, batch()[2 * rank : 2 * rank + 2])
    for ours, theirs in zip(got, train(build(gradient, dynamics), batch())):
        for name, value in theirs.items():
            assert value.any(), name
            torch.testing.assert_close(ours[name], value, **tolerance)


@gloo
def test_two_processes_give_what_one_gives(tmp_path):
    """DDP's own default, no find_unused_parameters: every parameter has its gradient on every step."""
    kinds = [("checkpoint", "published"), ("checkpoint", "tanh"), ("direct", "tanh"), ("adjoint", "tanh")]
    pass_in_processes([(check, kind) for kind in kinds], 2, tmp_path, seconds=100)


# -------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize(
    ("backend", "gradient"), [("aot_eager", "checkpoint"), ("eager", "direct"), ("eager", "adjoint")]
)
def test_compiled(backend, gradient):
    """The solve may break the graph: values and gradients are eager's for several lengths, steps and modes."""
    torch._dynamo.reset()
    plain, model = build(gradient, dtype=torch.float32), build(gradient, dtype=torch.float32)
    compiled = torch.compile(model, backend=backend)
    for length in (12, 20):
        x = batch(torch.float32, length)
        want, got = plain(x), compiled(x)
        torch.testing.assert_close(got, want)
        want.square().mean().backward()
        got.square().mean().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), plain(x))
            for p in (*model.parameters(), *plain.parameters()):
                p.sub_(0.1 * p.grad)
            torch.testing.assert_close(compiled(x), plain(x))
        for own in (model, plain):
            own.zero_grad()


def test_compiled_evaluation():
    """Frozen and kept: what autograd needs of a table made within a compiled call is there after it."""
    torch._dynamo.reset()
    model = build("checkpoint", dtype=torch.float32).requires_grad_(False).eval()
    compiled = torch.compile(model, backend="aot_eager")
    want = [model(batch(torch.float32, length)) for length in (20, 30)]
    model.positions.clear()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for length, values in zip((20, 30), want):
                torch.testing.assert_close(compiled(batch(torch.float32, length)), values)
