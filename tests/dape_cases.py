"""Calls of attention with a DAPE, and what the oracle says to each."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from calls import blockwise, triton
from oracle_dape import dape_oracle

from posattn import DAPE, FIRE, KERPLE, TISA, ALiBi, Bias, T5Bias

# (attention by a backend, dtype, tolerance)
CALLS = [
    pytest.param(blockwise, torch.float64, 1e-10, id="blockwise-fp64"),
    pytest.param(blockwise, torch.float32, 3e-5, id="blockwise-fp32"),
]

# On a GPU everything; the interpreter is slow and gets what INTERPRETED names.
HERE = 3e-5 if torch.cuda.is_available() else 1e-5
TRITON = pytest.param(triton, torch.float32, HERE, id="triton-fp32", marks=pytest.mark.triton)
GPU = pytest.param(triton, torch.float32, 3e-5, id="gpu-fp32", marks=[pytest.mark.triton, pytest.mark.gpu])

BASES = {
    "none": lambda heads: None,
    "alibi": ALiBi,
    "alibi-learnable": functools.partial(ALiBi, learnable=True),
    "kerple": KERPLE,
    "t5": T5Bias,
    "tisa": TISA,
    "fire": lambda heads: FIRE(heads, hidden=5, init_length=11, negative_slope=0.01),
    "fire-relu": lambda heads: FIRE(heads, hidden=7, init_length=3),
}


def base_matrix(
    base: Bias | None, queries: int, keys: int, shift: int, query_start: int
) -> torch.Tensor | None:
    """The oracle's matrix, (H, Lq, Lk), differentiable by the base's parameters."""
    at = queries, keys, shift
    if isinstance(base, ALiBi):
        return oracle.alibi(base.slope, *at)
    if isinstance(base, KERPLE):
        return oracle.kerple(base.p, base.a, *at)
    if isinstance(base, T5Bias):
        return oracle.t5(base.weight, *at)
    if isinstance(base, TISA):
        return oracle.tisa(base.amplitudes, base.sharpness, base.offsets, *at)
    if isinstance(base, FIRE):
        first = base.first_layer.weight[:, 0], base.first_layer.bias
        last = base.last_layer.weight, base.last_layer.bias
        i, j = query_start + torch.arange(queries), query_start + shift + torch.arange(keys)
        options = dict(init_length=base.init_length, negative_slope=base.negative_slope)
        return oracle.fire(base.c, base.multiplier, first, last, (i, j), **options)
    return None


class Case(NamedTuple):
    """One call; start = query_start - (its default), mask: none, gaps, right, blind (whole entries)."""

    base: str = "kerple"
    heads: int = 3
    key_heads: int | None = None
    queries: int = 21
    keys: int = 21
    dim: int = 6
    value_dim: int = 6
    hidden: int = 9
    kernel_size: int = 1
    published: bool = False
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    mask: str = "none"
    start: int = 0
    scale: float | None = None
    batch: int = 2

    def module(self, dtype: torch.dtype) -> DAPE:
        base = BASES[self.base](self.heads)
        module = DAPE(self.heads, base, self.hidden, self.kernel_size, not self.published)
        with torch.no_grad():  # a network that counts
            for weight in (module.first_weight, module.second_weight):
                weight.mul_(1.5)
            if isinstance(base, KERPLE):
                base.p.clamp_(0.05, 1.9)
                base.a.clamp_(0.05, 0.9)
        return module.to(dtype)

    def make(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], DAPE, dict[str, Any]]:
        """query, key, value; the module; keywords of attention."""
        key_heads = self.key_heads or self.heads
        query = torch.randn(self.batch, self.heads, self.queries, self.dim, dtype=dtype, requires_grad=True)
        key = torch.randn(self.batch, key_heads, self.keys, self.dim, dtype=dtype, requires_grad=True)
        value = torch.randn(self.batch, key_heads, self.keys, self.value_dim, dtype=dtype, requires_grad=True)
        number = torch.arange(self.keys)[None]
        mask = {
            "none": None,
            "gaps": torch.rand(self.batch, self.keys) < 0.6,
            "right": number < 1 + torch.randint(0, max(1, self.keys), (self.batch, 1)),
            "blind": (torch.arange(self.batch)[:, None] > 0) & (number % 5 != 1),
        }[self.mask]
        keywords: dict[str, Any] = dict(is_causal=self.causal, window=self.window, scale=self.scale)
        if key_heads != self.heads:
            keywords["enable_gqa"] = True
        if mask is not None:
            keywords["key_padding_mask"] = mask
        if self.start:
            keywords["query_start"] = self.query_start
        return [query, key, value], self.module(dtype), keywords

    @property
    def query_start(self) -> int:
        return self.keys - self.queries + self.start

    def oracle(self, tensors: list[torch.Tensor], module: DAPE, keywords: dict[str, Any]):
        left, right = (-1 if side is None else side for side in self.window or (None, None))
        base = base_matrix(module.base, self.queries, self.keys, -self.query_start, self.query_start)
        layers = module.first_weight, module.first_bias, module.second_weight, module.second_bias
        return dape_oracle(
            *tensors,
            *layers,
            base,
            scale=self.scale,
            left=left,
            right=0 if self.causal else right,
            shift=-self.query_start,
            key_padding_mask=keywords.get("key_padding_mask"),
            published=self.published,
        )


CASES = {f"{heads} heads": Case(heads=heads) for heads in (1, 3, 8, 12, 16)}
CASES |= {
    f"{base}, {kind}": Case(base, causal=kind == "causal") for base in BASES for kind in ("causal", "full")
}
CASES |= {
    "lengths 1": Case(queries=1, keys=1),
    "lengths 63, 65": Case(heads=2, queries=63, keys=65),
    "lengths 65, 63": Case("fire", heads=2, queries=65, keys=63),
    "fewer queries": Case("tisa", queries=7, keys=30),
    "more queries": Case("alibi", queries=30, keys=7),
    "all queries before the keys": Case(start=-40),
    "starts elsewhere": Case("fire", start=-5),
    "starts later": Case("fire", start=9, causal=False),
    "window": Case(window=(4, None)),
    "window both ways": Case("tisa", window=(3, 2), causal=False),
    "window, FIRE": Case("fire", window=(5, 0)),
    "gaps": Case(mask="gaps", heads=4),
    "gaps, full": Case("none", mask="gaps", causal=False),
    "right padding, FIRE": Case("fire", mask="right", causal=False),
    "blind rows": Case("tisa", mask="blind"),
    "grouped": Case(heads=6, key_heads=2),
    "one key head": Case("fire", heads=4, key_heads=1, mask="gaps"),
    "narrow values": Case(value_dim=3),
    "wide values": Case("none", dim=5, value_dim=12),
    "scale": Case(scale=-0.3),
    "hidden 1": Case(hidden=1),
    "hidden 40": Case("alibi", hidden=40),
}
V2 = {
    f"V2, {k} taps, {base}": Case(base, kernel_size=k)
    for k in (3, 5, 7)
    for base in ("none", "kerple", "fire")
}
V2 |= {f"published, {k} taps, {base}": Case(base, kernel_size=k, published=True)
       for k in (3, 5, 7) for base in ("none", "kerple", "fire")}  # fmt: skip
V2 |= {
    "published, 1 tap": Case(published=True),
    "V2, full": Case(kernel_size=3, causal=False),
    "V2, window": Case("tisa", kernel_size=5, window=(3, 2), causal=False),
    "V2, window shorter than the kernel": Case("fire", kernel_size=7, window=(1, None)),
    "V2, gaps": Case(kernel_size=3, mask="gaps", heads=4, key_heads=2),
    "V2, right padding, full": Case("fire", kernel_size=5, mask="right", causal=False),
    "V2, blind rows": Case("none", kernel_size=3, mask="blind"),
    "V2, fewer queries": Case("fire", kernel_size=3, queries=7, keys=30),
    "V2, more queries": Case(kernel_size=5, queries=30, keys=7),
    "V2, starts elsewhere": Case("fire", kernel_size=3, start=-5),
    "V2, fewer keys than taps": Case(kernel_size=7, queries=4, keys=2),
    "V2, 65 queries": Case("fire", heads=2, kernel_size=3, queries=65, keys=65),
    "published, gaps": Case(kernel_size=3, published=True, mask="gaps", heads=4, key_heads=2),
    "published, blind rows": Case("fire", kernel_size=5, published=True, mask="blind"),
    "published, fewer queries": Case(kernel_size=5, published=True, queries=7, keys=30),
    "published, more queries": Case("fire", kernel_size=3, published=True, queries=30, keys=7),
    "published, starts elsewhere": Case(kernel_size=7, published=True, start=-5),
    "published, ends before the keys": Case(
        "none", kernel_size=7, published=True, queries=9, keys=30, start=-4
    ),
}
CASES |= V2

# What cells of the kernels make up is in test_mix_kernels.py: V2 with FIRE and a window, too.
INTERPRETED = [
    "3 heads",
    "12 heads",
    "none, full",
    "fire-relu, causal",
    "lengths 63, 65",
    "more queries",
    "all queries before the keys",
    "window both ways",
    "blind rows",
    "grouped",
    "V2, fewer keys than taps",
    "published, 1 tap",
]
