"""attention where nothing is visible, nothing is there, dtypes are mixed, and tensors lie oddly in memory."""

from __future__ import annotations

import math

import pytest
import torch
from backends import BACKENDS, by
from calls import TRITON, blockwise, qkv, same, triton
from oracle import attention_oracle

import posattn
from posattn import attention, attention_reference, dispatch

# ---------------------------------------------------------------------------------------- blind, empty


def blind_rows(kind: str) -> tuple[dict, torch.Tensor]:
    """Keyword arguments, and which of (2 batches, 6 queries) see nothing."""
    blind = torch.zeros(2, 6, dtype=torch.bool)
    if kind == "mask":
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[1] = False
        blind[1] = True
        return dict(key_padding_mask=mask), blind
    if kind == "causal":
        blind[:, :2] = True
        return dict(is_causal=True, query_start=-2), blind
    if kind == "window":
        blind[:] = True
        return dict(window=(1, 1), query_start=100), blind
    table = torch.zeros(3, 11)
    table[:, :8] = -math.inf if kind == "bias -inf" else -1e30  # all offsets up to j - i = 2
    blind[:, 3:] = True
    return dict(bias=table), blind


@pytest.mark.parametrize("kind", ["mask", "causal", "window", "bias -inf", "bias -1e30"])
@pytest.mark.parametrize("call", [blockwise, TRITON, attention_reference])
def test_rows_that_see_nothing(call, kind):
    kwargs, blind = blind_rows(kind)
    if "bias" in kwargs:
        kwargs["bias"].requires_grad_()
    tensors = qkv(queries=6)
    out, lse = call(*tensors, **kwargs, return_lse=True)
    blind = blind[:, None, :].expand(2, 3, 6)
    assert (out[blind] == 0).all()
    assert (lse[blind] == -math.inf).all()
    assert (out[~blind] != 0).all()
    assert lse[~blind].isfinite().all()
    (out.sum() + torch.where(blind, 0.0, lse).sum()).backward()
    assert (tensors[0].grad[blind] == 0).all()
    everything = [*tensors, *([kwargs["bias"]] if "bias" in kwargs else [])]
    assert all(t.grad.isfinite().all() for t in everything)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("bias", ["none", "table", "tisa", "alibi"])
@pytest.mark.parametrize("call", [blockwise, TRITON, attention_reference])
def test_empty(call, bias, batch, queries, keys):
    shapes = (batch, 4, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 6)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    table = torch.randn(4, max(queries + keys - 1, 0), requires_grad=True)
    made = dict(none=None, table=table, tisa=posattn.TISA(4), alibi=posattn.ALiBi(4))[bias]
    out, lse = call(*tensors, made, enable_gqa=True, return_lse=True)
    assert out.shape == (batch, 4, queries, 6)
    assert lse.shape == (batch, 4, queries)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape and (t.grad == 0).all() for t in tensors)


# -------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_tensors_and_not_the_bias(dtype, monkeypatch):
    query, key, value = qkv()
    query, value = query.half(), value.bfloat16()  # mixed, as a model under autocast makes them
    bias, seen = posattn.TISA(3), []
    apply = dispatch.Attend.apply
    monkeypatch.setattr(
        dispatch.Attend,
        "apply",
        lambda *args: (seen.extend(args[:4]), apply(*args))[1],
    )
    with torch.autocast("cpu", dtype):
        out, lse = attention(query, key, value, bias, return_lse=True)
    assert [t.dtype for t in seen] == [dtype, dtype, dtype, torch.float32]
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    monkeypatch.undo()
    cast = [t.to(dtype) for t in (query, key, value)]
    torch.testing.assert_close((out, lse), attention(*cast, bias, return_lse=True), atol=0, rtol=0)
    (out.float().sum() + lse.sum()).backward()
    assert bias.amplitudes.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    tensors = qkv(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*tensors).dtype == torch.float64


def test_backward_under_autocast_stays_precise():
    tensors = qkv(queries=40)
    expected = torch.autograd.grad(attention(*tensors, is_causal=True).square().sum(), tensors)
    out = attention(*tensors, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out.square().sum(), tensors)
    torch.testing.assert_close(got, expected)


# --------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    "layout", ["heads inside", "sliced", "expanded", "last axis strided", "projected together"]
)
@pytest.mark.parametrize("call", [blockwise, TRITON])
def test_layouts(call, layout):
    def lay(x):
        if layout == "heads inside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.nn.functional.pad(x, (2, 3, 1, 1))[:, :, 1:-1, 2:-3]
        if layout == "expanded":
            return x[:1].expand(2, -1, -1, -1)
        if layout == "last axis strided":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return torch.stack([x, x], dim=2).transpose(1, 2).flatten(1, 2)[:, ::2]

    tensors = qkv(queries=20)
    laid = [lay(t) for t in tensors]
    got = call(*laid, return_lse=True)
    expected = attention_oracle(*laid)
    # An expanded gradient, as .sum() makes it, reaches backward too.
    same(got, expected, tensors, atol=1e-3 if call is triton else 2e-5, rtol=1e-3 if call is triton else 2e-5)
    torch.testing.assert_close(
        torch.autograd.grad(call(*laid).sum(), tensors),
        torch.autograd.grad(attention_oracle(*laid)[0].sum(), tensors),
        atol=1e-3,
        rtol=1e-3,
    )


def test_meta_tensors():
    query, key, value = (torch.empty(2, 4, n, 8, device="meta") for n in (5, 7, 7))
    with torch.device("meta"):
        bias = posattn.TISA(4)
    out, lse = attention(query, key, value, bias, return_lse=True)
    assert out.shape == (2, 4, 5, 8)
    assert lse.shape == (2, 4, 5)
    assert out.device.type == "meta"


# ------------------------------------------------------------------------------------ what is not a number


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["forward", "decoding", "ALiBi", "DAPE", "a softcap"])
def test_a_query_that_is_no_number_shows(backend, way):
    """And it alone: a query whose logits are all NaN is not one that sees nothing, which gives 0."""
    query, key, value = (torch.randn(2, 2, 2 if way == "decoding" and n == 0 else 40, 16) for n in range(3))
    query[1, 0, 1] = torch.nan
    bias = posattn.DAPE(2, posattn.ALiBi(2)) if way == "DAPE" else posattn.ALiBi(2) if way == "ALiBi" else None
    kwargs = dict(softcap=2.0) if way == "a softcap" else {}
    with torch.no_grad():
        out, lse = by(backend, attention, query, key, value, bias, is_causal=True, return_lse=True, **kwargs)
    bad = torch.zeros(lse.shape, dtype=torch.bool)
    bad[1, 0, 1] = True
    if way == "DAPE":
        bad[1, 1, 1] = True  # its heads are mixed
    assert torch.equal(lse.isnan(), bad)
    assert torch.equal(out.isnan(), bad[..., None].expand_as(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_slopes_that_became_negative(backend):
    """Without gradient slopes are not made into a table: both forms, one-sided and symmetric, of either sign."""
    query, key, value = torch.randn(3, 1, 2, 40, 16)
    for symmetric in (True, False):
        bias = posattn.ALiBi(2, learnable=True, symmetric=symmetric)
        with torch.no_grad():
            bias.slope.copy_(torch.tensor([0.3, -0.2]))
            out = by(backend, attention, query, key, value, bias)
            right = attention_reference(query, key, value, bias)
        torch.testing.assert_close(out, right, atol=2e-5, rtol=2e-5)


class Walled(posattn.Bias):
    """Nothing within 20 positions, and beyond them what hides a pair, or nearly so."""

    def __init__(self, num_heads, tail):
        super().__init__(num_heads)
        self.tail = tail

    def values(self, offsets):
        return torch.where(offsets.abs() <= 20, -0.1 * offsets.abs().float(), self.tail).expand(self.num_heads, -1)

    def support(self):
        return torch.tensor([[-20], [20]], dtype=torch.int32).repeat(1, self.num_heads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [-math.inf, -1e10, -1e9, torch.finfo(torch.float32).min, -1e4, 30.0])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 4.0), (torch.float32, 40.0)])
def test_tails_as_good_as_hidden(backend, tail, dtype, size):
    """A tile of such a tail alone leaves nothing behind, whatever its scores are."""
    query, key, value = (torch.randn(1, 1, 128, 16).to(dtype) for _ in range(3))
    query = query * size
    bias = Walled(1, tail)
    out = by(backend, attention, query, key, value, bias, is_causal=True)
    right = attention_reference(query, key, value, bias, is_causal=True)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out, right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_is_no_number_shows(backend):
    query, key, value = torch.randn(3, 1, 1, 40, 16)
    table = torch.zeros(1, 79)
    table[0, 39 - 10] = torch.nan  # of the offset -10
    out = by(backend, attention, query, key, value, table, is_causal=True)
    right = attention_reference(query, key, value, table, is_causal=True)
    bad = torch.arange(40) >= 10
    assert torch.equal(out.isnan().any(-1)[0, 0], bad)
    assert torch.equal(right.isnan().any(-1)[0, 0], bad)
