"""What the GPU gate checks of decoding: attention_with_kvcache by Triton, on caches in one piece and in pages.

The truth is `posattn.attention_reference` in float64, entry by entry with the keys that count; the rule is that of
gate_numerics.py: an error of at most twice that of the same formula at the case's dtype, and ATOL. On a GPU every case
is also captured by a CUDA graph, with other lengths than those it then runs with, and has to give the same bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posattn

from .gate_numerics import ATOL, distance

# name -> heads, key heads, queries, lengths, and options
FORMS: dict[str, dict[str, Any]] = {
    "one query": dict(lengths=(4096, 1, 777)),
    "one query, pages of 16": dict(lengths=(4096, 0, 777), page=16),
    "one query, pages of 256": dict(lengths=(3000, 513), page=256),
    "GQA 8": dict(heads=16, key_heads=2, lengths=(2049, 4096)),
    "GQA 8, 4 queries, pages of 32": dict(heads=16, key_heads=2, queries=4, lengths=(3, 2500), page=32),
    "GQA 8, 16 queries": dict(heads=16, key_heads=2, queries=16, lengths=(1000, 2048)),
    "16 queries, window": dict(queries=16, lengths=(1500, 700), window=(100, None)),
    "window, pages of 16": dict(lengths=(4096, 40), window=(255, 0), page=16),
    "softcap, sinks": dict(heads=8, key_heads=4, lengths=(1999, 300), softcap=5.0, sinks=True),
    "padding": dict(queries=2, lengths=(1500, 1500), padding=True),
    "one long entry": dict(lengths=(60000,)),
}
BIASES = ("none", "TISA", "ALiBi", "FIRE", "DAPE", "DAPE V2")
SMALL = 64  # a rehearsal divides lengths by this


class Case(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    bias: str
    form: str
    deterministic: bool = False  # always is; the gate asks

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} D {self.head_dim}, {self.bias}, {self.form}"


def cases() -> Iterator[Case]:
    dtypes, dims = (torch.bfloat16, torch.float16, torch.float32), (128, 64, 256, 80, 40)
    n = 0
    for form, told in FORMS.items():
        for bias in BIASES:
            if bias.startswith("DAPE") and (told.get("softcap") or max(told["lengths"]) > 9000):
                continue
            dtype, d = dtypes[n % 3], dims[n % 5]
            n += 1
            yield Case(dtype, 128 if dtype == torch.float32 and d == 256 else d, bias, form)


def rehearsal() -> Iterator[Case]:
    yield Case(torch.float32, 16, "TISA", "one query, pages of 16")
    yield Case(torch.float16, 40, "ALiBi", "softcap, sinks")
    yield Case(torch.float32, 16, "FIRE", "padding")
    yield Case(torch.float32, 16, "DAPE V2", "one query")


def make_bias(name: str, heads: int) -> Any:
    makers = {
        "none": lambda: None, "TISA": lambda: posattn.TISA(heads), "ALiBi": lambda: posattn.ALiBi(heads),
        "FIRE": lambda: posattn.FIRE(heads), "DAPE": lambda: posattn.DAPE(heads, posattn.KERPLE(heads)),
        "DAPE V2": lambda: posattn.DAPE(heads, posattn.FIRE(heads, negative_slope=0.01), kernel_size=3),
    }  # fmt: skip
    return makers[name]()


class Problem:
    def __init__(self, case: Case, device: torch.device, rehearse: bool):
        torch.manual_seed(sum(str(case).encode()))
        told = dict(FORMS[case.form])
        self.lengths = [-(-n // (SMALL if rehearse else 1)) for n in told.pop("lengths")]
        heads, queries, page = told.pop("heads", 4), told.pop("queries", 1), told.pop("page", 0)
        key_heads, batch = told.pop("key_heads", heads), len(self.lengths)
        room = -(-(max(self.lengths) + 5) // (page or 16)) * (page or 16)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(case.dtype)

        self.query = normal(batch, heads, queries, case.head_dim)
        self.key, self.value = (normal(batch, key_heads, room, case.head_dim) for _ in "kv")
        self.bias = make_bias(case.bias, heads)
        self.bias = None if self.bias is None else self.bias.to(device)
        self.shared: dict[str, Any] = {"enable_gqa": heads != key_heads, "is_causal": True}
        self.mask = None
        if told.pop("padding", False):
            self.mask = torch.rand(batch, room, device=device) < 0.8
        if told.pop("sinks", False):
            self.shared["sinks"] = torch.randn(heads, device=device)
        self.shared.update(told)
        self.seqlens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.caches, self.table = (self.key, self.value), None
        if page:
            blocks = room // page
            order = torch.randperm(batch * blocks, device=device)
            self.table = order.view(batch, blocks).int()
            self.caches = tuple(self.paged(cache, order, page) for cache in self.caches)
            ends = (self.seqlens + page - 1) // page
            self.table[torch.arange(blocks, device=device) >= ends[:, None]] = -1

    def paged(self, cache: Tensor, order: Tensor, page: int) -> Tensor:
        batch, heads, room, dim = cache.shape
        blocks = cache.view(batch, heads, room // page, page, dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
        pages = torch.empty_like(blocks.contiguous())
        pages[order] = blocks
        return pages

    def attend(self) -> tuple[Tensor, Tensor]:
        made: Any = posattn.attention_with_kvcache(
            self.query, *self.caches, self.bias, cache_seqlens=self.seqlens, block_table=self.table,
            key_padding_mask=self.mask, return_lse=True, backend="triton", **self.shared,
        )  # fmt: skip
        return made

    def replayed(self) -> tuple[Tensor, Tensor]:
        """By a graph that was captured while every entry had one key."""
        right = self.seqlens.clone()
        self.seqlens.fill_(1)
        self.attend()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = self.attend()
        self.seqlens.copy_(right)
        graph.replay()
        torch.cuda.synchronize()
        return made

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        bias = None if self.bias is None else copy.deepcopy(self.bias)
        bias = bias.double() if bias is not None and dtype == torch.float64 else bias
        for b, n in enumerate(self.lengths):
            parts = self.query[b : b + 1], self.key[b : b + 1, :, :n], self.value[b : b + 1, :, :n]
            mask = None if self.mask is None else self.mask[b : b + 1, :n]
            if n == 0:
                outs.append(torch.zeros_like(parts[0], dtype=dtype))
                lses.append(torch.full(parts[0].shape[:3], -math.inf, dtype=dtype, device=self.query.device))
                continue
            made: Any = posattn.attention_reference(
                *(x.to(dtype) for x in parts), bias, key_padding_mask=mask, return_lse=True, **self.shared
            )
            outs.append(made[0])
            lses.append(made[1])
        return torch.cat(outs), torch.cat(lses)


@torch.no_grad()
def check(case: Case, device: torch.device, rehearse: bool = False) -> dict[str, Any]:
    """{"case", "errors": {output: [error, allowed]}, "failed": outputs that are too far off, or not repeatable}."""
    problem = Problem(case, device, rehearse)
    truth, plain, found = problem.reference(torch.float64), problem.reference(case.dtype), problem.attend()
    errors = {}
    for name, exact, formula, got in zip(("out", "lse"), truth, plain, found):
        size = max(1.0, exact.masked_fill(exact.isinf(), 0).abs().max().item())
        # A DAPE's network is of the dtype; what else makes a logit is fp32, but scores of fp32 are made of TF32 parts.
        atol = ATOL[case.dtype] if name == "out" or case.bias.startswith("DAPE") else 10 * ATOL[torch.float32]
        errors[name] = [distance(got, exact), 2 * distance(formula, exact) + atol * size]
    failed = [name for name, (error, allowed) in errors.items() if not error <= allowed]
    again = problem.replayed() if device.type == "cuda" else problem.attend()
    names = zip(("out", "lse"), found, again)
    failed += [f"{name} differs when repeated" for name, one, two in names if not torch.equal(one, two)]
    return {"case": str(case), "errors": errors, "failed": failed}
