"""What linear_attention and the modules of SPE refuse, and how they say so."""

from __future__ import annotations

import pytest
import torch

from posattn import ConvSPE, Favor, LinearState, SineSPE, linear_attention
from posattn.noise import Noise

B, H, L, D, R, V = 2, 3, 6, 4, 8, 5


def tensors(**change):
    shapes = {"query": (B, H, L, D), "key": (B, H, L, D), "value": (B, H, L, V)}
    return {name: change.get(name, torch.randn(shape)) for name, shape in shapes.items()}


def sine(**options):
    return SineSPE(**{**dict(num_heads=H, head_dim=D, num_sines=2, num_realizations=R), **options})


def conv(**options):
    return ConvSPE(**{**dict(num_heads=H, head_dim=D, kernel_size=3, num_realizations=R), **options})


def state(width=D, position=4, noise=None, batch=B, value=V, dtype=torch.float32):
    return LinearState(torch.zeros(batch, H, width, value, dtype=dtype), torch.zeros(batch, H, width), position, noise)


BAD = [
    (TypeError, "query must be a Tensor", dict(query=[1.0])),
    (ValueError, "key must be 4-D", dict(key=torch.randn(B, H, L))),
    (ValueError, "value must be float16, bfloat16, float32 or float64", dict(value=torch.zeros(B, H, L, V).long())),
    (ValueError, "one dtype", dict(key=torch.randn(B, H, L, D).double())),
    (ValueError, "one device", dict(value=torch.randn(B, H, L, V, device="meta"))),
    (ValueError, "key must have query's batch", dict(key=torch.randn(1, H, L, D))),
    (ValueError, "key must have query's head_dim", dict(key=torch.randn(B, H, L, D + 1))),
    (ValueError, "value must have key's", dict(value=torch.randn(B, H, L + 1, V))),
    (ValueError, "heads", dict(key=torch.randn(B, 1, L, D), value=torch.randn(B, 1, L, V))),
    (ValueError, "is_causal", dict(query=torch.randn(B, H, L - 1, D), is_causal=True)),
    (TypeError, "is_causal must be a bool", dict(is_causal=1)),
    (TypeError, "return_state must be a bool", dict(return_state="yes")),
    (ValueError, "feature_map must be .*got 'softmax'", dict(feature_map="softmax")),
    (TypeError, "feature_map", dict(feature_map=3)),
    (ValueError, "feature_map", dict(feature_map=Favor(D + 1))),
    (ValueError, "feature_map", dict(feature_map=Favor(D), spe=sine())),
    (ValueError, "feature_map", dict(feature_map=lambda x: x[:, :, :-1])),
    ((TypeError, ValueError), "feature_map", dict(feature_map=lambda x: 3)),
    (ValueError, "eps", dict(eps=0.0)),
    (ValueError, "eps", dict(eps=-1e-6)),
    (ValueError, "eps", dict(eps=float("inf"))),
    (TypeError, "eps", dict(eps="small")),
    (TypeError, "key_padding_mask must be a Tensor or None", dict(key_padding_mask=[True])),
    (ValueError, "key_padding_mask must be bool", dict(key_padding_mask=torch.ones(B, L))),
    (ValueError, "key_padding_mask must have the shape", dict(key_padding_mask=torch.ones(B, L + 1).bool())),
    (TypeError, "spe must be", dict(spe=torch.zeros(3))),
    (TypeError, "spe must be .*the class SineSPE", dict(spe=SineSPE)),
    (ValueError, "spe must have query's 3 heads", dict(spe=sine(num_heads=H + 1))),
    (ValueError, "spe must have .*head_dim", dict(spe=conv(head_dim=D + 1))),
    (ValueError, "spe must .*device", dict(spe=sine().to("meta"))),
    (TypeError, "initial_state must be a posattn.LinearState", dict(initial_state=torch.zeros(B, H, D, V))),
    (ValueError, "initial_state", dict(initial_state=state(width=D + 1))),
    (ValueError, "initial_state", dict(initial_state=state(batch=B + 1))),
    (ValueError, "initial_state", dict(initial_state=state(value=V + 1))),
    (ValueError, "initial_state", dict(initial_state=state(dtype=torch.float16))),
    ((TypeError, ValueError), "initial_state", dict(initial_state=state(position=-1))),
    ((TypeError, ValueError), "initial_state", dict(initial_state=state(position=1.5))),
    (ValueError, "initial_state.*spe|spe.*initial_state", dict(initial_state=state(R), spe=sine())),
    (ValueError, "initial_state.*spe|spe.*initial_state", dict(initial_state=state(noise=sine().draw()))),
    (ValueError, "noise", dict(initial_state=state(R, noise=sine().draw()), spe=sine()())),
    (ValueError, "noise", dict(initial_state=state(R, noise=conv().draw()), spe=sine())),
    (ValueError, 'backend must be "triton", "blockwise" or None', dict(backend="cuda")),
    (ValueError, 'backend="triton" takes float16, bfloat16 and float32', dict(backend="triton", double=True)),
]


@pytest.mark.parametrize(("error", "match", "options"), BAD)
def test_bad_calls(error, match, options):
    options = dict(options)
    given = tensors(**options)
    if options.pop("double", False):
        given = {name: t.double() for name, t in given.items()}
    with pytest.raises(error, match=match):
        linear_attention(**given, **{name: value for name, value in options.items() if name not in given})


HALF = torch.randn(1, 1, 2, 4).half()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("match", "options"),
    [
        ('backend="triton"', dict(query=torch.randn(1, 1, 2, 300), key=torch.randn(1, 1, 2, 300))),
        ('backend="triton"', dict(value=torch.randn(1, 1, 2, 300))),
        ('backend="triton" takes features to 128 in torch.float32, got 200', dict(spe=SineSPE(1, 4, 1, 200))),
        (  # what runs is fp32
            'backend="triton" takes features to 128 in torch.float32, got 200',
            dict(feature_map=Favor(4, num_features=200), **dict.fromkeys(("query", "key", "value"), HALF)),
        ),
        ('backend="triton" takes num_sines to 32 .*, got 33', dict(spe=SineSPE(1, 4, 32, 8))),
        ('backend="triton"', dict(spe=SineSPE(1, 4, 65, 8))),
        ('backend="triton"', dict(spe=SineSPE(1, 4, 1, 300))),
        ('backend="triton"', dict(feature_map=Favor(4, num_features=300))),
    ],
)
def test_what_triton_refuses_blockwise_takes(match, options):
    options = dict(options)
    given = {name: options.pop(name, torch.randn(1, 1, 2, 4)) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=match):
        linear_attention(**given, **options, backend="triton")
    out = linear_attention(**given, **options)
    assert out.shape[-1] == given["value"].shape[-1]


MODULES = [
    (ValueError, "num_heads", dict(num_heads=0)),
    (ValueError, "head_dim", dict(head_dim=0)),
    (ValueError, "head_dim", dict(head_dim=4.0)),
    (ValueError, "num_realizations", dict(num_realizations=0)),
    (ValueError, "num_realizations", dict(num_realizations=True)),
    ((TypeError, ValueError), "gated", dict(gated=1)),
    ((TypeError, ValueError), "resample", dict(resample=None)),
    ((TypeError, ValueError), "seed", dict(seed=0.5)),
]


@pytest.mark.parametrize("made", [sine, conv])
@pytest.mark.parametrize(("error", "match", "options"), MODULES)
def test_bad_modules(made, error, match, options):
    with pytest.raises(error, match=match):
        made(**options)


def test_bad_sizes_of_one_module():
    with pytest.raises(ValueError, match="num_sines"):
        sine(num_sines=0)
    with pytest.raises(ValueError, match="kernel_size"):
        conv(kernel_size=0)
    with pytest.raises(ValueError, match="num_realizations"):
        conv(num_realizations=None)
    for name, value in dict(dim=0, num_features=0, orthogonal=1).items():
        with pytest.raises(ValueError, match=name):
            Favor(**{"dim": 4, name: value})


z, e = torch.randn(H, D, 4, R), torch.randn(H, D, R)
NOISES = [
    (TypeError, sine, z),
    (ValueError, sine, Noise(z[:, :, :3], e)),
    (ValueError, sine, Noise(z[..., :-1], e)),
    (ValueError, sine, Noise(z, None)),
    (ValueError, sine, Noise(z, e[:, :1])),
    (ValueError, sine, Noise(z.clone().requires_grad_(), e)),
    (ValueError, sine, Noise(z, e.clone().requires_grad_())),
    (ValueError, sine, Noise(z.long(), e)),
    (ValueError, lambda: sine(gated=False), Noise(z, e)),
    (ValueError, conv, Noise(torch.tensor([3.5]), e)),
    (ValueError, conv, Noise(torch.tensor([3, 4]), e)),
    (ValueError, conv, Noise(torch.randn(H, D + 1, 20, R), e)),
    (ValueError, lambda: sine(num_realizations=None), Noise(z, e)),
    (ValueError, sine, Noise(z.to("meta"), e)),
]


@pytest.mark.parametrize(("error", "made", "noise"), NOISES)
def test_bad_noise(error, made, noise):
    with pytest.raises(error, match="noise"):
        linear_attention(**tensors(), spe=made()(noise))


def test_noise_that_ends_before_the_sequence():
    """L = 6 positions, 3 taps: 8 noise indices."""
    for length, start in ((7, 0), (8, 1)):
        noise = Noise(torch.randn(H, D, length, R), e)
        initial = LinearState(torch.zeros(B, H, R, V), torch.zeros(B, H, R), start, noise)
        with pytest.raises(ValueError, match="noise"):
            linear_attention(**tensors(), spe=conv(), initial_state=initial)
    linear_attention(**tensors(), spe=conv()(Noise(torch.randn(H, D, 8, R), e)))


def test_a_generator_that_is_none():
    with pytest.raises(TypeError, match="generator"):
        sine()(generator=3)
    with pytest.raises(ValueError, match=r"noise|generator"):
        sine()(sine().draw(), generator=torch.Generator())
