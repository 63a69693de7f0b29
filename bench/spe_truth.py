"""SPE and linear attention dense, as their papers write them: what the gate holds posattn against. No code is shared.

Codes of every position, weights of every pair: Liutkus et al. (arXiv 2105.08399), Katharopoulos et al. (arXiv
2006.16236), Choromanski et al. (arXiv 2009.14794). In float64 this is the truth. `plain` is the same with waves, noise,
codes, features and weights rounded to the dtype of the tensors, and products of them; angles are in float64, all else
is in fp32. As posattn, it makes favor's features in fp32, and keeps them so where tensors are fp16.

A ReLU's slope jumps at 0. In fp32 few features are so close to it that rounding takes them to the other side, but one
is seen in a gradient: "jumped" is the truth with the slopes of all of those swapped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import posattn

NEAR = 3e-6  # zero, as a part of the largest feature: what rounding in fp32 does to one
CODE_BYTES = 2**31  # of the codes that are made at a time, in float64
MASK = 2**32 - 1


# ------------------------------------------------------------------------------------------------------ noise


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words of the counters (c0, c1, c2, 0), int64 as all of them.

    Products wrap around; their 64 bits are right all the same.
    """
    c3, k0, k1 = torch.zeros_like(c0), seed & MASK, seed >> 32
    for _ in range(10):
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (y >> 32 & MASK) ^ c1 ^ k0, y & MASK, (x >> 32 & MASK) ^ c3 ^ k1, x & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def noise_at(seed: Tensor, heads: int, dim: int, count: int, first: int, length: int) -> Tensor:
    """Box and Muller's normal numbers (H, D, length, count) of the places first .. in float64."""
    counters = torch.arange(first, first + length), torch.arange(-(-count // 4)), torch.arange(heads * dim)
    t, group, channel = (c.to(seed.device) for c in counters)
    words = philox(int(seed), t[:, None], group, channel[:, None, None])
    u = [((word >> 8).double() + 0.5) * 2.0**-24 for word in torch.broadcast_tensors(*words)]
    made = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2 * torch.log(radius))
        made += [radius * torch.cos(2 * math.pi * angle), radius * torch.sin(2 * math.pi * angle)]
    return torch.stack(made, -1).flatten(2)[..., :count].unflatten(0, (heads, dim))


def exact_noise(heads: int, dim: int, rows: int, like: Tensor) -> Tensor:
    """sqrt(R) times the identity, R = rows D: inner products are then what those of noise are on average."""
    made = math.sqrt(rows * dim) * torch.eye(rows * dim, dtype=torch.float64, device=like.device)
    return made.view(dim, rows, rows * dim).expand(heads, -1, -1, -1)


# ---------------------------------------------------------------------------------------------- one precision


class Formula:
    """The formula for one case at one precision: "exact", "plain" or "jumped"."""

    def __init__(self, precision: str, case: Any, given: Any):
        self.case, self.noise = case, given.noise
        self.near = NEAR if precision == "jumped" else 0.0
        plain = precision == "plain"
        self.dtype = case.dtype if plain else torch.float64
        self.exact = torch.float32 if plain else torch.float64
        self.inner = self.dtype  # of features and what follows
        if plain and case.feature_map == "favor" and case.dtype == torch.float16:
            self.inner = self.exact
        self.parameters: dict[str, Tensor] = {}
        if given.module is not None:
            named = given.module.named_parameters()
            self.parameters = {name: p.detach().to(self.exact).requires_grad_() for name, p in named}

    def codes(self, queries: bool, start: int, length: int) -> Tensor:
        """(H, L, D, R) of the positions start .., at self.dtype."""
        case, p, e = self.case, self.parameters, self.noise.gate
        heads, dim, sines = case.heads, case.head_dim, case.spe in ("sine", "exact")
        if case.spe == "seed":
            z = noise_at(self.noise.codes, heads, dim, case.realizations, start, length + case.rows - 1)
        elif case.spe == "exact":
            z = exact_noise(heads, dim, 2 * case.rows + case.gated, self.noise.codes)
            z, e = z[:, :, : 2 * case.rows], z[:, :, -1]
        else:
            z = self.noise.codes.double() if sines else self.noise.codes[:, :, start:].double()
        moving = still = (z.shape[3] * dim) ** -0.25
        if case.gated:
            share = torch.sigmoid(p["gate"])
            moving, still = moving * torch.sqrt(1 - share)[..., None], still * torch.sqrt(share)[..., None]
        if sines:
            place = start + torch.arange(length, device=z.device, dtype=torch.float64)
            angle = math.pi * torch.sigmoid(p["freqs"].double())[:, None] * place[:, None, None]
            if queries:
                angle = angle + p["offsets"].double()[:, None]
            waves = torch.stack([torch.cos(angle), torch.sin(angle)], -1).flatten(-2)  # (H, L, D, 2K)
            gains = moving * F.softplus(p["gains"]) / math.sqrt(2 * case.rows)
            z = z * gains.repeat_interleave(2, -1)[..., None]
            made = torch.einsum("hldc,hdcr->hldr", waves.to(self.dtype), z.to(self.dtype))
        else:
            taps = moving * p["filter_q" if queries else "filter_k"].view(heads, dim, -1)
            z = z[:, :, : length + case.rows - 1].permute(3, 0, 1, 2).flatten(1, 2)
            taps = taps.flatten(0, 1)[:, None].to(self.dtype)
            made = F.conv1d(z.to(self.dtype), taps, groups=heads * dim)
            made = made.unflatten(1, (heads, dim)).permute(1, 3, 2, 0)
        return made + (still * e).to(self.dtype)[:, None] if case.gated else made

    def hats(self, x: Tensor, queries: bool, start: int) -> Tensor:
        """(B, H, L, R) of x (B, H, L, D) whose first row stands at start."""
        case = self.case
        if case.spe == "none":
            return x
        wide = (2 * case.rows + case.gated) * case.head_dim if case.spe == "exact" else case.realizations
        step = max(1, CODE_BYTES // (8 * case.heads * case.head_dim * wide))
        parts = []
        for first in range(0, x.shape[2], step):
            rows = x[:, :, first : first + step]
            parts.append(torch.einsum("bhld,hldr->bhlr", rows, self.codes(queries, start + first, rows.shape[2])))
        return torch.cat(parts, 2)

    def features(self, x: Tensor, queries: bool) -> Tensor:
        x = x.to(self.exact)
        if self.case.feature_map == "elu":
            made = torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0.0, x)))
        elif self.case.feature_map == "relu":
            made = torch.relu(x) + 1e-3
            if self.near:  # the value as it is, the slope of the other side
                close = x.detach().abs() <= self.near * x.detach().abs().max()
                other = torch.where(x.detach() > 0, 0.0, 1.0) * x
                made = torch.where(close, other + (made - other).detach(), made)
        else:
            projection = posattn.Favor(x.shape[-1]).projection.to(x)  # numbers, not code
            x = x * x.shape[-1] ** -0.25
            power = x @ projection.T - x.square().sum(-1, keepdim=True) / 2
            if queries:
                power = power - power.detach().amax(-1, keepdim=True)
            made = torch.exp(power) / math.sqrt(len(projection))
        return made.to(self.inner)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, limit: Tensor, mask: Tensor | None, before: list[Tensor], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out; sums of phi(k) v^T and of phi(k). Query i sees the keys before limit[i] and what `before` sums up."""
        v = v.to(self.inner)
        visible = torch.arange(k.shape[2], device=k.device) < limit[:, None]
        if mask is not None:
            k, visible = torch.where(mask[:, None, :, None], k, 0.0), visible & mask[:, None, None]
        weight = torch.where(visible, (q @ k.mT).to(self.exact), 0.0)
        wide_k = k.to(self.exact)
        kv, sums = wide_k.mT @ v.to(self.exact), wide_k.sum(2)
        total = weight.sum(-1, keepdim=True)
        read: Any = 0.0
        if before:
            kv, sums = kv + before[0], sums + before[1]
            largest = before[0].detach().abs().max()  # or fp16 could not hold sums over a million keys
            read = (q @ (before[0] / largest).to(self.inner)).to(self.exact) * largest
            total = total + (q.to(self.exact) * before[1][:, :, None]).sum(-1, keepdim=True)
        total = torch.where(total >= 0, total + eps, total - eps)
        out = ((weight / total).to(self.inner) @ v).to(self.exact) + read / total
        return out.to(self.dtype), kv, sums

    def run(self, given: Any) -> dict[str, Tensor]:
        """What gate_spe.attend gives, by name."""
        leaves = [t.detach().to(self.dtype) for t in (given.q, given.k, given.v)]
        before = [t.detach().to(self.exact) for t in given.before]
        with torch.set_grad_enabled(given.grads is not None):
            leaves, before = ([t.requires_grad_(given.grads is not None) for t in some] for some in (leaves, before))
            q, k, v = leaves
            skipped = 0 if given.grads is not None else given.pieces[-1][0].start
            q = self.features(self.hats(q[:, :, skipped:], True, given.start + skipped), True)
            k = self.features(self.hats(k, False, given.start), False)
            outputs = self.attend(q, k, v, given.limit[skipped:], given.mask, before, given.options["eps"])
        return named(given, outputs, [*leaves, *before], self.parameters)


def named(given: Any, outputs: Any, inputs: list[Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs (the state only where it is asked for) and, where given.grads are, gradients of inputs and parameters."""
    outputs = outputs[: 3 if given.keep else 1]
    made = {name: t.detach() for name, t in zip(("out", "kv", "sums"), outputs)}
    if given.grads is not None:
        grads = [g.to(t.dtype) for g, t in zip(given.grads, outputs)]
        found = torch.autograd.grad(outputs, [*inputs, *parameters.values()], grads)
        names = [*("dq", "dk", "dv", "dbefore.kv", "dbefore.sums")[: len(inputs)], *(f"d{name}" for name in parameters)]
        made.update(zip(names, found))
    return made
