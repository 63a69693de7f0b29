"""replace_sdpa against torch's own function with the bias in its mask."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

import posattn
from posattn import DAPE, FIRE, KERPLE, TISA, ALiBi, replace_sdpa

HEADS, DIM = 4, 8
CLOSE = dict(rtol=1e-9, atol=1e-10)


def qkv(*lead, queries=6, keys=None, heads=HEADS, key_heads=None, value_dim=DIM):
    keys, key_heads = keys or queries, key_heads or heads
    shapes = (heads, queries, DIM), (key_heads, keys, DIM), (key_heads, keys, value_dim)
    return [torch.randn(*lead, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def bias_of(heads=HEADS):
    bias = TISA(heads).double()
    nn.init.normal_(bias.amplitudes)
    return bias


def additive(mask):
    return (
        torch.zeros(mask.shape).double().masked_fill(~mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
    )


def check(bias, tensors, dense, given, mask=0.0, *, formula=False):
    """The call with `given` inside the context is the call with `dense + mask` outside it: values and gradients."""
    options = {k: v for k, v in given.items() if k in ("scale", "enable_gqa")}
    expected = F.scaled_dot_product_attention(*tensors, dense + mask, **options)
    with replace_sdpa(bias) as replaced:
        found = F.scaled_dot_product_attention(*tensors, **given)
    assert (replaced.calls, replaced.dense, replaced.left) == (1, int(formula), 0)
    torch.testing.assert_close(found, expected, **CLOSE)
    leaves = [*tensors, *bias.parameters()]
    probe = torch.randn_like(found)
    grads = [torch.autograd.grad((out * probe).sum(), leaves, retain_graph=True) for out in (found, expected)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("lengths", [(6, 6), (1, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"scale": 0.0}, {"is_causal": True}])
def test_shapes_and_where_queries_stand(lead, lengths, options):
    bias, tensors = bias_of(), qkv(*lead, queries=lengths[0], keys=lengths[1], value_dim=5)
    causal = options.get("is_causal", False)
    dense = bias.dense(*lengths, query_start=0 if causal else None)
    mask = additive(torch.ones(lengths, dtype=torch.bool).tril()) if causal else 0.0
    check(bias, tensors, dense, options, mask)


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_biases_of_torch(make):
    bias, tensors = bias_of(), qkv(2, queries=3, keys=5)
    start = 0 if make is causal_upper_left else 2
    mask = additive(torch.ones(3, 5, dtype=torch.bool).tril(start))
    check(bias, tensors, bias.dense(3, 5, query_start=start), {"attn_mask": make(3, 5)}, mask)


MASKS = {
    "keys": lambda: torch.rand(2, 1, 1, 5) < 0.7,
    "keys, expanded": lambda: (torch.arange(5) != 3).expand(2, HEADS, 3, 5),
    "keys, repeated": lambda: (torch.arange(5) != 3).repeat(2, HEADS, 1, 1),
    "keys of all": lambda: torch.rand(5) < 0.7,
    "keys, 0 and -inf": lambda: additive(torch.rand(2, 1, 1, 5) < 0.7),
    "keys, numbers": lambda: torch.randn(2, 1, 1, 5).double(),
    "dense": lambda: torch.rand(2, 1, 3, 5) < 0.7,
    "dense of one": lambda: torch.rand(3, 5) < 0.7,
    "dense per head": lambda: torch.rand(2, HEADS, 3, 5) < 0.7,
    "heads and keys": lambda: torch.rand(HEADS, 1, 5) < 0.7,
    "queries": lambda: torch.randn(3, 1).double(),
    "numbers": lambda: torch.randn(2, 1, 3, 5).double(),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("gqa", [False, True])
def test_masks(kind, gqa):
    mask = MASKS[kind]()
    if mask.dtype == torch.bool and mask.is_contiguous():
        mask[..., 0] = True  # no query without a key: NaN in torch
    elif mask.is_floating_point() and mask.isinf().any():
        mask[..., 0] = 0.0
    bias, tensors = bias_of(), qkv(2, queries=3, keys=5, key_heads=2 if gqa else None)
    given = dict(attn_mask=mask) | (dict(enable_gqa=True) if gqa else {})
    check(bias, tensors, bias.dense(3, 5), given, additive(mask), formula=not kind.startswith("keys"))


def test_a_decoded_token_has_only_keys_to_hide():
    bias, tensors = bias_of(), qkv(2, queries=1, keys=5)
    mask = torch.tensor([True, False, True, True, True]).expand(2, 1, 1, 5).contiguous()
    check(bias, tensors, bias.dense(1, 5), dict(attn_mask=mask), additive(mask))


def test_dimensions_broadcast():
    bias = bias_of()
    query, _, value = qkv(2, 3)
    key = torch.randn(3, 1, 6, DIM).double().requires_grad_()
    mask = torch.rand(3, 1, 6, 6) < 0.7
    mask[..., 0] = True
    check(bias, [query, key, value], bias.dense(6, 6), dict(attn_mask=mask), additive(mask), formula=True)


def test_every_way_to_call_it():
    bias, (query, key, value) = bias_of(), qkv(2)
    expected = posattn.attention(query, key, value, bias)
    calls = (
        F.scaled_dot_product_attention,
        imported_by_name,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    )
    for place in (torch.enable_grad(), torch.device("cpu")):  # another mode around, and inside
        with place, replace_sdpa(bias) as replaced:
            for call in calls:
                assert torch.equal(call(query, key, value), expected)
        with replace_sdpa(bias), place:
            assert torch.equal(imported_by_name(query, key, value), expected)
        assert replaced.calls == len(calls)
    assert torch.equal(imported_by_name(query, key, value), F.scaled_dot_product_attention(query, key, value))


def layers(count, tensors):
    query, key, value = tensors
    for _ in range(count):
        query = F.scaled_dot_product_attention(query, key, value)
    return query


def test_biases_in_turn_and_calls_left_to_torch():
    tensors = qkv(2)
    biases = nn.ModuleList([bias_of(), ALiBi(HEADS).double()])
    expected = tensors[0]
    for bias in (biases[0], biases[1], None):
        expected = posattn.attention(expected, *tensors[1:], bias)
    for given in (biases, [*biases]):
        with replace_sdpa([*given, None]) as replaced:
            for _ in range(3):
                torch.testing.assert_close(layers(3, tensors), expected, **CLOSE)
        assert (replaced.calls, replaced.left) == (6, 3)
    with replace_sdpa(lambda query, key: biases[0] if query.shape[2] > 1 else None) as replaced:
        torch.testing.assert_close(layers(1, tensors), posattn.attention(*tensors, biases[0]), **CLOSE)
        layers(1, qkv(2, queries=1, keys=4))
    assert (replaced.calls, replaced.left) == (1, 1)


def test_dape_and_fire():
    tensors = qkv(2)
    mask = torch.rand(2, 1, 6, 6) < 0.6
    mask[..., 0] = True
    for bias in (FIRE(HEADS).double(), DAPE(HEADS, KERPLE(HEADS), hidden=6, kernel_size=3).double()):
        with replace_sdpa(bias) as replaced:
            causal = F.scaled_dot_product_attention(*tensors, is_causal=True)
            lower = torch.ones(6, 6, dtype=torch.bool).tril()
            dense = F.scaled_dot_product_attention(*tensors, attn_mask=lower)
            F.scaled_dot_product_attention(*tensors, attn_mask=mask)
        assert (replaced.calls, replaced.dense) == (3, 2)
        expected = posattn.attention(*tensors, bias, is_causal=True)
        torch.testing.assert_close(causal, expected, **CLOSE)
        torch.testing.assert_close(dense, expected, **CLOSE)


def test_query_start():
    """A cache of 9 keys of which 4 are there: the query stands at 3."""
    bias, tensors = bias_of(), qkv(2, queries=1, keys=9)
    mask = (torch.arange(9) < 4).view(1, 1, 1, 9)
    expected = F.scaled_dot_product_attention(*tensors, bias.dense(1, 9, query_start=3) + additive(mask))
    with replace_sdpa(bias, query_start=3) as replaced:
        found = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
        torch.testing.assert_close(found, expected, **CLOSE)
        replaced.query_start = 5
        other = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    assert not torch.allclose(found, other)


def test_dropout():
    bias, tensors = bias_of(), qkv(2, queries=40)
    with replace_sdpa(bias):
        outs = []
        for seed, mask in ((0, None), (0, None), (1, None), (0, torch.ones(40, 40, dtype=torch.bool))):
            torch.manual_seed(seed)
            outs.append(F.scaled_dot_product_attention(*tensors, attn_mask=mask, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    whole = posattn.attention(*tensors, bias)
    for out in (outs[0], outs[2], outs[3]):
        assert not torch.allclose(out, whole)
    assert not torch.allclose(outs[0], outs[2])


def test_half_precision():
    bias = TISA(HEADS)
    tensors = [x.detach().bfloat16() for x in qkv(2)]
    mask = torch.ones(6, 6, dtype=torch.bool)
    with replace_sdpa(bias):
        outs = [F.scaled_dot_product_attention(*tensors, attn_mask=m) for m in (None, mask)]
        with torch.autocast("cpu", torch.bfloat16):
            singles = [x.float() for x in tensors]
            outs += [F.scaled_dot_product_attention(*singles, attn_mask=m) for m in (None, mask)]
    expected = posattn.attention_reference(*(x.double() for x in tensors), bias)
    huge = torch.tensor([0.0] * 5 + [-1e9])
    kept = posattn.attention_reference(
        *(x.double() for x in tensors), bias, key_padding_mask=(huge == 0).expand(2, 6)
    )
    with replace_sdpa(bias) as replaced, torch.autocast("cpu", torch.float16):
        out = F.scaled_dot_product_attention(*singles, attn_mask=huge)
    assert replaced.dense == 0
    torch.testing.assert_close(out.double(), kept, rtol=0.02, atol=0.02)
    for out in outs:
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


def test_other_threads_are_left_alone():
    bias, tensors = bias_of(), [x.detach() for x in qkv(2)]
    expected, found = F.scaled_dot_product_attention(*tensors), []
    with replace_sdpa(bias):
        thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(*tensors)))
        thread.start()
        thread.join()
        assert not torch.equal(F.scaled_dot_product_attention(*tensors), expected)
    assert torch.equal(found[0], expected)


def test_warnings_and_errors():
    tensors = [x.detach() for x in qkv(2)]
    call = F.scaled_dot_product_attention
    with pytest.warns(UserWarning, match=r"no call .* \(0 were left"), replace_sdpa(TISA(HEADS)):
        torch.ones(2).sum()
    with pytest.warns(UserWarning, match="took 1 of 2 biases"), replace_sdpa([TISA(HEADS), TISA(HEADS)]):
        call(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), replace_sdpa(TISA(HEADS)):  # an error of the caller's is not covered up
            raise KeyError
        with replace_sdpa(TISA(HEADS)):
            call(*tensors)
    for wrong in (None, 3, [], torch.zeros(4, 11)):
        with pytest.raises(TypeError, match="bias must be"):
            replace_sdpa(wrong)
    with pytest.raises(TypeError, match=r"bias must be or give .* got Linear"):
        replace_sdpa([nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="query_start must be an int or None, got float"):
        replace_sdpa(TISA(HEADS), query_start=1.0)
    with (
        pytest.raises(TypeError, match=r"bias must be or give .* got int"),
        replace_sdpa(lambda query, key: 3),
    ):
        call(*tensors)

    def refused(message, *args, bias=None, **kwargs):
        with pytest.raises(ValueError, match=message), replace_sdpa(bias or TISA(HEADS)):
            call(*args, **kwargs)

    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    refused(r"got TISA with 3 and query \(2, 4, 6, 8\)", *tensors, bias=TISA(3))
    refused("attn_mask must be None with is_causal=True", *tensors, attn_mask=lower, is_causal=True)
    refused(r"attn_mask must broadcast to \(2, 4, 6, 6\), got \(5, 6\)", *tensors, attn_mask=lower[1:])
    refused(r"attn_mask must broadcast .* got \(3, 1, 6, 6\)", *tensors, attn_mask=lower.expand(3, 1, 6, 6))
    refused("attn_mask must be bool or floating point", *tensors, attn_mask=lower.long())
    refused(r"query must be \(\.\.\., heads, length, head_dim\)", *(x[0, 0] for x in tensors))
    per_head = lower.expand(HEADS, 6, 6)[None].clone()
    refused("attn_mask must be one for all heads", *tensors, bias=DAPE(HEADS).double(), attn_mask=per_head)
    published = DAPE(HEADS, kernel_size=3, prefix_consistent=False).double()
    refused("is defined for is_causal=True", *tensors, bias=published, attn_mask=lower)
