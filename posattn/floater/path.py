"""A trajectory solved by torchdiffeq and kept step by step, so that it can be read anywhere, extended and repeated.

An adaptive solver does not cut its steps to the times it is asked for: the same steps are taken whatever the length, so
a prefix of a longer solve is the shorter solve, and a solve that goes on from the last step kept is one solve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .runge_kutta import METHODS, Field, coefficients, dense_of, step, times_of

# A step that meets an overflow is made this much smaller, this many times, before the trajectory counts as lost.
SHRINK, SHRINKS = 0.1, 12


class Plan(NamedTuple):
    """How to solve: everything that decides the numbers, parameters apart."""

    method: str
    rtol: float
    atol: float
    step_size: float  # that of a fixed-step method; the first one tried of an adaptive method
    max_steps: int
    delta_t: float
    streams: tuple[str, ...]


class Solve(NamedTuple):
    """What a solve, or an extension, cost: calls of the dynamics, steps taken, steps rejected; and the time reached."""

    evaluations: int
    steps: int
    rejected: int
    end: float


class Step(NamedTuple):
    """From `start` to `start + size`: state and slope at the start, and the polynomial between (runge_kutta.py)."""

    start: float
    size: float
    state: Tensor
    slope: Tensor
    coefficients: Tensor
    reached: Tensor  # the state at the end

    @property
    def end(self) -> float:
        return self.start + self.size


class _Lost(Exception):
    """No step, however small, leads on from here."""


class _TooMany(Exception):
    """More steps than allowed."""


class Path:
    """The trajectory from `initial` (streams, layers, dim) at time 0, as far as it has been asked for.

    With a `reader`, which is given each step as it is taken, of steps only what it takes to make them again is kept.
    """

    def __init__(self, plan: Plan, initial: Tensor, reader: Callable[[Step], None] | None = None) -> None:
        self.plan, self.initial, self.reader = plan, initial, reader
        self.method = METHODS[plan.method]
        self.dense = dense_of(self.method, initial)
        self.steps: list[Step] = []
        self.solve = Solve(0, 0, 0, 0.0)

    @property
    def end(self) -> float:
        return self.steps[-1].end if self.steps else 0.0

    @torch.no_grad()
    def reach(self, end: float, field: Field) -> None:
        """Take steps until `end` is within them. Raises RuntimeError for a trajectory that cannot be followed.

        It begins with the last step kept, taken once more, so that the next one is what it would have been.
        """
        if self.steps and self.end >= end:
            return
        end = max(end, 1e-3 * self.plan.step_size)  # position 0 is read from a step, too
        watch = _Watch(self, field, self.steps.pop() if self.steps else None)
        try:
            self._adapt(end, watch) if self.method.adaptive else self._march(end, watch)
        finally:
            self.solve = Solve(watch.evaluations, watch.taken, watch.rejected, self.end)

    def _adapt(self, end: float, watch: _Watch) -> None:
        """torchdiffeq decides on the steps; `watch` keeps them."""
        from torchdiffeq import odeint  # here: it imports scipy, which takes a while

        plan = self.plan
        for _ in range(SHRINKS + 1):
            watch.fresh = True
            span = torch.tensor([watch.start, end], dtype=torch.float64, device=self.initial.device)
            options = {"first_step": watch.size, "norm": worst_vector}
            try:
                odeint(
                    watch, watch.state, span, rtol=plan.rtol, atol=plan.atol, method=plan.method, options=options
                )
                return
            except _TooMany:
                raise RuntimeError(watch.too_many()) from None
            except (_Lost, AssertionError):  # torchdiffeq asserts that states are finite
                if watch.busy:  # an assertion of the dynamics' own
                    raise
                watch.size = watch.tried * SHRINK
        raise RuntimeError(watch.lost())

    def _march(self, end: float, watch: _Watch) -> None:
        """Steps of one size, at multiples of it. A GPU is waited for once, at the end."""
        plan, kept = self.plan, len(self.steps)
        size, count = plan.step_size, end / plan.step_size
        if count - kept > plan.max_steps:
            raise RuntimeError(
                f'FLOATER with method="{plan.method}" would take {count:.6g} steps of step_size = {size:g} to position '
                f"{end / plan.delta_t:.6g}, more than max_steps = {plan.max_steps}: use a larger step_size, an "
                "adaptive method, fewer positions, or a larger max_steps"
            )
        starts = [k * size for k in range(kept, max(kept + 1, math.ceil(count)))]
        finite = []
        for start, times in zip(starts, times_of(self.method, starts, [size] * len(starts), self.initial)):
            watch.start = start
            made = step(self.method, watch.evaluate, times, size, watch.state, watch.slope)
            watch.slope, watch.slopes, watch.reached = made.slopes[0], made.slopes[1:], made.end
            finite.append(watch.keep(size))
        if not torch.stack(finite).all():
            bad = kept + int(torch.stack(finite).int().argmin())
            states = [*(step.state for step in self.steps), watch.state][bad : bad + 2]
            self.steps = self.steps[:bad]
            watch.start, watch.slope, watch.slopes = bad * size, None, []
            watch.state, watch.reached = states
            raise RuntimeError(watch.lost())


class _Watch:
    """The dynamics as torchdiffeq calls them; it writes down each step that is accepted."""

    def __init__(self, path: Path, field: Field, last: Step | None) -> None:
        self.path, self.field = path, field
        self.start, self.size = (last.start, last.size) if last else (0.0, path.plan.step_size)
        self.state = last.state if last else path.initial
        self.slope: Tensor | None = last.slope if last else None  # at start
        self.slopes: list[Tensor] = []  # of the step being tried, without the first
        self.reached, self.tried = self.state, self.size
        self.evaluations = self.taken = self.rejected = 0
        self.fresh, self.busy = True, False

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        if self.fresh:
            self.fresh = False
            if self.slope is None:
                self.slope = self.evaluate(time, state)
            return self.slope
        self.reached = state  # in the last stage: the state at the step's end
        self.slopes.append(self.evaluate(time, state))
        return self.slopes[-1]

    def evaluate(self, time: Tensor, state: Tensor) -> Tensor:
        self.busy = True
        slope = self.field(time, state)
        self.busy = False
        if not self.evaluations:
            check_slope(slope, state)
        self.evaluations += 1
        return slope

    def callback_step(self, start: Tensor, state: Tensor, size: Tensor) -> None:
        tried = float(size)
        if not self.start + tried > self.start:
            raise _Lost
        if self.taken + self.rejected >= self.path.plan.max_steps:
            raise _TooMany
        self.tried, self.slopes = tried, []

    def callback_accept_step(self, start: Tensor, state: Tensor, size: Tensor) -> None:
        if not self.keep(self.tried, wait=True):
            raise _Lost

    def callback_reject_step(self, start: Tensor, state: Tensor, size: Tensor) -> None:
        self.rejected += 1

    def keep(self, size: float, wait: bool = False) -> Tensor:
        """Add the step to the path, and tell whether its polynomial is finite: a state may be although that is not.

        The answer stays on the device. With `wait` it is waited for, and a step without is not added.
        """
        assert self.slope is not None
        slopes = [self.slope, *self.slopes]
        made = coefficients(self.path.dense, slopes, size)
        finite = torch.isfinite(made).all()
        if wait and not finite:
            return finite
        taken = Step(self.start, size, self.state, self.slope, made, self.reached)
        if self.path.reader is not None:
            self.path.reader(taken)
            nothing = self.path.dense  # of no size to speak of
            taken = taken._replace(slope=nothing, coefficients=nothing, reached=nothing)
        self.path.steps.append(taken)
        self.start, self.state, self.slope = self.start + size, self.reached, slopes[-1]
        self.taken += 1
        return finite

    def lost(self) -> str:
        """What to say of a trajectory that leaves the numbers there are."""
        seen = [self.state, *([] if self.slope is None else [self.slope]), *self.slopes, self.reached]
        bad = torch.stack([~torch.isfinite(x) for x in seen]).any(0).any(-1)
        size = torch.stack([x.abs().amax(-1) for x in seen]).nan_to_num(math.inf).amax(0)
        plan = self.path.plan
        return (
            f"the trajectory of FLOATER is not finite: {self._name(torch.where(bad, math.inf, size))} diverges near "
            f"position {self.start / plan.delta_t:.0f} (t = {self.start:.4g}). Use a smaller delta_t (now "
            f"{plan.delta_t:g}), smaller weights of the dynamics (a smaller gain or learning rate, weight decay), or "
            "fewer positions"
        )

    def too_many(self) -> str:
        """What to say of a trajectory that needs very small steps."""
        plan, slopes = self.path.plan, [x for x in (self.slope, *self.slopes) if x is not None]
        spread = torch.stack(slopes).sub(slopes[0]).abs().amax(0) / (plan.atol + plan.rtol * self.state.abs())
        return (
            f"solving FLOATER's trajectory took more than max_steps = {plan.max_steps} steps by position "
            f"{self.start / plan.delta_t:.0f} (t = {self.start:.4g}), the last of {self.tried:.2g}: it is stiff or "
            f"rough, most of all in {self._name(spread.amax(-1))}. Use a smaller delta_t (now {plan.delta_t:g}), "
            f"smaller weights of the dynamics, a larger rtol or atol (now {plan.rtol:g}, {plan.atol:g}), float64 "
            'parameters if they are that small, a larger max_steps, or method="rk4" with a step_size of your choice'
        )

    def _name(self, scores: Tensor) -> str:
        """Stream and layer of the largest of (streams, layers) scores."""
        stream, layer = divmod(int(scores.flatten().argmax()), scores.shape[-1])
        return f'stream "{self.path.plan.streams[stream]}", layer {layer}'


def worst_vector(error: Tensor) -> Tensor:
    """The norm that tolerances bound: the root mean square of the worst of all vectors, not of all together."""
    return error.square().mean(-1).sqrt().max()


def check_slope(slope: Tensor, state: Tensor) -> None:
    if not isinstance(slope, Tensor):
        raise TypeError(f"dynamics must return a Tensor, got {type(slope).__name__}")
    if slope.shape != state.shape or slope.dtype != state.dtype or slope.device != state.device:
        raise ValueError(
            f"dynamics must return what it is given, {tuple(state.shape)}, {state.dtype} on {state.device}; "
            f"got {tuple(slope.shape)}, {slope.dtype} on {slope.device}"
        )
