"""Linear attention with and without SPE against the dense oracle: results, states and every gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from spe_calls import DEVICE, NEAR
from spe_cases import CASES, INTERPRETED, Case, close

from posattn import LinearState, linear_attention, linear_blockwise, spe_blockwise, spe_conv_blockwise
from posattn.noise import Noise

blockwise = functools.partial(linear_attention, backend="blockwise")


def gradients(results, inputs, weights):
    """Of a weighted sum of results."""
    loss = sum((r.double() * w.to(r.device)).sum() for r, w in zip(results, weights))
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def check(case, backend, device, dtype, tolerance):
    """out, the state after it, and the gradients of all by all."""
    tensors, module, keywords = case.make(dtype)
    noise, exact = case.noise(), case.module(torch.float64)
    if exact is not None:
        exact.load_state_dict(module.state_dict())
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]
    want = case.oracle(exact_tensors, exact, noise, keywords)

    tensors = [t.detach().to(device).requires_grad_() for t in tensors]
    module = None if module is None else module.to(device)
    noise = None if noise is None else Noise(*(t if t is None else t.to(device) for t in noise))
    keywords = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in keywords.items()}
    attend = functools.partial(linear_attention, backend=backend)
    got = case.call(attend, tensors, module, noise, keywords)
    assert [t.dtype for t in got] == [dtype] * 3
    tolerance = max(tolerance, case.rounding)
    for ours, wanted in zip(got, want):
        close(ours, wanted, tolerance)

    weights = [torch.randn_like(w) / w.detach().abs().max().clamp(min=1e-3) for w in want]
    parameters, exact_parameters = ([] if m is None else [*m.parameters()] for m in (module, exact))
    expected = gradients(want, [*exact_tensors, *exact_parameters], weights)
    ours = gradients(got, [*tensors, *parameters], weights)
    for grad, wanted in zip(ours, expected):
        close(grad, wanted, 10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, dtype, tolerance):
    check(CASES[name], "blockwise", "cpu", dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle_on_a_gpu(name):
    check(CASES[name], "triton", DEVICE, torch.float32, NEAR)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them all")
@pytest.mark.triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_against_the_oracle(name):
    check(CASES[name], "triton", "cpu", torch.float32, NEAR)


def test_blind_queries_get_nothing():
    case = CASES["blind"]
    tensors, module, keywords = case.make(torch.float32)
    out = case.call(blockwise, tensors, module, case.noise(), keywords)[0]
    assert (out[0, :, :5] == 0).all()
    assert (out[1] == 0).all()
    assert out[0, :, 5:].abs().amax(-1).min() > 0


SMALL = dict(queries=4, heads=1, dim=2, value_dim=2, sines=1, taps=3, realizations=3, batch=1, eps=1e-2)


@pytest.mark.parametrize(
    "case",
    [
        Case("sine", state=True, **SMALL),
        Case("sine", False, "relu", causal=False, **SMALL),
        Case("conv", mask="gaps", **SMALL),
        Case("seed", False, causal=False, state=True, **SMALL),
        Case("exact", **SMALL),
        Case("exact", True, "favor", state=True, **{**SMALL, "eps": 1e-12}),
        Case("none", feature_map="favor", **{**SMALL, "eps": 1e-12}),
        Case("none", feature_map=torch.exp, state=True, **SMALL),
    ],
)
def test_gradcheck(case):
    """Of out and of the state; favor's maximum is a constant, so eps must not matter there."""
    tensors, module, keywords = case.make(torch.float64)
    noise = case.noise()
    if case.spe == "none":
        assert torch.autograd.gradcheck(lambda *t: case.call(blockwise, t, None, None, keywords), tensors)
        return
    names = [name for name, _ in module.named_parameters()]

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *tensors):
            return case.call(blockwise, tensors, self.module, noise, keywords)

    def call(*inputs):
        parameters = {f"module.{name}": p for name, p in zip(names, inputs[len(tensors) :])}
        return torch.func.functional_call(Call(), parameters, inputs[: len(tensors)])

    assert torch.autograd.gradcheck(call, (*tensors, *module.parameters()))


# --------------------------------------------------------------------------------------------- one after another


def parts(case: Case, cuts: list[int], dtype: torch.dtype, hand_over):
    """(a whole pass, the same in parts): out, kv, k of each and the gradients of all inputs."""
    tensors, module, keywords = case.make(dtype)
    noise = case.noise()
    codes = None if module is None else module(noise)
    whole = blockwise(*tensors, spe=codes, return_state=True, **keywords)
    state, outs = None, []
    for start, end in zip([0, *cuts], [*cuts, case.queries]):
        piece = (t[:, :, start:end] for t in tensors)
        spe = hand_over(module, codes, state)
        out, state = blockwise(*piece, spe=spe, initial_state=state, return_state=True, **keywords)
        assert state.position == end
        outs.append(out)
    results = [(whole[0], *whole[1][:2]), (torch.cat(outs, 2), *state[:2])]
    inputs = [*tensors, *([] if module is None else module.parameters())]
    weights = [torch.randn_like(r).double() for r in results[0]]
    return [(*r, *gradients(r, inputs, weights)) for r in results]


CONTINUED = {
    "sine, elu": Case(queries=70),
    "sine, favor": Case(feature_map="favor", queries=33),
    "conv, relu": Case("conv", feature_map="relu", queries=40),
    "seed, elu": Case("seed", queries=40, gated=False),
    "exact, favor": Case("exact", feature_map="favor"),
    "none, elu": Case("none", queries=70),
}


@pytest.mark.parametrize("cuts", [[1], [20], [3, 4, 11, 20], "each"], ids=str)
@pytest.mark.parametrize("name", CONTINUED)
def test_parts_are_the_whole(name, cuts):
    """The noise is the state's: codes are given first and the module later, or the codes again."""
    case = CONTINUED[name]
    cuts = [*range(1, 21)] if cuts == "each" else cuts
    again = len(cuts) == 1
    whole, pieces = parts(case, cuts, torch.float64, lambda m, codes, state: codes if again or state is None else m)
    for ours, want in zip(pieces, whole):
        close(ours, want, 1e-10)


@pytest.mark.parametrize("name", CONTINUED)
def test_tokens_one_by_one_in_float32(name):
    case = CONTINUED[name]._replace(queries=12)
    whole, pieces = parts(case, [*range(1, 12)], torch.float32, lambda m, codes, state: codes if state is None else m)
    for ours, want in zip(pieces, whole):
        close(ours, want, 3e-5)


def test_keys_in_parts_when_not_causal():
    """A full call continued sees the earlier keys and its own."""
    case = Case(causal=False, queries=20)
    (query, key, value), module, keywords = case.make(torch.float64)
    codes = module(case.noise())
    _, state = blockwise(query[:, :, :8], key[:, :, :8], value[:, :, :8], spe=codes, return_state=True, **keywords)
    rest = (t[:, :, 8:] for t in (query, key, value))
    out = blockwise(*rest, spe=codes, initial_state=state, **keywords)
    want = blockwise(query, key, value, spe=codes, **keywords)
    torch.testing.assert_close(out, want[:, :, 8:])


def test_a_state_made_with_module_alone_keeps_its_noise():
    (query, key, value), module, keywords = Case("seed").make(torch.float64)
    out, state = blockwise(query, key, value, spe=module, return_state=True, **keywords)
    assert isinstance(state, LinearState)
    torch.testing.assert_close(blockwise(query, key, value, spe=module(state.noise), **keywords), out)


BLOCKS = {  # of positions, of heads and of the scratch: one, few, all
    "least": (dict(SCRATCH=1, CHUNK=1, WIDE_CHUNK=1), dict(SCRATCH=1, ROWS=1), dict(POSITIONS=1)),
    "few": (dict(SCRATCH=500, CHUNK=3, WIDE_CHUNK=5), dict(SCRATCH=900, ROWS=14), dict(POSITIONS=4)),
    "odd": (dict(CHUNK=11), dict(SCRATCH=5000, ROWS=20), dict(POSITIONS=13)),
}


@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize(
    "name",
    ["sine, gated, elu, causal", "conv, gated, relu, full", "seed, length 65", "state, far", "blind", "10 sines"],
)
def test_blocks_of_any_size(name, size, monkeypatch):
    """What is cut into blocks is the same whatever their size."""
    case = CASES[name]
    tensors, module, keywords = case.make(torch.float64)
    noise = case.noise()
    want = case.oracle(tensors, module, noise, keywords)
    for place, sizes in zip((linear_blockwise, spe_blockwise, spe_conv_blockwise), BLOCKS[size]):
        for constant, number in sizes.items():
            monkeypatch.setattr(place, constant, number)
    got = case.call(blockwise, tensors, module, noise, keywords)
    inputs = [*tensors, *module.parameters()]
    weights = [torch.randn_like(w) for w in want]
    for ours, wanted in zip((*got, *gradients(got, inputs, weights)), (*want, *gradients(want, inputs, weights))):
        close(ours, wanted, max(1e-10, case.rounding))


@pytest.mark.parametrize("has_gate", [True, False])
def test_exact_codes_need_not_be_wide(has_gate):
    """Their products with a projection and their norms, and the gradients of those, are those of the features."""
    case = Case("exact", has_gate, queries=9, keys=11)
    tensors, module, _ = case.make(torch.float64)
    codes, projection = module(), torch.randn(7, case.width, dtype=torch.float64)
    wide = codes.features(*tensors[:2], 1000, 3)
    want = [*(hat @ projection.mT for hat in wide), *(hat.square().sum(-1) for hat in wide)]
    got = [*codes.projected(*tensors[:2], projection, 1000, 3), *codes.squared_norms(*tensors[:2])]
    torch.testing.assert_close(got, want)
    weights, inputs = [torch.randn_like(w) for w in want], [*tensors[:2], *module.parameters()]
    torch.testing.assert_close(gradients(got, inputs, weights), gradients(want, inputs, weights))
    drawn = Case("sine").module()()
    with pytest.raises(ValueError, match="num_realizations=None"):
        drawn.squared_norms(*(t.float() for t in tensors[:2]))


def test_any_strides():
    case = Case("conv", mask="gaps")
    tensors, module, keywords = case.make(torch.float64)
    codes = module(case.noise())
    expected = blockwise(*tensors, spe=codes, **keywords)
    grads = torch.autograd.grad(expected.sin().sum(), tensors)
    for layout in (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t.mT.contiguous().mT):
        strided = [layout(t.detach()).requires_grad_() for t in tensors]
        out = blockwise(*strided, spe=codes, **keywords)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), strided), grads)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@pytest.mark.parametrize("spe", ["none", "sine", "conv", "exact"])
def test_nothing_there(empty, spe):
    case = Case(spe, causal=False, queries=4, keys=3)
    tensors, module, keywords = case.make(torch.float32)
    cut = {"batch": (0, 0, 0), "queries": (2, 0, 1), "keys": (2, 1, 0)}[empty]
    query, key, value = (
        t.detach()[: cut[0], :, : t.shape[2] * (1 if cut[0] == 0 else cut[1 + (t is not tensors[0])])].requires_grad_()
        for t in tensors
    )
    out, state = blockwise(query, key, value, spe=module, return_state=True, **keywords)
    assert out.shape == (*query.shape[:3], case.value_dim)
    assert state.kv.shape == (query.shape[0], case.heads, case.width, case.value_dim)
    assert state.position == key.shape[2]
    if empty == "keys":
        assert (out == 0).all()
        assert (state.kv == 0).all()
    inputs = [query, key, value, *([] if module is None else module.parameters())]
    for grad in torch.autograd.grad(out.sum() + state.kv.sum(), inputs, materialize_grads=True):
        assert not grad.isnan().any()
