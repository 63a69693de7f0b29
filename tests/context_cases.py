"""The cases of context parallel, and each of them by one process and by the processes of a group."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import posattn
from posattn.distributed import context_parallel_attention, shard

WORLD, HEADS = 4, 4
BIASES = {
    "none": lambda: None,
    "tisa": lambda: posattn.TISA(HEADS),
    "alibi": lambda: posattn.ALiBi(HEADS),
    "alibi-one-sided": lambda: posattn.ALiBi(HEADS, symmetric=False),
    "alibi-learnable": lambda: posattn.ALiBi(HEADS, learnable=True),
    "t5": lambda: posattn.T5Bias(HEADS, num_buckets=12, max_distance=30),
    "kerple": lambda: posattn.KERPLE(HEADS),
    "sandwich": lambda: posattn.Sandwich(HEADS, embedding_dim=8),
    "relative-table": lambda: posattn.RelativeTable(HEADS, max_distance=5),
    "fire": lambda: posattn.FIRE(HEADS, hidden=8, init_length=6),
    "dape": lambda: posattn.DAPE(HEADS, posattn.KERPLE(HEADS), hidden=6),
    "dape-alone": lambda: posattn.DAPE(HEADS, hidden=6),
    "dape-fire": lambda: posattn.DAPE(HEADS, posattn.FIRE(HEADS, hidden=8, negative_slope=0.01), hidden=6),
}


class Case(NamedTuple):
    bias: str = "tisa"
    length: int = 37
    order: str = "zigzag"
    causal: bool = True
    key_heads: int = HEADS
    value_dim: int = 6
    masked: bool = False
    sinks: bool = False
    relative: int = 0
    dtype: torch.dtype = torch.float64
    options: tuple[tuple[str, Any], ...] = ()  # keywords of both calls
    bias_gradient: str = "sum"
    ranks: tuple[int, ...] = tuple(range(WORLD))
    batch: int = 2
    backend: str | None = None  # of the processes together


def cases() -> dict[str, Case]:
    made = {
        f"{bias}, {order}, {'causal' if causal else 'full'}": Case(bias, order=order, causal=causal)
        for bias in (*BIASES, "table")
        for order, causal in (("zigzag", True), ("contiguous", False))
    }
    made |= {
        f"{bias}, {n} positions": Case(bias, length=n) for bias in ("table", "fire", "dape") for n in (5, 2)
    }
    made |= {f"{n} positions": Case("kerple", length=n, order="contiguous") for n in (0, 1, 3, 8, 40)}
    made |= {
        "zigzag, full": Case("relative-table", causal=False),
        "contiguous, causal": Case("t5", order="contiguous"),
        "window": Case(options=(("window", (6, None)),)),
        "window, contiguous": Case("fire", order="contiguous", options=(("window", (6, None)),)),
        "window both ways": Case("kerple", order="contiguous", causal=False, options=(("window", (3, 2)),)),
        "window of the past": Case(order="contiguous", options=(("window", (0, None)),)),
        "dape, window": Case("dape-fire", causal=False, options=(("window", (7, 4)),)),
        "softcap": Case("kerple", options=(("softcap", 1.5), ("scale", -0.4))),
        "padding": Case(masked=True),
        "padding, full": Case("fire", masked=True, causal=False, order="contiguous"),
        "dape, padding": Case("dape", masked=True),
        "grouped": Case("alibi-learnable", key_heads=2),
        "dape, grouped": Case("dape", key_heads=1, causal=False),
        "sinks": Case("t5", sinks=True, masked=True),
        "dape, sinks": Case("dape", sinks=True, masked=True),
        "dropout": Case("kerple", options=(("dropout_p", 0.3),)),
        "dropout, contiguous": Case(options=(("dropout_p", 0.3),), order="contiguous", causal=False),
        "relative logits": Case("none", relative=7, key_heads=2),
        "local gradients": Case("tisa", sinks=True, bias_gradient="local"),
        "dape, local gradients": Case("dape", bias_gradient="local", causal=False),
        "float32": Case("tisa", dtype=torch.float32, length=61),
        "dape, float32": Case("dape-fire", dtype=torch.float32, length=61, sinks=True),
        "bfloat16": Case("kerple", dtype=torch.bfloat16, length=61),
        "dape, bfloat16": Case("dape", dtype=torch.bfloat16, length=61),
        "two of four": Case("tisa", ranks=(1, 3), sinks=True),
        "three of four, full": Case("dape", ranks=(0, 2, 3), causal=False),
    }
    return made


CASES = cases()
# By two processes and against the other backend: Triton's interpreter takes its time.
TRITON = dict(backend="triton", batch=1, length=13, ranks=(0, 2))
INTERPRETED = {
    "triton": Case("kerple", dtype=torch.float32, key_heads=2, sinks=True, **TRITON),
    "triton, fire": Case(
        "fire", dtype=torch.float32, order="contiguous", causal=False, masked=True, **TRITON
    ),
    "triton, dape": Case("dape", dtype=torch.float16, order="contiguous", masked=True, **TRITON),
}
CASES |= INTERPRETED
TOLERANCE = {torch.float64: 1e-10, torch.float16: 5e-3, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@functools.cache
def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    return dist.new_group(ranks)


class Run:
    """The whole problem, the same on every process; and its shards here."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.length)
        n, dtype = case.length, case.dtype
        shapes = (HEADS, n, 8), (case.key_heads, n, 8), (case.key_heads, n, case.value_dim)
        self.streams = [torch.randn(case.batch, *shape, dtype=dtype).requires_grad_() for shape in shapes]
        width = max(2 * n - 1, 0)
        double = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.randn(HEADS, width, dtype=double).requires_grad_()
        self.bias = table if case.bias == "table" else BIASES[case.bias]()
        if isinstance(self.bias, torch.nn.Module):
            self.bias.to(double)
        self.sinks = torch.randn(HEADS, dtype=double).requires_grad_() if case.sinks else None
        self.relative = (
            torch.randn(case.batch, HEADS, n, case.relative, dtype=double).requires_grad_()
            if case.relative
            else None
        )
        mask = torch.rand(case.batch, n) < 0.7
        mask[0, : n // 3] = False  # under a causal mask, rows that see nothing
        self.mask = mask if case.masked else None
        self.weights = (
            torch.randn(case.batch, HEADS, n, case.value_dim, dtype=dtype),
            torch.randn(case.batch, HEADS, n, dtype=double),
        )

    def shared(self) -> list[Tensor]:
        """What every process has whole."""
        own = (
            [self.bias]
            if isinstance(self.bias, Tensor)
            else list(self.bias.parameters())
            if self.bias
            else []
        )
        return own if self.sinks is None else [*own, self.sinks]

    def one(self) -> tuple[list[Tensor], list[Tensor]]:
        """(out, lse) and the gradients of streams, relative logits and what is shared, by one process."""
        relative = [] if self.relative is None else [self.relative]
        keywords: dict[str, Any] = dict(
            is_causal=self.case.causal, enable_gqa=True, **dict(self.case.options)
        )
        torch.manual_seed(1)
        outs = posattn.attention(
            *self.streams, self.bias, key_padding_mask=self.mask, sinks=self.sinks, relative_logits=self.relative,
            return_lse=True, **keywords,
        )  # fmt: skip
        inputs = [*self.streams, *relative, *self.shared()]
        return list(outs), gradients(outs, self.weights, inputs)

    def here(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same from the shards."""
        case, group = self.case, group_of(self.case.ranks)
        cut = functools.partial(shard, dim=2, group=group, order=case.order)
        streams = [cut(t).detach().requires_grad_() for t in self.streams]
        relative = [] if self.relative is None else [cut(self.relative).detach().requires_grad_()]
        keywords: dict[str, Any] = dict(
            is_causal=case.causal, enable_gqa=True, backend=case.backend, **dict(case.options)
        )
        torch.manual_seed(1)
        outs = context_parallel_attention(
            *streams, self.bias, group=group, order=case.order, length=case.length,
            key_padding_mask=None if self.mask is None else shard(self.mask, 1, group, case.order),
            sinks=self.sinks, relative_logits=relative[0] if relative else None, return_lse=True,
            bias_gradient=case.bias_gradient, **keywords,
        )  # fmt: skip
        shared = self.shared()
        found = gradients(outs, [cut(w) for w in self.weights], [*streams, *relative, *shared])
        if case.bias_gradient == "local":
            for gradient in found[len(found) - len(shared) :]:
                dist.all_reduce(gradient, group=group)
        return list(outs), found


def gradients(outs: Any, weights: Any, inputs: list[Tensor]) -> list[Tensor]:
    loss = sum((torch.where(o.isfinite(), o, 0.0) * w).sum() for o, w in zip(outs, weights))
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True))
