"""`python -m bench decode`: one new token against a cache of keys: time, beside SDPA's and the floor of the memory.

On a GPU: bf16, D 128, 16 heads, each call inside of a CUDA graph, over so many copies of the cache that none is left in
L2; the floor is the bytes of K and V at 4.3 TB/s, the copy speed of an H200. "none" is no bias, "TISA" and "ALiBi" a
bias; SDPA gets TISA's row as its mask, FlexAttention reads it from a table. On the CPU: fp32, D 64, 12 heads, and
what a call costs beside its arithmetic. The job stops at its budget and says what it did not reach.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import posattn

from .machine import describe, slug
from .measure import Patience, interleaved, seconds_of, summary

BANDWIDTH = 4.3e12
RESULTS = Path(__file__).parent / "results"
COLD = 256 << 20  # bytes of keys and values that a turn goes through
ENOUGH = 2e-3  # seconds that a CUDA graph takes at the floor, or more: what starting it costs is then lost in it
MOST_CALLS = 512  # in a graph
PEERS = (
    "posattn none",
    "posattn ALiBi",
    "posattn TISA",
    "posattn pages",
    "SDPA none",
    "SDPA TISA",
    "Flex TISA",
)


class Place(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    head_dim: int
    length: int

    def __str__(self) -> str:
        return f"B {self.batch} H {self.heads}/{self.key_heads} D {self.head_dim} N {self.length}"

    def cache_bytes(self, item: int) -> int:
        return 2 * item * self.batch * self.key_heads * self.length * self.head_dim


def places(device: str, quick: bool) -> Iterator[Place]:
    """Most important first."""
    if quick:
        yield Place(1, 4, 4, 64, 512)
    elif device == "cpu":
        for length in (4096, 512, 64, 16384):
            yield Place(1, 12, 12, 64, length)
        yield Place(1, 16, 2, 64, 4096)
    else:
        for lengths in ((8192, 32768), (1024, 2048, 4096, 16384, 65536, 131072)):
            for batch, key_heads in ((1, 16), (8, 16), (1, 2), (8, 2)):
                for length in lengths:
                    yield Place(batch, 16, key_heads, 128, length)


class Cache:
    """Tensors of a place: copies of a cache, lengths as data, a bias."""

    def __init__(self, place: Place, device: str):
        torch.manual_seed(0)
        self.place = place
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        size = place.cache_bytes(self.dtype.itemsize)
        copies = max(1, min(64, COLD // size)) if device == "cuda" else 1
        shape = (2, place.batch, place.key_heads, place.length, place.head_dim)
        self.copies = [torch.randn(shape, device=device, dtype=self.dtype).unbind() for _ in range(copies)]
        self.query = torch.randn(place.batch, place.heads, 1, place.head_dim, device=device, dtype=self.dtype)
        self.seqlens = torch.full((place.batch,), place.length, dtype=torch.int32, device=device)
        self.tisa, self.alibi = (
            kind(place.heads).to(device).eval() for kind in (posattn.TISA, posattn.ALiBi)
        )
        self.row = self.tisa.table(1, place.length)  # offsets 1 - N to 0
        self.mask = self.row[None, :, None].to(self.dtype)
        self.pages = 16

    def paged(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        p, page = self.place, self.pages
        blocks = p.length // page
        order = torch.randperm(p.batch * blocks, device=self.query.device)

        def cut(cache: Tensor) -> Tensor:
            pages = cache.unflatten(2, (blocks, page)).permute(0, 2, 3, 1, 4).flatten(0, 1)
            return pages[order]

        where = torch.empty_like(order)
        where[order] = torch.arange(len(order), device=order.device)
        made = [(cut(k), cut(v)) for k, v in self.copies]
        return made, where.view(p.batch, blocks).int()


def peer(name: str, cache: Cache, device: str) -> Callable[[Tensor, Tensor], Any] | None:
    """attention(k, v) of one copy; None where it is not to be had."""
    ours, bias = name.split()
    grouped = cache.place.heads != cache.place.key_heads
    if ours == "posattn":
        module = {"TISA": cache.tisa, "ALiBi": cache.alibi}.get(bias)
        backend = "triton" if device == "cuda" else "blockwise"
        more = dict(cache_seqlens=cache.seqlens, enable_gqa=grouped, backend=backend)
        return lambda k, v: posattn.attention_with_kvcache(cache.query, k, v, module, **more)
    if ours == "SDPA":
        mask = cache.mask if bias == "TISA" else None
        return lambda k, v: F.scaled_dot_product_attention(
            cache.query, k, v, attn_mask=mask, enable_gqa=grouped
        )
    if device == "cpu":
        return None
    from torch.nn.attention.flex_attention import flex_attention

    row = cache.row

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + row[h, j]

    torch.compiler.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda k, v: flex(cache.query, k, v, score_mod=score, enable_gqa=grouped)


def turn(name: str, cache: Cache, device: str) -> tuple[Callable[[], Any], int] | None:
    """A function that goes through all copies, on a GPU so often that it takes a while, and how many calls that is."""
    copies = cache.copies
    if name == "posattn pages":
        if cache.place.length % cache.pages:
            return None
        copies, table = cache.paged()
        backend = "triton" if device == "cuda" else "blockwise"
        grouped = cache.place.heads != cache.place.key_heads
        more = dict(cache_seqlens=cache.seqlens, block_table=table, enable_gqa=grouped, backend=backend)
        attend: Any = lambda k, v: posattn.attention_with_kvcache(cache.query, k, v, cache.tisa, **more)
    else:
        attend = peer(name, cache, device)
    if attend is None:
        return None
    if device == "cpu":
        ways = cycle(copies)
        return lambda: attend(*next(ways)), 1
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes the tables that are kept
        for k, v in copies[:2]:
            attend(k, v)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    rounds = rounds_of(cache.place.cache_bytes(cache.dtype.itemsize), len(copies))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for k, v in copies:
                attend(k, v)
    return graph.replay, rounds * len(copies)


def rounds_of(size: int, copies: int) -> int:
    """How often a graph goes through its copies, `size` bytes each."""
    return max(1, min(math.ceil(ENOUGH * BANDWIDTH / (size * copies)), MOST_CALLS // copies))


@torch.no_grad()
def measured(
    place: Place, device: str, patience: Patience, peers: tuple[str, ...] = PEERS
) -> list[dict[str, Any]]:
    cache = Cache(place, device)
    floor = place.cache_bytes(cache.dtype.itemsize) / BANDWIDTH
    runs, calls, rows, first = {}, {}, [], {}
    for name in peers:
        row = dict(place=str(place), **place._asdict(), peer=name, floor=floor if device == "cuda" else None)
        try:
            made = turn(name, cache, device)
        except Exception as error:
            rows.append({**row, "error": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        if made is not None:
            runs[name], calls[name] = made
            seconds_of(made[0], device)
            first[name] = seconds_of(made[0], device)
            rows.append(row)
    times = interleaved(runs, first, device, patience)
    for row in rows:
        if row["peer"] in times:
            row.update(
                summary([t / calls[row["peer"]] for t in times[row["peer"]]]), calls=calls[row["peer"]]
            )
    return rows


def line(row: dict[str, Any]) -> str:
    made = f"{row['place']:32} {row['peer']:14}"
    if "error" in row:
        return f"{made} {row['error'][:80]}"
    made += f" {row['median'] * 1e6:10.1f} us"
    if row["floor"]:
        made += f" {row['floor'] * 1e6:10.1f} us {row['floor'] / row['median']:6.2f} of the floor's speed"
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench decode", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small place: shows that it works")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    parser.add_argument("--budget", type=float, default=420, metavar="SECONDS", help="when to stop (420)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe(device)
    todo, rows = list(places(device, options.quick)), []
    patience = Patience(fewest=5, most=30 if device == "cuda" else 200, seconds=0.4)
    print(f"{machine['device_name']}, torch {machine['torch']}, {len(todo)} places", flush=True)
    done = 0
    for place in todo:
        if time.perf_counter() - start > options.budget:
            break
        found = measured(place, device, patience)
        rows += found
        done += 1
        print("\n".join(map(line, found)), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    missing = [str(place) for place in todo[done:]]
    results = {
        "machine": machine,
        "rows": rows,
        "not_reached": missing,
        "seconds": time.perf_counter() - start,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{'quick-' if options.quick else ''}decode-{slug(machine)}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"written: {path}")
    if missing:
        print(f"not reached in the budget: {len(missing)}: {'; '.join(missing[:6])}")
    return 0
