"""The GPU gate's cases of linear attention and SPE; what they are held to is in gate_spe.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

FAR = 1_000_000  # where a state stands

# name -> lengths of queries and keys (equal if not said) of calls that go on from each other's state; what differs
VARIANTS: dict[str, dict[str, Any]] = {
    "causal": dict(queries=(1000,)),
    "odd": dict(queries=(257,)),
    "all keys": dict(queries=(509,), is_causal=False),
    "fewer queries": dict(queries=(197,), keys=(509,), is_causal=False),
    "more queries, padding": dict(queries=(509,), keys=(197,), is_causal=False, padding=True),
    "one query": dict(queries=(1,), keys=(777,), is_causal=False),
    "padding": dict(queries=(509,), padding=True),
    "in pieces": dict(queries=(300, 1, 208), keep=True),
    "in pieces, all keys, padding": dict(queries=(200, 309), is_causal=False, keep=True, padding=True),
    "after a state": dict(queries=(257,), start=FAR, keep=True),
    "tokens after a state": dict(queries=(40, 1, 1), start=FAR - 40, keep=True),
    "one token after a state": dict(queries=(1,), start=FAR, keep=True),
    "value dim": dict(queries=(333,), value_dim=32),
    "heads last": dict(queries=(509,), heads_last=True),
    "one token after 1,000,000": dict(queries=(FAR, 1), keep=True, gradient=False),
    "noise alone": dict(queries=(257,)),  # of a seed, on the GPU and on the CPU
}
RARE = ("one token after 1,000,000", "noise alone")


class Case(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    heads: int
    spe: str = "sine"  # exact: a sine without noise; conv: noise that is stored; seed: noise that is not; none
    feature_map: str = "elu"
    variant: str = "causal"
    realizations: int = 64
    rows: int = 10  # sines or taps
    gated: bool = True
    length: int | None = None  # instead of the first of the variant's; then with 1 batch

    def __str__(self) -> str:
        kind = {"sine": "{} sines", "exact": "{} sines, exact", "conv": "{} taps", "seed": "{} taps of a seed"}
        name = kind.get(self.spe, "no SPE").format(self.rows)
        name += f" R {self.realizations}" if self.spe not in ("exact", "none") else ""
        name += " gated" if self.gated and self.spe != "none" else ""
        length = f", N {self.length}" if self.length else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} D {self.head_dim} H {self.heads}, {name}, {self.feature_map}, {self.variant}{length}"


def cases() -> Iterator[Case]:
    """Most important first: each kernel at the usual sizes, states, dtypes, sizes, edges, long ones; then all mixed."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield Case(bf16, 64, 16)
    yield Case(fp32, 64, 16, variant="odd")
    yield Case(fp16, 64, 16, variant="odd")
    yield Case(bf16, 64, 8, "seed", rows=128, variant="odd")
    yield Case(fp32, 64, 4, "seed", variant="noise alone", rows=16)
    yield Case(bf16, 64, 16, "none")
    yield Case(bf16, 64, 16, variant="in pieces")
    yield Case(bf16, 64, 16, variant="one token after a state")
    yield Case(fp32, 64, 16, variant="tokens after a state")
    yield Case(bf16, 64, 16, feature_map="relu", realizations=128)
    yield Case(bf16, 64, 16, feature_map="favor")
    yield Case(bf16, 64, 16, length=8192)
    yield Case(bf16, 128, 16, realizations=256, rows=16, variant="odd")
    yield Case(fp32, 128, 16, realizations=128, rows=16, variant="odd")
    yield Case(fp16, 40, 3, rows=5, gated=False, variant="padding")
    yield Case(bf16, 40, 1, rows=1, feature_map="relu", variant="more queries, padding")
    yield Case(bf16, 64, 4, "exact", "favor", "odd", rows=5)
    yield Case(bf16, 64, 4, variant="one token after 1,000,000")
    yield Case(fp32, 64, 4, "seed", variant="one token after 1,000,000", rows=16)
    yield Case(fp32, 64, 16, feature_map="relu", variant="fewer queries")
    yield Case(fp16, 128, 8, "conv", rows=16, variant="all keys")
    yield Case(fp32, 64, 8, "seed", "relu", "after a state", rows=128)
    yield Case(fp16, 64, 16, "none", "relu", "after a state")
    yield Case(bf16, 64, 8, "seed", "elu", "noise alone", 256, 128)
    yield Case(fp32, 64, 16, length=8192)
    yield Case(bf16, 64, 8, "seed", rows=128, length=8192)
    yield Case(bf16, 64, 16, realizations=128, variant="all keys", length=8192)
    yield Case(fp16, 64, 16, "none", length=8192)
    pick = random.Random(0).choice
    for _ in range(80):
        spe = pick(("sine",) * 6 + ("seed",) * 3 + ("conv", "none", "exact"))
        rows = pick((1, 5, 10, 16) if spe == "sine" else (1, 7, 16, 128))
        case = Case(
            pick((bf16, fp16, fp32)), pick((40, 64, 128)), pick((1, 3, 8, 12, 16)), spe, pick(("elu", "relu", "favor")),
            pick(list(VARIANTS)[: -len(RARE)]), pick((64, 128, 256)), rows, pick((True, True, False)),
        )  # fmt: skip
        if spe == "exact":  # whose dense features are (2 K + 1) D wide
            case = case._replace(head_dim=min(64, case.head_dim), heads=min(4, case.heads), rows=pick((1, 2, 5)))
            case = case._replace(feature_map="favor")
        if case.dtype == fp32 or case.feature_map == "favor":  # whose features are made in fp32
            case = case._replace(realizations=min(128, case.realizations))
        yield case


def rehearsal() -> Iterator[Case]:
    """For the interpreter, which has no products of bf16."""
    fp16, fp32 = torch.float16, torch.float32
    yield Case(fp32, 8, 2, "sine", "elu", "in pieces", 12, 2)
    yield Case(fp16, 8, 2, "sine", "relu", "odd", 16, 3, False)
    yield Case(fp32, 6, 1, "seed", "relu", "padding", 8, 5)
    yield Case(fp32, 4, 1, "exact", "favor", "fewer queries", rows=2)
    yield Case(fp16, 8, 2, "none", "elu", "after a state")
    yield Case(fp32, 8, 1, "seed", "elu", "one token after 1,000,000", 8, 3, length=40)
    yield Case(fp32, 6, 1, "seed", "elu", "noise alone", 12, 3)
