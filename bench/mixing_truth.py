"""DAPE and FIRE in the plainest PyTorch, and what may be wrong by rounding: what the gate holds posattn against.

No code is shared. In float64 this is the truth. `plain` makes the products by keys, by values and of both layers of the
network at the dtype of the tensors, all else in fp32. Both go a few rows at a time, so that long ones fit. The few
numbers of a parameter's gradient say little about the size of errors, so theirs are drawn 8 times more: by random signs
on what each of these chunks adds, and for the base on the errors of each offset.

A ReLU's slope jumps. In fp32 few numbers are so close to 0 that rounding takes them to its other side, but one is
seen in a gradient, and plain has others: twice what a gradient changes by if all of those jump is allowed as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gate_numerics import distance

CHUNKS, CHUNK_BYTES = 8, 2**28  # at least so many chunks of rows, the hidden layer of one at most so large in float64
DRAWS = 9
NEAR = 2.5e-7  # zero, as a part of the largest: a few roundings of fp32
NETWORK = ("first_weight", "first_bias", "second_weight", "second_bias")


def leaky(x: Tensor, slope: float, near: float) -> Tensor:
    """LeakyReLU; where |x| <= near max |x|, with the slope of the other side."""
    made = F.leaky_relu(x, slope)
    if not near or not x.numel():
        return made
    other = torch.where(x > 0, slope, 1.0) * x
    return torch.where(x.abs() <= near * x.detach().abs().max(), other + (made - other).detach(), made)


# ------------------------------------------ bases: positions i, j in float64, parameters by name -> (H, rows, keys)


def alibi(i: Tensor, j: Tensor, heads: int) -> Tensor:
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)]
    return -torch.tensor(slopes).to(i)[:, None, None] * (j - i).abs()


def kerple(i: Tensor, j: Tensor, p: dict[str, Tensor]) -> Tensor:
    return -p["p"][:, None, None] * torch.log(1 + p["a"][:, None, None] * (j - i).abs())


def fire(i: Tensor, j: Tensor, p: dict[str, Tensor], slope: float, start: float, near: float) -> Tensor:
    c = p["c"].abs()
    x = torch.log(c * (j - i).abs() + 1) / (torch.log(c * torch.maximum(i, (p["multiplier"] * start).abs()) + 1) + 1e-6)
    hidden = leaky(x[..., None] * p["first_layer.weight"][:, 0] + p["first_layer.bias"], slope, near)
    return (hidden @ p["last_layer.weight"].T + p["last_layer.bias"]).movedim(-1, 0)


def base_matrix(
    kind: str, base: Any, parameters: dict[str, Tensor], i: Tensor, j: Tensor, near: float = 0.0
) -> Tensor | None:
    i, j = i[:, None], j[None]
    if kind == "FIRE":
        return fire(i, j, parameters, base.negative_slope, base.init_length, near)
    if kind == "ALiBi":
        return alibi(i, j, base.num_heads)
    return kerple(i, j, parameters) if kind == "KERPLE" else None


# ------------------------------------------------------------------------------------------------- attention


def moved(x: Tensor, by: int) -> Tensor:
    """[..., j] -> x[..., j + by], 0 where there is no such column."""
    return F.pad(x, (max(-by, 0), max(by, 0)))[..., max(by, 0) :][..., : x.shape[-1]]


def layer(weight: Tensor, bias: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """bias + sum_t weight[:, :, t + taps // 2] x(j + t), products at dtype."""
    taps, made = weight.shape[2], bias[:, None, None]
    for t in range(taps):
        at = moved(x, t - taps // 2).to(dtype)
        made = made + (weight[:, :, t].to(dtype) @ at.flatten(2)).unflatten(2, at.shape[2:]).to(x.dtype)
    return made


def dense(
    q: Tensor, k: Tensor, v: Tensor, network: list[Tensor], base: Tensor | None, i: Tensor, j: Tensor,
    left: int, right: int, mask: Tensor | None, published: bool, near: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of queries at positions i, keys at j. network: [w1, b1, w2, b2] or []; left, right: -1 is open."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    score = (q @ k.mT).to(exact) * q.shape[-1] ** -0.5
    offset = (j[None] - i[:, None])[None, None]
    visible = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        visible = visible & (offset >= -left)
    if right >= 0:
        visible = visible & (offset <= right)
    visible = visible if mask is None else visible & mask[:, None, None, :]
    z = score if base is None else torch.cat([score, base.expand(score.shape)], 1)
    score = score if base is None else score + base
    if network:
        w1, b1, w2, b2 = network
        z = torch.where(offset <= 0 if published else visible, z, 0.0)
        hidden = leaky(layer(w1, b1, z, q.dtype), 0.01, near)
        hidden = hidden if published else torch.where(visible, hidden, 0.0)
        score = score + layer(w2, b2, hidden, q.dtype)
    seen = visible.any(-1)
    score = torch.where(visible, score, torch.where(seen[..., None], -math.inf, 0.0))
    lse = torch.where(seen, torch.logsumexp(score, -1), -math.inf)
    weight = torch.where(seen[..., None], torch.softmax(score, -1), 0.0)
    return weight.to(q.dtype) @ v, lse.expand(q.shape[:3])


def gradients(
    outputs: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor | None], inputs: list[Tensor]
) -> list[Tensor]:
    """[out, lse, gradient of each input]"""
    count = 1 if grads[1] is None else 2
    wanted = [g.to(x.dtype) for g, x in zip(grads[:count], outputs)]  # type: ignore[union-attr]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs[:count], inputs, wanted)]


class Run:
    """The formula at one precision, by chunks of rows: "exact", "plain", or "jumped": exact, near slopes swapped."""

    def __init__(self, kind: str, given: Any, base: str, published: bool):
        self.given, self.base_kind, self.near = given, base, NEAR if kind == "jumped" else 0.0
        dtype = given.q.dtype if kind == "plain" else torch.float64
        self.exact = torch.float32 if kind == "plain" else torch.float64
        self.rule = given.left, given.right, given.mask, published, self.near
        parameters = {n: p.detach().to(self.exact).requires_grad_() for n, p in given.bias.named_parameters()}
        self.network = [parameters.pop(name) for name in NETWORK if name in parameters]
        self.base = {name.removeprefix("base."): p for name, p in parameters.items()}
        self.base_names = [f"d{name}" for name in parameters]
        self.module = given.bias.base if self.network else given.bias
        self.names = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in NETWORK if self.network)]
        self.q, self.k, self.v = (t.detach().to(dtype).requires_grad_() for t in (given.q, given.k, given.v))

    def rows(self, rows: slice, i: Tensor, j: Tensor) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """What these rows give; the base's matrix, with its graph; the matrix's gradient."""
        made = base_matrix(self.base_kind, self.module, self.base, i.to(self.exact), j.to(self.exact), self.near)
        leaf = [] if made is None else [made.detach().requires_grad_()]
        inputs = [self.q.detach()[:, :, rows].requires_grad_(), self.k, self.v, *self.network]
        out = dense(*inputs[:3], self.network, leaf[0] if leaf else None, i, j, *self.rule)
        lse = self.given.grad_lse
        grads = self.given.grad_out[:, :, rows], None if lse is None else lse[:, :, rows]
        found = gradients(out, grads, inputs + leaf)
        along = found.pop() if leaf else None
        named = dict(zip(self.names, found))
        if self.base:
            named.update(zip(self.base_names, self.through(made, along)))
        return named, made, along

    def through(self, made: Any, along: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(made, list(self.base.values()), along, retain_graph=True)


def expected(
    given: Any, base: str, published: bool, jumps: bool
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Truth, by output; 2 error(plain) and what jumps; error(plain) by itself. base: FIRE, ALiBi, KERPLE or none."""
    runs = [Run(kind, given, base, published) for kind in ("exact", "plain", "jumped")[: 2 + jumps]]
    queries, keys, device = given.q.shape[2], given.k.shape[2], given.q.device
    by_row: dict[str, list[list[Tensor]]] = {name: [[] for _ in runs] for name in ("out", "lse", "dq")}
    truth: dict[str, Any] = {}
    errors: dict[str, list[Any]] = {}  # of plain, by draw
    jumped: dict[str, Any] = {}
    heads = given.q.shape[1]
    signs = torch.randint(0, 2, (DRAWS, heads, queries + keys - 1), device=device).double() * 2 - 1

    hidden = max([2 * heads, *(p.shape[0] for p in runs[0].network)])
    step = max(1, min(-(-queries // CHUNKS), CHUNK_BYTES // (8 * given.q.shape[0] * hidden * keys)))
    j = torch.arange(keys, device=device).double()
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        i = torch.arange(rows.start, rows.stop, device=device).double() + given.start
        (exact, made, along), (plain, _, plain_along), *other = (run.rows(rows, i, j) for run in runs)
        for name, parts in by_row.items():
            for part, found in zip(parts, (exact, plain, *(named for named, *_ in other))):
                part.append(found[name])
        for name in exact.keys() - by_row.keys():
            truth[name] = truth.get(name, 0.0) + exact[name]
            if other:
                jumped[name] = jumped.get(name, 0.0) + other[0][0][name] - exact[name]
        wrong = {name: plain[name].double() - exact[name] for name in exact.keys() - by_row.keys()}
        along_wrong = None if along is None or plain_along is None else plain_along.double() - along
        at = (j[None] - i[:, None] + (queries - 1 + given.start)).long()
        seen = dict(zip(runs[0].base_names, runs[0].through(made, along_wrong))) if runs[0].base else {}
        for draw in range(DRAWS):
            sign = float(torch.randint(0, 2, ()) * 2 - 1) if draw else 1.0
            drawn = {name: sign * (error - seen.get(name, 0.0)) for name, error in wrong.items()}
            if runs[0].base:
                projected = seen.values() if not draw else runs[0].through(made, along_wrong * signs[draw][:, at])
                for name, part in zip(seen, projected):
                    drawn[name] = drawn[name] + part
            for name, error in drawn.items():
                sums = errors.setdefault(name, [0.0] * DRAWS)
                sums[draw] = sums[draw] + error
    whole = {name: [torch.cat(part, 2) for part in parts] for name, parts in by_row.items()}
    truth.update({name: parts[0] for name, parts in whole.items()})
    alone = {name: distance(parts[1], parts[0]) for name, parts in whole.items()}
    allowed = {name: 2 * error for name, error in alone.items()}
    for name, sums in errors.items():
        sizes = [error.abs().max().item() for error in sums]
        alone[name], allowed[name] = sizes[0], 2 * max(sizes[:1] if name in ("dk", "dv") else sizes)
    for name, change in jumped.items():
        allowed[name] += 2 * change.abs().max().item()
    if jumps:
        allowed["dq"] += 2 * distance(whole["dq"][2], whole["dq"][0])
    return truth, allowed, alone
