"""Reading a trajectory between the ends of its steps: from polynomials to vectors, and the way back of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .path import Step
from .runge_kutta import DEGREE

ROWS = 256  # on a CPU this many positions stay in a cache while they are summed up


class Times(NamedTuple):
    """Ascending times, and which of them each step reaches.

    powers (n, DEGREE): u, u^2, ... of each time, u its place within its step; bounds: step k has the times from
    bounds[k] to bounds[k + 1]. A time at which one step ends and another begins belongs to the one that ends there;
    at_end has the steps whose last time that is.
    """

    powers: Tensor
    bounds: list[int]
    at_end: set[int]

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(k, from, to) of the steps that have times."""
        for k, (start, end) in enumerate(zip(self.bounds, self.bounds[1:])):
            if start < end:
                yield k, start, end


def locate(times: Tensor, starts: Sequence[float], sizes: Sequence[float], like: Tensor) -> Times:
    """`times` ascend, float64 on the CPU."""
    begin, size = torch.tensor([starts, sizes], dtype=torch.float64)
    bounds = [0, *torch.searchsorted(times, begin + size, right=True).tolist()]
    bounds[-1] = len(times)  # whatever rounding does to the last time of all
    at = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(bounds).diff())
    place = ((times - begin[at]) / size[at]).clamp(0, 1)
    at_end = set(at[place == 1.0].tolist())
    return Times((place[:, None] ** torch.arange(1, DEGREE + 1)).to(like), bounds, at_end)


def read(steps: Sequence[Step], times: Times, out: Tensor) -> None:
    """Write the vectors at `times` to out (streams, layers, n, dim), of whatever dtype.

    Sums of products element by element: a vector does not depend on which others are read along with it. At the end of
    a step it is the solver's state there, which the polynomial gives with its own rounding.
    """
    for k, start, end in times.spans():
        state, parts = steps[k].state[..., None, :], steps[k].coefficients.unsqueeze(-2).unbind()
        rows = ROWS if out.device.type == "cpu" else end - start
        for first in range(start, end, rows):
            last = min(first + rows, end)
            place, into = times.powers[first:last], out[..., first:last, :]
            wide = into if into.dtype == state.dtype else state.new_empty(into.shape)
            torch.addcmul(state, parts[0], place[:, :1], out=wide)
            for j in range(1, DEGREE):
                wide.addcmul_(parts[j], place[:, j : j + 1])
            if wide is not into:
                into.copy_(narrowed(wide, into.dtype))
        if k in times.at_end:
            out[..., end - 1, :] = narrowed(steps[k].reached, out.dtype)


def narrowed(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`. Raises RuntimeError where float16 has no such numbers."""
    made = vectors.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(made).all()):
        raise RuntimeError(
            f"FLOATER's vectors reach {vectors.abs().max():.3g}, beyond float16 (65504): use bfloat16 or float32 "
            "parameters, a smaller delta_t, or smaller weights of the dynamics"
        )
    return made


class Reader:
    """Reads the vectors at ascending `times` (float64, CPU) into `out` while a path is being taken, step by step."""

    def __init__(self, times: Tensor, out: Tensor) -> None:
        self.times, self.out, self.done = times, out, 0

    def __call__(self, step: Step) -> None:
        done, count = self.done, int(torch.searchsorted(self.times, step.end, right=True))
        if count > done:
            here = locate(self.times[done:count], [step.start], [step.size], step.state)
            read([step], here, self.out[..., done:count, :])
            self.done = count


def read_with_grad(states: Sequence[Tensor], coefficients: Sequence[Tensor], times: Times) -> Tensor:
    """The same as a differentiable function of the steps' states and coefficients: (streams, layers, n, dim)."""
    read = []
    for k, start, end in times.spans():
        here = states[k][..., None, :]
        for j, part in enumerate(coefficients[k].unsqueeze(-2)):
            here = torch.addcmul(here, part, times.powers[start:end, j : j + 1])
        read.append(here)
    return torch.cat(read, dim=2)


def gradients(grad_out: Tensor, times: Times, k: int) -> tuple[Tensor, Tensor]:
    """Those of step k's state (streams, layers, dim) and coefficients (DEGREE, streams, layers, dim)."""
    start, end = times.bounds[k], times.bounds[k + 1]
    grad, powers = grad_out[..., start:end, :], times.powers[start:end]
    both = torch.cat([torch.ones_like(powers[:, :1]), powers], dim=1).T @ grad  # (streams, layers, 1 + DEGREE, dim)
    return both[..., 0, :], both[..., 1:, :].movedim(-2, 0)
