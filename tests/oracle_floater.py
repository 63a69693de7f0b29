"""What FLOATER must compute, in float64, from the paper's formulas and with solvers of its own.

It shares no code with the package. Liu, Yu, Dhillon, Hsieh, "Learning to Encode Position for Transformer with
Continuous Dynamical Model", ICML 2020, arXiv 2003.09229: p(t) = p(0) + the integral of h(t, p(t)) (8), positions at
t_i = i delta_t, one h for all layers (10), added to queries, keys and values (13).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[float, Tensor], Tensor]  # h(t, p): p (streams, layers, dim)

# --------------------------------------------------------------------------------------------------- dynamics


def published(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Field:
    """h = W2 [ReLU(W1 [p; t] + b1); t] + b2; w1 (hidden, dim + 1), w2 (dim, hidden + 1), time their last column."""

    def field(t: float, p: Tensor) -> Tensor:
        hidden = torch.relu(with_time(p, t) @ w1.double().T + b1.double())
        return with_time(hidden, t) @ w2.double().T + b2.double()

    return field


def with_time(x: Tensor, t: float) -> Tensor:
    return torch.cat([x, torch.full_like(x[..., :1], t)], -1)


# ------------------------------------------------------------------------------------- trajectories, to rounding


def classical(field: Field, t: float, h: float, p: Tensor) -> Tensor:
    """One step of Kutta's method of 1901, weights 1/6 (1, 2, 2, 1): not the 3/8 rule that the package has."""
    k1 = field(t, p)
    k2 = field(t + h / 2, p + h / 2 * k1)
    k3 = field(t + h / 2, p + h / 2 * k2)
    k4 = field(t + h, p + h * k3)
    return p + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def advance(field: Field, t: float, h: float, p: Tensor, tolerance: float) -> Tensor:
    """p at t + h: halved until two halves are one whole to `tolerance` a unit of time, also across a kink of ReLU.

    Their difference is then taken once more towards zero (Richardson), so what is left is far below `tolerance`.
    """
    middle = t + h / 2
    whole, half = classical(field, t, h, p), classical(field, t, h / 2, p)
    halves = classical(field, middle, h / 2, half)
    with torch.no_grad():
        error = ((whole - halves).abs() / (1 + halves.abs())).max().item()
    if error <= max(tolerance * h, 1e-15):
        return halves + (halves - whole) / 15
    half = advance(field, t, h / 2, p, tolerance)
    return advance(field, middle, h / 2, half, tolerance)


def at(field: Field, start: Tensor, times: Tensor, tolerance: float = 1e-8) -> Tensor:
    """p (streams, layers, *times.shape, dim) at times of any shape and order, from p(0) = start; differentiable."""
    known, now, p = {}, 0.0, start.double()
    for time in sorted({0.0, *times.double().flatten().tolist()}):
        if time > now:
            p, now = advance(field, now, time - now, p, tolerance), time
        known[time] = p
    states = [known[time] for time in times.double().flatten().tolist()]
    if not states:
        return start.double().new_empty(*start.shape[:2], *times.shape, start.shape[2])
    return torch.stack(states, 2).unflatten(2, times.shape) if times.dim() else states[0]


def positions(field: Field, start: Tensor, length: int, delta_t: float, tolerance: float = 1e-8) -> Tensor:
    """p (streams, layers, length, dim) at 0, delta_t, 2 delta_t, ..: interval by interval."""
    return at(field, start, torch.arange(length, dtype=torch.float64) * delta_t, tolerance)


# ------------------------------------------------------------------------------------------- steps of one size


def euler(field: Field, t: float, h: float, p: Tensor) -> Tensor:
    return p + h * field(t, p)


def midpoint(field: Field, t: float, h: float, p: Tensor) -> Tensor:
    return p + h * field(t + h / 2, p + h / 2 * field(t, p))


def three_eighths(field: Field, t: float, h: float, p: Tensor) -> Tensor:
    """What torchdiffeq and the authors' code call "rk4"."""
    k1 = field(t, p)
    k2 = field(t + h / 3, p + h * k1 / 3)
    k3 = field(t + 2 * h / 3, p + h * (k2 - k1 / 3))
    k4 = field(t + h, p + h * (k1 - k2 + k3))
    return p + h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)


STEPS = {"euler": euler, "midpoint": midpoint, "rk4": three_eighths}


def fixed_steps(method: str, field: Field, start: Tensor, times: list[float], h: float) -> Tensor:
    """States (streams, layers, len(times), dim) of steps of size h, and between them the cubic of states and slopes."""
    knots = [start.double()]
    for i in range(math.floor(max(times) / h) + 1):
        knots.append(STEPS[method](field, i * h, h, knots[-1]))
    states = []
    for time in times:
        i = min(math.floor(time / h), len(knots) - 2)
        u = time / h - i
        left, right = knots[i], knots[i + 1]
        if min(u, 1 - u) < 1e-9:  # a knot, whatever comes after it
            states.append(left if u < 0.5 else right)
            continue
        slope_left, slope_right = h * field(i * h, left), h * field((i + 1) * h, right)
        states.append(
            (1 + 2 * u) * (1 - u) ** 2 * left
            + u * (1 - u) ** 2 * slope_left
            + u**2 * (3 - 2 * u) * right
            - u**2 * (1 - u) * slope_right
        )
    return torch.stack(states, 2)


# --------------------------------------------------------------------------------------------------- attention


def attention(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], out_bias: Tensor, vectors: Tensor, heads: int,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """One published layer: x (batch, length, dim), weights of q, k, v and output (dim, dim), vectors (3, length, dim).

    q_i = W_q x_i + b_q,i, likewise k and v; projections have no bias of their own, and the vectors are there before
    the scores are divided by the root of the head's width.
    """
    x, out_bias, vectors = x.double(), out_bias.double(), vectors.double()
    wq, wk, wv, wo = (w.double() for w in weights)
    q, k, v = (x @ w.T + b for w, b in zip((wq, wk, wv), vectors))
    out, width = torch.empty_like(x), x.shape[-1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(width)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        out[..., part] = torch.softmax(scores, -1) @ v[..., part]
    return out @ wo.T + out_bias
