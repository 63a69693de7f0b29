"""Around decoding: tables that are kept, what is compiled while a cache grows, operators, and what is refused."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from bias_cases import CASES as BIASES
from bias_cases import make

import posattn
from posattn import TISA, attention_with_kvcache, kept_table
from posattn.decode_ops import decode_forward, decode_mix_forward


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def counted(monkeypatch, bias):
    made = []
    monkeypatch.setattr(
        type(bias), "values", lambda self, x, f=type(bias).values: made.append(len(x)) or f(self, x)
    )
    return made


# --------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kept_table_is_the_table(name, dtype):
    bias = make(name).to(dtype)
    for length in (1, 7, 300, 256, 257):
        table, zero = kept_table.kept_table(bias, length, dtype)
        right = bias.table(1, length).to(dtype)  # offsets 1 - length to 0
        torch.testing.assert_close(table[:, zero - length + 1 : zero + 1], right, rtol=1e-6, atol=1e-6)
        ahead = bias.values(torch.arange(16)).to(dtype)
        torch.testing.assert_close(table[:, zero : zero + 16], ahead, rtol=1e-6, atol=1e-6)
        assert table.shape[1] == zero + 16


def test_a_table_is_made_once_and_doubled(monkeypatch):
    bias = TISA(2)
    made = counted(monkeypatch, bias)
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1100, 8), torch.randn(1, 2, 1100, 8)
    for length in range(32, 1100, 7):
        posattn.attention(query, key[:, :, :length], value[:, :, :length], bias, is_causal=True)
    assert [count - 15 for count in made] == [256, 512, 1024, 2048]
    made.clear()
    attention_with_kvcache(query, key, value, bias)
    assert not made


def test_a_sequence_that_begins_makes_it_again():
    """So that what is written past the counts of changes shows at the next prompt."""
    bias, key = TISA(2), torch.randn(1, 2, 40, 8)
    query = key[:, :, -1:]
    with torch.no_grad():
        before = posattn.attention(query, key, key, bias)
        bias.amplitudes.data.mul_(-3.0)
        torch.testing.assert_close(posattn.attention(query, key, key, bias), before)
        posattn.attention(key, key, key, bias)
        expected = posattn.attention_reference(query, key, key, bias)
        torch.testing.assert_close(posattn.attention(query, key, key, bias), expected)
        assert not torch.allclose(before, expected)


def change_in_place(bias):
    bias.amplitudes.mul_(2.0)


def change_parameter(bias):
    bias.amplitudes = torch.nn.Parameter(torch.full_like(bias.amplitudes, 0.7))


def change_dtype(bias):
    bias.double()


def change_data(bias):
    bias.amplitudes.data = torch.full_like(bias.amplitudes, 0.7)


def load(bias):
    bias.load_state_dict(TISA(2).state_dict())


def step(bias):
    with torch.enable_grad():
        bias.table(3, 3).square().sum().backward()
    torch.optim.SGD(bias.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [change_in_place, change_parameter, change_dtype, change_data, load, step])
def test_a_change_makes_a_new_table(change):
    bias = TISA(2)
    before, _ = kept_table.kept_table(bias, 10, torch.float32)
    assert kept_table.kept_table(bias, 10, torch.float32)[0] is before
    change(bias)
    after, zero = kept_table.kept_table(bias, 10, torch.float32)
    assert after is not before
    torch.testing.assert_close(after[:, zero - 9 : zero + 1], bias.table(1, 10).float(), rtol=1e-6, atol=1e-6)


def test_modes():
    bias = TISA(2)
    before, _ = kept_table.kept_table(bias, 10, torch.float32)
    assert kept_table.kept_table(bias.eval(), 10, torch.float32)[0] is not before
    with torch.enable_grad():
        assert kept_table.kept_table(bias, 10, torch.float32) is None
    with torch.inference_mode():
        table, _ = kept_table.kept_table(bias, 10, torch.float32)
        assert not table.is_inference()
        young = TISA(2)
        assert kept_table.kept_table(young, 10, torch.float32) is None  # its parameters count no changes


def test_writing_into_a_kept_table_is_noticed():
    bias = TISA(2)
    before, zero = kept_table.kept_table(bias, 10, torch.float32)
    before.fill_(3.0)
    after, zero = kept_table.kept_table(bias, 10, torch.float32)
    torch.testing.assert_close(after[:, zero : zero + 1], bias.values(torch.zeros(1, dtype=torch.long)))


def test_a_bias_of_another_package_that_draws_numbers():
    class Noisy(posattn.Bias):
        def values(self, offsets):
            noise = torch.rand(self.num_heads, len(offsets)) if self.training else 0.0
            return torch.zeros(self.num_heads, len(offsets)) + noise

    bias = Noisy(2)
    assert kept_table.kept_table(bias, 10, torch.float32) is None
    assert kept_table.kept_table(bias.eval(), 10, torch.float32) is not None


def test_copies_know_nothing_of_it_and_it_goes_with_the_bias():
    bias = TISA(2)
    plain = pickle.dumps(bias)
    table, _ = kept_table.kept_table(bias, 5000, torch.float32)
    assert pickle.dumps(bias) == plain
    twin = copy.deepcopy(bias)
    assert kept_table.kept_table(twin, 10, torch.float32)[0] is not table
    gone = weakref.ref(table)
    del bias, table
    gc.collect()
    assert gone() is None


def test_functional_calls():
    bias = TISA(2)
    kept_table.kept_table(bias, 10, torch.float32)
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    other = {name: torch.rand_like(p) for name, p in bias.named_parameters()}

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = bias

        def forward(self):
            return posattn.attention(query, key, value, self.bias, is_causal=True)

    with torch.enable_grad():
        expected = Call()().detach()
    right = torch.func.functional_call(Call(), {f"bias.{name}": p for name, p in other.items()})
    torch.testing.assert_close(Call()(), expected)
    assert not torch.allclose(right, expected)
    bias.load_state_dict(other)
    torch.testing.assert_close(Call()(), right)


# ------------------------------------------------------------------------------------- what is compiled


VARIANTS = """
from collections import Counter
from bench.aot_decode import variants
grown = variants([*range(1, 40), *range(1000, 1020), 4096, 4097, 8191, 40000])
print(sorted(Counter(name for name, _ in grown).items()))
paged = variants([64, 128, 1024, 40000], page=16)
print(sorted(Counter(name for name, _ in paged).items()))
"""


def test_a_growing_cache_compiles_nothing_new():
    """Of each kernel one for a table and a DAPE, one for a strip; in a process in which Triton does not interpret."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", VARIANTS]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    kernels = [("decode_combine", 1), ("decode_mix", 1), ("decode_scores", 1), ("decode_split", 3)]
    assert done.stdout.splitlines() == [str(kernels)] * 2


def test_splits():
    pytest.importorskip("triton")
    from posattn.kernels.decode_configs import MOST_SPLITS, choose_splits

    assert choose_splits(300, 100, 264) == 1  # enough programs
    assert choose_splits(16, 1, 264) == 1  # nothing to split
    assert choose_splits(16, 128, 264) in range(14, 18)  # one wave, nearly full
    assert choose_splits(1, 10000, 264) >= 0.85 * MOST_SPLITS
    for programs in (1, 2, 5, 16, 33, 100, 264):
        for tiles in (1, 2, 16, 1000):
            splits = choose_splits(programs, tiles, 264)
            assert 1 <= splits <= max(1, min(tiles, MOST_SPLITS))


# ------------------------------------------------------------------------------------------- operators


def arguments_of(op, backend, **changes):
    q, k, v = torch.randn(2, 4, 2, 8), torch.randn(2, 2, 33, 8), torch.randn(2, 2, 33, 5)
    lengths = torch.tensor([33, 20], dtype=torch.int32)
    place = dict(scale=0.3, zero=32, start=0, left=-1, right=0)
    shared = dict(block_table=None, seqlens=lengths, sinks=torch.randn(4), key_mask=None)
    if op is decode_mix_forward:
        weights = torch.randn(9, 8, 1), torch.randn(9), torch.randn(4, 9, 1), torch.randn(4)
        more = dict(
            zip(("w1", "b1", "w2", "b2"), weights), table=torch.randn(4, 40), strip=None, published=False
        )
    else:
        more = dict(
            table=torch.randn(4, 40), slopes=None, strip=None, relative=None, softcap=0.0, symmetric=True
        )
    return dict(q=q, k=k, v=v, **shared, **more, **place, backend=backend) | changes


@pytest.mark.parametrize("op", [decode_forward, decode_mix_forward], ids=["decode", "mix"])
@pytest.mark.parametrize("backend", ["blockwise", pytest.param("triton", marks=pytest.mark.triton)])
def test_operators(op, backend):
    torch.library.opcheck(op, (), arguments_of(op, backend), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", [decode_forward, decode_mix_forward], ids=["decode", "mix"])
def test_no_keys(op):
    empty = dict(
        k=torch.empty(2, 2, 0, 8), v=torch.empty(2, 2, 0, 5), seqlens=torch.zeros(2, dtype=torch.int32)
    )
    arguments = arguments_of(op, "blockwise", **empty)
    out, lse = op(**arguments)
    assert out.shape == (2, 4, 2, 5) and not out.any()
    torch.testing.assert_close(lse, arguments["sinks"][:, None].expand(2, 4, 2))
    out, lse = op(**arguments_of(op, "blockwise", **empty, sinks=None))
    assert (lse == -math.inf).all()


def test_compiled():
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 33, 8), torch.randn(1, 2, 33, 8)
    bias = make("tisa", 2)
    lengths = torch.tensor([20], dtype=torch.int32)
    compiled = torch.compile(attention_with_kvcache, backend="aot_eager", fullgraph=True)
    got = compiled(query, key, value, bias, cache_seqlens=lengths)
    torch.testing.assert_close(got, attention_with_kvcache(query, key, value, bias, cache_seqlens=lengths))


# ---------------------------------------------------------------------------------------------- checks

Q, K = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 32, 8)
PAGES, BLOCKS, LENGTHS = torch.randn(5, 16, 2, 8), torch.zeros(2, 2).int(), torch.ones(2).int()
REFUSED = {
    "17 queries": ((torch.randn(2, 2, 17, 8), K, K), {}, ValueError, "1 to 16 queries.*got 17"),
    "no query": ((torch.randn(2, 2, 0, 8), K, K), {}, ValueError, "1 to 16 queries.*got 0"),
    "dtype": ((Q, K.double(), K), {}, ValueError, "key_cache must be of query's dtype.*float64"),
    "shapes": ((Q, K, K[:, :, 1:]), {}, ValueError, "value_cache must have key_cache's shape"),
    "head dim": ((Q, K[..., 1:], K), {}, ValueError, "key_cache must have query's head_dim 8"),
    "wide": (
        (Q, K, torch.randn(2, 2, 32, 257)),
        {},
        ValueError,
        "value_cache must have a head_dim of 1 to 256",
    ),
    "batch": ((Q, K[:1], K[:1]), {}, ValueError, "key_cache must have query's batch size 2"),
    "heads": ((Q, K[:, :1], K[:, :1]), {}, ValueError, "enable_gqa=True"),
    "group": (
        (Q[:, [0, 1, 1]], K, K),
        dict(enable_gqa=True),
        ValueError,
        "multiple of key_cache's, got 3 and 2",
    ),
    "kind": ((Q, [1], K), {}, TypeError, "key_cache must be a Tensor, got list"),
    "dimensions": ((Q, K[0], K), {}, ValueError, "key_cache must be a dense 4-D Tensor"),
    "lengths' kind": (
        (Q, K, K),
        dict(cache_seqlens=[3, 4]),
        TypeError,
        "cache_seqlens must be a Tensor or None, got list",
    ),
    "lengths' dtype": (
        (Q, K, K),
        dict(cache_seqlens=LENGTHS.long()),
        ValueError,
        "cache_seqlens must be int32.*int64",
    ),
    "lengths' shape": (
        (Q, K, K),
        dict(cache_seqlens=LENGTHS[:1]),
        ValueError,
        r"cache_seqlens must be int32 of shape.*\(2,\)",
    ),
    "too long": (
        (Q, K, K),
        dict(cache_seqlens=LENGTHS * 33),
        ValueError,
        r"cache_seqlens must be 0 to 32.*33, 33",
    ),
    "negative": ((Q, K, K), dict(cache_seqlens=-LENGTHS), ValueError, "cache_seqlens must be 0 to 32"),
    "no lengths": (
        (Q, PAGES, PAGES),
        dict(block_table=BLOCKS),
        ValueError,
        "cache_seqlens must be given with block_table",
    ),
    "blocks' kind": (
        (Q, PAGES, PAGES),
        dict(block_table=3),
        TypeError,
        "block_table must be a Tensor or None, got int 3",
    ),
    "blocks' dtype": (
        (Q, PAGES, PAGES),
        dict(block_table=BLOCKS.long()),
        ValueError,
        "block_table must be int32.*int64",
    ),
    "block size": (
        (Q, PAGES[:, :15], PAGES[:, :15]),
        dict(block_table=BLOCKS, cache_seqlens=LENGTHS),
        ValueError,
        "block_size that is a multiple of 16",
    ),
    "mask": (
        (Q, K, K),
        dict(key_padding_mask=torch.ones(2, 31).bool()),
        ValueError,
        "key_padding_mask must be bool.*31",
    ),
    "sinks": (
        (Q, K, K),
        dict(sinks=torch.zeros(3)),
        ValueError,
        "sinks must have one number for each of query's 2",
    ),
    "table": ((Q, K, K, torch.zeros(2, 31)), {}, ValueError, r"bias must be a table of shape.*\(2, 32\)"),
    "backend": ((Q, K, K), dict(backend="cuda"), ValueError, 'backend must be "triton"'),
    "softcap": (
        (Q, K, K, posattn.DAPE(2)),
        dict(softcap=1.0),
        ValueError,
        "softcap must be None with a DAPE",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, keywords, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        attention_with_kvcache(*arguments, **keywords)


def test_a_table_of_the_caller():
    table = torch.randn(2, 32)
    lengths = torch.tensor([32, 9], dtype=torch.int32)
    out = attention_with_kvcache(Q, K, K, table, cache_seqlens=lengths)
    for b, n in enumerate(lengths.tolist()):
        own = K[b : b + 1, :, :n]
        expected = posattn.attention_reference(Q[b : b + 1], own, own, table[:, 32 - n :])
        torch.testing.assert_close(out[b : b + 1], expected)


# ------------------------------------------------------------------------------------------- on a GPU


def on_the_gpu(length, queries=1, heads=4):
    query = torch.randn(2, heads, queries, 64, device="cuda", dtype=torch.float16)
    key, value = torch.randn(2, 2, 2, length, 64, device="cuda", dtype=torch.float16).unbind()
    return query, key, value, torch.tensor([length, length // 3], dtype=torch.int32, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["tisa", "alibi", "kerple-log"])
def test_a_graph_serves_a_growing_cache(bias):
    query, key, value, lengths = on_the_gpu(5000)
    bias = make(bias, 4).cuda()
    call = dict(cache_seqlens=lengths, enable_gqa=True, backend="triton")
    attention_with_kvcache(query, key, value, bias, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_with_kvcache(query, key, value, bias, **call)
    for first, second in ((5000, 17), (1, 0), (64, 4999)):
        lengths.copy_(torch.tensor([first, second], dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(
            out, attention_with_kvcache(query, key, value, bias, **call), rtol=0, atol=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["", "tisa", "alibi", "t5"])
def test_nothing_waits_for_the_device(bias):
    query, key, value, lengths = on_the_gpu(3000)
    module = make(bias, 4).cuda() if bias else None
    call = dict(cache_seqlens=lengths, enable_gqa=True, backend="triton")
    attention_with_kvcache(query, key, value, module, **call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_with_kvcache(query, key, value, module, **call)
        posattn.attention(query, key, value, module, is_causal=True, enable_gqa=True, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_table_that_a_graph_reads_stays():
    bias = make("tisa", 4).cuda()
    query, key, value, lengths = on_the_gpu(200)
    call = dict(cache_seqlens=lengths, enable_gqa=True, backend="triton")
    attention_with_kvcache(query, key, value, bias, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_with_kvcache(query, key, value, bias, **call)
    expected = attention_with_kvcache(query, key, value, bias, **call)
    kept_table.kept_table(bias, 100_000, torch.float32)  # a longer one takes its place
    filler = [torch.full((4, 271), float("nan"), device="cuda") for _ in range(50)]
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert filler
