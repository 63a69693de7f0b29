"""The noise of SPE: what it is drawn from, where it is kept, and its averages.

Every test of chance has a fixed seed and states how likely it would fail, over seeds, were the code right.
"""

from __future__ import annotations

import math
from itertools import pairwise

import oracle_spe as oracle
import pytest
import torch
from spe_cases import Case, close

from posattn import ConvSPE, SineSPE, linear_attention
from posattn.noise import Noise


def modules(resample=True, seed=0):
    return [
        SineSPE(2, 4, 3, 8, resample=resample, seed=seed),
        ConvSPE(2, 4, 5, 8, resample=resample, seed=seed),
        SineSPE(2, 4, 3, 8, gated=False, resample=resample, seed=seed),
    ]


def same(a: Noise, b: Noise) -> bool:
    gates = (a.gate is None) == (b.gate is None) and (a.gate is None or torch.equal(a.gate, b.gate))
    return torch.equal(a.codes, b.codes) and gates


@pytest.fixture
def tensors():
    return torch.randn(3, 1, 2, 9, 4).unbind()


# ------------------------------------------------------------------------------------------ seeds, generators


@pytest.mark.parametrize("kind", range(3))
def test_shapes_and_dtypes(kind):
    module = modules()[kind]
    noise = module.draw()
    assert isinstance(noise, Noise)
    if kind == 1:
        assert (noise.codes.dtype, noise.codes.shape) == (torch.int64, (1,))
    else:
        assert (noise.codes.dtype, noise.codes.shape) == (torch.float32, (2, 4, 6, 8))
    assert (noise.gate is None) if kind == 2 else (noise.gate.shape == (2, 4, 8))
    assert not any(t.requires_grad for t in noise if t is not None)
    assert not module.double().draw().codes.is_floating_point() or kind != 1


@pytest.mark.parametrize("kind", range(3))
def test_the_same_generator_gives_the_same_noise(kind, tensors):
    module = modules()[kind]
    first, again, other = (module.draw(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert same(first, again)
    assert not torch.equal(first.codes, other.codes)
    by_call = module(generator=torch.Generator().manual_seed(3))
    assert same(by_call.noise, first)
    torch.manual_seed(11)
    globally = module.draw()
    torch.manual_seed(11)
    assert same(module.draw(), globally)
    outs = [linear_attention(*tensors, spe=module(noise)) for noise in (first, again, other)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2], atol=1e-4)


@pytest.mark.parametrize("kind", range(3))
def test_one_drawing_for_all_layers(kind, tensors):
    """Codes are drawn where the module is called, and kept by whoever holds them."""
    module = modules()[kind]
    codes = module()
    a, b = (linear_attention(*tensors, spe=codes) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.allclose(linear_attention(*tensors, spe=module), linear_attention(*tensors, spe=module), atol=1e-4)


@pytest.mark.parametrize("kind", range(3))
def test_resampling(kind):
    """In training always; in eval unless resample=False, which keeps the noise of the seed."""
    module = modules()[kind]
    for mode in (module.train(), module.eval()):
        assert not torch.equal(mode().noise.codes, mode().noise.codes)
    kept = modules(resample=False, seed=5)[kind]
    assert not torch.equal(kept().noise.codes, kept().noise.codes)
    kept.eval()
    state = torch.get_rng_state()
    noise = kept().noise
    assert same(kept().noise, noise)
    assert same(noise, kept.draw(torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(modules(resample=False, seed=5)[kind].eval()().noise, noise)
    assert not torch.equal(modules(resample=False, seed=6)[kind].eval()().noise.codes, noise.codes)
    assert same(kept.train().eval()().noise, noise)
    explicit = kept.draw(torch.Generator().manual_seed(1))
    assert same(kept(explicit).noise, explicit)


def test_codes_of_every_step_go_on_where_their_noise_is_kept(tensors):
    """One call of the module a step for all layers, as in a decoder."""
    for module in (*modules(resample=False), SineSPE(2, 4, 3, None)):
        module.eval()
        whole = linear_attention(*tensors, spe=module(), is_causal=True)
        first, second = ([t[:, :, part] for t in tensors] for part in (slice(0, 5), slice(5, 9)))
        out, state = linear_attention(*first, spe=module(), is_causal=True, return_state=True)
        rest = linear_attention(*second, spe=module(), is_causal=True, initial_state=state)
        torch.testing.assert_close(torch.cat([out, rest], 2), whole)


def test_the_exact_limit_has_no_noise(tensors):
    module = SineSPE(2, 4, 3, None)
    assert module.draw().codes.numel() == 0
    assert module().exact
    assert module().dim == 7 * 4
    assert torch.equal(linear_attention(*tensors, spe=module), linear_attention(*tensors, spe=module))


@pytest.mark.parametrize("spe", ["sine", "conv"])
def test_noise_of_another_width(spe):
    """Noise that is passed may have more realizations than are drawn."""
    case = Case(spe, feature_map="favor")
    tensors, module, keywords = case.make(torch.float64)
    noise = case._replace(realizations=19).noise()
    want = case._replace(realizations=19).oracle(tensors, module, noise, keywords)
    assert module(noise).dim == 19
    for ours, wanted in zip(case.call(linear_attention, tensors, module, noise, keywords), want):
        close(ours, wanted, 1e-10)


@pytest.mark.parametrize("start", [0, 13])
def test_noise_of_a_seed_is_explicit_noise(start):
    case = Case("seed", queries=37, taps=6, realizations=10, state=True, start=start)
    tensors, module, keywords = case.make(torch.float64)
    drawn = case.noise()
    z = oracle.conv_noise(drawn.codes.item(), 2, case.dim, 0, start + 37 + 5, 10)
    runs = [case.call(linear_attention, tensors, module, noise, keywords) for noise in (drawn, Noise(z, drawn.gate))]
    inputs = [*tensors, *module.parameters()]
    for seed, explicit in zip(*([*r, *torch.autograd.grad(r[0].sin().sum(), inputs)] for r in runs)):
        close(seed, explicit, 1e-10)


# ------------------------------------------------------------------------------------------------- averages


def test_the_average_is_the_kernel():
    """z-scores of the average of qhat . khat over 40,000 draws of R = 1, which are one of R = 40,000.

    3 x 162 averages of products of normals: with P(|z| > 5.8) = 7e-9, doubled for skewness, chance fails 7e-6 of seeds.
    """
    draws, length = 40_000, 9
    made = SineSPE(2, 3, 2, draws), ConvSPE(2, 3, 4, draws, gated=False), ConvSPE(2, 3, 4, draws)
    for module, has_gate in zip(made, (True, False, True)):
        module.double()
        generator = torch.Generator().manual_seed(1)
        if isinstance(module, SineSPE):
            module.freqs.data.add_(2)
            codes = torch.randn(2, 3, 4, draws, generator=generator)
            parameters = module.freqs, module.offsets, module.gains
        else:
            codes = torch.randn(2, 3, length + 3, draws, generator=generator)
            parameters = module.filter_q, module.filter_k
        gate = torch.randn(2, 3, draws, generator=generator) if has_gate else None
        q, k = torch.randn(2, 1, 2, length, 3, generator=generator).double().unbind()
        qhat, khat = module(Noise(codes, gate)).features(q, k, 0, 0, "blockwise")
        samples = torch.einsum("bhmr,bhnr->bhmnr", qhat, khat).detach() * math.sqrt(draws)  # R = 1
        distances = torch.arange(1 - length, length)
        if isinstance(module, SineSPE):
            kernel = oracle.sine_kernel(*parameters, module.gate, distances)
        else:
            kernel = oracle.conv_kernel(*parameters, module.gate, 2, distances)
        at = torch.arange(length)
        matrix = kernel[:, :, at[:, None] - at[None, :] + length - 1]
        want = torch.einsum("bhmd,bhnd,hdmn->bhmn", q, k, matrix) / math.sqrt(3)
        error = (samples.mean(-1) - want) / (samples.std(-1) / math.sqrt(draws))
        assert error.numel() == 162
        assert error.abs().max() < 5.8
        assert error.square().mean().sqrt() > 0.5  # the errors are chance, not zero


def test_the_published_scale_and_the_kernel_of_the_module():
    """Of the exact limit: no chance. sqrt(R / D) sum_d q_d k_d P_d(m - n), R = (2K + 1) D."""
    for has_gate in (True, False):
        module = SineSPE(2, 3, 4, None, gated=has_gate).double()
        kernel = module.position_kernel(8)
        distances = torch.arange(-8, 9)
        want = oracle.sine_kernel(module.freqs, module.offsets, module.gains, module.gate, distances)
        torch.testing.assert_close(kernel, want)
        q, k = torch.randn(2, 1, 2, 9, 3).double().unbind()
        qhat, khat = module().features(q, k, 5, 5, "blockwise")
        assert qhat.shape == (1, 2, 9, (8 + has_gate) * 3)
        at = torch.arange(9)
        matrix = kernel[:, :, at[:, None] - at[None, :] + 8] * (8 + has_gate) ** 0.5
        torch.testing.assert_close(qhat @ khat.mT, torch.einsum("bhmd,bhnd,hdmn->bhmn", q, k, matrix))


def test_the_kernel_of_filters():
    module = ConvSPE(2, 3, 6).double()
    distances = torch.arange(-9, 10)
    want = oracle.conv_kernel(module.filter_q, module.filter_k, module.gate, 2, distances)
    torch.testing.assert_close(module.position_kernel(9), want)


@pytest.mark.parametrize("kind", ["sine", "conv"])
def test_the_error_falls_as_one_over_the_square_root_of_realizations(kind):
    """4,000 heads of equal parameters are 4,000 draws. Each doubling of R halves the variance of qhat . khat / sqrt(R).

    The log of a ratio of two such variances has a standard deviation below 0.06 (the kurtosis is below 7 once R >= 4):
    0.33 is 5.5 of them, three ratios, so chance fails less than 2e-7 of seeds.
    """
    heads, generator = 4000, torch.Generator().manual_seed(2)
    variances = []
    for realizations in (4, 16, 64, 256):
        if kind == "sine":
            module = SineSPE(heads, 2, 2, realizations)
        else:
            module = ConvSPE(heads, 2, 3, realizations, gated=False)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                rows = 2 if name.startswith("filter") else 1
                first = torch.randn(parameter[:rows].shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.copy_(first.repeat(heads, *[1] * (parameter.dim() - 1)))
        q, k = torch.tensor([0.7, -1.1]).expand(1, heads, 1, 2), torch.tensor([1.3, 0.4]).expand(1, heads, 1, 2)
        noise = module.draw(generator)
        if kind == "conv":
            noise = Noise(torch.randn(heads, 2, 4, realizations, generator=generator), None)
        qhat, khat = module(noise).features(q, k, 0, 1, "blockwise")
        variances.append(((qhat * khat).sum(-1).double() / math.sqrt(realizations)).var().item())
    logs = [math.log(a / b) for a, b in pairwise(variances)]
    assert max(abs(log - math.log(4)) for log in logs) < 0.33, logs


# ------------------------------------------------------------------------------- the noise of a seed as numbers


def noise_of(seed, heads=2, dim=3, length=500, realizations=64, start=0):
    """z (H, D, T, R), through the only way that a user has: a filter of one tap, 1."""
    module = ConvSPE(heads, 1, 1, realizations, gated=False).double()
    module.filter_q.data.fill_(1)
    module.filter_k.data.fill_(1)
    ones = torch.ones(1, heads, length, 1, dtype=torch.float64)
    codes = module(Noise(torch.tensor([seed]), None))
    return codes.features(ones, ones, start, start, "blockwise")[0].detach()[0] * realizations**0.25


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32 - 1, 2**62 + 12345])
@pytest.mark.parametrize("start", [0, 999_990])
def test_the_noise_is_that_of_philox(seed, start):
    got = noise_of(seed, length=20, realizations=11, start=start)
    want = oracle.conv_noise(seed, 2, 1, start, 20, 11)[:, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_the_noise_is_normal():
    """Kolmogorov and Smirnov's distance, and chi-square over 64 equal cells, of 64,000 numbers each of 4 seeds.

    P(sqrt(n) D > 2.95) = 2 exp(-2 x^2) = 6e-8; chi-square beyond 5.6 standard deviations of its cube root, 2e-8 (two
    sided). With 4 seeds chance fails 3e-7 of seeds.
    """
    for seed in (1, 2, 3, 10**12):
        z = noise_of(seed).flatten()
        n = z.numel()
        u = torch.special.ndtr(z.sort().values)
        steps = torch.arange(n + 1) / n
        distance = torch.maximum((u - steps[:-1]).abs(), (steps[1:] - u).abs()).max()
        assert math.sqrt(n) * distance < 2.95
        cells = torch.histc(u, 64, 0, 1)
        chi = ((cells - n / 64) ** 2 / (n / 64)).sum().item()
        spread = 2 / (9 * 63)
        assert abs(((chi / 63) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)) < 5.6


def test_the_noise_is_uncorrelated():
    """Correlations, of values and of squares, at lags along T and R, between heads and between seeds.

    26 of them, each sqrt(n) times a correlation, n > 50,000: P(|z| > 6) = 2e-9, some ten times that for squares.
    """
    a, b = noise_of(7), noise_of(8)
    pairs = [(a[:, :-lag], a[:, lag:]) for lag in (1, 2, 3, 64)]
    pairs += [(a[..., :-lag], a[..., lag:]) for lag in (1, 2, 3, 4, 8)]
    pairs += [(a[0], a[1]), (a, b), (a[0], b[1]), (a[:, 1:, :-4], a[:, :-1, 4:])]
    for x, y in pairs:
        for f in (lambda t: t, torch.square):
            both = torch.stack([f(x).flatten(), f(y).flatten()])
            correlation = torch.corrcoef(both)[0, 1].item()
            assert abs(correlation) * math.sqrt(both.shape[1]) < 6
