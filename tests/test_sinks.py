"""sinks: one more logit a head, without a value, against a column that is appended to the scores."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, HALF, TOLERANCE, by, small_blocks
from bias_cases import CASES, make
from calls import dense, qkv, same
from oracle_features import features_oracle

from posattn import DAPE, attention, attention_reference

OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(is_causal=True), dict(right=0)),
    "window": (dict(window=(2, 1)), dict(left=2, right=1)),
    "softcap": (dict(is_causal=True, softcap=0.8, scale=1.1), dict(right=0, softcap=0.8, scale=1.1)),
}


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


def make_sinks(heads=3, dtype=torch.float32):
    return torch.linspace(-2, 3, heads, dtype=dtype).requires_grad_()


SHAPES = [
    ("blockwise", *shape, options) for shape in ((1, 1), (9, 33), (33, 9), (40, 40)) for options in OPTIONS
]
SHAPES += [
    pytest.param("triton", *case, marks=pytest.mark.triton)
    for case in ((1, 1, "plain"), (9, 33, "window"), (33, 9, "causal"), (20, 20, "softcap"))
]


@pytest.mark.parametrize(("backend", "queries", "keys", "options"), SHAPES)
def test_is_a_key_without_a_value(backend, queries, keys, options):
    """More causal queries than keys: some rows see nothing but the sink."""
    tensors, sinks = qkv(batch=1, queries=queries, keys=keys, value_dim=5), make_sinks()
    given, said = OPTIONS[options]
    got = by(backend, attention, *tensors, sinks=sinks, **given, return_lse=True)
    expected = features_oracle(*tensors, sinks=sinks, **said)
    assert expected[1].isfinite().all()
    same(got, expected, [*tensors, sinks], **TOLERANCE[backend])


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_table_grouped_heads_and_gaps(backend, mask):
    tensors, sinks = qkv(heads=4, key_heads=2, queries=20, keys=24), make_sinks(4)
    table = torch.randn(4, 43, requires_grad=True)
    kept = torch.rand(2, 24) < 0.5 if mask else None
    if mask:
        kept[1] = False
    got = by(
        backend, attention, *tensors, table, sinks=sinks, enable_gqa=True, key_padding_mask=kept, return_lse=True
    )  # fmt: skip
    expected = features_oracle(*tensors, dense(table, 20, 24), sinks=sinks, key_padding_mask=kept)
    same(got, expected, [*tensors, table, sinks], **TOLERANCE[backend])


@pytest.mark.parametrize("name", CASES)
def test_every_bias(name):
    tensors, sinks, bias = qkv(queries=12, keys=17), make_sinks(), make(name)
    got = attention(*tensors, bias, sinks=sinks, return_lse=True)
    expected = features_oracle(*tensors, CASES[name][1](bias, 12, 17, -5), sinks=sinks)
    same(got, expected, [*tensors, sinks, *bias.parameters()], **TOLERANCE["blockwise"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dape(backend):
    """A sink takes from what attention is without it."""
    tensors, sinks, bias = qkv(batch=1, queries=9), make_sinks(), DAPE(3, hidden=5)
    out, lse = attention(*tensors, bias, is_causal=True, return_lse=True)
    total = torch.logaddexp(lse, sinks[:, None])
    got = by(backend, attention, *tensors, bias, is_causal=True, sinks=sinks, return_lse=True)
    expected = out * torch.exp(lse - total)[..., None], total
    same(got, expected, [*tensors, sinks, *bias.parameters()], **TOLERANCE[backend])


def test_reference():
    tensors, sinks = qkv(queries=9, keys=7), make_sinks()
    got = attention_reference(*tensors, is_causal=True, sinks=sinks, return_lse=True)
    same(got, features_oracle(*tensors, sinks=sinks, right=0), [*tensors, sinks], **TOLERANCE["blockwise"])


@pytest.mark.parametrize("softcap", [None, 1.3])
def test_gradcheck(softcap):
    tensors, sinks = (
        qkv(batch=1, heads=2, queries=5, keys=4, dim=2, dtype=torch.float64),
        make_sinks(2, torch.float64),
    )

    def call(*tensors):
        *tensors, sinks = tensors
        return attention(*tensors, sinks=sinks, is_causal=True, softcap=softcap, return_lse=True)

    assert torch.autograd.gradcheck(call, (*tensors, sinks))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("never", [-torch.inf, torch.finfo(torch.float32).min, -1e30])
def test_a_sink_that_takes_nothing(never, backend):
    """Rows without keys stay 0, with gradients of 0."""
    tensors = qkv(batch=1, heads=2, queries=20, keys=7)
    sinks = torch.full((2,), never)
    got = by(backend, attention, *tensors, is_causal=True, sinks=sinks, return_lse=True)
    expected = attention(*tensors, is_causal=True, return_lse=True)
    seen = expected[1].isfinite()
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1][seen], expected[1][seen])
    assert (got[1][~seen] <= -1e29).all()
    same([got[0]], [expected[0]], tensors, **TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_that_takes_everything(backend):
    tensors, sinks = qkv(), torch.full((3,), 1e4)
    out, lse = by(backend, attention, *tensors, sinks=sinks, return_lse=True)
    assert (out == 0).all()
    assert (lse == 1e4).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum() + lse.sum(), tensors))


@pytest.mark.parametrize(("backend", "dtype"), HALF)
def test_half_precision(backend, dtype):
    """At most twice the error of plain PyTorch at that dtype; sinks of that dtype get gradients of it."""
    tensors = qkv(heads=2, queries=48, dim=16, dtype=dtype)
    sinks = torch.tensor([0.5, 2.0], dtype=dtype, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (*tensors, sinks)]
    expected, _ = features_oracle(*exact[:3], sinks=exact[3], right=0)
    got = by(backend, attention, *tensors, sinks=sinks, is_causal=True)
    q, k, v = tensors
    score = (q @ k.mT * 0.25).masked_fill(torch.ones(48, 48, dtype=torch.bool).triu(1), -torch.inf)
    score = torch.cat([score, sinks[:, None, None].expand(2, 2, 48, 1)], -1)
    eager = score.softmax(-1)[..., :48] @ v
    grad = torch.randn_like(eager)
    inputs = [*tensors, sinks]
    ours = (got, *torch.autograd.grad(got, inputs, grad))
    theirs = (eager, *torch.autograd.grad(eager, inputs, grad))
    for a, b, want in zip(ours, theirs, (expected, *torch.autograd.grad(expected, exact, grad.double()))):
        assert a.dtype == dtype
        assert (a - want).norm() <= 2 * (b - want).norm()


@pytest.mark.parametrize("empty", ["queries", "keys"])
def test_nothing_there(empty):
    tensors = [torch.randn(2, 3, 0 if empty == side else 4, 8) for side in ("queries", "keys", "keys")]
    sinks = make_sinks()
    out, lse = attention(*tensors, sinks=sinks, return_lse=True)
    assert (out == 0).all()
    assert torch.equal(lse, sinks[:, None].expand(lse.shape))
    (grad,) = torch.autograd.grad(lse.sum(), sinks)
    assert torch.equal(grad, torch.full((3,), 2.0 * tensors[0].shape[2]))


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (0.5, TypeError, "sinks must be a Tensor or None, got float"),
        (torch.zeros(2), ValueError, "sinks must have one number for each of query's 3 heads"),
        (torch.zeros(3, 1), ValueError, "sinks must have one number for each"),
        (torch.zeros(3, dtype=torch.int64), ValueError, "sinks must be floating-point, got torch.int64"),
    ],
)
def test_says_what_is_wrong(sinks, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv(), sinks=sinks)
