"""What SPE and linear attention must compute, dense, in float64, from the papers' formulas.

It shares no code with the package.

SPE: Liutkus et al., arXiv 2105.08399. Linear attention: Katharopoulos et al., arXiv 2006.16236. Positive random
features: Choromanski et al., arXiv 2009.14794. Counter-based noise: Salmon et al., SC 2011 (Philox4x32-10).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ codes


def sine_codes(
    freqs: Tensor, offsets: Tensor, gains: Tensor, gate: Tensor | None, z: Tensor, e: Tensor | None, queries: Tensor,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Qbar (H, Lq, D, R), Kbar (H, Lk, D, R); parameters (H, D, K), gate (H, D), z (H, D, 2K, R), e (H, D, R).

    queries, keys: the positions.
    """
    freqs, offsets, gains, z = (t.double() for t in (freqs, offsets, gains, z))
    sines = freqs.shape[2]
    frequency = torch.sigmoid(freqs) / 2
    amplitude = torch.log1p(torch.exp(gains)) / math.sqrt(2 * sines)
    phase_q = 2 * math.pi * frequency[:, None] * queries.double()[:, None, None] + offsets[:, None]
    phase_k = 2 * math.pi * frequency[:, None] * keys.double()[:, None, None]
    codes = []
    for phase in (phase_q, phase_k):  # (H, L, D, K)
        cosines = torch.einsum("hldk,hdkr->hldr", amplitude[:, None] * torch.cos(phase), z[:, :, 0::2])
        sines_ = torch.einsum("hldk,hdkr->hldr", amplitude[:, None] * torch.sin(phase), z[:, :, 1::2])
        codes.append(cosines + sines_)
    return gated(codes, gate, e)


def conv_codes(
    filter_q: Tensor, filter_k: Tensor, gate: Tensor | None, z: Tensor, e: Tensor | None, queries: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """As above, filters (H * D, 1, P); position m hears z (H, D, T, R) at m, m + 1, .. m + P - 1."""
    z = z.double()
    codes = []
    for taps, positions in ((filter_q, queries), (filter_k, keys)):
        taps = taps.double().reshape(*z.shape[:2], -1)
        code = 0.0
        for a in range(taps.shape[2]):
            code = code + taps[:, :, a, None, None] * z[:, :, positions + a]
        codes.append(code.transpose(1, 2))
    return gated(codes, gate, e)


def gated(codes: list[Tensor], gate: Tensor | None, e: Tensor | None) -> tuple[Tensor, Tensor]:
    dim, realizations = codes[0].shape[2:]
    if gate is not None:
        delta = torch.sigmoid(gate.double())[:, None, :, None]
        codes = [torch.sqrt(1 - delta) * code + torch.sqrt(delta) * e.double()[:, None] for code in codes]
    qbar, kbar = (code / (realizations * dim) ** 0.25 for code in codes)
    return qbar, kbar


def exact_noise(heads: int, dim: int, sines: int, has_gate: bool) -> tuple[Tensor, Tensor | None]:
    """sqrt(R) times the identity in place of (z, e): the inner product is what it is on average over draws."""
    rows = 2 * sines + has_gate
    identity = math.sqrt(rows * dim) * torch.eye(rows * dim, dtype=torch.float64).view(dim, rows, rows * dim)
    identity = identity.expand(heads, -1, -1, -1)
    return identity[:, :, : 2 * sines], identity[:, :, -1] if has_gate else None


def encoded(x: Tensor, code: Tensor) -> Tensor:
    """qhat (B, H, L, R) of q (B, H, L, D) and Qbar (H, L, D, R)."""
    return torch.einsum("bhld,hldr->bhlr", x.double(), code)


def sine_kernel(freqs: Tensor, offsets: Tensor, gains: Tensor, gate: Tensor | None, distances: Tensor) -> Tensor:
    """P_d(m - n), (H, D, distances)."""
    freqs, offsets, gains = freqs.double(), offsets.double(), gains.double()
    squares = torch.log1p(torch.exp(gains)) ** 2 / (2 * freqs.shape[2])
    angle = math.pi * torch.sigmoid(freqs)[..., None] * distances + offsets[..., None]
    return gated_kernel((squares[..., None] * torch.cos(angle)).sum(2), gate)


def conv_kernel(filter_q: Tensor, filter_k: Tensor, gate: Tensor | None, heads: int, distances: Tensor) -> Tensor:
    """P_d(s) = sum over a of filter_q[a] filter_k[a + s]."""
    fq, fk = (f.double().reshape(heads, -1, f.shape[-1]) for f in (filter_q, filter_k))
    taps = fq.shape[2]
    kernel = []
    for s in distances.tolist():
        pairs = [fq[:, :, a] * fk[:, :, a + s] for a in range(taps) if 0 <= a + s < taps]
        kernel.append(sum(pairs, torch.zeros_like(fq[:, :, 0])))
    return gated_kernel(torch.stack(kernel, -1), gate)


def gated_kernel(kernel: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return kernel
    delta = torch.sigmoid(gate.double())[..., None]
    return (1 - delta) * kernel + delta


# -------------------------------------------------------------------------------------------- linear attention


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0, x)))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0) + 1e-3


def favor(x: Tensor, projection: Tensor, query: bool) -> Tensor:
    """Features of exp(x . y / sqrt(dim)); a query's are divided by the largest of them, which is then a constant."""
    x, projection = x * x.shape[-1] ** -0.25, projection.double()
    exponent = x @ projection.T - x.square().sum(-1, keepdim=True) / 2
    if query:
        exponent = exponent - exponent.detach().amax(-1, keepdim=True)
    return torch.exp(exponent) / math.sqrt(projection.shape[0])


def linear_oracle(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, eps: float = 1e-6, causal: bool = False, mask: Tensor | None = None,
    state: Tensor | None = None, sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out (B, H, Lq, Dv), the sums of phi(k) v^T (B, H, R, Dv) and of phi(k) (B, H, R), by the Lq x Lk matrix."""
    phi_q, phi_k, v = phi_q.double(), phi_k.double(), v.double()
    if mask is not None:
        phi_k = torch.where(mask[:, None, :, None], phi_k, 0)
    matrix = phi_q @ phi_k.transpose(-2, -1)
    if causal:
        i, j = torch.arange(matrix.shape[-2])[:, None], torch.arange(matrix.shape[-1])[None, :]
        matrix = torch.where(j <= i, matrix, 0)
    numerator, total = matrix @ v, matrix.sum(-1, keepdim=True)
    kv, ksum = phi_k.transpose(-2, -1) @ v, phi_k.sum(-2)
    if state is not None:
        numerator = numerator + phi_q @ state.double()
        total = total + (phi_q * sums.double()[:, :, None]).sum(-1, keepdim=True)
        kv, ksum = kv + state.double(), ksum + sums.double()
    return numerator / torch.where(total >= 0, total + eps, total - eps), kv, ksum


# ------------------------------------------------------------------------------------------------------ noise


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: counters (4, ...) of 32 bits each -> four words of 32 bits each."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = key
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (second >> shift) ^ c1 ^ np.uint64(k0), second & low, (first >> shift) ^ c3 ^ np.uint64(k1), first & low
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def conv_noise(seed: int, heads: int, dim: int, start: int, length: int, realizations: int) -> Tensor:
    """z (H, D, T, R) of a seed, noise indices start .. start + length - 1: Box and Muller's normals."""
    channel, t, group = np.meshgrid(
        np.arange(heads * dim), np.arange(start, start + length), np.arange(-(-realizations // 4)), indexing="ij"
    )
    words = philox(np.stack([t, group, channel, np.zeros_like(t)]), (seed & 0xFFFFFFFF, seed >> 32))
    u = ((words >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)  # (pair, channel, t, group, 2)
    normal = np.moveaxis(normal, 0, -2).reshape(heads, dim, length, -1)[..., :realizations]
    return torch.from_numpy(np.ascontiguousarray(normal))
