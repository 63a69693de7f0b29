"""dropout_p: against the dense oracle, and the same pairs forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from backends import BACKENDS, HALF, TOLERANCE, by, small_blocks
from bias_cases import CASES, make
from calls import dense, qkv, same
from oracle_features import features_oracle, kept_pairs
from test_blockwise import Largest
from torch.utils.checkpoint import checkpoint

from posattn import DAPE, FIRE, attention, attention_reference, attention_varlen, blockwise
from posattn.dropout import Dropout, draw
from posattn.ops import Sequences


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


def drawn_bits(p, batch, heads, rows, columns, first=(0, 0, 0), seed=0):
    """As attention draws them from the generator at `seed`."""
    torch.manual_seed(seed)
    numbers = draw(p, *first[:2], torch.device("cpu")).seed.tolist()
    assert numbers[1:3] == list(first[:2])
    numbers[3] = first[2]
    return kept_pairs(p, numbers, batch, heads, rows, columns)


# ---------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize(("queries", "keys", "p"), [(1, 5, 0.1), (9, 20, 0.7), (20, 9, 0.1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_drops_probabilities(backend, queries, keys, p):
    """lse is that without dropout; places are those of the tensors' first query and key."""
    tensors = qkv(heads=2, queries=queries, keys=keys, value_dim=5)
    table = torch.randn(2, queries + keys - 1, requires_grad=True)
    place = dict(query_start=3, key_start=1)
    expected_bits = drawn_bits(p, 2, 2, queries, keys, first=(3, 1, 0))
    torch.manual_seed(0)
    got = by(backend, attention, *tensors, table, dropout_p=p, is_causal=True, **place, return_lse=True)
    expected = features_oracle(
        *tensors, dense(table, queries, keys), kept=expected_bits, dropout_p=p, right=0, shift=-2
    )
    same(got, expected, [*tensors, table], **TOLERANCE[backend])
    torch.testing.assert_close(
        got[1], attention(*tensors, table, is_causal=True, **place, return_lse=True)[1]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_together(backend):
    tensors = qkv(heads=4, key_heads=2, queries=12, keys=15)
    relative, sinks = torch.randn(2, 4, 12, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    mask = torch.rand(2, 15) < 0.6
    bits = drawn_bits(0.3, 2, 4, 12, 15, first=(3, 0, 0))
    torch.manual_seed(0)
    options = dict(
        relative_logits=relative, sinks=sinks, key_padding_mask=mask, softcap=1.5, is_causal=True, return_lse=True
    )  # fmt: skip
    got = by(backend, attention, *tensors, dropout_p=0.3, enable_gqa=True, **options)
    expected = features_oracle(
        *tensors, relative=relative, sinks=sinks, key_padding_mask=mask, softcap=1.5, right=0, kept=bits, dropout_p=0.3
    )  # fmt: skip
    same(got, expected, [*tensors, relative, sinks], **TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend):
    """Rows and keys are numbered through all sequences."""
    lengths = [4, 1, 9]
    query, key, value = (torch.randn(14, 2, 8, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 4, 5, 14], dtype=torch.int32)
    bits = drawn_bits(0.4, 1, 2, 14, 14)
    torch.manual_seed(0)
    got = by(backend, attention_varlen, query, key, value, cu, cu, 9, 9, dropout_p=0.4, is_causal=True)
    parts = []
    for start, length in zip(cu.tolist(), lengths):
        part = slice(start, start + length)
        tensors = (t[part].transpose(0, 1)[None] for t in (query, key, value))
        out, _ = features_oracle(*tensors, right=0, kept=bits[:, :, part, part], dropout_p=0.4)
        parts.append(out[0].transpose(0, 1))
    same([got], [torch.cat(parts)], [query, key, value], **TOLERANCE[backend])


@pytest.mark.parametrize("name", [*CASES, "fire"])
def test_every_bias(name):
    bias = FIRE(3, hidden=5, init_length=3) if name == "fire" else make(name)
    tensors = qkv(queries=10)
    bits = drawn_bits(0.2, 2, 3, 10, 10)
    torch.manual_seed(0)
    got = attention(*tensors, bias, dropout_p=0.2, return_lse=True)
    expected = features_oracle(*tensors, bias.dense(10, 10), kept=bits, dropout_p=0.2)
    same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE["blockwise"])


@pytest.mark.parametrize(("backend", "dtype"), HALF)
def test_half_precision(backend, dtype):
    """At most twice the error of plain PyTorch at that dtype."""
    tensors = qkv(heads=2, queries=32, dim=16, dtype=dtype)
    bits = drawn_bits(0.2, 2, 2, 32, 32)
    torch.manual_seed(0)
    got = by(backend, attention, *tensors, dropout_p=0.2)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected, _ = features_oracle(*exact, kept=bits, dropout_p=0.2)
    q, k, v = tensors
    eager = ((q @ k.mT * 0.25).softmax(-1) * bits / 0.8).to(dtype) @ v
    grad = torch.randn_like(eager)
    ours = (got, *torch.autograd.grad(got, tensors, grad))
    theirs = (eager, *torch.autograd.grad(eager, tensors, grad))
    for a, b, want in zip(ours, theirs, (expected, *torch.autograd.grad(expected, exact, grad.double()))):
        assert (a - want).norm() <= 2 * (b - want).norm()


# ---------------------------------------------------------------------------------- the same pairs once more


@pytest.mark.parametrize("softcap", [None, 1.3])
def test_gradcheck(softcap):
    tensors = qkv(batch=1, heads=2, queries=4, keys=5, dim=2, dtype=torch.float64)
    table = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def call(*tensors):
        torch.manual_seed(3)
        return attention(*tensors, dropout_p=0.4, softcap=softcap, return_lse=True)

    assert torch.autograd.gradcheck(call, (*tensors, table))


@pytest.mark.parametrize("backend", BACKENDS)
def test_manual_seed_reproduces(backend):
    tensors = qkv(batch=1, heads=2, queries=9)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs += [by(backend, attention, *tensors, dropout_p=0.5) for _ in range(2)]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[4])


@pytest.mark.parametrize(
    ("backend", "reentrant"),
    [("blockwise", True), ("blockwise", False), pytest.param("triton", False, marks=pytest.mark.triton)],
)
def test_checkpoint(backend, reentrant):
    tensors = qkv(batch=1, queries=20)
    grads = []
    for again in (False, True):
        torch.manual_seed(4)

        def call(*tensors):
            return by(backend, attention, *tensors, dropout_p=0.5)

        out = checkpoint(call, *tensors, use_reentrant=reentrant) if again else call(*tensors)
        for t in tensors:
            t.grad = None
        out.sin().sum().backward()
        grads.append([out, *(t.grad for t in tensors)])
    assert all(map(torch.equal, *grads))


def test_blocks_do_not_matter(monkeypatch):
    tensors = qkv(queries=40)
    outs = []
    for rows in (5, 16, 40):
        monkeypatch.setattr(blockwise, "ROWS", rows)
        torch.manual_seed(0)
        out = attention(*tensors, dropout_p=0.5)
        outs.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0])


def test_its_mean_over_seeds_is_attention():
    query, key, value = (t.detach() for t in qkv(batch=1, heads=2, queries=6))
    q, k, v = (t.expand(500, -1, -1, -1) for t in (query, key, value))  # each entry has pairs of its own
    got = attention(q, k, v, dropout_p=0.4).double()
    mean, sigma = got.mean(0), got.std(0) / math.sqrt(500)
    expected = attention(query, key, value)[0].double()
    assert ((mean - expected).abs() < 4.5 * sigma).all()


def test_a_shard_of_heads_drops_what_the_whole_drops():
    """And one of rows and keys: the seed says where they begin."""
    tensors = [t.detach() for t in qkv(heads=4, queries=12)]
    keywords = dict(
        table=None, support=None, slopes=None, key_mask=None, scale=0.3, softcap=0.0, shift=0, left=-1, right=-1,
        symmetric=True,
    )  # fmt: skip
    out, _ = blockwise.forward(*tensors, **keywords, dropout=Dropout(0.5, torch.tensor([9, 0, 0, 0])))
    q, k, v = (t[:, 2:] for t in tensors)
    moved = Dropout(0.5, torch.tensor([9, 5, 0, 2]))
    part, _ = blockwise.forward(q[:, :, 5:], k, v, **keywords, dropout=moved)
    torch.testing.assert_close(part, out[:, 2:, 5:])
    # Half of the keys, and the other half, each with its weight.
    outs, lses = zip(*(
        blockwise.forward(
            q, k[:, :, at], v[:, :, at], **keywords, dropout=Dropout(0.5, torch.tensor([9, 0, at.start, 2]))
        )
        for at in (slice(0, 7), slice(7, 12))
    ))  # fmt: skip
    share = torch.stack(lses).softmax(0)
    torch.testing.assert_close(outs[0] * share[0, ..., None] + outs[1] * share[1, ..., None], out[:, 2:])


def test_sequences_take_no_numbers_from_each_other():
    """The pairs of a row do not depend on how the rows are cut."""
    q, k, v = torch.randn(3, 1, 2, 12, 8).unbind()
    keywords = dict(
        table=None, support=None, slopes=None, key_mask=None, scale=0.3, softcap=0.0, left=-1, right=-1,
        symmetric=True, dropout=Dropout(0.5, torch.tensor([9, 0, 0, 0])),
    )  # fmt: skip
    cu = torch.tensor([0, 12], dtype=torch.int32)
    whole = blockwise.forward(q, k, v, **keywords, shift=0)
    cut = blockwise.forward(q, k, v, **keywords, shift=0, sequences=Sequences(cu, cu, 12, 12))
    torch.testing.assert_close(whole, cut)


def test_memory_grows_with_the_length(monkeypatch):
    small_blocks(monkeypatch, ROWS=64, SCRATCH=20000)
    largest = []
    for length in (512, 1024):
        q, k, v = torch.randn(3, 1, 1, length, 4).unbind()
        keywords = dict(
            table=None, support=None, slopes=None, key_mask=None, scale=0.5, softcap=0.0, shift=0, left=-1, right=0,
            symmetric=True, dropout=Dropout(0.5, torch.tensor([9, 0, 0, 0])),
        )  # fmt: skip
        with Largest() as mode:
            out, lse = blockwise.forward(q, k, v, **keywords)
            blockwise.backward(
                out, lse, q, k, v, out, lse, **keywords, tails_need_grad=True, need_q=True, need_kv=True,
                need_table=False, deterministic=True,
            )  # fmt: skip
        largest.append(mode.bytes)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 1024 * 1024


def test_reference_drops_as_much():
    query, key, value = torch.ones(3, 1, 1, 64, 4).unbind()
    out = attention_reference(query, key, value, dropout_p=0.25)
    assert abs(out.mean().item() - 1) < 4 * math.sqrt(0.25 / 0.75 / 64 / 64)


def test_zero_draws_nothing():
    tensors = qkv()
    state = torch.get_rng_state()
    assert torch.equal(attention(*tensors, dropout_p=0.0), attention(*tensors))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("p", "bias", "error", "message"),
    [
        ("0.5", None, TypeError, "dropout_p must be a number, got str '0.5'"),
        (True, None, TypeError, "dropout_p must be a number, got bool"),
        (-0.1, None, ValueError, "dropout_p must be at least 0 and less than 1, got -0.1"),
        (1.0, None, ValueError, "dropout_p must be at least 0 and less than 1, got 1.0"),
        (math.nan, None, ValueError, "dropout_p must be at least 0 and less than 1, got nan"),
        (0.1, DAPE(3, hidden=4), ValueError, "dropout_p must be 0 with a DAPE, got 0.1"),
    ],
)
def test_says_what_is_wrong(p, bias, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv(), bias, dropout_p=p, is_causal=True)
