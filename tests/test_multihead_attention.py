"""posattn.MultiheadAttention against torch's own, which gets the bias as a dense mask."""

from __future__ import annotations

import copy
import io
import warnings

import bias_cases
import oracle
import pytest
import torch
from oracle_dape import dape_oracle
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from posattn import DAPE, FIRE, KERPLE, TISA, ALiBi, MultiheadAttention

DIM, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 7, 5
CLOSE = dict(rtol=1e-9, atol=1e-10)


def randomized(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias_term" not in name:
                parameter.normal_(std=0.4)
    return module


def pair(bias_term=None, **options):
    """One of ours and torch's own with the same weights, in float64."""
    ours = randomized(MultiheadAttention(DIM, HEADS, bias_term=bias_term, **options)).double()
    theirs = nn.MultiheadAttention(DIM, HEADS, **options).double()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("bias_term")})
    return ours, theirs


def inputs(kind, batch_first=True):
    """query, key, value, equal objects where the kind says so."""
    query = torch.randn(BATCH, QUERIES, DIM).double()
    key = query if kind == "self" else torch.randn(BATCH, KEYS, 6 if kind == "kdim" else DIM).double()
    value = {"three": torch.randn_like(key), "kdim": torch.randn(BATCH, KEYS, 10).double()}.get(kind, key)
    if not batch_first:
        flipped = {id(x): x.transpose(0, 1) for x in (query, key, value)}
        query, key, value = (flipped[id(x)] for x in (query, key, value))
    return query, key, value


def masks(kind, length, other):
    """key_padding_mask, attn_mask and is_causal as keywords."""
    hidden = torch.rand(length, other) < 0.3
    hidden[:, 0] = False  # a query that sees nothing is NaN
    per_head = (torch.rand(BATCH * HEADS, length, other) < 0.3).index_fill(2, torch.tensor([0]), False)
    padding = torch.zeros(BATCH, other, dtype=torch.bool)
    padding[1, -2:] = True
    nothing = torch.zeros(BATCH, other).double()
    causal = dict(attn_mask=torch.ones(length, other).triu(1).bool(), is_causal=True)
    return {
        "none": {},
        "bool": dict(attn_mask=hidden),
        "float": dict(attn_mask=torch.randn(length, other).double()),
        "per head": dict(attn_mask=per_head),
        "padding": dict(key_padding_mask=padding),
        "both": dict(key_padding_mask=padding, attn_mask=hidden),
        "padding of 0 and -inf": dict(key_padding_mask=nothing.masked_fill(padding, float("-inf"))),
        "float padding": dict(key_padding_mask=torch.randn(BATCH, other).double()),
        "float and bool": dict(
            key_padding_mask=torch.randn(BATCH, other).double().masked_fill(padding, float("-inf")),
            attn_mask=torch.randn(length, other).double(),
        ),
        "causal": causal,
        "causal, padding": dict(key_padding_mask=padding, **causal),
    }[kind]


KINDS = ["none", "bool", "float", "per head", "padding", "both", "padding of 0 and -inf", "float padding"]
KINDS += ["float and bool", "causal", "causal, padding"]


def with_bias(mask, bias):
    """The mask of torch's own, (BATCH * HEADS, queries, keys), that adds bias (HEADS, queries, keys), too."""
    given = mask.get("attn_mask")
    if given is not None and given.dtype == torch.bool:
        given = torch.zeros(given.shape).double().masked_fill(given, float("-inf"))
    padding = mask.get("key_padding_mask")
    if padding is not None and padding.dtype == torch.bool:  # torch wants masks of one type
        padding = torch.zeros(padding.shape).double().masked_fill(padding, float("-inf"))
    dense = bias.repeat(BATCH, 1, 1)
    return dict(attn_mask=dense if given is None else dense + given, key_padding_mask=padding)


def compare(found, expected, ours, theirs, given, bias=None, skip=()):
    """Outputs, weights and gradients of inputs and parameters."""
    torch.testing.assert_close(found, expected, **CLOSE)
    probe = torch.randn_like(found[0])
    results = []
    for module, out in ((ours, found), (theirs, expected)):
        inner = [p for n, p in module.named_parameters() if not n.startswith("bias_term")]
        leaves = [x for x in given if x.requires_grad] + inner + (list(bias.parameters()) if bias else [])
        loss = (out[0] * probe).sum()
        if out[1] is not None:
            loss = loss + (out[1] * torch.ones_like(out[1]).cumsum(-1)).sum()
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("where", ["self", "cross", "kdim"])
@pytest.mark.parametrize("extra", ["", "add_bias_kv", "add_zero_attn"])
def test_without_a_bias_it_is_torchs(kind, batch_first, where, extra):
    sizes = {"kdim": 6, "vdim": 10} if where == "kdim" else {}
    options = sizes | ({extra: True} if extra else {})
    ours, theirs = pair(batch_first=batch_first, **options)
    given = inputs(where, batch_first)
    mask = masks(kind, QUERIES, QUERIES if where == "self" else KEYS)
    for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        outs = [module(*given, **mask, **call) for module in (ours, theirs)]
        compare(*outs, ours, theirs, given)


@pytest.mark.parametrize("bias_term", [None, ALiBi(HEADS)], ids=["none", "alibi"])
@pytest.mark.parametrize("where", ["self", "cross"])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_without_a_mask(bias_term, where, padded):
    ours, _ = pair(bias_term)
    given = inputs(where, batch_first=False)
    mask = masks("causal, padding" if padded else "causal", QUERIES, given[1].shape[0])
    for need_weights in (True, False):
        expected = ours(*given, **mask, need_weights=need_weights)
        mask_free = {k: v for k, v in mask.items() if k != "attn_mask"}
        torch.testing.assert_close(ours(*given, **mask_free, need_weights=need_weights), expected, **CLOSE)


BIASES = {
    name: bias_cases.CASES[name]
    for name in ("tisa", "alibi", "alibi-learnable-one-sided", "t5-small", "kerple-log", "relative-table")
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_a_dense_mask_of_torchs(kind, name):
    bias = bias_cases.make(name).double()
    # Layouts and inputs go round, instead of a full product.
    number = KINDS.index(kind) + list(BIASES).index(name)
    where, batch_first = ("self", "cross", "three", "kdim")[number % 4], number % 3 != 0
    sizes = {"kdim": 6, "vdim": 10} if where == "kdim" else {}
    ours, theirs = pair(bias, batch_first=batch_first, bias=number % 5 != 0, **sizes)
    given = [x.requires_grad_() for x in inputs(where, batch_first)]
    keys = QUERIES if where == "self" else KEYS
    mask = masks(kind, QUERIES, keys)
    shift = 0 if mask.get("is_causal") else QUERIES - keys
    for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        dense = BIASES[name][1](bias, QUERIES, keys, shift)
        expected = theirs(*given, **with_bias(mask, dense), **call)
        compare(ours(*given, **mask, **call), expected, ours, theirs, given, bias)


def test_fire_and_inputs_without_a_batch():
    bias = FIRE(HEADS, hidden=5, init_length=3).double()
    ours, theirs = pair(bias, batch_first=True)
    query, key = torch.randn(QUERIES, DIM).double(), torch.randn(KEYS, DIM).double()
    first = bias.first_layer.weight[:, 0], bias.first_layer.bias
    last = bias.last_layer.weight, bias.last_layer.bias
    at = KEYS - QUERIES + torch.arange(QUERIES), torch.arange(KEYS)
    padding = torch.tensor([False, True, False, False, True])
    hidden = torch.zeros(KEYS).double().masked_fill(padding, float("-inf"))
    for need_weights in (True, False):
        dense = oracle.fire(bias.c, bias.multiplier, first, last, at, init_length=3)
        found = ours(query, key, key, key_padding_mask=padding, need_weights=need_weights)
        expected = theirs(query, key, key, attn_mask=dense + hidden, need_weights=need_weights)
        compare(found, expected, ours, theirs, (query, key), bias)


@pytest.mark.parametrize("kind", ["none", "padding", "float padding", "causal", "bool"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_dape(kind, kernel_size):
    dape = DAPE(HEADS, base=KERPLE(HEADS), hidden=6, kernel_size=kernel_size).double()
    ours, _ = pair(dape, batch_first=True)
    query, key, value = inputs("self")
    mask = masks(kind, QUERIES, QUERIES)
    parts = nn.functional.linear(query, ours.in_proj_weight, ours.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in parts)
    base = oracle.kerple(dape.base.p, dape.base.a, QUERIES, QUERIES, 0)
    layers = dape.first_weight, dape.first_bias, dape.second_weight, dape.second_bias
    outs = [ours(query, key, value, **mask, need_weights=n)[0] for n in (True, False)]
    torch.testing.assert_close(*outs, **CLOSE)
    if kind in ("none", "padding", "causal"):
        padding = mask.get("key_padding_mask")
        right = 0 if kind == "causal" else -1
        keys = None if padding is None else ~padding
        expected, _ = dape_oracle(q, k, v, *layers, base, right=right, key_padding_mask=keys)
        expected = ours.out_proj(expected.transpose(1, 2).flatten(-2))
        torch.testing.assert_close(outs[0], expected, **CLOSE)


def test_a_query_that_sees_nothing_gives_zero():
    ours, _ = pair(TISA(HEADS), batch_first=True)
    with torch.no_grad():
        ours.out_proj.bias.zero_()
    x = torch.randn(BATCH, QUERIES, DIM).double().requires_grad_()
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[0] = True
    for mask in (padding, torch.zeros(padding.shape).double().masked_fill(padding, float("-inf"))):
        for need_weights in (True, False):
            out, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
            assert out[0].eq(0).all()
            assert out[1].ne(0).any()
            assert weights is None or weights[0].eq(0).all()
            assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outs = func(*args, **(kwargs or {}))
        for out in outs if isinstance(outs, tuple) else (outs,):
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
        return outs


def test_no_tensor_of_the_size_of_a_mask():
    length = 1024
    module = MultiheadAttention(4, 1, batch_first=True, bias_term=TISA(1))
    x = torch.randn(1, length, 4)
    padding = torch.zeros(1, length, dtype=torch.bool)
    padding[0, -100:] = True
    values = torch.zeros(1, length)
    for mask in (padding, values.masked_fill(padding, float("-inf")), values.uniform_()):
        for is_causal in (True, False):
            with Largest() as largest:
                out, _ = module(x, x, x, mask, need_weights=False, is_causal=is_causal)
                out.sum().backward()
            assert largest.numel < length * length // 2
    with Largest() as largest:
        module(x, x, x)
    assert largest.numel == length * length


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_of_training(need_weights):
    module = MultiheadAttention(DIM, HEADS, dropout=0.5, batch_first=True, bias_term=TISA(HEADS))
    x = torch.randn(BATCH, 40, DIM)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(module(x, x, x, need_weights=need_weights)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    kept = module.eval()(x, x, x, need_weights=need_weights)[0]
    module.train().dropout = 0.0
    assert torch.equal(kept, module(x, x, x, need_weights=need_weights)[0])
    outs[0].sum().backward()
    assert module.bias_term.amplitudes.grad.isfinite().all()


def test_states_copies_and_pickles():
    ours, theirs = pair(TISA(HEADS), dropout=0.1)
    names = ["bias_term.amplitudes", "bias_term.sharpness", "bias_term.offsets"]
    assert set(ours.state_dict()) - set(theirs.state_dict()) == set(names)
    fresh = MultiheadAttention(DIM, HEADS, bias_term=TISA(HEADS)).double()
    loaded = fresh.load_state_dict(theirs.state_dict(), strict=False)
    assert loaded.missing_keys == names
    assert not loaded.unexpected_keys
    loaded = nn.MultiheadAttention(DIM, HEADS).load_state_dict(ours.state_dict(), strict=False)
    assert loaded.unexpected_keys == names
    assert not loaded.missing_keys
    MultiheadAttention(DIM, HEADS).load_state_dict(theirs.state_dict())

    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x = torch.randn(QUERIES, BATCH, DIM).double()
    expected = ours.eval()(x, x, x)[0]
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False).eval()):
        assert torch.equal(other(x, x, x)[0], expected)
    before = ours.bias_term.amplitudes.clone()
    ours._reset_parameters()
    assert torch.equal(ours.bias_term.amplitudes, before)
    assert not ours.in_proj_bias.any()
    assert "bias_term" in repr(ours)


@pytest.mark.parametrize("kind", ["causal", "float padding"])
def test_compiled(kind):
    ours, _ = pair(TISA(HEADS), batch_first=True)
    mask = masks(kind, QUERIES, QUERIES)
    x = torch.randn(BATCH, QUERIES, DIM).double()
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for need_weights in (True, False):
        expected = ours(x, x, x, **mask, need_weights=need_weights)
        found = compiled(x, x, x, **mask, need_weights=need_weights)
        compare(found, expected, ours, ours, (), ours.bias_term)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    module = MultiheadAttention(16, 2, batch_first=True, bias_term=ALiBi(2))
    x = torch.randn(2, 9, 16)
    padding = torch.zeros(2, 9).masked_fill(torch.arange(9) > 6, torch.finfo(dtype).min)
    expected = module(x, x, x, padding, need_weights=False)[0]
    with torch.autocast("cpu", dtype):
        for need_weights in (True, False):
            out = module(x, x, x, padding, need_weights=need_weights)[0]
            assert out.dtype == dtype
            torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)
    half = copy.deepcopy(module).to(dtype)
    for mask in (padding.to(dtype), padding.bool()):
        for need_weights in (True, False):
            out = half(*[x.to(dtype)] * 3, mask, need_weights=need_weights)[0]
            torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)


def test_errors():
    for bias_term, error in (
        (TISA(4), ValueError),
        (torch.zeros(3, 5), TypeError),
        (nn.Linear(1, 1), TypeError),
    ):
        with pytest.raises(error, match="bias_term must"):
            MultiheadAttention(DIM, HEADS, bias_term=bias_term)
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match=f"{option} must be False with a bias_term"):
            MultiheadAttention(DIM, HEADS, bias_term=TISA(HEADS), **{option: True})
    with pytest.raises(ValueError, match=r"dropout must be 0 with a DAPE, got 0\.1"):
        MultiheadAttention(DIM, HEADS, dropout=0.1, bias_term=DAPE(HEADS))
    module = MultiheadAttention(DIM, HEADS, bias_term=TISA(HEADS))
    x = torch.randn(QUERIES, BATCH, DIM)
    with pytest.raises(RuntimeError, match=r"attn_mask must be \(7, 7\) or \(6, 7, 7\), got \(7,\)"):
        module(x, x, x, attn_mask=torch.zeros(7))
    with pytest.raises(RuntimeError, match=r"key_padding_mask must be \(2, 7\), got \(7, 2\)"):
        module(x, x, x, key_padding_mask=torch.zeros(7, 2).bool())
    with pytest.raises(RuntimeError, match="attn_mask must be bool or floating point"):
        module(x, x, x, attn_mask=torch.zeros(7, 7).long())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3, DIM), torch.randn(2, DIM)])
    with pytest.raises(RuntimeError, match="a nested tensor"):
        module(nested, nested, nested)
    published = MultiheadAttention(DIM, HEADS, bias_term=DAPE(HEADS, kernel_size=3, prefix_consistent=False))
    with pytest.raises(ValueError, match="is defined for is_causal=True"):
        published(x, x, x)
    assert published(x, x, x, is_causal=True)[0].shape == x.shape
