"""document_ids: documents in padded tensors, against the dense oracle, document by document."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, TOLERANCE, by, small_blocks
from bias_cases import CASES, HEADS
from calls import dense, qkv, same
from oracle_features import documents_oracle
from test_varlen import make_bias

from posattn import DAPE, FIRE, attention, attention_reference, attention_varlen

# Numbers need not ascend, and come back: each run is a document.
IDS = torch.tensor(
    [
        [0] * 25,
        [4] * 3 + [1] * 4 + [9] + [1] * 2 + [7] * 15,
        [-1] * 9 + [0] * 16,
    ]
)


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(is_causal=True), dict(right=0)),
    "window, softcap": (
        dict(window=(3, 1), softcap=1.5, scale=0.7),
        dict(left=3, right=1, softcap=1.5, scale=0.7),
    ),
}


def some(backend, **sizes):
    """Tensors and document_ids; for the interpreter, which is slow, fewer."""
    ids = IDS if backend == "blockwise" else IDS[1:, :12].contiguous()
    return qkv(batch=len(ids), queries=ids.shape[1], **sizes), ids


def mask(ids):
    """The last entry sees no key at all in its first document."""
    kept = torch.rand(ids.shape) < 0.6
    kept[-1, :9] = False
    return kept


WAYS = [("blockwise", options, masked) for options in OPTIONS for masked in (False, True)]
WAYS += [
    pytest.param("triton", *way, marks=pytest.mark.triton)
    for way in (("plain", True), ("window, softcap", False))
]


@pytest.mark.parametrize(("backend", "options", "masked"), WAYS)
def test_without_a_bias(backend, options, masked):
    tensors, ids = some(backend, value_dim=5)
    given, said = OPTIONS[options]
    options = dict(key_padding_mask=mask(ids) if masked else None)
    got = by(backend, attention, *tensors, document_ids=ids, **given, **options, return_lse=True)
    same(got, documents_oracle(*tensors, ids, **said, **options), tensors, **TOLERANCE[backend])


@pytest.mark.parametrize("name", [*CASES, "fire"])
def test_every_bias_and_its_gradient(name):
    bias, matrix = make_bias(name)
    tensors = qkv(batch=3, queries=25)
    for causal in (True, False):
        got = attention(*tensors, bias, document_ids=IDS, is_causal=causal, return_lse=True)
        expected = documents_oracle(*tensors, IDS, matrix, right=0 if causal else -1)
        same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE["blockwise"])


@pytest.mark.triton
@pytest.mark.parametrize("name", ["alibi", "fire"])
def test_every_bias_on_triton(name):
    bias, matrix = make_bias(name)
    tensors, ids = some("triton")
    got = by("triton", attention, *tensors, bias, document_ids=ids, is_causal=True, return_lse=True)
    expected = documents_oracle(*tensors, ids, matrix, right=0)
    same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE["triton"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_together(backend):
    """A table, grouped heads, a window, gaps, sinks."""
    tensors, ids = some(backend, heads=2, key_heads=1)
    length = ids.shape[1]
    table, sinks = torch.randn(2, 2 * length - 1, requires_grad=True), torch.randn(2, requires_grad=True)

    def matrix(queries, keys):
        return dense(table[:, length - keys :][:, : queries + keys - 1], queries, keys)

    options = dict(
        enable_gqa=True, window=(5, None), key_padding_mask=mask(ids), sinks=sinks, return_lse=True
    )
    got = by(backend, attention, *tensors, table, document_ids=ids, is_causal=True, **options)
    said = dict(left=5, right=0, key_padding_mask=options["key_padding_mask"], sinks=sinks)
    same(got, documents_oracle(*tensors, ids, matrix, **said), [*tensors, table, sinks], **TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_logits(backend):
    tensors, ids = some(backend)
    relative = torch.randn(*tensors[0].shape[:3], 6, requires_grad=True)
    got = by(backend, attention, *tensors, relative_logits=relative, document_ids=ids, return_lse=True)
    expected = documents_oracle(*tensors, ids, relative=relative)
    same(got, expected, [*tensors, relative], **TOLERANCE[backend])


@pytest.mark.parametrize("base", [None, "kerple-log", "fire"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dape(backend, base):
    """As each document by itself."""
    bias = DAPE(HEADS, None if base is None else make_bias(base)[0], hidden=5)
    ids = torch.tensor([[0] * 4 + [1] * 3, [3] * 7])
    tensors, kept = qkv(queries=7), torch.rand(2, 7) < 0.7
    options = dict(is_causal=True, return_lse=True)
    got = by(backend, attention, *tensors, bias, document_ids=ids, key_padding_mask=kept, **options)
    parts = []
    for b, span in ((0, slice(4)), (0, slice(4, 7)), (1, slice(7))):
        part = (t[b : b + 1, :, span] for t in tensors)
        parts.append(attention(*part, bias, key_padding_mask=kept[b : b + 1, span], **options))
    expected = [torch.cat([torch.cat([a, b], 2), c]) for a, b, c in zip(*parts)]
    same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE[backend])


def test_is_varlen_of_the_same_documents():
    bias = FIRE(HEADS, hidden=5, init_length=3)
    tensors = qkv(batch=1, queries=25)
    got = attention(*tensors, bias, document_ids=IDS[1:2], is_causal=True, return_lse=True)
    cu = torch.tensor([0, 3, 7, 8, 10, 25])
    packed = (t[0].transpose(0, 1) for t in tensors)
    out, lse = attention_varlen(*packed, cu, cu, 15, 15, bias, is_causal=True, return_lse=True)
    same(got, (out.transpose(0, 1)[None], lse[None]), [*tensors, *bias.parameters()])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_one_document_is_attention(dtype):
    tensors = qkv(queries=9)
    got = attention(*tensors, document_ids=torch.full((2, 9), 5, dtype=dtype), is_causal=True)
    torch.testing.assert_close(got, attention(*tensors, is_causal=True))


def test_reference():
    bias, matrix = make_bias("tisa")
    tensors, kept = qkv(batch=3, queries=25), mask(IDS)
    options = dict(document_ids=IDS, key_padding_mask=kept, is_causal=True, return_lse=True)
    got = attention_reference(*tensors, bias, **options)
    expected = documents_oracle(*tensors, IDS, matrix, key_padding_mask=kept, right=0)
    same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE["blockwise"])


@pytest.mark.parametrize("name", ["tisa", "fire"])
def test_entries_cut_alike(name):
    """Those next to each other are computed together where no key is missing in between."""
    bias, matrix = make_bias(name)
    one, other = [0] * 4 + [1] * 21, [0] * 20 + [1] * 5
    ids = torch.tensor([one, one, one, other, other, one, one])
    kept = torch.ones(7, 25, dtype=torch.bool)
    kept[2, 7] = kept[4, 22:] = kept[5:, :6] = kept[6, 24] = False
    tensors = qkv(batch=7, queries=25)
    for options in ({}, dict(key_padding_mask=kept)):
        got = attention(*tensors, bias, document_ids=ids, is_causal=True, **options, return_lse=True)
        expected = documents_oracle(*tensors, ids, matrix, right=0, **options)
        same(got, expected, [*tensors, *bias.parameters()], **TOLERANCE["blockwise"])


def test_nothing_there():
    query, key, value = torch.randn(3, 2, 3, 0, 8).unbind()
    assert attention(query, key, value, document_ids=torch.zeros(2, 0, dtype=torch.int64)).shape == (
        2,
        3,
        0,
        8,
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(document_ids=[[0] * 9] * 2), TypeError, "document_ids must be a Tensor or None, got list"),
        (
            dict(document_ids=torch.zeros(2, 9)),
            ValueError,
            "document_ids must be int16, int32 or int64, got torch.f",
        ),
        (
            dict(document_ids=torch.zeros(2, 8).int()),
            ValueError,
            r"shape \(batch, length\) = \(2, 9\), got shape",
        ),
        (dict(document_ids=torch.zeros(9).int()), ValueError, r"must have the shape \(batch, length\)"),
        (
            dict(document_ids=torch.zeros(2, 9).int(), query_start=1),
            ValueError,
            "query_start and key_start must be None with document_ids",
        ),
    ],
)
def test_says_what_is_wrong(given, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv(), **given)


def test_needs_one_length():
    with pytest.raises(ValueError, match="document_ids needs query and key of one length, got 9 and 7"):
        attention(*qkv(keys=7), document_ids=torch.zeros(2, 9).int())
