"""Around decoding: what is compiled while a cache grows, operators, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bias_cases import make

import posattn
from posattn import attention_with_kvcache
from posattn.decode_ops import decode_forward, decode_mix_forward


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


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


@pytest.mark.parametrize("kind", ["attention", "DAPE"])
def test_many_entries(kind, monkeypatch):
    """Only the first axis of a grid may be longer than 65535."""
    pytest.importorskip("triton")
    from posattn.kernels import decode_launch

    grids = []

    class Launch:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **keywords: None

    for kernel in ("decode_split", "decode_combine", "decode_scores", "decode_mix"):
        monkeypatch.setattr(decode_launch, kernel, Launch())
    op = decode_forward if kind == "attention" else decode_mix_forward
    arguments = arguments_of(op, "triton", seqlens=None)
    for name in "qkv":
        arguments[name] = arguments[name][:1].expand(70000, -1, -1, -1)
    op(**arguments)
    assert len(grids) >= 1 and all(rows >= 70000 and splits <= 128 for rows, splits in grids)


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


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            ValueError, match=r"key_cache must be of query's dtype.*torch\.autocast casts the query"
        ):
            attention_with_kvcache(Q, K, K)
        assert attention_with_kvcache(Q, K.bfloat16(), K.bfloat16()).dtype == torch.bfloat16


def test_meta():
    query, key = Q.to("meta"), K.to("meta")
    out, lse = attention_with_kvcache(query, key, key, posattn.TISA(2).to("meta").eval(), return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == (Q.shape, "meta", Q.shape[:3])


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
    bias = make(bias, 4).cuda().eval()
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
    module = make(bias, 4).cuda().eval() if bias else None
    call = dict(cache_seqlens=lengths, enable_gqa=True, backend="triton")
    attention_with_kvcache(query, key, value, module, **call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_with_kvcache(query, key, value, module, **call)
        posattn.attention(query, key, value, module, is_causal=True, enable_gqa=True, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
