"""Calls of attention_with_kvcache: a cache, lengths of its own for each entry, and what the oracle says to each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from bias_cases import CASES as BIASES
from bias_cases import make
from dape_cases import base_matrix
from oracle_dape import dape_oracle

import posattn
from posattn import DAPE, FIRE, KERPLE

SPARE = 2  # pages that nobody has


def call(backend, *args, **kwargs):
    """Where the backend runs; the results come back to the CPU."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"

    def moved(value):
        return value.to(device) if isinstance(value, (torch.Tensor, torch.nn.Module)) else value

    with torch.no_grad():
        args, kwargs = map(moved, args), {name: moved(value) for name, value in kwargs.items()}
        out, lse = posattn.attention_with_kvcache(*args, **kwargs, backend=backend, return_lse=True)
    return out.cpu(), lse.cpu()


class Case(NamedTuple):
    """lengths: one an entry; page: 0 for a cache in one piece; mask: keys that count, of entry 0 none."""

    bias: str = ""
    heads: int = 2
    key_heads: int = 2
    queries: int = 1
    room: int = 40
    lengths: tuple[int, ...] | None = (40, 23)
    dim: int = 8
    value_dim: int = 8
    page: int = 0
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sinks: bool = False
    mask: bool = False
    scale: float | None = None

    def module(self) -> Any:
        name, _, kernel_size = self.bias.partition(" ")
        if name == "":
            return None
        if name == "fire":
            return FIRE(self.heads, hidden=5, init_length=7)
        if name == "dape":
            bases = dict(none=lambda h: None, kerple=KERPLE, fire=lambda h: FIRE(h, 5, init_length=9))
            base, size, published = kernel_size.split(" ")
            module = DAPE(self.heads, bases[base](self.heads), 9, int(size), published != "published")
            with torch.no_grad():
                module.first_weight.mul_(1.5)
                module.second_weight.mul_(1.5)
                if isinstance(module.base, KERPLE):
                    module.base.p.clamp_(0.05, 1.9)
                    module.base.a.clamp_(0.05, 0.9)
            return module
        return make(name, self.heads)

    def make(self, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        """query, key, value in one piece and the bias; keywords of attention_with_kvcache but for the pages."""
        batch = 2 if self.lengths is None else len(self.lengths)
        query = torch.randn(batch, self.heads, self.queries, self.dim, dtype=dtype)
        key = torch.randn(batch, self.key_heads, self.room, self.dim, dtype=dtype)
        value = torch.randn(batch, self.key_heads, self.room, self.value_dim, dtype=dtype)
        bias = self.module()
        keywords: dict[str, Any] = dict(is_causal=self.causal, window=self.window, scale=self.scale)
        keywords["softcap"] = self.softcap
        if self.lengths is not None:
            keywords["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32)
        if self.heads != self.key_heads:
            keywords["enable_gqa"] = True
        if self.sinks:
            keywords["sinks"] = torch.randn(self.heads)
        if self.mask:
            keywords["key_padding_mask"] = torch.rand(batch, self.room) < 0.7
            keywords["key_padding_mask"][0] = False
        return [
            query,
            key,
            value,
            bias if bias is None or dtype == torch.float32 else bias.to(dtype),
        ], keywords

    def paged(self, tensors: list[Any]) -> tuple[list[Any], torch.Tensor]:
        """The same cache in shuffled pages, NaN where nothing is, and -1 in the table beyond an entry's keys."""
        query, key, value, bias = tensors
        count = -(-self.room // self.page)
        order = torch.randperm(len(query) * count + SPARE)
        table = order[: len(query) * count].view(len(query), count).int()
        caches = []
        for cache in (key, value):
            pages = cache.new_full((len(order), self.page, cache.shape[1], cache.shape[3]), math.nan)
            for b, row in enumerate(table.tolist()):
                for n, page in enumerate(row):
                    part = cache[b, :, n * self.page : (n + 1) * self.page].transpose(0, 1)
                    pages[page, : len(part)] = part
            caches.append(pages)
        for b, length in enumerate(self.lengths or ()):
            table[b, -(-length // self.page) :] = -1
            if self.window is not None and self.window[0] is not None:  # what has left the window may be gone
                table[b, : max(0, length - self.queries - self.window[0]) // self.page] = -7
        return [query, *caches, bias], table

    def oracle(self, tensors: list[Any], keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Entry by entry, with the keys that count."""
        query, key, value, bias = tensors
        outs, lses = [], []
        left, right = (-1 if side is None else side for side in self.window or (None, None))
        for b, n in enumerate(self.lengths or (self.room,) * len(query)):
            parts = query[b : b + 1], key[b : b + 1, :, :n], value[b : b + 1, :, :n]
            mask = keywords.get("key_padding_mask")
            at = dict(left=left, right=0 if self.causal else right, shift=self.queries - n, scale=self.scale)
            at["key_padding_mask"] = None if mask is None else mask[b : b + 1, :n]
            place = self.queries, n, self.queries - n
            if n == 0:
                out = torch.zeros(1, self.heads, self.queries, self.value_dim, dtype=torch.float64)
                lse = torch.full((1, self.heads, self.queries), -math.inf, dtype=torch.float64)
            elif isinstance(bias, DAPE):
                layers = bias.first_weight, bias.first_bias, bias.second_weight, bias.second_bias
                base = base_matrix(bias.base, *place, n - self.queries)
                out, lse = dape_oracle(*parts, *layers, base, published=not bias.prefix_consistent, **at)
            else:
                if isinstance(bias, FIRE):
                    dense = base_matrix(bias, *place, n - self.queries)
                else:
                    dense = None if bias is None else BIASES[self.bias][1](bias, *place)
                out, lse = oracle.attention_oracle(*parts, dense, softcap=self.softcap, **at)
            if self.sinks:
                sinks = keywords["sinks"].double()[:, None]
                out = out * torch.sigmoid(lse - sinks)[..., None]
                lse = torch.logaddexp(lse, sinks.expand_as(lse))
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs).detach(), torch.cat(lses).detach()


CASES = {name: Case(name) for name in BIASES}
CASES |= {f"{name}, queries": Case(name, queries=3) for name in ("tisa", "alibi", "t5", "kerple-log", "fire")}
CASES |= {
    "none": Case(),
    "fire": Case("fire"),
    "fire, pages": Case("fire", page=16, queries=2),
    "one key": Case("tisa", room=1, lengths=(1, 1)),
    "nothing in one entry": Case("tisa", lengths=(0, 40), sinks=True),
    "nothing at all": Case("", lengths=(0,)),
    "fewer keys than queries": Case("kerple-log", queries=5, lengths=(2, 5)),
    "no lengths": Case("t5", queries=2, lengths=None),
    "odd lengths": Case("tisa", room=67, lengths=(67, 33, 1)),
    "GQA 4": Case("tisa", heads=4, key_heads=1),
    "GQA 8, 2 queries": Case("alibi", heads=8, key_heads=1, queries=2),
    "GQA 4, 5 queries, pages": Case("t5", heads=8, key_heads=2, queries=5, page=16, lengths=(40,)),
    "GQA 8, 16 queries": Case("kerple-log", heads=8, key_heads=1, queries=16, room=24, lengths=(20,)),
    "16 queries": Case("tisa", queries=16, lengths=(40,)),
    "wide values": Case("tisa", dim=6, value_dim=20),
    "narrow values": Case("", dim=20, value_dim=6),
    "window": Case("tisa", window=(9, None), queries=2),
    "window of nothing but itself": Case("", window=(0, None), queries=2, sinks=True),
    "window, pages": Case("tisa", window=(5, 0), queries=2, page=16),
    "not causal": Case("tisa", causal=False, queries=4),
    "not causal, window": Case("alibi", causal=False, queries=4, window=(7, 1)),
    "pages": Case("tisa", page=16),
    "pages of 32": Case("", page=32, room=70, lengths=(70, 31), queries=2),
    "softcap": Case("tisa", softcap=2.0),
    "sinks": Case("", sinks=True, heads=4, queries=2),
    "padding": Case("tisa", mask=True, queries=2),
    "padding, sinks": Case("", mask=True, sinks=True, lengths=None),
    "scale": Case("alibi", scale=-0.3),
    "DAPE": Case("dape kerple 1 -"),
    "DAPE, no base, GQA, sinks": Case("dape none 1 -", heads=4, key_heads=2, queries=2, sinks=True),
    "DAPE, FIRE": Case("dape fire 1 -", queries=2),
    "DAPE V2": Case("dape kerple 3 -", queries=2, mask=True, room=20, lengths=(20, 18)),
    "DAPE V2, FIRE, pages, window": Case("dape fire 3 -", page=16, window=(9, None)),
    "DAPE published": Case("dape kerple 3 published", queries=2, lengths=(23,)),
    "DAPE published, padding": Case("dape none 3 published", mask=True, lengths=(40,)),
}

# The interpreter is slow: it gets each form of a bias once (a kernel knows tables, slopes and strips).
ALIKE = {*BIASES, "alibi, queries", "t5, queries", "kerple-log, queries"} - {
    "tisa",
    "alibi",
    "alibi-one-sided",
}
LIMIT = 3e-5 if torch.cuda.is_available() else 1e-5
EVERY = [
    pytest.param(
        backend, dtype, limit, name, id=f"{name}-{backend}-{dtype}".replace("torch.", ""), marks=marks
    )
    for backend, dtype, limit, marks in (
        ("blockwise", torch.float32, 1e-5, ()),
        ("blockwise", torch.float64, 1e-10, ()),
        ("triton", torch.float32, LIMIT, pytest.mark.triton),
    )
    for name in CASES
    if backend == "blockwise" or torch.cuda.is_available() or name not in ALIKE
]


# One token against a cache, for what is asked of a bias and not of a call.
Q, K = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 40, 8)


def right(bias, query=Q, key=K, **keywords):
    """What attention gives is what a bias says now."""
    got = posattn.attention(query, key, key, bias, **keywords)
    expected = posattn.attention_reference(query, key, key, bias, **keywords)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    return got.detach()
