"""Explicit Runge-Kutta steps whose coefficients are numbers here, so that a step can be made again with autograd on.

Each method is written with one more stage at the new state, k_s = f(t + h, y1), so its last row of weights is the
solution. Between the ends of a step the trajectory is a polynomial in u = (time - t) / h, degree 4 at most::

    y(u) = y0 + h sum_j u^j sum_i D_ji k_i,    j = 1..4

torchdiffeq chooses the steps of the adaptive methods (path.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

DEGREE = 4
Field = Callable[[Tensor, Tensor], Tensor]


class Method(NamedTuple):
    """Nodes c_2..c_s, rows of weights a_2..a_s and the DEGREE x s matrix D of the output between the ends."""

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    dense: tuple[tuple[float, ...], ...]
    adaptive: bool = False

    @property
    def stages(self) -> int:
        return len(self.nodes) + 1


def _method(
    nodes: Sequence[Fraction | float],
    weights: Sequence[Sequence[Fraction | float]],
    middle: Sequence[Fraction | float] | None = None,
    adaptive: bool = False,
) -> Method:
    """`middle`: weights of the state half way; None for a cubic through both ends and their slopes (Hermite)."""
    stages = len(nodes) + 1
    final = [*weights[-1], 0]
    first, last = ([int(i == at) for i in range(stages)] for at in (0, stages - 1))
    half = middle or [b / 2 + Fraction(f - g, 8) for b, f, g in zip(final, first, last)]
    columns = [
        (f, g - 4 * f - 5 * b + 16 * m, 5 * f - 3 * g + 14 * b - 32 * m, 2 * (g - f) - 8 * b + 16 * m)
        for f, g, b, m in zip(first, last, final, half)
    ]
    return Method(
        tuple(map(float, nodes)),
        tuple(tuple(map(float, row)) for row in weights),
        tuple(tuple(map(float, row)) for row in zip(*columns)),
        adaptive,
    )


_F = Fraction
METHODS = {
    # Dormand and Prince 1980; its state half way is Shampine's (1986).
    "dopri5": _method(
        (_F(1, 5), _F(3, 10), _F(4, 5), _F(8, 9), 1, 1),
        (
            (_F(1, 5),),
            (_F(3, 40), _F(9, 40)),
            (_F(44, 45), _F(-56, 15), _F(32, 9)),
            (_F(19372, 6561), _F(-25360, 2187), _F(64448, 6561), _F(-212, 729)),
            (_F(9017, 3168), _F(-355, 33), _F(46732, 5247), _F(49, 176), _F(-5103, 18656)),
            (_F(35, 384), 0, _F(500, 1113), _F(125, 192), _F(-2187, 6784), _F(11, 84)),
        ),
        (
            _F(6025192743, 2 * 30085553152),
            0,
            _F(51252292925, 2 * 65400821598),
            _F(-2691868925, 2 * 45128329728),
            _F(187940372067, 2 * 1594534317056),
            _F(-1776094331, 2 * 19743644256),
            _F(11237099, 2 * 235043384),
        ),
        adaptive=True,
    ),
    # Bogacki and Shampine 1989, with the cubic output that belongs to it: the state half way that torchdiffeq takes
    # for it, y0 + h/2 k_2, is of first order only.
    "bosh3": _method(
        (_F(1, 2), _F(3, 4), 1),
        ((_F(1, 2),), (0, _F(3, 4)), (_F(2, 9), _F(1, 3), _F(4, 9))),
        adaptive=True,
    ),
    # The 3/8 rule, which is what torchdiffeq and the published code call "rk4".
    "rk4": _method(
        (_F(1, 3), _F(2, 3), 1, 1),
        ((_F(1, 3),), (_F(-1, 3), 1), (1, -1, 1), (_F(1, 8), _F(3, 8), _F(3, 8), _F(1, 8))),
    ),
    "midpoint": _method((_F(1, 2), 1), ((_F(1, 2),), (0, 1))),
    "euler": _method((1,), ((1,),)),
}


class Slopes(NamedTuple):
    """One step: its stages' slopes k_1..k_s, and the state at its end."""

    slopes: list[Tensor]
    end: Tensor


def step(
    method: Method, field: Field, times: Tensor, size: float, state: Tensor, first: Tensor | None = None
) -> Slopes:
    """One step of `size` from `state`; `times` (stages,) are those of its stages. `first` is k_1 where it is known."""
    slopes = [field(times[0], state) if first is None else first]
    for time, row in zip(times[1:], method.weights):
        moved = state
        for weight, slope in zip(row, slopes):
            if weight:
                moved = torch.add(moved, slope, alpha=size * weight)
        slopes.append(field(time, moved))
    return Slopes(slopes, moved)


def times_of(method: Method, starts: Sequence[float], sizes: Sequence[float], like: Tensor) -> Tensor:
    """(steps, stages) times, in the state's dtype: one transfer to its device for all steps."""
    start, size = torch.tensor([starts, sizes], dtype=torch.float64)[..., None]
    times: Tensor = start + size * torch.tensor([0.0, *method.nodes], dtype=torch.float64)
    return times.to(like)


def dense_of(method: Method, like: Tensor) -> Tensor:
    return like.new_tensor(method.dense)


def coefficients(dense: Tensor, slopes: list[Tensor], size: float) -> Tensor:
    """(DEGREE, *state): what multiplies u, u^2, ... between the ends of a step; `dense` is D."""
    made: Tensor = (dense * size) @ torch.stack(slopes).flatten(1)
    return made.view(-1, *slopes[0].shape)
