"""Stochastic positional encoding as its paper's code computes it, with the codes of every position held in memory.

Liutkus et al., "Relative Positional Encoding for Transformers with Linear Complexity", ICML 2021 (arXiv 2105.08399).
The codes Qbar and Kbar, (N, H, D, R), are made whole, gated whole, multiplied with queries and keys and summed over D.
Attention after that is posattn's own, so that two forms differ in nothing but how they come to their features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def features(query: Tensor, key: Tensor, spe: Any, noise: Any = None) -> Pair:
    """qhat, khat (B, H, N, R) of queries and keys (B, H, N, D); noise is drawn when None."""
    make = conv_codes if hasattr(spe, "filter_q") else sine_codes
    length, dtype = query.shape[2], query.dtype
    qbar, kbar = make(spe, length, dtype, None if noise is None else noise.codes)
    if spe.gate is not None:
        qbar, kbar = gated(spe, qbar, kbar, None if noise is None else noise.gate)
    # The published layout has the positions before the heads.
    qhat, khat = ((x.permute(0, 2, 1, 3)[..., None] * bar).sum(3) for x, bar in ((query, qbar), (key, kbar)))
    return qhat.transpose(1, 2), khat.transpose(1, 2)


def scale_of(spe: Any) -> float:
    return float((spe.num_realizations * spe.head_dim) ** 0.25)


def sine_codes(spe: Any, length: int, dtype: torch.dtype, noise: Tensor | None) -> Pair:
    """Qbar, Kbar, (1, N, H, D, R): sines and cosines of every position times noise (H, D, 2K, R)."""
    heads, dim, sines = spe.freqs.shape
    place = torch.arange(length, device=spe.freqs.device, dtype=spe.freqs.dtype)[None, None, :, None]
    turned = math.pi * torch.sigmoid(spe.freqs)[:, :, None] * place
    if noise is None:
        noise = torch.randn(heads, dim, 2 * sines, spe.num_realizations, device=spe.freqs.device)
    z = noise.to(spe.freqs.dtype) * (2 * sines) ** -0.5
    z = z * F.softplus(spe.gains).repeat_interleave(2, dim=2)[..., None]
    bars = []
    for phase in (turned + spe.offsets[:, :, None], turned):
        omega = torch.stack([phase.cos(), phase.sin()], dim=-1).flatten(3)  # (H, D, N, 2K)
        bars.append((omega.to(dtype) @ z.to(dtype)).permute(2, 0, 1, 3)[None] / scale_of(spe))
    return bars[0], bars[1]


def conv_codes(spe: Any, length: int, dtype: torch.dtype, noise: Tensor | None) -> Pair:
    """Qbar, Kbar, (1, N, H, D, R): noise (H, D, T, R) filtered along its T places, from the first one on.

    Drawn here, T is 4 P + N and the first P results are dropped, as published (P taps).
    """
    heads, dim, count, taps = spe.num_heads, spe.head_dim, spe.num_realizations, spe.filter_q.shape[-1]
    first = 0
    if noise is None:
        first = taps
        z = torch.randn(count, heads * dim, 4 * taps + length, device=spe.filter_q.device)
    else:
        z = noise.permute(3, 0, 1, 2).flatten(1, 2)
    bars = []
    for taps_of in (spe.filter_q, spe.filter_k):
        made = F.conv1d(z.to(dtype), taps_of.to(dtype), groups=heads * dim)[..., first : first + length]
        made = made.unflatten(1, (heads, dim))  # (R, H, D, N)
        bars.append(made.permute(3, 1, 2, 0)[None] / scale_of(spe))
    return bars[0], bars[1]


def gated(spe: Any, qbar: Tensor, kbar: Tensor, noise: Tensor | None) -> Pair:
    """Part of each code gives way to noise (H, D, R) that is equal at all positions."""
    share = torch.sigmoid(spe.gate)[..., None].to(qbar.dtype)
    if noise is None:
        noise = torch.randn(*spe.gate.shape, spe.num_realizations, device=spe.gate.device)
    still = share.sqrt() * noise.to(qbar.dtype) / scale_of(spe)
    moving = (1 - share).sqrt()
    return moving * qbar + still, moving * kbar + still


def kernels_of(spe: Any, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the codes multiply q_d k_d with, on average: P_d(m - n), float64, (H, D, len(distances)), gate included;
    then the same of two queries at one place, and of two keys, (H, D) each: those decide how large the noise is."""
    with torch.no_grad():
        if hasattr(spe, "filter_q"):
            cross, own_q, own_k = _conv_kernels(spe, distances)
        else:
            cross, own_q, own_k = _sine_kernels(spe, distances)
        if spe.gate is not None:
            share = torch.sigmoid(spe.gate.double())
            own_q, own_k = ((1 - share) * own + share for own in (own_q, own_k))
            cross = (1 - share)[..., None] * cross + share[..., None]
    return cross, own_q, own_k


def _sine_kernels(spe: Any, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    power = F.softplus(spe.gains.double()) ** 2 / (2 * spe.gains.shape[2])  # (H, D, K)
    turned = math.pi * torch.sigmoid(spe.freqs.double())[:, :, None] * distances.double()[:, None]
    cross = (power[:, :, None] * torch.cos(turned + spe.offsets.double()[:, :, None])).sum(-1)
    return cross, power.sum(-1), power.sum(-1)


def _conv_kernels(spe: Any, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P(m - n) = sum_a filter_q[a] filter_k[a + m - n], 0 beyond the filters."""
    shape = (spe.num_heads, spe.head_dim, -1)
    of_q, of_k = spe.filter_q.double().view(shape), spe.filter_k.double().view(shape)
    taps = of_q.shape[2]
    at = torch.arange(taps, device=of_q.device) + distances[:, None]  # (distances, P)
    inside = (at >= 0) & (at < taps)
    moved = of_k[..., at.clamp(0, taps - 1)] * inside
    return (of_q[:, :, None] * moved).sum(-1), (of_q**2).sum(-1), (of_k**2).sum(-1)
