"""Linear attention by itself: denominators, long sums, Favor's features, 16 bits, autocast, bad inputs."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_spe import elu, favor, linear_oracle, relu
from spe_cases import Case, close

from posattn import Favor, SineSPE, linear_attention

# ------------------------------------------------------------------------------------------- denominators


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_negative_denominators_grow_away_from_zero(eps):
    """A map of one's own may give negative sums: den = d - eps below 0, d + eps from 0 on."""
    query = torch.tensor([1.0, -1.0, 0.0, 2.0]).view(1, 1, 4, 1)
    key, value = torch.tensor([0.5, 0.25]).view(1, 1, 2, 1), torch.tensor([3.0, -1.0]).view(1, 1, 2, 1)
    out = linear_attention(query, key, value, feature_map=lambda x: x, eps=eps)
    want = [1.25 / (0.75 + eps), -1.25 / (-0.75 - eps), 0.0, 2.5 / (1.5 + eps)]
    torch.testing.assert_close(out.flatten(), torch.tensor(want))


def test_only_eps_stands_between_a_query_and_zero():
    """Keys that are all masked: 0, and gradients 0, not NaN."""
    tensors, _, keywords = Case("none", causal=False).make(torch.float32)
    out = linear_attention(*tensors, key_padding_mask=torch.zeros(2, 21, dtype=torch.bool), **keywords)
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert (grad == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["blockwise", pytest.param("triton", marks=pytest.mark.triton)])
def test_what_is_masked_is_not_read(poison, causal, backend):
    tensors, _, keywords = Case("none", causal=causal, mask="gaps").make(torch.float32)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = [t.detach().to(device).requires_grad_() for t in tensors]
    keywords.update(backend=backend, key_padding_mask=keywords["key_padding_mask"].to(device))
    want = linear_attention(*tensors, **keywords)
    grads = torch.autograd.grad(want.sin().sum(), tensors)
    hidden = ~keywords["key_padding_mask"][:, None, :, None]
    query, key, value = (t.detach() for t in tensors)
    tensors = [query.requires_grad_(), *(t.masked_fill(hidden, poison).requires_grad_() for t in (key, value))]
    out = linear_attention(*tensors, **keywords)
    assert torch.equal(out, want)
    for grad, expected in zip(torch.autograd.grad(out.sin().sum(), tensors), grads):
        assert torch.equal(grad, expected)


def test_favor_of_large_keys():
    """A query that sees one key gets its value, though the features of the key are of the order of e^-36."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 64).unbind()
    out = linear_attention(3 * query, 3 * key, value, feature_map="favor", is_causal=True)
    torch.testing.assert_close(out[:, :, 0], value[:, :, 0])


@pytest.mark.parametrize("spe", [None, SineSPE(2, 8, 2, 16)])
@pytest.mark.parametrize("backend", ["blockwise", pytest.param("triton", marks=pytest.mark.triton)])
def test_inputs_whose_rows_overlap(backend, spe):
    """Windows of one tensor: the last stride is 1, but a gradient cannot be laid out like them."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    long, value = torch.randn(1, 2, 15, device=device), torch.randn(1, 2, 8, 8, device=device)
    spe = None if spe is None else SineSPE(2, 8, 2, 16).to(device).eval()
    noise = None if spe is None else spe.draw()
    found = []
    for overlap in (True, False):
        query = long.unfold(-1, 8, 1)
        query = (query if overlap else query.contiguous()).detach().requires_grad_()
        codes = None if spe is None else spe(noise)
        out = linear_attention(query, query, value, spe=codes, backend=backend, is_causal=True)
        found.append((out, *torch.autograd.grad(out.sin().sum(), query)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_million_tokens_do_not_overflow(dtype, causal):
    """float16 ends at 65504 and bfloat16 has 8 bits: neither could hold or count the sum of the keys, 5.5e6."""
    length = 1_000_000
    key = torch.tensor([1.5, 2.0]).to(dtype).expand(1, 1, length, 2)
    value = torch.where(torch.arange(length) < length // 4, 2.0, 1.0).to(dtype).view(1, 1, length, 1)
    out, state = linear_attention(key, key, value, is_causal=causal, return_state=True)
    assert state.kv.dtype == state.k.dtype == torch.float32
    assert state.position == length
    want = torch.tensor([2.5, 3.0], dtype=torch.float64) * length
    torch.testing.assert_close(state.k.flatten().double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(state.kv.flatten().double(), 1.25 * want, rtol=1e-5, atol=0)
    assert abs(out[0, 0, -1].item() - 1.25) < 5e-3
    assert abs(out[0, 0, 1000].item() - (2 if causal else 1.25)) < 1e-2
    assert out.isfinite().all()


# ------------------------------------------------------------------------------------------------- favor


def test_favor_by_name_and_by_module():
    tensors, _, _ = Case("none", dim=24).make(torch.float64)
    by_name = linear_attention(*tensors, feature_map="favor")
    torch.testing.assert_close(linear_attention(*tensors, feature_map=Favor(24)), by_name)
    other = Favor(24, num_features=40, seed=3)
    phi = favor(tensors[0], other.projection, True), favor(tensors[1], other.projection, False)
    want = linear_oracle(*phi, tensors[2], eps=1e-30)[0]
    torch.testing.assert_close(linear_attention(*tensors, feature_map=other), want)
    assert not torch.allclose(want, by_name, atol=1e-3)
    assert torch.equal(Favor(24).projection, Favor(24, 128, 0, True).projection)
    assert not torch.equal(Favor(24, seed=1).projection, Favor(24).projection)
    assert dict(Favor(24).named_buffers()).keys() == {"projection"}
    assert Favor(24).projection.dtype == torch.float32


def test_favor_estimates_softmax():
    """E[phi(x) . phi(y)] = exp(x . y / sqrt(dim)): the average of 4,000 projections within 5 standard errors, which
    chance fails 6e-7 of seeds for each of the two kinds; and orthogonal rows have less variance than others."""
    x, y = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    want, spread = math.exp(x @ y / 8**0.5), {}
    for orthogonal in (True, False):
        made = [Favor(8, 8, seed, orthogonal) for seed in range(2000)]
        projection = torch.stack([f.projection for f in made]).double()
        if orthogonal:
            gram = projection @ projection.mT
            assert (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
        exponents = [projection @ t / 8**0.25 - t @ t / (2 * 8**0.5) for t in (x, y)]
        estimate = torch.exp(sum(exponents)).mean(-1)
        torch.testing.assert_close(estimate[0], (made[0](x) * made[0](y)).sum())
        spread[orthogonal] = estimate.std().item()
        assert abs(estimate.mean().item() - want) < 5 * spread[orthogonal] / 2000**0.5
    assert spread[True] < spread[False]


def test_favor_of_large_queries_and_of_float16():
    """Queries as large as 100, whose features alone would overflow; keys have no maximum taken."""
    query, key, value = torch.randn(3, 1, 1, 30, 16).unbind()
    out = linear_attention(100 * query, key, value, feature_map="favor")
    assert out.isfinite().all()
    phi = favor(100 * query.double(), Favor(16).projection, True), favor(key.double(), Favor(16).projection, False)
    close(out, linear_oracle(*phi, value, eps=1e-30)[0], 1e-4)
    half = [t.half().requires_grad_() for t in (4 * query, 4 * key, value)]
    out = linear_attention(*half, feature_map="favor")
    assert out.dtype == torch.float16
    doubles = [t.detach().double() for t in half]
    projection = Favor(16).projection
    phi = favor(doubles[0], projection, True), favor(doubles[1], projection, False)
    close(out, linear_oracle(*phi, doubles[2], eps=1e-30)[0], 1e-3)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), half))


# ------------------------------------------------------------------------------------------ 16 bits, autocast

KINDS = {
    "none, elu": Case("none", queries=65, dim=16, value_dim=16),
    "none, relu, full": Case("none", feature_map="relu", causal=False, queries=65, dim=16, value_dim=16),
    "sine": Case(queries=65, dim=16, value_dim=16, realizations=32, sines=4),
    "sine, favor": Case(feature_map="favor", queries=65, dim=16, value_dim=16, realizations=32),
    "conv, relu, full": Case("conv", feature_map="relu", causal=False, queries=65, dim=16, realizations=32, taps=8),
}


def plain(case, tensors, module, noise):
    """The formula in PyTorch, in the tensors' dtype throughout; the codes are made in fp64."""
    query, key, value = tensors
    dtype = query.dtype
    if module is not None:
        codes = case.codes(module, noise, case.queries, case.queries)
        query, key = (torch.einsum("bhld,hldr->bhlr", x, code.to(dtype)) for x, code in zip((query, key), codes))
    maps = {"elu": elu, "relu": relu}
    if case.feature_map == "favor":
        projection = Favor(query.shape[-1]).projection.to(dtype)
        scaled = [x * x.shape[-1] ** -0.25 for x in (query, key)]
        exponents = [x @ projection.T - x.square().sum(-1, keepdim=True) / 2 for x in scaled]
        exponents[0] = exponents[0] - exponents[0].detach().amax(-1, keepdim=True)
        phi_q, phi_k = (e.exp() * projection.shape[0] ** -0.5 for e in exponents)
    else:
        phi_q, phi_k = map(maps[case.feature_map], (query, key))
    matrix = phi_q @ phi_k.mT
    matrix = matrix.tril() if case.causal else matrix
    return matrix @ value / (matrix.sum(-1, keepdim=True) + case.eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_16_bit_at_most_twice_the_error_of_plain(name, dtype):
    """Root mean squares over 3 seeds, of out and of every gradient."""
    case, sums = KINDS[name], None
    for seed in range(3):
        torch.manual_seed(seed)
        tensors, module, keywords = case.make(torch.float32)
        noise = case.noise()
        halves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        doubles = [t.detach().double().requires_grad_() for t in halves]
        exact = case.module(torch.float64)
        if module is not None:
            exact.load_state_dict(module.state_dict())
        weight = torch.randn_like(halves[2]).to(dtype)
        results = []
        for out, inputs, m in (
            (case.call(linear_attention, halves, module, noise, keywords)[0], halves, module),
            (plain(case, halves, module, noise), halves, module),
            (case.oracle(doubles, exact, noise, keywords)[0], doubles, exact),
        ):
            parameters = [] if m is None else m.parameters()
            results.append([out, *torch.autograd.grad(out, [*inputs, *parameters], weight.to(out.dtype))])
        assert results[0][0].dtype == dtype
        errors = [
            torch.stack([(a - t).square().sum(), (b - t).square().sum(), t.square().sum()]) for a, b, t in zip(*results)
        ]
        sums = torch.stack(errors, 1) if sums is None else sums + torch.stack(errors, 1)
    error, allowed, size = sums.sqrt()
    assert (error <= 2 * allowed + 1e-6 * size).all(), (error / size, allowed / size)


@pytest.mark.parametrize("name", ["none, elu", "sine, favor", "conv, relu, full"])
def test_autocast_casts_the_tensors_and_spares_the_codes(name):
    case = KINDS[name]
    tensors, module, keywords = case.make(torch.float32)
    noise = case.noise()
    half = [t.detach().bfloat16() for t in tensors]
    expected = case.call(linear_attention, half, module, noise, keywords)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.call(linear_attention, tensors, module, noise, keywords)
    assert got[0].dtype == torch.bfloat16
    assert all(map(torch.equal, got, expected))
    inputs = [*tensors, *([] if module is None else module.parameters())]
    assert all(grad.dtype == t.dtype for grad, t in zip(torch.autograd.grad(got[0].sum(), inputs), inputs))


@pytest.mark.parametrize("name", ["none, elu", "sine", "conv, relu, full"])
def test_the_same_bits_again(name):
    case = KINDS[name]
    tensors, module, keywords = case.make(torch.float32)
    noise = case.noise()

    def run():
        out = case.call(linear_attention, tensors, module, noise, keywords)[0]
        return out, *torch.autograd.grad(out.sin().sum(), [*tensors, *([] if module is None else module.parameters())])

    assert all(map(torch.equal, run(), run()))
