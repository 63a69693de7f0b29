"""FLOATER's position vectors against the oracle: lengths, methods, positions between, what a layer makes of them."""

from __future__ import annotations

import functools

import oracle_floater as oracle
import pytest
import torch
import torchdiffeq
from floater_cases import CASES, TOLERANCE, Case, Rotation, Tanh, Wave, close, field, truth, truth_at
from torch import nn

from posattn import FLOATER
from posattn.floater import MLPDynamics

LONGEST = 127
FIXED = ["rk4", "midpoint", "euler"]


@functools.cache
def expected(name: str) -> torch.Tensor:
    with torch.no_grad():
        return truth(CASES[name].encoder(), LONGEST)


# -------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("name", CASES)
def test_two_witnesses_agree(name):
    """The oracle's own steps and torchdiffeq's dopri8 at 1e-12, which lands on every position."""
    encoder, times = CASES[name].encoder(), torch.arange(33, dtype=torch.float64) * CASES[name].delta_t
    with torch.no_grad():
        field_ = field(encoder)
        other = torchdiffeq.odeint(
            lambda t, p: field_(t.item(), p), encoder.initial, times, method="dopri8", rtol=1e-12, atol=1e-12,
            options=dict(step_t=times[1:]),
        )  # fmt: skip
    close(other.movedim(0, 2), expected(name)[:, :, :33], 1e-9)


def test_trajectories_with_a_formula():
    """Rotations are matrix exponentials, waves are sines: the oracle and the encoder have both."""
    times = torch.arange(40, dtype=torch.float64) * 0.1
    for dynamics in (Rotation, Wave):
        encoder = Case(dynamics, 6, 2, 3).encoder()
        with torch.no_grad():
            made = encoder.dynamics
            if dynamics is Rotation:
                turned = torch.linalg.matrix_exp((made.generator - made.generator.T) * times[:, None, None])
                want = torch.einsum("nde,sle->slnd", turned, encoder.initial)
            else:
                moved = torch.sin(made.turn * times[:, None] + made.phase) - torch.sin(made.phase)
                want = encoder.initial[:, :, None] + moved * made.height / made.turn
            close(truth(encoder, 40), want, 1e-9)
            close(encoder(40), want, 1e-8)


# --------------------------------------------------------------------------------------------- lengths and methods


@pytest.mark.parametrize("length", [1, 2, 63, 65, LONGEST])
@pytest.mark.parametrize("name", CASES)
def test_positions(name, length):
    case, encoder = CASES[name], CASES[name].encoder()
    with torch.set_grad_enabled(length != 65):  # one length by the table, all by the other tests
        out = encoder(length)
    assert out.requires_grad == (length != 65)
    assert out.shape == (case.streams, case.layers, length, case.dim)
    assert out.dtype == torch.float64
    close(out, expected(name)[:, :, :length], TOLERANCE[name])
    assert torch.equal(out[:, :, 0], encoder.initial)


@pytest.mark.parametrize("name", ["published, slow", "tanh", "wave"])
def test_the_method_of_low_order(name):
    """Errors of some hundred steps, each of at most rtol, add up to less than 100 rtol."""
    encoder = CASES[name].encoder(method="bosh3", rtol=1e-6, atol=1e-7)
    close(encoder(33), expected(name)[:, :, :33], 1e-4)


@pytest.mark.parametrize("step_size", [None, 0.25, 0.03])
@pytest.mark.parametrize("name", ["published, xavier", "tanh", "rotation"])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps(method, name, step_size):
    """The same steps, and the same cubics between them, to rounding."""
    case = CASES[name]
    encoder = case.encoder(method=method, step_size=step_size)
    times = [i * case.delta_t for i in range(33)]
    step_size = step_size or case.delta_t
    want = oracle.fixed_steps(method, field(encoder), encoder.initial, times, step_size)
    close(encoder(33), want, 1e-11)
    between = torch.tensor([0.3, 2.71, 30.9], dtype=torch.float64)
    want = oracle.fixed_steps(
        method, field(encoder), encoder.initial, (between * case.delta_t).tolist(), step_size
    )
    close(encoder.at(between), want, 1e-11)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_order_of_fixed_steps(method, order):
    """Half the step errs by 1 / 2^order, between the steps too; 0.8 for what comes after the leading term."""
    errors = [
        (CASES["tanh"].encoder(method=method, step_size=0.32 / parts)(33) - expected("tanh")[:, :, :33])
        .abs()
        .max()
        for parts in (2, 4, 8)
    ]
    assert errors[0] / errors[1] > 0.8 * 2**order
    assert errors[1] / errors[2] > 0.8 * 2**order


# --------------------------------------------------------------------------------------------- positions between


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["gradients", "kept"])
def test_any_positions(name, mode):
    """Unsorted, repeated, between, of any shape."""
    case, encoder = CASES[name], CASES[name].encoder()
    generator = torch.Generator().manual_seed(1)
    many = 30 * torch.rand(3, 7, generator=generator, dtype=torch.float64)
    many[1, 2] = many[2, 4] = many[0, 1]
    many[2, 0] = 0
    with torch.set_grad_enabled(mode == "gradients"):
        for positions in (many.T[None], many[0, 0], torch.tensor([[5], [2], [5]])):
            out = encoder.at(positions)
            assert out.shape == (case.streams, case.layers, *positions.shape, case.dim)
            close(out, truth_at(encoder, positions).detach(), TOLERANCE[name])
            assert out.requires_grad == (mode == "gradients")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_positions(dtype):
    """Those of encoder(length), bit by bit: the same sums."""
    encoder, positions = CASES["tanh"].encoder(rtol=1e-6), torch.tensor([3, 120, 0, 17, 3], dtype=dtype)
    assert torch.equal(encoder.at(positions), encoder(121)[:, :, positions.long()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_positions_of_other_floating_dtypes(dtype):
    """Taken for what they are, exactly: 12.375 is a number of all these dtypes."""
    encoder = CASES["tanh"].encoder(rtol=1e-6)
    positions = torch.tensor([12.375, 0.5, 3.0])
    assert torch.equal(encoder.at(positions.to(dtype)), encoder.at(positions.double()))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_no_positions(shape):
    encoder = CASES["rotation"].encoder()
    for dtype in (torch.float32, torch.int64):
        assert encoder.at(torch.zeros(shape, dtype=dtype)).shape == (3, 2, *shape, 12)


class Drift(nn.Module):
    """dp/dt = v."""

    def __init__(self, dim):
        super().__init__()
        self.velocity = nn.Parameter(torch.randn(dim))

    def forward(self, t, p):
        return self.velocity.expand_as(p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_far_positions_are_not_rounded(dtype):
    """2^24 + 1 is no number of float32, and is not 2^24 either; the vectors are rounded, as their dtype has it."""
    encoder = Case(Drift, 3, 1, 1, delta_t=2.0**-20).encoder(dtype)
    far = 2**24 + torch.tensor([0, 1, 2, 3])
    velocity, start = (p.detach().double() for p in (encoder.dynamics.velocity, encoder.initial))
    got = encoder.at(far).double()[0, 0]
    want = start[0, 0] + velocity * far[:, None] * 2.0**-20
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=0, atol=8 * eps * want.abs().max().item())
    if dtype == torch.float64:
        moved = (got[1:] - got[:-1]) * 2**20
        torch.testing.assert_close(moved, velocity.expand(3, -1), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the injection


def test_one_stream_and_one_layer_is_the_additive_form():
    """x + p, in float32 and with the default tolerances."""
    encoder = Case(Tanh, 16, 1, 1).encoder(torch.float32)
    x = torch.randn(2, 40, 16)
    want = x + truth(encoder, 40)[0, 0]
    close(x + encoder(40)[0, 0], want.detach(), 1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_a_still_flow_from_projection_biases_is_the_layer_it_was(causal):
    """The warm start: vectors that stay at the biases of a torch.nn.MultiheadAttention change nothing, to rounding."""
    layer, x = (
        nn.MultiheadAttention(12, 3, batch_first=True).double(),
        torch.randn(2, 17, 12, dtype=torch.float64),
    )
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    encoder = FLOATER(12, 1).double()
    with torch.no_grad():
        encoder.initial.copy_(layer.in_proj_bias.view(3, 1, 12))
    mask = torch.ones(17, 17).triu(1).bool() if causal else None
    want = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
    weights = (*layer.in_proj_weight.chunk(3), layer.out_proj.weight)
    got = oracle.attention(x, weights, layer.out_proj.bias, encoder(17)[:, 0], 3, causal)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_start():
    """Zeros and a flow that is still, unless asked for: the published start of h is Xavier-normal."""
    encoder = FLOATER(64, 3)
    assert encoder.initial.shape == (3, 3, 64)
    assert not encoder(100).any()
    assert {name: tuple(p.shape) for name, p in encoder.named_parameters()} == {
        "initial": (3, 3, 64),
        "dynamics.linear1.weight": (64, 65), "dynamics.linear1.bias": (64,),
        "dynamics.linear2.weight": (64, 65), "dynamics.linear2.bias": (64,),
    }  # fmt: skip
    assert (
        sum(p.numel() for p in FLOATER(512, 6).dynamics.parameters()) == 526_336
    )  # the paper's 526.3K, table 6
    for gain in (1.0, 0.25):
        made = MLPDynamics(64, gain=gain)
        for layer, wanted in ((made.linear1, 1.0), (made.linear2, gain)):
            deviation = wanted * (2 / 129) ** 0.5
            assert (
                abs(layer.weight.std() - deviation) < 5 * deviation / (2 * 64 * 65) ** 0.5
            )  # 5 standard errors
            assert not layer.bias.any()
    assert FLOATER(8, 1, gain=0.5).dynamics.linear2.weight.any()
    assert FLOATER(8, 1, dtype=torch.float64).dynamics.linear1.weight.dtype == torch.float64
    assert MLPDynamics(6, hidden=10).linear1.weight.shape == (10, 7)
