"""Attention of packed sequences, with dropout, sinks and relative logits, in float64 and one sequence at a time.

For the tests of kernels/: `call` runs the launchers, `expected` the formulas; both take what `make` made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Sequences(NamedTuple):
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


class Dropout(NamedTuple):
    p: float
    seed: Tensor


class Case(NamedTuple):
    bias: str = "none"  # none, table, slopes, one-sided slopes, fire, relative
    # Lengths of queries and keys, one list of sequences for each batch entry; unpacked has one sequence in each.
    queries: tuple[tuple[int, ...], ...] = ((40,),)
    keys: tuple[tuple[int, ...], ...] | None = None
    packed: bool = True
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 16
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    padding: bool = False
    support: tuple[int, int] | None = None
    sinks: bool = False
    dropout: float = 0.0
    width: int = 24
    dtype: torch.dtype = torch.float32
    relative_dtype: torch.dtype = torch.float32
    lse_grad: bool = True


def words(seed: list[int], b: int, h: int, i: int) -> tuple[int, int]:
    """The first two words of Philox4x32-10 (Salmon et al. 2011) for query row i, in Python's integers."""
    low = 0xFFFFFFFF
    c = [(seed[1] + i) & low, (seed[3] + h) & low, b & low, 0]
    key = [seed[0] & low, (seed[0] >> 32) & low]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ key[0], second & low, (first >> 32) ^ c[3] ^ key[1], first & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return c[0], c[1]


def kept(p: float, seed: list[int], b: int, h: int, i: int, keys: int) -> Tensor:
    """Which keys query i keeps, bool (keys,)."""
    low = 0xFFFFFFFF
    w0, w1 = words(seed, b, h, i)
    made = []
    for j in range(seed[2], seed[2] + keys):
        x = (w0 + j * 0x9E3779B1) & low
        x ^= x >> 16
        x = (x * 0x85EBCA6B) & low
        x ^= x >> 13
        x = (x * (w1 | 1)) & low
        made.append(x >= round(p * 2**32))
    return torch.tensor(made, dtype=torch.bool)


def make(case: Case) -> dict[str, Any]:
    """Tensors of the call, in the case's dtype and on the device; fp32 parameters of the bias."""
    keys = case.keys or case.queries
    batch, lq, lk = len(case.queries), sum(case.queries[0]), sum(keys[0])
    generator = torch.Generator().manual_seed(lq * 1000 + lk)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    d, h = case.head_dim, case.heads
    q, do = normal(batch, h, lq, d), normal(batch, h, lq, d)
    k, v = normal(batch, case.key_heads, lk, d), normal(batch, case.key_heads, lk, d)
    made: dict[str, Any] = dict(q=q, k=k, v=v, do=do, dlse=normal(batch, h, lq) if case.lse_grad else None)
    flat_q, flat_k = (torch.tensor([n for entry in x for n in entry]) for x in (case.queries, keys))
    max_q, max_k = int(flat_q.max()), int(flat_k.max())
    cu_q, cu_k = (torch.cat([torch.zeros(1), x.cumsum(0)]).to(DEVICE, torch.int32) for x in (flat_q, flat_k))
    # What launch is told of equal lengths is one tensor for both.
    made["sequences"] = Sequences(cu_q, cu_q if case.keys is None else cu_k, max_q, max_k) if case.packed else None
    if case.bias == "table":
        values = normal(h, max_q + max_k - 1)
        if case.support is not None:
            offset = torch.arange(max_q + max_k - 1) + 1 - max_k
            values = torch.where(offset < case.support[0], values[:, :1], values)
            values = torch.where(offset > case.support[1], values[:, -1:], values)
        made["table"] = values
    elif case.bias in ("slopes", "one-sided slopes"):
        made["slopes"] = torch.rand(h, generator=generator)
    elif case.bias == "relative":
        made["relative"] = normal(batch, h, lq, case.width).to(case.relative_dtype)
    elif case.bias == "fire":
        # b_h of log(|o| + 1) * rows[position]: knots inside of where it is, and none of them where a pair is.
        f = 3
        made["rows"] = 1.0 / (torch.arange(-max_q, max_k).clamp(min=7).float() + 1).log()
        made["line"] = torch.arange(1 - max_k, max_q).abs().float().log1p()
        made["hidden"] = torch.cat([torch.ones(f, 1), -torch.linspace(0.23, 1.1, f)[:, None]], 1)
        made["last"] = normal(h, f + 1)
    if case.sinks:
        made["sinks"] = normal(h)
    if case.padding:
        made["key_mask"] = torch.rand(batch, lk, generator=generator) > 0.3
        made["key_mask"][0, : lk // 3] = False
    if case.dropout:
        made["dropout"] = Dropout(case.dropout, torch.tensor([0x123456789ABCDEF, 3, 2**31 - 20, 1]))
    for name, x in made.items():
        if isinstance(x, Tensor):
            made[name] = x.to(DEVICE, case.dtype if name in ("q", "k", "v", "do") else x.dtype)
    if case.dropout:
        made["dropout"] = Dropout(case.dropout, made["dropout"].seed.to(DEVICE))
    return made


def pieces_of(hidden: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Knots (F,) and pieces (H, F + 1, 2) of sum_f last[f] relu(w_f x + b_f) + last[F], all w_f > 0, knots in order."""
    weight, bias = hidden.T
    knots = -bias / weight
    slope = torch.cat([torch.zeros_like(last[:, :1]), (last[:, :-1] * weight).cumsum(1)], 1)
    intercept = torch.cat([torch.zeros_like(last[:, :1]), (last[:, :-1] * bias).cumsum(1)], 1) + last[:, -1:]
    return knots, torch.stack([slope, intercept], -1)


def expected(case: Case, made: dict[str, Any]) -> dict[str, Tensor]:
    """out, lse and the gradients of all that learns, in float64."""
    keys = case.keys or case.queries
    names = [n for n in ("q", "k", "v", "table", "relative", "line", "rows", "last") if n in made]
    leaf = {n: made[n].cpu().double().requires_grad_() for n in names}
    q, k, v = leaf["q"], leaf["k"], leaf["v"]
    group = case.heads // case.key_heads
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    max_q = max(n for x in case.queries for n in x)
    max_k = max(n for x in keys for n in x)
    outs, lses = [], []
    for b, (some_queries, some_keys) in enumerate(zip(case.queries, keys)):
        q0 = k0 = 0
        for lq, lk in zip(some_queries, some_keys):
            i, j = torch.arange(lq)[:, None] + (lk - lq), torch.arange(lk)[None, :]
            o = j - i
            s = q[b, :, q0 : q0 + lq] @ k[b, :, k0 : k0 + lk].transpose(1, 2) * case.head_dim**-0.5
            if case.softcap:
                s = case.softcap * torch.tanh(s / case.softcap)
            if case.bias == "table":
                s = s + leaf["table"][:, o + max_k - 1]
            elif case.bias == "slopes":
                s = s - made["slopes"].cpu().double()[:, None, None] * o.abs()
            elif case.bias == "one-sided slopes":
                s = s + made["slopes"].cpu().double()[:, None, None] * o
            elif case.bias == "relative":
                inside = (o <= 0) & (o > -case.width)
                near = leaf["relative"][b, :, q0 : q0 + lq]
                index = torch.where(inside, -o, 0).expand(case.heads, lq, lk)
                s = s + torch.where(inside, near.gather(2, index), 0.0)
            elif case.bias == "fire":
                x = leaf["line"][o + max_k - 1] * leaf["rows"][i + max_q]
                weight, bias = made["hidden"].cpu().double().T
                units = torch.relu(x[..., None] * weight + bias)
                last = leaf["last"]
                s = s + (units @ last[:, :-1].T).permute(2, 0, 1) + last[:, -1, None, None]
            visible = torch.ones(lq, lk, dtype=torch.bool)
            if case.left >= 0:
                visible &= o >= -case.left
            if case.right >= 0:
                visible &= o <= case.right
            if case.padding:
                visible = visible & made["key_mask"].cpu()[b, k0 : k0 + lk]
            sink = torch.full((case.heads, lq, 1), -math.inf, dtype=torch.float64)
            if case.sinks:
                sink = made["sinks"].cpu().double()[:, None, None].expand(-1, lq, 1)
            s = torch.cat([torch.where(visible, s, -1e30), sink], 2)
            top = s.amax(2, keepdim=True).detach()
            weight = torch.exp(s - top) * torch.cat([visible, torch.ones(lq, 1, dtype=torch.bool)], 1)
            total = weight.sum(2, keepdim=True)
            seen = total > 0
            p = weight[..., :lk] / torch.where(seen, total, 1.0)
            lse = torch.where(seen, top + torch.where(seen, total, 1.0).log(), -math.inf)[..., 0]
            if case.dropout:
                seed = made["dropout"].seed.tolist()
                stay = [
                    [kept(case.dropout, seed, b, h, q0 + r, k0 + lk)[k0:] for r in range(lq)] for h in range(case.heads)
                ]
                stay = torch.stack([torch.stack(rows) if rows else torch.zeros(0, lk) for rows in stay])
                p = p * stay / (1.0 - case.dropout)
            outs.append(p @ v[b, :, k0 : k0 + lk])
            lses.append(lse)
            q0, k0 = q0 + lq, k0 + lk
    shape = made["q"].shape
    out = torch.cat(outs, 1).unflatten(1, (shape[0], shape[2])).transpose(0, 1)
    lse = torch.cat(lses, 1).unflatten(1, (shape[0], shape[2])).transpose(0, 1)
    loss = (out * made["do"].cpu().double()).sum()
    if case.lse_grad:
        loss = loss + torch.where(torch.isfinite(lse), lse * made["dlse"].cpu().double(), 0.0).sum()
    grads = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True)
    correct = {"out": out.detach(), "lse": lse.detach()}
    return correct | {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaf.items(), grads)}


def call(case: Case, made: dict[str, Any], **asked: Any) -> dict[str, Tensor]:
    from posattn.kernels import launch

    told: dict[str, Any] = dict(
        table=made.get("table"), support=None, slopes=made.get("slopes"), key_mask=made.get("key_mask"),
        scale=case.head_dim**-0.5, softcap=case.softcap, shift=0, left=case.left, right=case.right,
        symmetric=case.bias == "slopes", relative=made.get("relative"), sinks=made.get("sinks"),
        sequences=made["sequences"], dropout=made.get("dropout"), scaled=None,
    )  # fmt: skip
    if not case.packed:
        told["shift"] = sum(case.queries[0]) - sum((case.keys or case.queries)[0])
    if case.support is not None:
        told["support"] = torch.tensor(case.support, dtype=torch.int32)[:, None].repeat(1, case.heads).to(DEVICE)
    learns = case.bias in ("table", "relative", "fire")
    asked = dict(need_q=True, need_kv=True, need_table=learns, deterministic=False, tails_need_grad=True) | asked
    last = None
    if case.bias == "fire":
        last = made["last"].clone().requires_grad_()
        knots, pieces = pieces_of(made["hidden"], last)
        told["scaled"] = made["line"], made["rows"], knots, pieces.detach()
    out, lse = launch.forward(made["q"], made["k"], made["v"], **told)
    dq, dk, dv, dtable, *rest = launch.backward(
        made["do"], made["dlse"], made["q"], made["k"], made["v"], out, lse, **told, **asked
    )
    actual = dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv, dtable=dtable)
    if case.bias == "fire":
        actual["dline"], actual["drows"], dpieces = rest
        actual["dlast"] = torch.autograd.grad(pieces, last, dpieces)[0]
    elif case.bias == "relative":
        (actual["drelative"],) = rest
    return actual


def error(actual: Tensor, correct: Tensor) -> float:
    """Largest difference by the size of the whole; what is not finite must be so in both."""
    actual = actual.cpu().double()
    assert actual.shape == correct.shape
    finite = torch.isfinite(correct)
    assert torch.equal(torch.isfinite(actual), finite)
    if not finite.any():
        return 0.0
    actual, correct = actual[finite], correct[finite]
    return float((actual - correct).abs().max() / correct.abs().max().clamp(min=1e-3))


def by_cause(case: Case, made: dict[str, Any], gradient: Tensor) -> Tensor:
    """Entries of a constant tail have one cause: their gradients count as one sum."""
    if case.support is None:
        return gradient.cpu().double()
    sequences = made["sequences"]
    behind = sequences.max_k if sequences is not None else made["q"].shape[2]
    offset = torch.arange(gradient.shape[1]) + 1 - behind
    left, right = offset < case.support[0], offset > case.support[1]
    gradient = gradient.cpu().double()
    ends = torch.stack([gradient[:, left].sum(1), gradient[:, right].sum(1)], 1)
    return torch.cat([ends, gradient[:, ~left & ~right]], 1)


def check(case: Case, tolerance: float | None = None, **asked: Any) -> None:
    made = make(case)
    correct, actual = expected(case, made), call(case, made, **asked)
    tolerance = tolerance or (6e-6 if case.dtype == torch.float32 else 4e-3)
    for key, value in correct.items():
        got = actual[key]
        if key == "dtable":
            got, value = by_cause(case, made, got), by_cause(case, made, value)
        assert error(got, value) < tolerance, (key, error(got, value))
