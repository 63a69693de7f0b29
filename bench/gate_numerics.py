"""What the GPU gate checks: attention and all its gradients against float64, in the plainest PyTorch; no code shared.

The rule: with error(x) = max |x - x64|, an output passes when error(posattn) <= 2 error(plain) + atol max |x64|, where
`plain` is the same formula in PyTorch with products at the case's dtype. The few numbers of a bias's parameters say
little about the size of rounding errors, so theirs are drawn 8 times more, by random signs on the errors of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posattn

ATOL = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2e-6}
HEADS = 4


# -------------------------------------------------- biases: how to make one, its formula over float64 offsets


def tisa(x: Tensor, amplitudes: Tensor, sharpness: Tensor, offsets: Tensor) -> Tensor:
    distance = x[None, None, :] - offsets[:, :, None]
    return (amplitudes[:, :, None] * torch.exp(-sharpness.abs()[:, :, None] * distance**2)).sum(1)


def t5(x: Tensor, weight: Tensor, bidirectional: bool) -> Tensor:
    side = weight.shape[0] // 2 if bidirectional else weight.shape[0]
    distance = x.abs() if bidirectional else (-x).clamp(min=0)
    exact = side // 2
    far = exact + torch.floor(torch.log(distance.clamp(min=1) / exact) / math.log(128 / exact) * (side - exact) + 1e-9)
    bucket = torch.where(distance < exact, distance, far.clamp(max=side - 1))
    return weight[(bucket + side * (x > 0) if bidirectional else bucket).long()].T


def kerple_power(x: Tensor, p: Tensor, a: Tensor) -> Tensor:
    return -a[:, None] * torch.where(x == 0, 1.0, x.abs()) ** p[:, None] * (x != 0)


# name -> (make, formula(offsets, *parameters)); parameters in the order of module.parameters()
BIASES: dict[str, tuple[Callable[[], posattn.Bias] | None, Callable[..., Tensor]]] = {
    "relative table": (
        lambda: posattn.RelativeTable(HEADS, max_distance=40),
        lambda x, w: w[:, (x.clamp(-40, 40) + 40).long()],
    ),
    "TISA": (lambda: posattn.TISA(HEADS), tisa),
    "raw table": (None, lambda x, table: table),
    "T5": (lambda: posattn.T5Bias(HEADS), lambda x, w: t5(x, w, True)),
    "none": (None, lambda x: torch.zeros(HEADS, len(x), dtype=x.dtype, device=x.device)),
    "ALiBi": (
        lambda: posattn.ALiBi(HEADS),
        lambda x: -torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)]).to(x)[:, None] * x.abs(),
    ),
    "T5 decoder": (lambda: posattn.T5Bias(HEADS, bidirectional=False), lambda x, w: t5(x, w, False)),
    "KERPLE log": (
        lambda: posattn.KERPLE(HEADS),
        lambda x, p, a: -p[:, None] * torch.log(1 + a[:, None] * x.abs()),
    ),
    "ALiBi learnable": (lambda: posattn.ALiBi(HEADS, learnable=True), lambda x, slope: -slope[:, None] * x.abs()),
    "KERPLE power": (lambda: posattn.KERPLE(HEADS, kind="power"), kerple_power),
    "ALiBi one-sided": (
        lambda: posattn.ALiBi(HEADS, symmetric=False),
        lambda x: torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)]).to(x)[:, None] * x,
    ),
}


def make_bias(name: str, width: int, device: torch.device) -> tuple[Any, list[Tensor]]:
    """(what posattn.attention takes, its parameters), with numbers that move a softmax."""
    if name == "none":
        return None, []
    if name == "raw table":
        table = torch.randn(HEADS, width, device=device).requires_grad_()
        return table, [table]
    bias = BIASES[name][0]().to(device)  # type: ignore[misc]
    with torch.no_grad():
        for key, parameter in bias.named_parameters():
            if name == "TISA":
                start = {"amplitudes": torch.randn, "sharpness": torch.rand, "offsets": torch.randn}[key]
                parameter.copy_(start(parameter.shape) * {"amplitudes": 1, "sharpness": 0.1, "offsets": 10}[key])
                if key == "sharpness":
                    parameter.add_(0.002)
            elif key == "weight":
                parameter.normal_()
            else:
                parameter.copy_(torch.rand(parameter.shape) * 0.8 + 0.1)
    return bias, list(bias.parameters())


# ------------------------------------------------------------------------------------------------------ cases

# name -> lengths of queries and keys, and what differs from the plain call
VARIANTS: dict[str, dict[str, Any]] = {
    "odd": dict(queries=509, keys=509),
    "causal": dict(queries=1024, keys=1024, is_causal=True),
    "window": dict(queries=509, keys=509, window=(37, 70)),
    "padding": dict(queries=509, keys=509, padding=True),
    "grouped, causal": dict(queries=512, keys=512, key_heads=2, is_causal=True),
    "last queries, causal": dict(queries=197, keys=509, is_causal=True),
    "softcap": dict(queries=384, keys=384, softcap=5.0),
    "gradient of lse": dict(queries=300, keys=509, lse_gradient=True),
    "more queries than keys, causal": dict(queries=509, keys=197, is_causal=True, padding=True),
    "one query": dict(queries=1, keys=777),
    "far positions": dict(queries=256, keys=320, query_start=300),
    "value dim": dict(queries=333, keys=333, value_dim=32),
    "heads last, causal window": dict(queries=640, keys=640, heads_last=True, is_causal=True, window=(130, None)),
}
SMALL = 12  # a rehearsal divides lengths by this


class Case(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    bias: str
    variant: str
    deterministic: bool = False
    length: int | None = None  # instead of the variant's; then with 1 batch

    def __str__(self) -> str:
        extra = (", deterministic" if self.deterministic else "") + (f", N {self.length}" if self.length else "")
        return f"{str(self.dtype).removeprefix('torch.')} D {self.head_dim}, {self.bias}, {self.variant}{extra}"


def first_cases() -> Iterator[Case]:
    """Most important first: every row of the config table, order of sums, a long one."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, dims in ((bf16, (64, 128, 256)), (fp32, (64, 128, 256)), (fp16, (64, 128))):
        yield from (Case(dtype, d, "relative table", "causal" if d == 128 else "odd") for d in dims)
    for dtype in (bf16, fp32):
        for d, bias in ((64, "relative table"), (128, "raw table"), (256, "TISA")):
            yield Case(dtype, d, bias, "odd", deterministic=True)
    yield Case(bf16, 128, "TISA", "causal", length=8192)
    yield Case(bf16, 64, "relative table", "odd", length=8192)
    # Tiles of hidden pairs alone, by scales that a multiply-add rounds in one way or the other.
    for d in (96, 112, 192):
        yield Case(bf16, d, "none", "padding")
        yield Case(bf16, d, "T5", "window")


def cases() -> Iterator[Case]:
    """The first ones, then everything mixed."""
    yield from first_cases()
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    places = [(dtype, d) for d in (64, 128, 16, 80, 256, 40, 96) for dtype in (bf16, fp16, fp32)]
    names, variants = list(BIASES), list(VARIANTS)
    for n in range(len(names) * len(variants)):  # 11 biases, 13 variants, 21 places: no two numbers share a factor
        dtype, d = places[n % len(places)]
        bias = names[n % len(names)]
        yield Case(dtype, d, bias, variants[n % len(variants)], deterministic=bias in ("TISA", "T5") and n % 5 == 0)


def rehearsal() -> Iterator[Case]:
    """For the interpreter, which has no products of bf16."""
    fp16, fp32 = torch.float16, torch.float32
    yield Case(fp32, 16, "relative table", "causal")
    yield Case(fp16, 40, "TISA", "padding")
    yield Case(fp32, 16, "raw table", "gradient of lse", deterministic=True)
    yield Case(fp16, 16, "T5", "more queries than keys, causal")
    yield Case(fp32, 24, "KERPLE power", "softcap")
    yield Case(fp32, 16, "ALiBi", "grouped, causal")
    yield Case(fp32, 16, "KERPLE log", "heads last, causal window")


# --------------------------------------------------------------------------------------------------- one case


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    bias: Any
    parameters: list[Tensor]
    mask: Tensor | None
    options: dict[str, Any]  # of posattn.attention
    right: int
    left: int
    shift: int


def make_inputs(case: Case, device: torch.device, rehearse: bool) -> Inputs:
    torch.manual_seed(sum(str(case).encode()))
    variant = dict(VARIANTS[case.variant])
    queries, keys = (case.length,) * 2 if case.length else (variant.pop("queries"), variant.pop("keys"))
    for key in ("queries", "keys"):
        variant.pop(key, None)
    if rehearse:
        queries, keys = max(1, queries // SMALL), max(1, keys // SMALL)
        if "query_start" in variant:
            variant["query_start"] //= SMALL
    batch = 1 if case.length else 2
    key_heads, value_dim = variant.pop("key_heads", HEADS), variant.pop("value_dim", case.head_dim)
    heads_last, padding = variant.pop("heads_last", False), variant.pop("padding", False)
    lse_gradient = variant.pop("lse_gradient", False)

    def normal(heads: int, length: int, dim: int) -> Tensor:
        shape = (batch, length, heads, dim) if heads_last else (batch, heads, length, dim)
        made = torch.randn(shape, device=device).to(case.dtype)
        return (made.transpose(1, 2) if heads_last else made).requires_grad_()

    bias, parameters = make_bias(case.bias, queries + keys - 1, device)
    mask = None
    if padding:
        mask = torch.rand(batch, keys, device=device) < 0.8
        mask[0, : keys // 4] = False  # with a causal mask, the first queries see nothing
    left, right = variant.get("window", (None, None))
    return Inputs(
        normal(HEADS, queries, case.head_dim), normal(key_heads, keys, case.head_dim),
        normal(key_heads, keys, value_dim),
        torch.randn(batch, HEADS, queries, value_dim, device=device).to(case.dtype),
        torch.randn(batch, HEADS, queries, device=device) if lse_gradient else None,
        bias, parameters, mask, {**variant, "key_padding_mask": mask, "enable_gqa": key_heads != HEADS},
        0 if variant.get("is_causal") else keys if right is None else right, queries + keys if left is None else left,
        -variant.get("query_start", keys - queries),
    )  # fmt: skip


def dense(given: Inputs, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) by the formula; products in q's dtype, softmax in the table's."""
    group, (queries, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.mT).to(table.dtype) * q.shape[-1] ** -0.5
    if cap := given.options.get("softcap"):
        score = cap * torch.tanh(score / cap)
    score = score + table.unfold(1, keys, 1).flip(1)  # row i: table[j - i + queries - 1]
    at = torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None] + given.shift
    visible = (at >= -given.left) & (at <= given.right) if given.right < keys or given.left < queries else at == at
    visible = visible if given.mask is None else visible & given.mask[:, None, None, :]
    seen = visible.any(-1)
    score = torch.where(visible, score, torch.where(seen[..., None], -math.inf, 0.0))
    lse = torch.where(seen, torch.logsumexp(score, -1), -math.inf)
    weight = torch.where(seen[..., None], torch.softmax(score, -1), 0.0)
    return weight.to(q.dtype) @ v, lse.expand(q.shape[:3])


def gradients(given: Inputs, out: Tensor, lse: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    names = ["dq", "dk", "dv", *(f"dparameter{n}" for n in range(len(inputs) - 3))]
    outputs, grads = [out], [given.grad_out.to(out.dtype)]
    if given.grad_lse is not None:
        outputs, grads = [out, lse], [*grads, given.grad_lse.to(lse.dtype)]
    found = torch.autograd.grad(outputs, inputs, grads)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found))}


def attend(given: Inputs, case: Case) -> dict[str, Tensor]:
    out, lse = posattn.attention(
        given.q, given.k, given.v, given.bias, **given.options, return_lse=True, backend="triton"
    )
    return gradients(given, out, lse, [given.q, given.k, given.v, *given.parameters])


def check(case: Case, device: torch.device, rehearse: bool = False) -> dict[str, Any]:
    """{"case", "errors": {output: [error, allowed]}, "failed": outputs that are too far off, or not repeatable}."""
    given = make_inputs(case, device, rehearse)
    queries, keys = given.q.shape[2], given.k.shape[2]
    x = torch.arange(queries + keys - 1, device=device).double() + (given.shift - queries + 1)
    inputs64 = [t.detach().double().requires_grad_() for t in (given.q, given.k, given.v)]
    parameters64 = [t.detach().double().requires_grad_() for t in given.parameters]
    made64 = BIASES[case.bias][1](x, *parameters64)
    table64 = made64.detach().requires_grad_()
    truth = gradients(given, *dense(given, *inputs64, table64), [*inputs64, table64])
    inputs = [t.detach().requires_grad_() for t in (given.q, given.k, given.v)]
    table = made64.detach().float().requires_grad_()
    plain = gradients(given, *dense(given, *inputs, table), [*inputs, table])

    allowed = {name: 2 * distance(plain[name], truth[name]) for name in ("out", "lse", "dq", "dk", "dv")}
    if parameters64:
        dtable = truth["dparameter0"]
        wrong = plain["dparameter0"].double() - dtable
        back = torch.autograd.grad(made64, parameters64, dtable, retain_graph=True)
        truth.update({f"dparameter{n}": g for n, g in enumerate(back)})
        allowed.update({f"dparameter{n}": 0.0 for n in range(len(back))})
        for draw in range(9):
            signs = torch.randint(0, 2, wrong.shape, device=device).double() * 2 - 1 if draw else 1.0
            for n, g in enumerate(torch.autograd.grad(made64, parameters64, wrong * signs, retain_graph=True)):
                allowed[f"dparameter{n}"] = max(allowed[f"dparameter{n}"], 2 * g.abs().max().item())
    for name in allowed:
        size = truth[name].masked_fill(truth[name].isinf(), 0).abs().max().item()
        allowed[name] += size * (ATOL[torch.float32] if name == "lse" else ATOL[case.dtype])
    del plain, inputs, inputs64

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case.deterministic, warn_only=True)
    try:
        found = attend(given, case)
        again = attend(given, case) if case.deterministic else found
    finally:
        torch.use_deterministic_algorithms(before)
    errors = {name: [distance(found[name], truth[name]), bound] for name, bound in allowed.items()}
    failed = [name for name, (error, bound) in errors.items() if not error <= bound]
    failed += [f"{name} differs when repeated" for name in found if not torch.equal(found[name], again[name])]
    return {"case": str(case), "errors": errors, "failed": failed}


def distance(found: Tensor, truth: Tensor) -> float:
    """Largest |found - truth|; NaN where one is NaN or infinite and the other is not, or not the same infinity."""
    difference = torch.where(found.double() == truth, 0.0, found.double() - truth)
    return math.nan if not bool(difference.isfinite().all()) else difference.abs().max().item()
