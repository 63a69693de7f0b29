"""attention_varlen against the dense oracle, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, HALF, TOLERANCE, by, small_blocks
from bias_cases import CASES, HEADS, make
from calls import dense, same
from dape_cases import base_matrix
from oracle_dape import dape_oracle
from oracle_features import varlen_oracle

from posattn import DAPE, FIRE, attention_varlen, blockwise

# (lengths of the queries, of the keys): short ones of as many queries as keys are computed together.
SEQUENCES = {
    "one": ([9], [9]),
    "short": ([3, 5, 1, 4], [3, 5, 1, 4]),
    "equal": ([4, 4, 4], [4, 4, 4]),
    "long": ([40, 2, 3, 33, 1], [40, 2, 3, 33, 1]),
    "cross": ([3, 7, 5, 2], [9, 2, 5, 2]),
    "empty": ([0, 4, 0, 3, 2, 0, 5, 0], [0, 4, 2, 0, 2, 0, 7, 3]),
    "decoding": ([1, 1, 1], [6, 1, 11]),
}
SMALL = ["short", "cross", "empty"]


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


def packed(lengths_q, lengths_k, heads=HEADS, key_heads=None, dim=8, value_dim=None, dtype=torch.float32):
    """q, k, v (T, H, D) and the arguments that follow them."""
    key_heads, value_dim = key_heads or heads, value_dim or dim
    shapes = (
        (sum(lengths_q), heads, dim),
        (sum(lengths_k), key_heads, dim),
        (sum(lengths_k), key_heads, value_dim),
    )
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    cu = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)]
    return tensors, (*cu, max(lengths_q), max(lengths_k))


def fire_matrix(bias, queries, keys):
    return base_matrix(bias, queries, keys, queries - keys, keys - queries)


def make_bias(name):
    """A bias and its matrix for a sequence of some queries and keys."""
    if name == "fire":
        bias = FIRE(HEADS, hidden=5, init_length=3)
        return bias, lambda queries, keys: fire_matrix(bias, queries, keys)
    bias = make(name)
    return bias, lambda queries, keys: CASES[name][1](bias, queries, keys, queries - keys)


# ------------------------------------------------------------------------------------------ against the oracle

OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(is_causal=True), dict(right=0)),
    "window": (dict(window=(3, 1)), dict(left=3, right=1)),
    "causal window, softcap": (
        dict(is_causal=True, window=(2, None), softcap=1.5, scale=0.7),
        dict(left=2, right=0, softcap=1.5, scale=0.7),
    ),
    "negative scale": (dict(is_causal=True, scale=-0.3), dict(right=0, scale=-0.3)),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", SEQUENCES)
def test_without_a_bias(lengths, options):
    tensors, cut = packed(*SEQUENCES[lengths], value_dim=5)
    given, said = OPTIONS[options]
    got = attention_varlen(*tensors, *cut, **given, return_lse=True)
    assert got[0].shape == (sum(SEQUENCES[lengths][0]), HEADS, 5)
    assert got[1].shape == (HEADS, len(got[0]))
    same(got, varlen_oracle(*tensors, *cut[:2], **said), tensors, **TOLERANCE["blockwise"])


@pytest.mark.parametrize(
    ("lengths", "causal"), [("short", True), ("long", False), ("cross", False), ("empty", True)]
)
@pytest.mark.parametrize("name", [*CASES, "fire"])
def test_every_bias_and_its_gradient(name, lengths, causal):
    bias, matrix = make_bias(name)
    tensors, cut = packed(*SEQUENCES[lengths])
    got = attention_varlen(*tensors, *cut, bias, is_causal=causal, return_lse=True)
    expected = varlen_oracle(*tensors, *cut[:2], matrix, right=0 if causal else -1)
    same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE["blockwise"])


@pytest.mark.triton
@pytest.mark.parametrize(
    ("name", "lengths", "causal"),
    [("tisa", "cross", True), ("alibi", "short", False), ("fire", "empty", True), ("t5", "empty", False)],
)
def test_every_bias_on_triton(name, lengths, causal):
    bias, matrix = make_bias(name)
    tensors, cut = packed(*SEQUENCES[lengths])
    got = by("triton", attention_varlen, *tensors, *cut, bias, is_causal=causal, return_lse=True)
    expected = varlen_oracle(*tensors, *cut[:2], matrix, right=0 if causal else -1)
    same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE["triton"])


@pytest.mark.parametrize(("lengths", "more"), [("short", 0), ("cross", 3), ("empty", 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table(backend, lengths, more):
    """Of max_seqlens that may be larger than the longest; with grouped heads, a window and causality."""
    tensors, (cu_q, cu_k, max_q, max_k) = packed(*SEQUENCES[lengths], heads=4, key_heads=2)
    max_q, max_k = max_q + more, max_k + more
    table = torch.randn(4, max_q + max_k - 1, requires_grad=True)

    def matrix(queries, keys):
        return dense(table[:, max_k - keys :][:, : queries + keys - 1], queries, keys)

    options = dict(is_causal=True, window=(4, None), enable_gqa=True, return_lse=True)
    got = by(backend, attention_varlen, *tensors, cu_q, cu_k, max_q, max_k, table, **options)
    expected = varlen_oracle(*tensors, cu_q, cu_k, matrix, left=4, right=0)
    same(got, expected, [*tensors, table], **TOLERANCE[backend])


@pytest.mark.parametrize("lengths", SMALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_logits_and_sinks(backend, lengths):
    tensors, cut = packed(*SEQUENCES[lengths], heads=4, key_heads=2)
    relative = torch.randn(len(tensors[0]), 4, 3, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)
    options = dict(is_causal=True, enable_gqa=True, return_lse=True)
    got = by(backend, attention_varlen, *tensors, *cut, relative_logits=relative, sinks=sinks, **options)
    expected = varlen_oracle(*tensors, *cut[:2], relative=relative, sinks=sinks, right=0)
    same(got, expected, [*tensors, relative, sinks], **TOLERANCE[backend])


@pytest.mark.parametrize("base", ["none", "kerple-log", "fire"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dape(backend, base):
    bias = DAPE(HEADS, None if base == "none" else make_bias(base)[0], hidden=6)
    tensors, cut = packed([2, 4, 0, 3], [2, 5, 0, 3])
    got = by(backend, attention_varlen, *tensors, *cut, bias, is_causal=True, return_lse=True)
    layers = bias.first_weight, bias.first_bias, bias.second_weight, bias.second_bias
    outs, lses = [], []
    for q, k, v in zip(*(t.split(sizes) for t, sizes in zip(tensors, ([2, 4, 3], [2, 5, 3], [2, 5, 3])))):
        lengths = len(q), len(k)
        matrix = base_matrix(bias.base, *lengths, lengths[0] - lengths[1], lengths[1] - lengths[0])
        parts = (t.transpose(0, 1)[None] for t in (q, k, v))
        out, lse = dape_oracle(*parts, *layers, matrix, right=0)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    expected = torch.cat(outs), torch.cat(lses, 1)
    same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE[backend])


def test_random_cuts_of_every_kind():
    """Of tables, with blocks and packs of several sizes, in float64."""
    for seed in range(30):
        torch.manual_seed(seed)
        blockwise.PACK = [0, 7, 16, 64][seed % 4]  # `blocks` undoes it
        lengths_q = torch.randint(0, 12, (8,)).tolist()
        lengths_k = torch.randint(0, 12, (8,)).tolist()
        lengths_k = [q if torch.rand(()) < 0.7 else k for q, k in zip(lengths_q, lengths_k)]
        tensors, cut = packed([1, *lengths_q], [1, *lengths_k], dtype=torch.float64)
        table = torch.randn(HEADS, cut[2] + cut[3] - 1, dtype=torch.float64, requires_grad=True)
        left, right = torch.randint(-1, 8, (2,)).tolist()
        window = tuple(None if side < 0 else side for side in (left, right))
        got = attention_varlen(*tensors, *cut, table, window=window, return_lse=True)

        def matrix(queries, keys, table=table, most=cut[3]):
            return dense(table[:, most - keys :][:, : queries + keys - 1], queries, keys)

        expected = varlen_oracle(*tensors, *cut[:2], matrix, left=left, right=right)
        same(got, expected, [*tensors, table], atol=1e-10, rtol=1e-10)


# -------------------------------------------------------------------------------------------- what else holds


@pytest.mark.parametrize("name", ["tisa", "fire"])
def test_gradcheck(name):
    bias = make_bias(name)[0].double()
    names = [n for n, p in bias.named_parameters() if p.requires_grad]
    parameters = [p.detach().clone().requires_grad_() for p in bias.parameters()]
    tensors, cut = packed([2, 1, 0, 3, 2], [2, 1, 2, 4, 0], dim=2, dtype=torch.float64)

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = bias

        def forward(self, *tensors):
            return attention_varlen(*tensors, *cut, self.bias, is_causal=True)

    def call(*inputs):
        named = {f"bias.{n}": p for n, p in zip(names, inputs[3:])}
        return torch.func.functional_call(Call(), named, inputs[:3])

    assert torch.autograd.gradcheck(call, (*tensors, *parameters))


@pytest.mark.parametrize(("backend", "dtype"), HALF)
def test_half_precision(backend, dtype):
    """At most twice the error of plain PyTorch at that dtype."""
    lengths = [20, 33, 7]
    tensors, cut = packed(lengths, lengths, heads=2, dim=16, dtype=dtype)
    table = torch.randn(2, 65, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (*tensors, table)]

    def matrix(table):
        return lambda queries, keys: dense(table[:, 33 - keys :][:, : queries + keys - 1], queries, keys)

    expected, _ = varlen_oracle(*exact[:3], *cut[:2], matrix(exact[3]), right=0)
    got = by(backend, attention_varlen, *tensors, *cut, table, is_causal=True)
    eager = []
    for q, k, v in zip(*(t.split(lengths) for t in tensors)):
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        score = q @ k.mT * 0.25 + matrix(table)(q.shape[1], q.shape[1]).to(dtype)
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
        eager.append((score.softmax(-1) @ v).transpose(0, 1))
    eager = torch.cat(eager)
    grad = torch.randn_like(eager)
    plain = torch.autograd.grad(eager, [*tensors, table], grad)
    grads = torch.autograd.grad(got, [*tensors, table], grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    assert got.dtype == dtype
    for ours, theirs, want in zip((got, *grads), (eager, *plain), (expected, *wanted)):
        assert (ours - want).norm() <= 2 * (theirs - want).norm()
