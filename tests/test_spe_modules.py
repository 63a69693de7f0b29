"""SineSPE and ConvSPE as modules: how they start, the authors' parameters, positions far out, copies."""

from __future__ import annotations

import copy
import io
import math
from fractions import Fraction

import oracle_spe as oracle
import pytest
import torch
import torch.nn.functional as F
from spe_cases import close

from posattn import ConvSPE, SineSPE, linear_attention
from posattn.noise import Noise

H, D, K, R, P, N = 2, 3, 4, 5, 6, 17

# --------------------------------------------------------------------------------------- the authors' modules


def official(kind: str, gated: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Names and shapes of their modules' parameters, and of their filter's one."""

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    names = {"freqs": (H, D, K), "offsets": (H, D, K), "gains": (H, D, K)}
    if kind == "conv":
        names = {"conv_q.weight": (H * D, 1, P), "conv_k.weight": (H * D, 1, P)}
    return {name: randn(*shape) for name, shape in names.items()} | ({"gate": randn(H, D)} if gated else {})


def official_forward(kind, parameters, queries, keys, generator):
    """qhat, khat (B, N, H, R) of queries, keys (B, N, H, D) by the authors' formulas, and the noise they drew.

    Their convolutions are of 4 P + N numbers, whose first P are left out, and conv_q makes the keys' code.
    """
    p = {name: value.double() for name, value in parameters.items()}
    scale = (R * D) ** 0.25
    if kind == "sine":
        z = torch.randn(1, H, D, 2 * K, R, generator=generator, dtype=torch.float64)
        gains = F.softplus(p["gains"]).repeat_interleave(2, dim=-1)[None, ..., None]
        turns = torch.sigmoid(p["freqs"])[:, :, None] / 2 * torch.arange(N)[:, None]
        qbar, kbar = (
            torch.stack([(2 * math.pi * turns + o).cos(), (2 * math.pi * turns + o).sin()], -1).flatten(-2)
            @ (z / math.sqrt(2 * K) * gains)
            for o in (p["offsets"][:, :, None], 0.0)
        )
        codes = [bar.permute(0, 3, 1, 2, 4) / scale for bar in (qbar, kbar)]  # (1, N, H, D, R)
        drawn = z[0]
    else:
        z = torch.randn(R, H * D, 4 * P + N, generator=generator, dtype=torch.float64)
        kbar, qbar = (F.conv1d(z, p[f"conv_{x}.weight"], groups=H * D)[:, :, P : P + N] for x in "qk")
        codes = [bar.view(1, R, H, D, N).permute(0, 4, 2, 3, 1) / scale for bar in (qbar, kbar)]
        drawn = z[:, :, P:].view(R, H, D, -1).permute(1, 2, 3, 0)
    noise = torch.randn(1, 1, H, D, R, generator=generator, dtype=torch.float64) if "gate" in p else None
    if noise is not None:
        gate = torch.sigmoid(p["gate"])[None, None, ..., None]
        codes = [torch.sqrt(1 - gate) * code + torch.sqrt(gate) * noise / scale for code in codes]
    hats = [(x[..., None] * code).sum(-2) for x, code in zip((queries, keys), codes)]
    return hats, Noise(drawn.float(), None if noise is None else noise[0, 0].float())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["sine", "conv"])
@pytest.mark.parametrize("way", ["from_official", "prefixed", "gate apart", "load_state_dict"])
def test_official_parameters(kind, gated, way):
    generator = torch.Generator().manual_seed(1)
    parameters = official(kind, gated, generator)
    queries, keys = torch.randn(2, 2, N, H, D, generator=generator, dtype=torch.float64)
    want, noise = official_forward(kind, parameters, queries, keys, generator)
    made = SineSPE if kind == "sine" else ConvSPE
    heads = {} if kind == "sine" or gated else dict(num_heads=H)  # filters do not tell how many
    if way == "load_state_dict":
        module = made(H, D, K if kind == "sine" else P, R, gated)
        module.load_state_dict(parameters)
    elif way == "gate apart":
        alone = {name: value for name, value in parameters.items() if name != "gate"}
        module = made.from_official(alone, {"gate": parameters["gate"]} if gated else None, **heads)
    else:
        prefix = "spe." if way == "prefixed" else ""
        module = made.from_official({prefix + name: value for name, value in parameters.items()}, **heads)
    assert (module.num_heads, module.head_dim, module.gate is not None) == (H, D, gated)
    if way == "from_official":
        assert module.num_realizations == 64
    got = module.double()(noise).features(*(x.transpose(1, 2) for x in (queries, keys)), 0, 0, "blockwise")
    for ours, wanted in zip(got, want):
        close(ours, wanted.transpose(1, 2), 1e-6)  # noise is float32


def test_official_names_in_a_larger_model():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = ConvSPE(H, D, P, R), SineSPE(H, D, K, R, gated=False)

    generator, model = torch.Generator().manual_seed(1), Model()
    parameters = {f"near.{name}": value for name, value in official("conv", True, generator).items()}
    parameters |= {f"far.{name}": value for name, value in official("sine", False, generator).items()}
    model.load_state_dict(parameters)
    assert torch.equal(model.near.filter_q, parameters["near.conv_k.weight"])
    assert torch.equal(model.near.filter_k, parameters["near.conv_q.weight"])
    assert torch.equal(model.far.gains, parameters["far.gains"])
    assert len(parameters) == 6  # as it came
    again = Model()
    again.load_state_dict(model.state_dict())
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    del parameters["near.conv_q.weight"]
    with pytest.raises(RuntimeError, match=r"near.filter_k"):
        model.load_state_dict(parameters)


@pytest.mark.parametrize("kind", ["sine", "conv"])
def test_official_parameters_of_other_shapes(kind):
    made, good = SineSPE if kind == "sine" else ConvSPE, official(kind, True, torch.Generator().manual_seed(0))
    for name in good:
        if name != "gate":
            with pytest.raises(ValueError, match=name):
                made.from_official({key: value for key, value in good.items() if key != name})
            with pytest.raises(ValueError, match=name.split(".")[0] + "|filter_"):
                made.from_official({**good, name: torch.zeros(H, D + 1, 3, 3)})
    with pytest.raises(ValueError, match="gate"):
        made.from_official({**good, "gate": torch.zeros(H, D + 1)})
    if kind == "conv":
        del good["gate"]
        for heads in ({}, dict(num_heads=4)):
            with pytest.raises(ValueError, match="num_heads"):
                made.from_official(good, **heads)


# ------------------------------------------------------------------------------------------------ how they start


def test_the_published_start():
    torch.manual_seed(0)
    module = SineSPE(8, 64, 10)
    draws = 8 * 64 * 10
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "freqs": (8, 64, 10), "offsets": (8, 64, 10), "gains": (8, 64, 10), "gate": (8, 64)
    }  # fmt: skip
    for values, mean in ((module.freqs, -4), (module.offsets, 0)):  # within 5 standard errors
        assert abs(values.mean().item() - mean) < 5 / draws**0.5
        assert abs(values.std().item() - 1) < 5 / (2 * draws) ** 0.5
    assert abs(module.gate.mean().item()) < 5 / 512**0.5
    assert abs(module.gate.std().item() - 1) < 5 / 1024**0.5
    # gains = 2 g / sqrt(|g|): their norm squared is 4 |g|, and |g|^2 is chi-square with K
    norms = module.gains.norm(dim=-1) ** 2 / 4
    assert abs((norms**2).mean().item() - 10) < 5 * (20 / 512) ** 0.5
    assert sum(p.numel() for p in module.parameters()) == 15_360 + 512

    module = ConvSPE(8, 64, 128)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "filter_q": (512, 1, 128), "filter_k": (512, 1, 128), "gate": (8, 64)
    }  # fmt: skip
    for taps in (module.filter_q, module.filter_k):
        assert taps.min() >= 0
        assert taps.max() < 1 / 8
        assert abs(taps.mean().item() - 1 / 16) < 1e-3
    assert SineSPE(2, 3, gated=False).gate is None
    assert (SineSPE(2, 3).num_sines, SineSPE(2, 3).num_realizations) == (1, 64)
    assert (ConvSPE(2, 3).kernel_size, ConvSPE(2, 3).num_realizations) == (200, 64)


# ------------------------------------------------------------------------------------------------ far positions


TRITON = pytest.param("triton", torch.float32, marks=pytest.mark.triton, id="triton")


@pytest.mark.parametrize(("backend", "dtype"), [("blockwise", torch.float32), ("blockwise", torch.float64), TRITON])
@pytest.mark.parametrize("start", [0, 999_800, 2**24 - 100, 2**31 + 7])
def test_phases_far_out(start, backend, dtype):
    """To 1e-4 rad of turns * position + phase in exact fractions: with noise (1, 0), (0, 1) the code is (cos, sin)."""
    raw = torch.tensor([-9.0, -4.0, -3.3, 0.1, 2.7, 6.0]).view(-1, 1, 1)
    heads, length = raw.shape[0], 300
    module = SineSPE(heads, 1, 1, 2, gated=False).to(dtype)
    with torch.no_grad():
        module.freqs.copy_(raw)
        module.offsets.copy_(torch.linspace(-3, 3, heads).view(-1, 1, 1))
    codes = module(Noise(torch.eye(2).view(1, 1, 2, 2).repeat(heads, 1, 1, 1), None))
    ones = torch.ones(1, heads, length, 1, dtype=dtype)
    qhat, khat = codes.features(ones, ones, start, start, backend)
    turns = torch.sigmoid(module.freqs.detach().double()) / 2
    for hat, offsets in ((qhat, module.offsets.detach().double()), (khat, torch.zeros(heads))):
        got = torch.atan2(hat[0, :, :, 1], hat[0, :, :, 0])
        for head in range(heads):
            turn = Fraction(turns[head].item())
            for i in (0, 1, 63, 200, length - 1):
                want = 2 * math.pi * float(turn * (start + i) % 1) + offsets[head].item()
                error = (got[head, i].item() - want + math.pi) % (2 * math.pi) - math.pi
                assert abs(error) < (1e-4 if dtype == torch.float32 else 1e-5), (head, i, error)


@pytest.mark.parametrize("backend", ["blockwise", pytest.param("triton", marks=pytest.mark.triton)])
def test_a_million_tokens_before(backend):
    """Values and gradients at a position of a million are those of the oracle in float32."""
    module = SineSPE(1, 4, 3, 8)
    with torch.no_grad():
        module.freqs.add_(3)
    noise = module.draw(torch.Generator().manual_seed(0))
    q, k = torch.randn(2, 1, 1, 5, 4).unbind()
    got = module(noise).features(q, k, 1_000_000, 1_000_000, backend)
    exact = SineSPE(1, 4, 3, 8).double()
    exact.load_state_dict(module.state_dict())
    at = 1_000_000 + torch.arange(5)
    codes = oracle.sine_codes(exact.freqs, exact.offsets, exact.gains, exact.gate, *noise, at, at)
    want = [oracle.encoded(x, code) for x, code in zip((q, k), codes)]
    weights = torch.randn(2, *want[0].shape).double()
    for a, b in zip(got, want):
        close(a, b, 1e-5)
    grads = (
        torch.autograd.grad(sum((h.double() * w).sum() for h, w in zip(hats, weights)), [*m.parameters()])
        for hats, m in ((got, module), (want, exact))
    )
    for a, b in zip(*grads):
        close(a, b, 1e-4)


# ------------------------------------------------------------------------------------------------------- copies


def sine(number=R, **options):
    return SineSPE(H, D, K, number, **options)


def conv(**options):
    return ConvSPE(H, D, P, R, **options)


@pytest.mark.parametrize("made", [sine, conv, lambda: sine(None)])
def test_state_dict_and_copies(made):
    module, tensors = made(), torch.randn(3, 1, H, N, D).unbind()
    noise = module.draw()
    expected = linear_attention(*tensors, spe=module(noise))
    torch.testing.assert_close(linear_attention(*tensors, spe=copy.deepcopy(module)(noise)), expected)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = made()
    fresh.load_state_dict(torch.load(file))
    torch.testing.assert_close(linear_attention(*tensors, spe=fresh(noise)), expected)
    assert repr(module).startswith(type(module).__name__ + f"(num_heads={H}, head_dim={D}")
    assert fresh.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("made", [sine, conv])
def test_kept_noise_is_in_no_checkpoint_and_never_rounded(made):
    module = made(resample=False).eval()
    assert module.state_dict().keys() == dict(module.named_parameters()).keys()
    noise = module().noise
    for other in (copy.deepcopy(module), copy.deepcopy(module).bfloat16(), copy.deepcopy(module).bfloat16().double()):
        assert all(map(torch.equal, other().noise, noise))
    lazily = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    assert all(map(torch.equal, lazily().noise, noise))


@pytest.mark.parametrize("made", [sine, conv])
def test_parameters_in_half_precision(made):
    module, tensors = made(), [t.bfloat16() for t in torch.randn(3, 1, H, N, D).unbind()]
    noise = module.draw()
    module.bfloat16()
    out = linear_attention(*tensors, spe=module(noise))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, linear_attention(*tensors, spe=module.float()(noise)))
