"""relative_logits: a bias that each query brings along, against a dense gather."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, HALF, TOLERANCE, by, small_blocks
from calls import qkv, same
from oracle_features import features_oracle
from test_blockwise import Largest

from posattn import ALiBi, attention, attention_reference, blockwise

OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(is_causal=True), dict(right=0)),
    "window": (dict(window=(4, 1)), dict(left=4, right=1)),
    "shifted": (dict(is_causal=True, query_start=5, key_start=2), dict(right=0, shift=-3)),
    "ahead": (dict(query_start=0, key_start=3), dict(shift=3)),
    "far": (dict(query_start=60, key_start=0), dict(shift=-60)),
    "softcap": (dict(softcap=0.8, scale=1.1), dict(softcap=0.8, scale=1.1)),
}


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


def make(tensors, width, dtype=None):
    return torch.randn(*tensors[0].shape[:3], width, dtype=dtype or tensors[0].dtype, requires_grad=True)


@pytest.mark.parametrize("width", [1, 3, 70])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 33), (33, 9), (50, 50)])
def test_is_a_band_of_the_scores(queries, keys, options, width):
    tensors = qkv(queries=queries, keys=keys, value_dim=5)
    relative = make(tensors, width)
    given, said = OPTIONS[options]
    got = attention(*tensors, relative_logits=relative, **given, return_lse=True)
    expected = features_oracle(*tensors, relative=relative, **said)
    same(got, expected, [*tensors, relative], **TOLERANCE["blockwise"])


@pytest.mark.triton
@pytest.mark.parametrize(
    ("queries", "keys", "width", "options"),
    [(9, 33, 3, "causal"), (33, 9, 70, "plain"), (50, 50, 20, "window"), (20, 20, 1, "shifted"),
     (20, 20, 16, "softcap"), (20, 20, 8, "ahead"), (20, 20, 8, "far")],
)  # fmt: skip
def test_is_a_band_of_the_scores_on_triton(queries, keys, width, options):
    tensors = qkv(batch=1, heads=2, queries=queries, keys=keys, value_dim=5)
    relative = make(tensors, width)
    given, said = OPTIONS[options]
    got = by("triton", attention, *tensors, relative_logits=relative, **given, return_lse=True)
    expected = features_oracle(*tensors, relative=relative, **said)
    same(got, expected, [*tensors, relative], **TOLERANCE["triton"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_gaps_and_sinks(backend):
    tensors = qkv(heads=4, key_heads=2, queries=20, keys=24)
    relative, sinks = make(tensors, 7), torch.randn(4, requires_grad=True)
    mask = torch.rand(2, 24) < 0.5
    options = dict(enable_gqa=True, key_padding_mask=mask, return_lse=True, is_causal=True)
    got = by(backend, attention, *tensors, relative_logits=relative, sinks=sinks, **options)
    said = dict(sinks=sinks, key_padding_mask=mask, right=0)
    expected = features_oracle(*tensors, relative=relative, **said)
    same(got, expected, [*tensors, relative, sinks], **TOLERANCE[backend])


@pytest.mark.parametrize("layout", ["as projected", "expanded", "every second"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, layout):
    """A projection gives (B, L, H, W)."""
    tensors = qkv(queries=12)
    shape = dict(
        zip(("as projected", "expanded", "every second"), ((2, 12, 3, 5), (2, 1, 12, 5), (2, 3, 12, 10)))
    )
    made = torch.randn(shape[layout], requires_grad=True)
    if layout == "as projected":
        relative = made.transpose(1, 2)
    else:
        relative = made.expand(2, 3, 12, 5) if layout == "expanded" else made[..., ::2]
    got = by(backend, attention, *tensors, relative_logits=relative, is_causal=True, return_lse=True)
    expected = features_oracle(*tensors, relative=relative, right=0)
    same(got, expected, [*tensors, made], **TOLERANCE[backend])


def test_a_constant_row_is_a_table():
    """Of width L, with equal rows: ALiBi's numbers."""
    tensors, bias = qkv(queries=30), ALiBi(3)
    row = bias.values(-torch.arange(30))
    relative = row[None, :, None].expand(2, 3, 30, 30)
    got = attention(*tensors, relative_logits=relative, is_causal=True)
    torch.testing.assert_close(got, attention(*tensors, bias, is_causal=True), atol=1e-5, rtol=1e-5)


def test_reference():
    tensors = qkv(queries=9, keys=7)
    relative = make(tensors, 4)
    got = attention_reference(*tensors, relative_logits=relative, return_lse=True)
    same(got, features_oracle(*tensors, relative=relative), [*tensors, relative], **TOLERANCE["blockwise"])


@pytest.mark.parametrize("width", [2, 9])
@pytest.mark.parametrize("softcap", [None, 1.3])
def test_gradcheck(softcap, width):
    tensors = qkv(batch=1, heads=2, queries=4, keys=5, dim=2, dtype=torch.float64)

    def call(*tensors):
        *tensors, relative = tensors
        return attention(*tensors, relative_logits=relative, is_causal=True, softcap=softcap, return_lse=True)

    assert torch.autograd.gradcheck(call, (*tensors, make(tensors, width)))


def test_only_its_gradient():
    tensors = qkv(queries=12)
    relative = make(tensors, 5)
    (whole,) = torch.autograd.grad(attention(*tensors, relative_logits=relative).sin().sum(), relative)
    query, key, value = (t.detach() for t in tensors)
    (alone,) = torch.autograd.grad(
        attention(query, key, value, relative_logits=relative).sin().sum(), relative
    )
    assert torch.equal(whole, alone)
    out = attention(*tensors, relative_logits=relative.detach())
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("own", ["half", "float"])
@pytest.mark.parametrize(("backend", "dtype"), HALF)
def test_half_precision(backend, dtype, own):
    """At most twice the error of plain PyTorch at that dtype; the gradient is of relative_logits' own."""
    tensors = qkv(heads=2, queries=40, dim=16, dtype=dtype)
    relative = make(tensors, 9, dtype if own == "half" else torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (*tensors, relative)]
    expected, _ = features_oracle(*exact[:3], relative=exact[3], right=0)
    got = by(backend, attention, *tensors, relative_logits=relative, is_causal=True)
    q, k, v = tensors
    distance = torch.arange(40)[:, None] - torch.arange(40)[None]
    near = (distance >= 0) & (distance < 9)
    index = torch.where(near, distance, 0).expand(2, 2, 40, 40)
    score = q @ k.mT * 0.25 + torch.where(near, relative.gather(3, index), 0.0).to(dtype)
    eager = score.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
    grad = torch.randn_like(eager)
    inputs = [*tensors, relative]
    ours = (got, *torch.autograd.grad(got, inputs, grad))
    theirs = (eager, *torch.autograd.grad(eager, inputs, grad))
    assert ours[-1].dtype == relative.dtype
    for a, b, want in zip(ours, theirs, (expected, *torch.autograd.grad(expected, exact, grad.double()))):
        assert (a - want).norm() <= 2 * (b - want).norm()


def test_the_same_bits_again():
    tensors = qkv(queries=50)
    relative = make(tensors, 20)
    first, second = (
        torch.autograd.grad(attention(*tensors, relative_logits=relative).sin().sum(), [*tensors, relative])
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_memory_grows_with_the_length(monkeypatch):
    small_blocks(monkeypatch, ROWS=64, FUSED_ROWS=64, SCRATCH=20000)
    largest = []
    for length in (512, 1024):
        q, k, v = torch.randn(3, 1, 1, length, 4).unbind()
        keywords = dict(
            table=None, support=None, slopes=None, key_mask=None, scale=0.5, softcap=0.0, shift=0, left=-1, right=0,
            symmetric=True, relative=torch.randn(1, 1, length, 8),
        )  # fmt: skip
        with Largest() as mode:
            out, lse = blockwise.forward(q, k, v, **keywords)
            blockwise.backward(
                out, lse, q, k, v, out, lse, **keywords, tails_need_grad=True, need_q=True, need_kv=True,
                need_table=True, deterministic=True,
            )  # fmt: skip
        largest.append(mode.bytes)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 1024 * 1024


@pytest.mark.parametrize(
    ("relative", "error", "message"),
    [
        (0.5, TypeError, "relative_logits must be a Tensor or None, got float"),
        (
            torch.zeros(2, 3, 9),
            ValueError,
            r"relative_logits must have the shape \(2, 3, 9, W\) with W at least 1",
        ),
        (torch.zeros(2, 1, 9, 4), ValueError, r"shape \(2, 3, 9, W\).* got shape \(2, 1, 9, 4\)"),
        (torch.zeros(2, 3, 9, 0), ValueError, "W at least 1"),
        (
            torch.zeros(2, 3, 9, 4, dtype=torch.int64),
            ValueError,
            "relative_logits must be dense and floating-point",
        ),
    ],
)
def test_says_what_is_wrong(relative, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv(), relative_logits=relative)


def test_not_together_with_a_bias():
    with pytest.raises(
        ValueError, match="relative_logits and bias cannot be given together, got a bias of ALiBi"
    ):
        attention(*qkv(), ALiBi(3), relative_logits=torch.zeros(2, 3, 9, 4))
