"""FLOATER with the parameters of the authors' code: names and shapes as their models have them."""

from __future__ import annotations

import functools

import oracle_floater as oracle
import pytest
import torch
from floater_cases import close

from posattn import FLOATER

LAYERS, DIM = 3, 8
STATES = {  # of the vectors, of the dynamics, their streams in the order of the first axis
    "encoder": ("encoder.proj_bias", "encoder.proj_flow", ("query", "key", "value")),
    "decoder": (
        "decoder.proj_bias_selfattn", "decoder.proj_flow_selfattn", ("cross_query", "query", "key", "value"),
    ),
    "cross": ("decoder.proj_bias_encattn_kv", "decoder.proj_flow_encattn_kv", ("cross_key", "cross_value")),
}  # fmt: skip
CALLS = {
    "encoder": {},
    "decoder": dict(prefix="decoder."),
    "cross": dict(prefix="decoder.", part="cross"),
}


def flow(prefix: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Xavier-normal weights as theirs; biases too, which theirs begin at zero."""
    parameters = {}
    for layer in (0, 2):
        weight = torch.randn(DIM, DIM + 1, generator=generator) * (2 / (2 * DIM + 1)) ** 0.5
        parameters[f"{prefix}.layers.{layer}.linear.weight"] = weight
        parameters[f"{prefix}.layers.{layer}.linear.bias"] = torch.randn(DIM, generator=generator) / 4
    return parameters


def official(dtype: torch.dtype = torch.float32, delta_t: bool = True) -> dict[str, torch.Tensor]:
    """A translation model's state_dict, with some of the other names that are in it."""
    generator, made = torch.Generator().manual_seed(1), {}
    for vectors, dynamics, streams in STATES.values():
        made[vectors] = torch.randn(len(streams), LAYERS, DIM, generator=generator)
        made |= flow(dynamics, generator)
    made |= {
        f"{part}.layers.0.self_attn.out_proj.weight": torch.zeros(DIM, DIM) for part in ("encoder", "decoder")
    }
    made["encoder.version"] = torch.tensor([3.0])
    if delta_t:
        made |= {f"{part}.time_dt": torch.tensor(0.01) for part in ("encoder", "decoder")}
    return {name: value.to(dtype) for name, value in made.items()}


@functools.cache
def expected(part: str) -> torch.Tensor:
    """Their 255 positions."""
    state_dict = official()
    vectors, dynamics, _ = STATES[part]
    names = [f"{dynamics}.layers.{layer}.linear.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    field = oracle.published(*(state_dict[name] for name in names))
    return oracle.positions(field, state_dict[vectors], 255, 0.01)


@pytest.mark.parametrize(
    ("dtype", "part"), [(torch.float32, "decoder"), *((torch.float64, part) for part in STATES)]
)
def test_from_official(dtype, part):
    """Their 255 positions, over which these vectors, and with them errors, grow tenfold: 100 rtol."""
    state_dict = official()
    before = {name: value.clone() for name, value in state_dict.items()}
    rtol = 1e-8 if dtype == torch.float64 else 3e-7
    encoder = FLOATER.from_official(state_dict, **CALLS[part], rtol=rtol, atol=rtol / 10, dtype=dtype)
    assert encoder.streams == STATES[part][2]
    assert (encoder.num_layers, encoder.dim) == (LAYERS, DIM)
    assert encoder.delta_t == pytest.approx(0.01, rel=1e-7)
    assert {p.dtype for p in encoder.parameters()} == {dtype}
    close(encoder(255), expected(part), 100 * rtol)
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
    assert all(torch.equal(state_dict[name], value) for name, value in before.items())  # copies, not views


def test_the_authors_steps():
    """rk4 at steps of 0.002: five steps to a position of 0.01, and the values that they should have had."""
    encoder = FLOATER.from_official(official(), **CALLS["decoder"], method="rk4", step_size=0.002)
    close(encoder(255), expected("decoder"), 1e-5)


def test_a_prefix_of_a_larger_model():
    renamed = {f"module.{name}": value for name, value in official().items()}
    encoder = FLOATER.from_official(renamed, prefix="module.encoder.")
    assert torch.equal(encoder(20), FLOATER.from_official(official())(20))


def test_delta_t():
    """Theirs where the state_dict says it, and what is asked for in any case."""
    assert FLOATER.from_official(official(delta_t=False), delta_t=0.02).delta_t == 0.02
    assert FLOATER.from_official(official(), delta_t=0.02).delta_t == 0.02
    for kept in (torch.tensor(0.01).double(), torch.tensor([0.01]), torch.tensor(0.01).double().unsqueeze(0)):
        assert FLOATER.from_official(official() | {"encoder.time_dt": kept}).delta_t == pytest.approx(
            0.01, rel=1e-7
        )


def test_without_delta_t():
    """All their models have 0.01: never the 0.1 of the paper in silence."""
    assert FLOATER.from_official(official(delta_t=False)).delta_t == pytest.approx(0.01, rel=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_is_theirs_to_train(training):
    encoder = FLOATER.from_official(official()).train(training)
    encoder(50).square().mean().backward()
    assert all(p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("part", STATES)
def test_missing_and_misshapen(part):
    vectors, dynamics, _ = STATES[part]
    names = [vectors, *(name for name in official() if name.startswith(dynamics + "."))]
    assert len(names) == 5
    for name in names:
        state_dict = official()
        del state_dict[name]
        with pytest.raises((KeyError, ValueError), match=name.split(".", 1)[1]):
            FLOATER.from_official(state_dict, **CALLS[part])
        with pytest.raises(ValueError, match=name.split(".", 1)[1]):
            FLOATER.from_official(official() | {name: torch.zeros(5, 7, 3, 2)}, **CALLS[part])
    with pytest.raises(ValueError, match=vectors.split(".")[1]):  # a stream too many
        FLOATER.from_official(official() | {vectors: torch.zeros(5, LAYERS, DIM)}, **CALLS[part])
    name = f"{dynamics}.layers.0.linear.weight"
    with pytest.raises(ValueError, match=r"linear\.weight"):  # without the column of time
        FLOATER.from_official(official() | {name: torch.zeros(DIM, DIM)}, **CALLS[part])


def test_other_arguments():
    with pytest.raises((TypeError, ValueError), match="part"):
        FLOATER.from_official(official(), prefix="decoder.", part="sideways")
    with pytest.raises((KeyError, ValueError), match=r"model\."):
        FLOATER.from_official(official(), prefix="model.")
    with pytest.raises(TypeError, match="state_dict"):
        FLOATER.from_official(None)


@pytest.mark.parametrize("kind", ["flow_func", "flow_func_big"])
def test_convolutional_flows_are_refused(kind):
    """Two or four convolutions over the layers in place of two linear layers."""
    state_dict = {
        name: value for name, value in official().items() if not name.startswith("encoder.proj_flow.")
    }
    names = {"flow_func": ["conv", "conv_tr"], "flow_func_big": ["conv", "conv", "conv_tr", "conv_tr"]}[kind]
    for i, name in enumerate(names):
        state_dict[f"encoder.proj_flow.layers.{2 * i}.{name}.weight"] = torch.zeros(6, LAYERS + 1, 5)
        state_dict[f"encoder.proj_flow.layers.{2 * i}.{name}.bias"] = torch.zeros(6)
    with pytest.raises((NotImplementedError, ValueError), match="conv"):
        FLOATER.from_official(state_dict)
