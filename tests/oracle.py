"""What the package must compute, in float64, from the papers' formulas; shares no code with the package.

`attention_oracle` is dense attention; the other functions are the bias matrices, (H, Lq, Lk), of query i at
position ``i`` and key j at position ``j + shift``, written over (i, j).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dense_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    left: int = -1,
    right: int = -1,
    shift: int | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of dense attention; q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv).

    score = softcap * tanh(scale * q.k / softcap) + dense_bias, dense_bias (Hq, Lq, Lk) or (B, Hq, Lq, Lk).
    Key j is visible to query i iff -left <= j - i + shift <= right (-1: no limit), key_padding_mask[b, j]
    holds and the bias is above -1e29. shift defaults to Lq - Lk. A query that sees no key: out 0, lse -inf,
    gradients 0.
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    query_length, key_length = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    shift = query_length - key_length if shift is None else shift

    score = scale * (q @ k.transpose(-2, -1))
    if softcap:
        score = softcap * torch.tanh(score / softcap)

    i = torch.arange(query_length, device=q.device)[:, None]
    j = torch.arange(key_length, device=q.device)[None, :]
    offset = j - i + shift
    visible = torch.ones_like(score, dtype=torch.bool)
    if left >= 0:
        visible = visible & (offset >= -left)
    if right >= 0:
        visible = visible & (offset <= right)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    if dense_bias is not None:
        bias = dense_bias.double().expand(score.shape)
        visible = visible & (bias > -1e29)
        score = score + torch.where(visible, bias, 0.0)

    # Every value that is not wanted is replaced before, not after, it can turn into inf or NaN.
    score = torch.where(visible, score, 0.0)
    top = torch.where(visible, score, -math.inf).amax(-1, keepdim=True).detach()
    seen = visible.any(-1, keepdim=True)
    top = torch.where(seen, top, 0.0)
    weight = torch.where(visible, torch.exp(torch.where(visible, score - top, 0.0)), 0.0)
    total = torch.where(seen, weight.sum(-1, keepdim=True), 1.0)
    out = (weight / total) @ v
    lse = torch.where(seen, top + total.log(), -math.inf).squeeze(-1)
    return out, lse


def _offset(query_length: int, key_length: int, shift: int) -> Tensor:
    i = torch.arange(query_length, dtype=torch.float64)[:, None]
    j = torch.arange(key_length, dtype=torch.float64)[None, :]
    return (j + shift) - i


def tisa(
    amplitudes: Tensor, sharpness: Tensor, offsets: Tensor, query_length: int, key_length: int, shift: int = 0
):
    """f_h(j - i), f_h(x) = sum_s a exp(-|b| (x - c)^2); parameters (H, S)."""
    x = _offset(query_length, key_length, shift)
    heads = []
    for a_h, b_h, c_h in zip(amplitudes.double(), sharpness.double(), offsets.double()):
        f = torch.zeros_like(x)
        for a, b, c in zip(a_h, b_h, c_h):
            f = f + a * torch.exp(-abs(b) * (x - c) ** 2)
        heads.append(f)
    return torch.stack(heads)


def tisa_official(amplitudes: Tensor, sharpness: Tensor, offsets: Tensor, length: int) -> Tensor:
    """The authors' code: f_h(i - j - 1), parameters (S, H)."""
    matrix = torch.zeros(amplitudes.shape[1], length, length, dtype=torch.float64)
    for h in range(amplitudes.shape[1]):
        for i in range(length):
            for j in range(length):
                for s in range(amplitudes.shape[0]):
                    a, b, c = (float(p[s, h]) for p in (amplitudes, sharpness, offsets))
                    matrix[h, i, j] += a * math.exp(-abs(b) * (c - (i - j - 1)) ** 2)
    return matrix


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8 (h + 1) / H); otherwise those of the lower power of two, then every second of the higher."""
    if math.log2(num_heads).is_integer():
        return [2 ** (-8 * (h + 1) / num_heads) for h in range(num_heads)]
    lower = 2 ** math.floor(math.log2(num_heads))
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[0::2][: num_heads - lower]


def alibi(
    slopes: Tensor, query_length: int, key_length: int, shift: int = 0, symmetric: bool = True
) -> Tensor:
    """-m |j - i|, or m (j - i)."""
    x = _offset(query_length, key_length, shift)
    return torch.stack([-m * x.abs() if symmetric else m * x for m in slopes.double()])


def t5_bucket(offset: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """In exact integers: floor(log(d / M) / log(D / M) * r) >= t  iff  d^r M^t >= D^t M^r."""
    bucket, side = 0, num_buckets
    if bidirectional:
        side = num_buckets // 2
        bucket = side if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = side // 2
    if distance < exact:
        return bucket + distance
    rest = side - exact
    steps = [t for t in range(rest) if distance**rest * exact**t >= max_distance**t * exact**rest]
    return bucket + exact + max(steps)


def t5(
    weight: Tensor,
    query_length: int,
    key_length: int,
    shift: int = 0,
    *,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Tensor:
    """weight[bucket(j - i), h]; weight (num_buckets, H)."""
    rows = []
    for i in range(query_length):
        offsets = range(shift - i, shift - i + key_length)
        rows.append([t5_bucket(o, weight.shape[0], max_distance, bidirectional) for o in offsets])
    return weight.double()[torch.tensor(rows)].permute(2, 0, 1)


def kerple(
    p: Tensor, a: Tensor, query_length: int, key_length: int, shift: int = 0, kind: str = "log"
) -> Tensor:
    """-p log(1 + a |j - i|) or -a |j - i|^p, for parameters inside their limits; (H,) each."""
    x = _offset(query_length, key_length, shift).abs()
    p, a = p.double(), a.double()
    if kind == "log":
        return torch.stack([-p[h] * torch.log(1 + a[h] * x) for h in range(len(p))])
    return torch.stack([-a[h] * torch.where(x > 0, x, 1.0) ** p[h] * (x > 0) for h in range(len(p))])


def sandwich(
    num_heads: int, query_length: int, key_length: int, shift: int = 0, embedding_dim: int = 128
) -> Tensor:
    """p_i . p_j / (8 (h + 1) / H) with the sinusoidal embeddings p written out."""

    def embedding(position: int) -> list[float]:
        angles = [position / 10000 ** (2 * k / embedding_dim) for k in range(embedding_dim // 2)]
        return [math.sin(x) for x in angles] + [math.cos(x) for x in angles]

    queries = torch.tensor([embedding(i) for i in range(query_length)], dtype=torch.float64)
    keys = torch.tensor([embedding(j + shift) for j in range(key_length)], dtype=torch.float64)
    return torch.stack([queries @ keys.T / (8 * (h + 1) / num_heads) for h in range(num_heads)])


def relative_table(weight: Tensor, query_length: int, key_length: int, shift: int = 0) -> Tensor:
    """weight[h, clip(j - i, -D, D) + D]; weight (H, 2 D + 1)."""
    far = weight.shape[1] // 2
    rows = []
    for i in range(query_length):
        rows.append([max(-far, min(far, j + shift - i)) + far for j in range(key_length)])
    return weight.double()[:, torch.tensor(rows)]


def fire(
    c: Tensor,
    multiplier: Tensor,
    first: tuple[Tensor, Tensor],
    last: tuple[Tensor, Tensor],
    positions: tuple[Tensor, Tensor],
    *,
    init_length: float,
    negative_slope: float = 0.0,
) -> Tensor:
    """The MLP, written out, of log(|c| |j - i| + 1) / (log(|c| max(i, |m L|) + 1) + 1e-6).

    first: weight and bias (F,) each; last: (H, F) and (H,); positions: those of the queries and of the keys.
    """
    c, multiplier, first, last = (
        c.double(), multiplier.double(), [t.double() for t in first], [t.double() for t in last]
    )  # fmt: skip
    i, j = positions[0].double()[:, None], positions[1].double()[None, :]
    top = torch.log(c.abs() * (j - i).abs() + 1)
    x = top / (torch.log(c.abs() * torch.maximum(i, (multiplier * init_length).abs()) + 1) + 1e-6)
    heads = []
    for h in range(len(last[1])):
        b = last[1][h]
        for f in range(len(first[0])):
            y = first[0][f] * x + first[1][f]
            b = b + last[0][h, f] * torch.where(y > 0, y, negative_slope * y)
        heads.append(b)
    return torch.stack(heads)
