"""attention_varlen: strides, sequences without keys, repeated bits, memory, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backends import BACKENDS, by, small_blocks
from bias_cases import HEADS
from calls import same
from oracle import attention_oracle
from oracle_features import features_oracle
from test_blockwise import Largest
from test_varlen import SEQUENCES, make_bias, packed

from posattn import DAPE, KERPLE, attention_varlen, blockwise
from posattn.ops import Sequences


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


def test_any_strides():
    """As a projection leaves them, (T, 3, H, D); and transposed."""
    _, cut = packed(*SEQUENCES["long"])
    tokens = sum(SEQUENCES["long"][0])
    qkv = torch.randn(tokens, 3, HEADS, 8, requires_grad=True)
    flipped = torch.randn(8, HEADS, tokens, 3)
    for tensors in (qkv.unbind(1), flipped.permute(2, 3, 1, 0).unbind(1)):
        got = attention_varlen(*tensors, *cut, is_causal=True, return_lse=True)
        expected = attention_varlen(*(t.contiguous() for t in tensors), *cut, is_causal=True, return_lse=True)
        torch.testing.assert_close(got, expected)


def test_one_sequence_is_attention():
    tensors, cut = packed([30], [41])
    parts = (t.transpose(0, 1)[None] for t in tensors)
    same([attention_varlen(*tensors, *cut)], [attention_oracle(*parts)[0][0].transpose(0, 1)], tensors)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0])])
def test_no_keys_at_all(sinks):
    tensors, cut = packed([3, 2], [0, 0])
    out, lse = attention_varlen(*tensors, *cut[:2], 3, 3, sinks=sinks, return_lse=True)
    assert (out == 0).all()
    assert torch.equal(lse, (torch.full((3,), -torch.inf) if sinks is None else sinks)[:, None].expand(3, 5))
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["none", "tisa", "fire", "dape"])
@pytest.mark.parametrize("lengths", [([5, 7], [5, 7]), ([5, 0, 7], [3, 2, 8])])
def test_tokens_behind_the_last_sequence(backend, name, lengths):
    """A buffer of fixed size: as without them, and they get 0, whatever they hold."""
    if name == "dape":
        bias = DAPE(HEADS, base=KERPLE(HEADS), hidden=4)
    else:
        bias = None if name == "none" else make_bias(name)[0]
    tensors, cut = packed(*lengths)
    sinks = torch.randn(HEADS, requires_grad=True)
    rest = 9
    full = [torch.cat([t.detach(), torch.full((rest, HEADS, 8), 3.0)]).requires_grad_() for t in tensors]
    if lengths[0] == lengths[1]:
        cut = (cut[0], cut[0], *cut[2:])
    call = partial(by, backend, attention_varlen)
    expected = call(*tensors, *cut, bias, is_causal=True, sinks=sinks, return_lse=True)
    out, lse = call(*full, *cut, bias, is_causal=True, sinks=sinks, return_lse=True)
    count = sum(lengths[0])
    torch.testing.assert_close((out[:count], lse[:, :count]), expected, atol=1e-6, rtol=1e-6)
    assert (out[count:] == 0).all()
    assert torch.equal(lse[:, count:], sinks[:, None].expand(HEADS, rest))
    others = [sinks, *([] if bias is None else bias.parameters())]
    grads = torch.autograd.grad(out.sin().sum() + lse[:, :count].sum(), [*full, *others])
    right = torch.autograd.grad(expected[0].sin().sum() + expected[1].sum(), [*tensors, *others])
    for grad, other in zip(grads, right):
        torch.testing.assert_close(grad[: len(other)], other, atol=2e-6, rtol=2e-6)
        assert (grad[len(other) :] == 0).all()


def test_no_tokens_and_no_sequences():
    nothing = torch.randn(0, HEADS, 8, requires_grad=True)
    cu = torch.tensor([0])
    for bias in (None, make_bias("tisa")[0], DAPE(HEADS, hidden=4)):
        out, lse = attention_varlen(nothing, nothing, nothing, cu, cu, 0, 0, bias, return_lse=True)
        assert out.shape == (0, HEADS, 8)
        assert lse.shape == (HEADS, 0)
        out.sum().backward()


def test_the_same_bits_again():
    tensors, cut = packed(*SEQUENCES["long"])
    bias, _ = make_bias("fire")
    inputs = [*tensors, *bias.parameters()]
    first, second = (
        torch.autograd.grad(attention_varlen(*tensors, *cut, bias).sin().sum(), inputs) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("sizes", [[450, 50, 10, 2], [16] * 32])
@pytest.mark.parametrize("name", ["tisa", "fire"])
def test_memory_grows_with_the_tokens(name, sizes, monkeypatch):
    """Operators are called by themselves: what they do inside is then seen."""
    small_blocks(monkeypatch, ROWS=64, FUSED_ROWS=64, SCRATCH=20000)
    largest = []
    for times in (1, 2):
        lengths = [size * times for size in sizes] if len(set(sizes)) > 1 else sizes * times
        bias, _ = make_bias(name)
        tensors, (cu_q, cu_k, max_q, max_k) = packed(lengths, lengths, dim=4)
        q, k, v = (t.detach().transpose(0, 1)[None] for t in tensors)
        table = scaled = None
        if name == "fire":
            scaled = bias.scaled(max_q, max_k)
            scaled = scaled._replace(rows=bias.scaled(max_q + max_k, 1, -max_q, 0).rows)
            scaled = type(scaled)(*(part.detach() for part in scaled))
        else:
            table = bias.table(max_q, max_k).detach()
        keywords = dict(
            table=table, support=None, slopes=None, scaled=scaled, key_mask=None, scale=0.5, softcap=0.0, shift=0,
            left=-1, right=0, symmetric=True, sequences=Sequences(cu_q, cu_k, max_q, max_k),
        )  # fmt: skip
        with Largest() as mode:
            out, lse = blockwise.forward(q, k, v, **keywords)
            blockwise.backward(
                out, lse, q, k, v, out, lse, **keywords, tails_need_grad=True, need_q=True, need_kv=True,
                need_table=True, deterministic=True,
            )  # fmt: skip
        largest.append(mode.bytes)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 4 * HEADS * 1024 * 1024 / 20


# --------------------------------------------------------------------------------------------- what is refused


def arguments():
    tensors, cut = packed([3, 2], [4, 2])
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (*tensors, *cut)))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(cu_seqlens_q=[0, 3, 5]), TypeError, "cu_seqlens_q must be a Tensor, got list"),
        (dict(cu_seqlens_q=torch.tensor([0.0, 3, 5])), ValueError, "cu_seqlens_q must be an int32 or int64"),
        (
            dict(cu_seqlens_q=torch.tensor([[0, 3, 5]])),
            ValueError,
            "cu_seqlens_q must be an int32 or int64 vector",
        ),
        (dict(cu_seqlens_q=torch.tensor([0])), ValueError, "as many sequences, got 0 and 2"),
        (
            dict(cu_seqlens_q=torch.tensor([0, 3, 6])),
            ValueError,
            r"cu_seqlens_q must ascend from 0 to at most the 5 tokens",
        ),
        (dict(cu_seqlens_q=torch.tensor([1, 3, 5])), ValueError, "cu_seqlens_q must ascend from 0"),
        (dict(cu_seqlens_k=torch.tensor([0, 7, 6])), ValueError, "cu_seqlens_k must ascend from 0"),
        (dict(cu_seqlens_k=torch.tensor([0, 1, 2, 6])), ValueError, "as many sequences, got 2 and 3"),
        (dict(max_seqlen_q=2), ValueError, "max_seqlen_q must be at least the longest sequence, 3, got 2"),
        (dict(max_seqlen_k=1), ValueError, "max_seqlen_k must be at least the longest sequence, 4, got 1"),
        (dict(max_seqlen_q=2.0), TypeError, "max_seqlen_q must be an int, got float"),
        (dict(max_seqlen_k=-1), ValueError, "max_seqlen_k must be at least 0"),
        (dict(query=torch.randn(1, 3, 5, 8)), ValueError, r"query must be 3-D, \(tokens of all sequences"),
        (dict(value=torch.randn(5, 3, 8)), ValueError, "value must have key's heads and length"),
        (dict(bias=torch.randn(3, 5)), ValueError, r"bias must be a table of shape .* = \(3, 6\)"),
        (dict(relative_logits=torch.randn(3, 5, 2)), ValueError, "relative_logits must have the shape"),
        (dict(sinks=torch.randn(2)), ValueError, "sinks must have one number for each of query's 3 heads"),
        (dict(dropout_p=1.0), ValueError, "dropout_p must be at least 0 and less than 1"),
    ],
)
def test_says_what_is_wrong(given, error, message):
    with pytest.raises(error, match=message):
        attention_varlen(**{**arguments(), **given})


def test_long_cu_seqlens_are_taken():
    given = arguments()
    expected = attention_varlen(**given)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        given[name] = given[name].long()
    torch.testing.assert_close(attention_varlen(**given), expected)


def test_the_oracle_of_one_sequence_is_the_oracle():
    tensors = [torch.randn(1, HEADS, 7, 8) for _ in range(3)]
    bias = torch.randn(HEADS, 7, 7)
    torch.testing.assert_close(
        features_oracle(*tensors, bias, left=2, right=1), attention_oracle(*tensors, bias, left=2, right=1)
    )
