"""What the GPU gate checks of DAPE and FIRE: attention and all its gradients against float64, in the plainest PyTorch.

The rule is that of gate_numerics.py: error(posattn) <= 2 error(plain) + atol max |x64|, with both from mixing_truth.py.
Without a gradient of lse that of the network's last bias (of FIRE's, alone) is 0, for a softmax ignores constants: its
error is held against the size of the other weights' gradients. The logits of a network are stored between kernels, of
16-bit tensors in fp16, which lse shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posattn

from .gate_numerics import ATOL, SMALL, distance
from .mixing_truth import NETWORK, expected, gradients

# ------------------------------------------------------------------------------------------------------ cases

VARIANTS: dict[str, dict[str, Any]] = {
    "causal": dict(queries=512, keys=512, is_causal=True),
    "odd": dict(queries=509, keys=509),
    "gradient of lse": dict(queries=300, keys=509, lse_gradient=True),
    "padding": dict(queries=509, keys=509, padding=True),
    "window": dict(queries=509, keys=509, window=(37, 70)),
    "last queries, causal": dict(queries=197, keys=509, is_causal=True),
    "grouped, causal": dict(queries=512, keys=512, grouped=True, is_causal=True),
    "more queries than keys, causal": dict(queries=509, keys=197, is_causal=True, padding=True),
    "causal window": dict(queries=640, keys=640, is_causal=True, window=(130, None)),
    "heads last, causal, gradient of lse": dict(
        queries=509, keys=509, heads_last=True, is_causal=True, lse_gradient=True
    ),
    "value dim, causal": dict(queries=333, keys=333, value_dim=32, is_causal=True),
    "one query": dict(queries=1, keys=777),
    "far positions, causal": dict(queries=256, keys=320, query_start=300, is_causal=True),
}
FIRE_UNITS = 32


class Case(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    heads: int
    form: str  # DAPE; V2 and published, which are DAPE V2; FIRE, without a network
    base: str = "KERPLE"
    variant: str = "causal"
    hidden: int = 32
    taps: int = 1
    length: int | None = None  # instead of the variant's; then with 1 batch
    deterministic: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.form == "FIRE":
            kind = "FIRE alone" + (", deterministic" if self.deterministic else "")
        else:
            hidden = f", hidden {self.hidden}" if self.hidden != 32 else ""
            kind = self.form + (f" {self.taps} taps" if self.taps > 1 else "") + f" of {self.base}{hidden}"
        length = f", N {self.length}" if self.length else ""
        return f"{dtype} D {self.head_dim} H {self.heads}, {kind}, {self.variant}{length}"


    @property
    def mixed(self) -> tuple[int, ...]:
        """What a pair of positions keeps: heads, hidden units, FIRE's; nothing without a DAPE."""
        return () if self.form == "FIRE" else (self.heads, self.hidden, *([FIRE_UNITS] if self.base == "FIRE" else []))


def cases() -> Iterator[Case]:
    """Most important first: each kernel at the usual sizes, several cells, dtypes, sizes, edges; then all mixed."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield Case(bf16, 64, 16, "DAPE", length=2048)
    yield Case(bf16, 64, 12, "V2", taps=3)
    yield Case(bf16, 64, 12, "DAPE", "FIRE")
    yield Case(bf16, 64, 12, "published", taps=3)
    yield Case(bf16, 64, 12, "FIRE", "FIRE")
    yield Case(bf16, 64, 16, "DAPE", length=4096)
    yield Case(fp16, 64, 16, "DAPE")
    yield Case(fp32, 64, 16, "DAPE")
    yield Case(bf16, 128, 32, "DAPE")
    yield Case(bf16, 64, 16, "V2", taps=3, length=2048)
    yield Case(bf16, 64, 16, "DAPE", variant="heads last, causal, gradient of lse")
    yield Case(bf16, 64, 16, "DAPE", variant="padding")
    yield Case(bf16, 64, 16, "DAPE", variant="grouped, causal")
    yield Case(bf16, 64, 12, "DAPE", "ALiBi", length=2048)
    yield Case(bf16, 64, 8, "DAPE", "none", "odd")
    yield Case(bf16, 128, 16, "FIRE", "FIRE", "odd", length=4096)
    yield Case(bf16, 64, 16, "published", "FIRE", taps=3, length=2048)
    yield Case(fp32, 64, 12, "V2", variant="odd", taps=3)
    yield Case(fp32, 64, 12, "DAPE", "FIRE", "last queries, causal")
    yield Case(fp32, 64, 12, "FIRE", "FIRE", deterministic=True)
    yield Case(fp16, 64, 12, "V2", "FIRE", taps=5)
    yield Case(bf16, 64, 64, "DAPE", hidden=128)
    yield Case(bf16, 256, 16, "DAPE")
    yield Case(fp32, 128, 16, "DAPE")
    yield Case(bf16, 40, 3, "DAPE", "none", "window", hidden=8)
    yield Case(fp16, 128, 1, "DAPE", hidden=64)
    yield Case(bf16, 64, 32, "V2", hidden=64, taps=3)
    yield Case(bf16, 64, 16, "DAPE", "FIRE", "more queries than keys, causal")
    yield Case(bf16, 64, 16, "V2", "FIRE", "causal window", taps=3)
    yield Case(bf16, 64, 16, "DAPE", length=8192)
    yield Case(fp16, 64, 12, "FIRE", "FIRE", "padding", deterministic=True)
    yield Case(bf16, 256, 8, "FIRE", "FIRE", "grouped, causal")
    yield Case(fp32, 64, 16, "DAPE", length=2048)
    yield Case(bf16, 64, 16, "V2", taps=7, length=4096)
    heads, hidden, bases = (12, 8, 3, 16, 1, 32, 64), (32, 8, 64, 32, 128), ("KERPLE", "none", "FIRE", "ALiBi")
    places = [(dtype, d) for d in (64, 128, 40, 256) for dtype in (bf16, fp16, fp32) if (dtype, d) != (fp32, 256)]
    forms, variants = ("V2", "DAPE", "published"), list(VARIANTS)
    published = [name for name in variants if "causal" in name and "window" not in name]
    for n in range(1, 92):  # 7 heads, 5 sizes, 4 bases, 11 places, 3 forms, 13 variants: no two numbers share a factor
        dtype, d = places[n % len(places)]
        form, variant = forms[n % len(forms)], variants[n % len(variants)]
        if form == "published" and variant not in published:
            variant = published[n % len(published)]
        taps = 1 if form == "DAPE" else (3, 5, 7, 3)[n // 3 % 4]
        yield Case(dtype, d, heads[n % 7], form, bases[n % 4], variant, hidden[n % 5], taps)


def rehearsal() -> Iterator[Case]:
    """For the interpreter, which has no products of bf16."""
    yield Case(torch.float32, 16, 3, "DAPE", hidden=8, length=40)
    yield Case(torch.float16, 16, 2, "V2", "FIRE", hidden=4, taps=3, length=24)
    yield Case(torch.float16, 16, 2, "FIRE", "FIRE", length=40)


# --------------------------------------------------------------------------------------------------- one case


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    bias: Any  # what posattn.attention takes
    mask: Tensor | None
    options: dict[str, Any]  # of posattn.attention
    left: int
    right: int
    start: int  # of the queries, where that of the keys is 0


def make_bias(case: Case) -> Any:
    """With numbers that move a softmax."""
    made: Any = None
    if case.base == "FIRE":
        slope = 0.0 if case.form == "FIRE" else 0.01
        made = posattn.FIRE(case.heads, FIRE_UNITS, init_length=100, negative_slope=slope)
    elif case.base != "none":
        made = {"ALiBi": posattn.ALiBi, "KERPLE": posattn.KERPLE}[case.base](case.heads)
    with torch.no_grad():
        if case.base == "KERPLE":
            for parameter in made.parameters():
                parameter.copy_(torch.rand(parameter.shape) * 0.8 + 0.1)
        if case.base == "FIRE":
            made.last_layer.weight.mul_(5)
        if case.form == "FIRE":
            return made
        made = posattn.DAPE(case.heads, made, case.hidden, case.taps, prefix_consistent=case.form != "published")
        made.first_weight.mul_(1.5)
        made.second_weight.mul_(1.5)
    return made


def make_inputs(case: Case, device: torch.device, rehearse: bool) -> Inputs:
    torch.manual_seed(sum(str(case).encode()))
    variant = dict(VARIANTS[case.variant])
    queries, keys = variant.pop("queries"), variant.pop("keys")
    if case.length:
        queries = keys = case.length
    elif rehearse:
        queries, keys = max(1, queries // SMALL), max(1, keys // SMALL)
        if "query_start" in variant:
            variant["query_start"] //= SMALL
    batch = 1 if case.length else 2
    # As many heads as groups of 2 to 4, or one.
    key_heads = next(case.heads // g for g in (4, 3, 2, case.heads) if case.heads % g == 0)
    key_heads = key_heads if variant.pop("grouped", False) else case.heads
    value_dim, heads_last = variant.pop("value_dim", case.head_dim), variant.pop("heads_last", False)
    padding, lse_gradient = variant.pop("padding", False), variant.pop("lse_gradient", False)

    def normal(heads: int, length: int, dim: int) -> Tensor:
        shape = (batch, length, heads, dim) if heads_last else (batch, heads, length, dim)
        made = torch.randn(shape, device=device).to(case.dtype)
        return (made.transpose(1, 2) if heads_last else made).requires_grad_()

    mask = None
    if padding:
        mask = torch.rand(batch, keys, device=device) < 0.8
        mask[0, : keys // 4] = False  # with a causal mask, the first queries see nothing
    left, right = variant.get("window", (None, None))
    return Inputs(
        normal(case.heads, queries, case.head_dim), normal(key_heads, keys, case.head_dim),
        normal(key_heads, keys, value_dim),
        torch.randn(batch, case.heads, queries, value_dim, device=device).to(case.dtype),
        torch.randn(batch, case.heads, queries, device=device) if lse_gradient else None,
        make_bias(case).to(device), mask, {**variant, "key_padding_mask": mask, "enable_gqa": key_heads != case.heads},
        -1 if left is None else left, 0 if variant.get("is_causal") else -1 if right is None else right,
        variant.get("query_start", keys - queries),
    )  # fmt: skip


def attend(given: Inputs, backend: str = "triton") -> dict[str, Tensor]:
    outputs = posattn.attention(
        given.q, given.k, given.v, given.bias, **given.options, return_lse=True, backend=backend
    )
    names, parameters = zip(*given.bias.named_parameters()) if list(given.bias.parameters()) else ((), ())
    made = gradients(outputs, (given.grad_out, given.grad_lse), [given.q, given.k, given.v, *parameters])
    return dict(zip(["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in names)], made))


def check(case: Case, device: torch.device, rehearse: bool = False) -> dict[str, Any]:
    """As gate_numerics.check; and "relative": {gradient of a parameter: [error, error of plain] by its size}."""
    given = make_inputs(case, device, rehearse)
    truth, allowed, plain = expected(given, case.base, case.form == "published", case.dtype == torch.float32)
    size = {name: x.masked_fill(x.isinf(), 0).abs().max().item() for name, x in truth.items()}
    if given.grad_lse is None:
        layers, last = NETWORK, "dsecond_bias"
        if case.form == "FIRE":
            layers, last = ("first_layer.weight", "first_layer.bias", "last_layer.weight"), "dlast_layer.bias"
        size[last] = max(size[f"d{name}"] for name in layers)
    stored = ATOL[torch.float32 if case.form == "FIRE" or case.dtype == torch.float32 else torch.float16]
    for name in allowed:
        allowed[name] += size[name] * (stored if name == "lse" else ATOL[case.dtype])
    repeats = case.form != "FIRE" or case.deterministic  # DAPE always does
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case.deterministic, warn_only=True)
    try:
        found = attend(given)
        again = attend(given) if repeats else found
    finally:
        torch.use_deterministic_algorithms(before)
    errors = {name: [distance(found[name], truth[name]), bound] for name, bound in allowed.items()}
    failed = [name for name, (error, bound) in errors.items() if not error <= bound]
    failed += [f"{name} differs when repeated" for name in found if not torch.equal(found[name], again[name])]
    relative = {
        name: [errors[name][0] / (size[name] or 1.0), plain[name] / (size[name] or 1.0)]
        for name in truth
        if name not in ("out", "lse", "dq", "dk", "dv")
    }
    return {"case": str(case), "errors": errors, "failed": failed, "relative": relative}
