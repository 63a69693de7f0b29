"""attention_with_kvcache against the float64 oracle, by each backend; and attention, which decodes by itself."""

from __future__ import annotations

import pytest
import torch
from bias_cases import make
from decode_cases import CASES, EVERY, call
from torch.autograd import forward_ad

import posattn
from posattn import DAPE, KERPLE, attention, attention_reference, attention_with_kvcache, decode


@pytest.mark.parametrize(("backend", "dtype", "limit", "name"), EVERY)
def test_against_the_oracle(backend, dtype, limit, name):
    case = CASES[name]
    tensors, keywords = case.make(dtype)
    expected = case.oracle(tensors, keywords)
    if case.page:
        tensors, keywords["block_table"] = case.paged(tensors)
    out, lse = call(backend, *tensors, **keywords)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out, expected[0], atol=limit, rtol=limit, check_dtype=False)
    torch.testing.assert_close(lse, expected[1], atol=limit, rtol=limit, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """The blockwise backend multiplies in float32; the interpreter knows no bfloat16."""
    query, keys, values = (torch.randn(2, 4, length, 16).to(dtype) for length in (1, 3000, 3000))
    bias = make("tisa", 4)
    lengths = torch.tensor([3000, 2100], dtype=torch.int32)
    out, lse = call("blockwise", query, keys, values, bias, cache_seqlens=lengths)
    whole = [t.float() for t in (query, keys, values)]
    expected = call("blockwise", *whole, bias, cache_seqlens=lengths)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, expected[0].to(dtype), atol=1e-3, rtol=1e-2)


def in_steps(query, key, value, bias, steps, **keywords):
    """Token by token (or a few at a time) through the cache, as a model would generate."""
    outs, position = [], 0
    cache = torch.full_like(key, torch.nan), torch.full_like(value, torch.nan)
    for step in steps:
        now = slice(position, position + step)
        for into, new in zip(cache, (key, value)):
            into[:, :, now] = new[:, :, now]
        position += step
        lengths = torch.full((len(query),), position, dtype=torch.int32)
        outs.append(call(keywords["backend"], query[:, :, now], *cache, bias, cache_seqlens=lengths)[0])
    return torch.cat(outs, 2)


@pytest.mark.parametrize("backend", ["blockwise", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize(
    "bias", [None, make("tisa", 2), make("alibi", 2), posattn.FIRE(2, 5), DAPE(2, KERPLE(2), 9, 3)]
)
def test_steps_equal_one_causal_call(bias, backend):
    query, key, value = torch.randn(3, 1, 2, 19, 8)
    steps = [1] * 5 + [5, 2, 7] if backend == "blockwise" else [16, 3]
    if isinstance(bias, DAPE) and backend == "triton":
        query, key, value, steps = query[:, :, :5], key[:, :, :5], value[:, :, :5], [4, 1]
    got = in_steps(query, key, value, bias, steps, backend=backend)
    whole = attention(query, key, value, bias, is_causal=True, backend="blockwise")
    torch.testing.assert_close(got, whole.detach(), atol=1e-5, rtol=1e-5)


STARTS = [
    {},
    dict(query_start=70),
    dict(query_start=20),
    dict(query_start=3, key_start=11),
    dict(query_start=-4),
]


@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("bias", ["", "tisa", "alibi", "fire", "dape"])
def test_attention_decodes_by_itself(bias, starts, monkeypatch):
    """The same results without gradients as with them, wherever the queries stand."""
    modules = {"": None, "fire": posattn.FIRE(4, 5), "dape": DAPE(4, KERPLE(4), 9, 3)}
    module = modules[bias] if bias in modules else make(bias, 4)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 60, 8), torch.randn(2, 2, 60, 8)
    keywords = dict(enable_gqa=True, return_lse=True, window=(30, 2), sinks=torch.randn(4), **starts)
    expected = attention_reference(query, key, value, module, **keywords)
    served = []
    monkeypatch.setattr(
        decode, "decode_forward", lambda *a: served.append(a) or posattn.decode_ops.decode_forward(*a)
    )
    with torch.no_grad():
        got = attention(query, key, value, module, **keywords, backend="blockwise")
    assert served or bias == "dape"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["relative", "table"])
def test_attention_decodes_by_the_kernel(kind):
    query, key, value = torch.randn(1, 2, 2, 8), torch.randn(1, 1, 260, 8), torch.randn(1, 1, 260, 8)
    keywords = dict(is_causal=True, enable_gqa=True, return_lse=True)
    bias = torch.randn(2, 261)
    if kind == "relative":
        bias, keywords["relative_logits"] = None, torch.randn(1, 2, 2, 37)
    expected = attention_reference(query, key, value, bias, **keywords)
    for backend in ("blockwise", "triton"):
        with torch.no_grad():
            got = attention(query, key, value, bias, **keywords, backend=backend)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_who_wants_a_gradient_is_not_served():
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    bias = make("tisa", 2)
    assert not decode.serves(query, key, value, bias, "blockwise")
    assert decode.serves(query, key, value, None, "blockwise")
    assert not decode.serves(query, key, value, None, "triton")  # too short to be split
    assert not decode.serves(query, key[:, :, :20], value[:, :, :20], None, "blockwise")
    with torch.no_grad():
        assert decode.serves(query, key, value, bias, "blockwise")
    assert not decode.serves(query.requires_grad_(), key, value, None, "blockwise")
    assert not decode.serves(torch.randn(1, 2, 17, 8), key, value, None, "blockwise")
    out = attention(query, key, value, bias)
    assert out.requires_grad


def test_a_gradient_is_refused():
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    for arguments in ((query, key, value, make("tisa", 2)), (query.clone().requires_grad_(), key, value)):
        with pytest.raises(RuntimeError, match=r"no gradient.*posattn\.attention\(\)"):
            attention_with_kvcache(*arguments)
    attention_with_kvcache(query, key, value, make("alibi", 2))


def test_what_a_bias_makes_wants_a_gradient():
    """A bias of somebody else's may have tensors that are no parameters."""

    class Own(posattn.Bias):
        def __init__(self):
            super().__init__(2)
            self.weight = torch.ones(2, requires_grad=True)

        def values(self, offsets):
            return self.weight[:, None] * offsets.abs()

    class OwnSlopes(Own):
        def slopes(self):
            return 1.0 * self.weight

    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    for bias in (Own(), DAPE(2, Own(), 5).requires_grad_(False)):
        assert attention(query, key, value, bias).requires_grad
        with pytest.raises(RuntimeError, match="no gradient"):
            attention_with_kvcache(query, key, value, bias)
        with torch.no_grad():
            attention_with_kvcache(query, key, value, bias)
    with pytest.raises(RuntimeError, match="no gradient"):
        attention_with_kvcache(query, key, value, OwnSlopes())
    frozen = make("tisa", 2).requires_grad_(False)
    assert decode.serves(query, key, value, frozen, "blockwise")


def test_forward_mode_is_not_served():
    """Tangents would be lost: the usual path says that it has no rule for them, and so does this one."""
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    for function in (attention, attention_with_kvcache):
        with pytest.raises(RuntimeError):
            torch.func.jvp(lambda q, f=function: f(q, key, value), (query,), (query,))
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError):
            function(forward_ad.make_dual(query, query), key, value)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no rules for forward-mode"):
        torch.vmap(lambda q: attention_with_kvcache(q, key, value))(query[None])
