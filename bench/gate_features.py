"""What the GPU gate checks of packed sequences, documents, dropout, sinks and relative logits, all gradients included.

The truth is dense float64, sequence by sequence, and shares no code with the package; the rule is that of
gate_numerics.py: an error of at most twice that of the same formula in PyTorch at the case's dtype, and ATOL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posattn

from .gate_numerics import ATOL, HEADS, distance

# name -> lengths of queries (and keys, where they differ) of the sequences, or the length of a batch; and options
FEATURES: dict[str, dict[str, Any]] = {
    "packed": dict(packed=((300, 1, 517, 64, 0, 201), None)),
    "packed, causal": dict(packed=((1024, 77, 333), None), is_causal=True),
    "packed, cross": dict(packed=((100, 37, 0, 250), (130, 8, 55, 201))),
    "packed, causal window": dict(packed=((190, 500), (203, 509)), is_causal=True, window=(70, None)),
    "packed, grouped": dict(packed=((128, 256, 129), None), is_causal=True, key_heads=2),
    "documents": dict(length=700, documents=True, is_causal=True),
    "documents, padding": dict(length=509, documents=True, padding=True),
    "dropout": dict(length=384, dropout_p=0.2),
    "dropout, causal, grouped": dict(length=509, dropout_p=0.5, is_causal=True, key_heads=2),
    "dropout, packed": dict(packed=((300, 213), None), dropout_p=0.1, is_causal=True),
    "sinks": dict(length=509, sinks=True, is_causal=True),
    "sinks, softcap": dict(length=333, sinks=True, softcap=5.0, padding=True),
    "relative": dict(length=509, relative=64, is_causal=True),
    "relative, wide": dict(length=300, relative=400),
    "relative, packed": dict(packed=((300, 213), None), relative=100, is_causal=True),
    "relative, sinks, dropout": dict(length=384, relative=32, sinks=True, dropout_p=0.1, is_causal=True),
}
SMALL = 12  # a rehearsal divides lengths by this


class Case(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    bias: str  # "none", "raw table" or "ALiBi"; "none" with relative logits
    feature: str
    deterministic: bool = False

    def __str__(self) -> str:
        extra = ", deterministic" if self.deterministic else ""
        return f"{str(self.dtype).removeprefix('torch.')} D {self.head_dim}, {self.bias}, {self.feature}{extra}"


def cases() -> Iterator[Case]:
    dtypes, dims = (torch.bfloat16, torch.float16, torch.float32), (64, 128, 40, 256)
    n = 0
    for feature, options in FEATURES.items():
        for bias in ("none",) if "relative" in options else ("raw table", "ALiBi", "none"):
            dtype, d = dtypes[n % 3], dims[n % 4]
            n += 1
            if dtype == torch.float32 and d == 256:
                d = 128
            yield Case(dtype, d, bias, feature, deterministic=bias == "raw table" and n % 2 == 0)


def rehearsal() -> Iterator[Case]:
    fp16, fp32 = torch.float16, torch.float32
    yield Case(fp32, 16, "raw table", "packed, cross")
    yield Case(fp32, 16, "raw table", "packed, causal", deterministic=True)
    yield Case(fp16, 40, "ALiBi", "documents, padding")
    yield Case(fp32, 16, "raw table", "dropout, causal, grouped")
    yield Case(fp16, 16, "none", "sinks, softcap")
    yield Case(fp32, 16, "none", "relative, sinks, dropout")


class Problem:
    """The tensors of a case, as (1, heads, tokens, dim), and which of the tokens belong together."""

    def __init__(self, case: Case, device: torch.device, rehearse: bool):
        torch.manual_seed(sum(str(case).encode()))
        told = dict(FEATURES[case.feature])
        small = SMALL if rehearse else 1
        self.packed = told.pop("packed", None)
        self.batch, self.mask, self.ids = 1, None, None
        if self.packed:
            queries, keys = self.packed
            self.queries = [n and max(1, n // small) for n in queries]
            self.keys = self.queries if keys is None else [n and max(1, n // small) for n in keys]
        else:
            length = told.pop("length") // small
            self.batch = 2
            self.queries = self.keys = [length] * 2
            if told.pop("documents", False):
                cut = length // 3
                self.ids = torch.zeros(2, length, dtype=torch.int32, device=device)
                self.ids[0, cut:], self.ids[0, 2 * cut + 3 :], self.ids[1, 5:] = 7, 2, 1
                self.queries = self.keys = [cut, cut + 3, length - 2 * cut - 3, 5, length - 5]
            if told.pop("padding", False):
                self.mask = torch.rand(2, length, device=device) < 0.8
                self.mask[0, : length // 4] = False
        key_heads = told.pop("key_heads", HEADS)
        self.width, self.p = told.pop("relative", 0) and max(3, told_width(case) // small), told.get("dropout_p", 0.0)
        self.softcap = told.get("softcap")
        self.causal = told.get("is_causal", False)
        self.left = (told.get("window") or (None, None))[0]
        total, total_k = sum(self.queries), sum(self.keys)

        def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.randn(shape, device=device).to(dtype).requires_grad_()

        self.inputs = {"dq": normal(HEADS, total, case.head_dim), "dk": normal(key_heads, total_k, case.head_dim)}
        self.inputs["dv"] = normal(key_heads, total_k, case.head_dim)
        self.most = (max(self.queries), max(self.keys)) if self.packed else (total // 2,) * 2
        if case.bias == "raw table":
            self.inputs["dtable"] = normal(HEADS, sum(self.most) - 1, dtype=torch.float32)
        if told.pop("sinks", False):
            self.inputs["dsinks"] = normal(HEADS, dtype=torch.float32)
        if self.width:
            self.inputs["drelative"] = normal(HEADS, total, self.width)
        self.slopes = torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)], device=device).double()
        self.slopes = self.slopes if case.bias == "ALiBi" else self.slopes * 0
        self.bias = {"ALiBi": posattn.ALiBi(HEADS).to(device), "none": None, "raw table": self.inputs.get("dtable")}[
            case.bias
        ]
        self.options: dict[str, Any] = {**told, "enable_gqa": key_heads != HEADS, "sinks": self.inputs.get("dsinks")}
        self.grads = normal(HEADS, total, case.head_dim), normal(HEADS, total, dtype=torch.float32)


def told_width(case: Case) -> int:
    return int(FEATURES[case.feature]["relative"])


def bits(seed: Tensor, heads: int, first: int, rows: int, keys: int, row0: int, key0: int, b: int) -> Tensor:
    """The 32 random bits of each pair (heads, rows, keys), as kernels/dropout.py defines them, one by one."""
    word = 0xFFFFFFFF
    key = int(seed[0])
    made = torch.empty(heads, rows, 2, dtype=torch.int64)
    for h in range(heads):
        for i in range(rows):
            c = [row0 + i, first + h, b, 0]
            k0, k1 = key & word, key >> 32
            for _ in range(10):
                p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
                c = [(p1 >> 32) ^ c[1] ^ k0, p1 & word, (p0 >> 32) ^ c[3] ^ k1, p0 & word]
                k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
            made[h, i, 0], made[h, i, 1] = c[0], c[1]
    made = made.to(seed.device)
    x = (made[..., :1] + (torch.arange(keys, device=seed.device) + key0) * 0x9E3779B1) & word
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & word
    return ((x ^ (x >> 13)) * (made[..., 1:] | 1)) & word


def dense(problem: Problem, inputs: dict[str, Tensor], seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse), (heads, tokens, dim) and (heads, tokens): products in the dtype of inputs, softmax at least fp32."""
    q, k, v = inputs["dq"], inputs["dk"], inputs["dv"]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = HEADS // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    outs, lses, q0, k0 = [], [], 0, 0
    length = sum(problem.queries) // problem.batch
    for n, m in zip(problem.queries, problem.keys):
        rows, keys = slice(q0, q0 + n), slice(k0, k0 + m)
        score = (q[:, rows] @ k[:, keys].mT).to(exact) * q.shape[-1] ** -0.5
        if problem.softcap:
            score = problem.softcap * torch.tanh(score / problem.softcap)
        x = torch.arange(m, device=q.device) - torch.arange(n, device=q.device)[:, None] - (m - n)
        score = score - problem.slopes[:, None, None].to(exact) * x.abs()
        if "dtable" in inputs:
            score = score + inputs["dtable"].to(exact)[:, x + problem.most[1] - 1]
        if "drelative" in inputs:
            near = (x <= 0) & (-x < problem.width)
            at = (-x).clamp(0, problem.width - 1).expand(HEADS, -1, -1)
            score = score + torch.where(near, inputs["drelative"].to(exact)[:, rows].gather(2, at), 0.0)
        visible = x <= 0 if problem.causal else x == x
        if problem.left is not None:
            visible = visible & (-x <= problem.left)
        b = q0 // length
        if problem.mask is not None:
            visible = visible & problem.mask[b, k0 - b * length : k0 - b * length + m]
        score = torch.where(visible, score, -math.inf)
        sinks = inputs["dsinks"].to(exact)[:, None, None] if "dsinks" in inputs else None
        column = score.new_full((HEADS, n, 1), -math.inf) if sinks is None else sinks.expand(-1, n, -1)
        score = torch.cat([score, column], -1)
        seen = (score > -math.inf).any(-1)
        weight = torch.softmax(torch.where(seen[..., None], score, 0.0), -1)[..., :m]
        weight = torch.where(visible & seen[..., None], weight, 0.0)
        if problem.p and seed is not None:
            random = bits(seed, HEADS, 0, n, m, q0 - b * length, k0 - b * length, b)
            weight = torch.where(random >= round(problem.p * 2**32), weight, 0.0) / (1 - problem.p)
        outs.append(weight.to(q.dtype) @ v[:, keys])
        lses.append(torch.where(seen, torch.logsumexp(torch.where(seen[..., None], score, 0.0), -1), -math.inf))
        q0, k0 = q0 + n, k0 + m
    return torch.cat(outs, 1), torch.cat(lses, 1)


def attend(problem: Problem) -> dict[str, Tensor]:
    """What posattn gives, in the layout of `dense`."""
    parts = [problem.inputs[name] for name in ("dq", "dk", "dv")]
    relative = problem.inputs.get("drelative")
    options = {**problem.options, "return_lse": True, "backend": "triton"}
    device = parts[0].device
    if problem.packed:
        cu_q, cu_k = (
            torch.tensor([0, *n], device=device).cumsum(0).int() for n in (problem.queries, problem.keys)
        )
        if problem.keys is problem.queries:
            cu_k = cu_q
        if relative is not None:
            options["relative_logits"] = relative.transpose(0, 1)
        packed = (x.transpose(0, 1) for x in parts)
        out, lse = posattn.attention_varlen(*packed, cu_q, cu_k, *problem.most, problem.bias, **options)
        out = out.transpose(0, 1)
    else:

        def entries(x: Tensor) -> Tensor:  # (heads, tokens, ...) -> (batch, heads, length, ...)
            return x.unflatten(1, (problem.batch, -1)).transpose(0, 1)

        if relative is not None:
            options["relative_logits"] = entries(relative)
        options.update(key_padding_mask=problem.mask, document_ids=problem.ids)
        out, lse = posattn.attention(*map(entries, parts), problem.bias, **options)
        out, lse = out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)
    return results(problem, out, lse, problem.inputs)


def results(problem: Problem, out: Tensor, lse: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    grad_out, grad_lse = (g.detach() for g in problem.grads)
    grad_lse = torch.where(lse > -math.inf, grad_lse, 0.0)
    grads = torch.autograd.grad((out, lse), list(inputs.values()), (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(inputs, grads))}


def check(case: Case, device: torch.device, rehearse: bool = False) -> dict[str, Any]:
    """{"case", "errors": {output: [error, allowed]}, "failed": outputs that are too far off, or not repeatable}."""
    problem = Problem(case, device, rehearse)
    torch.manual_seed(1)
    seed = None
    if problem.p:
        from posattn.dropout import draw

        drawn = draw(problem.p, 0, 0, device)
        seed = None if drawn is None else drawn.seed
    inputs64 = {name: x.detach().double().requires_grad_() for name, x in problem.inputs.items()}
    truth = results(problem, *dense(problem, inputs64, seed), inputs64)
    inputs = {name: x.detach().requires_grad_() for name, x in problem.inputs.items()}
    plain = results(problem, *dense(problem, inputs, seed), inputs)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case.deterministic, warn_only=True)
    try:
        runs = []
        for _ in range(2 if case.deterministic else 1):
            torch.manual_seed(1)  # the same pairs are dropped
            runs.append(attend(problem))
    finally:
        torch.use_deterministic_algorithms(before)
    found, again = runs[0], runs[-1]
    errors = {}
    for name, exact in truth.items():
        size = exact.masked_fill(exact.isinf(), 0).abs().max().item()
        bound = 2 * distance(plain[name], exact) + size * (ATOL[torch.float32] if name == "lse" else ATOL[case.dtype])
        errors[name] = [distance(found[name], exact), bound]
    failed = [name for name, (error, bound) in errors.items() if not error <= bound]
    failed += [f"{name} differs when repeated" for name in found if not torch.equal(found[name], again[name])]
    return {"case": str(case), "errors": errors, "failed": failed}
