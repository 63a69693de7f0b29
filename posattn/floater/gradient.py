"""Autograd through a trajectory.

The steps are chosen without autograd and then fixed: what is differentiated is the computation with those steps.

- "checkpoint": keeps the state at the start of each step; backward makes one step again at a time. Exact gradients,
  memory of one state a step and of one step's graph.
- "direct": plain autograd through all steps; the same gradients, all stages in memory, differentiable twice.
- "adjoint": torchdiffeq.odeint_adjoint from step to step, which solves the adjoint equation backward in time: gradients
  within the solver's tolerance, memory of one state a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..biases.bias import no_autocast
from ..ops import _RefuseSecond
from .path import Path, Plan, Step, worst_vector
from .reading import Times, gradients, locate, read, read_with_grad
from .runge_kutta import METHODS, Field, Slopes, coefficients, dense_of, step, times_of

GRADIENTS = ("checkpoint", "direct", "adjoint")
SECOND = (
    'the vectors of posattn.FLOATER have a second derivative only with gradient="direct": make it so for a gradient of '
    "their gradient (gradient penalty, Hessian-vector product)"
)


class Dynamics:
    """A module with the tensors that it is to use: a field, and what its gradients belong to.

    `tensors` take the place of the module's parameters and buffers while a field of it is in use: as they stood when
    the forward pass ran, or cast to the dtype of the solve.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.module, self.tensors = module, tensors

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Dynamics:
        """With its own parameters and buffers, in the dtype of the solve."""
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return cls(module, {name: x.to(dtype) if x.is_floating_point() else x for name, x in named.items()})

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Dynamics:
        return Dynamics(self.module, dict(zip(self.tensors, tensors)))

    def use(self, run: Callable[[Field], Any]) -> Any:
        """run(field), the module holding the tensors meanwhile."""
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        if all(own[name] is x for name, x in self.tensors.items()):
            return run(self.module)
        holder = _Holder(self.module)
        return torch.func.functional_call(holder, {f"module.{name}": x for name, x in self.tensors.items()}, (run,))


class _Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[Field], Any]) -> Any:
        return run(self.module)


def solve(path: Path, end: float, dynamics: Dynamics) -> None:
    """Let `path` reach `end`."""
    dynamics.use(lambda field: path.reach(end, field))


def vectors(path: Path, initial: Tensor, dynamics: Dynamics, times: Tensor, gradient: str) -> Tensor:
    """(streams, layers, n, dim) at ascending float64 `times` (CPU), differentiable in initial and the dynamics.

    `path` begins at `initial`; it is solved here, and its steps are dropped once they are read.
    """
    with torch.no_grad():
        solve(path, float(times[-1]), dynamics)
    steps, path.steps = path.steps, []
    if gradient == "checkpoint":
        made: Tensor = _Checkpointed.apply(  # type: ignore[no-untyped-call]
            path.plan, steps, times, dynamics, initial, *dynamics.tensors.values()
        )
        return made
    taken = Taken.of(path.plan, steps, times, initial)
    if gradient == "adjoint":
        return _adjoint(taken, initial, dynamics)
    made = dynamics.use(lambda field: _direct(taken, initial, field))
    return made


class Taken(NamedTuple):
    """Steps without their numbers: what is needed to take them again."""

    plan: Plan
    starts: list[float]
    sizes: list[float]
    times: Times
    moments: Tensor  # (steps, stages)
    dense: Tensor

    @classmethod
    def of(cls, plan: Plan, steps: list[Step], times: Tensor, like: Tensor) -> Taken:
        starts, sizes = [step.start for step in steps], [step.size for step in steps]
        method = METHODS[plan.method]
        moments, dense = times_of(method, starts, sizes, like), dense_of(method, like)
        return cls(plan, starts, sizes, locate(times, starts, sizes, like), moments, dense)

    def again(self, k: int, field: Field, state: Tensor, first: Tensor | None = None) -> Slopes:
        return step(METHODS[self.plan.method], field, self.moments[k], self.sizes[k], state, first)

    def coefficients(self, k: int, made: Slopes) -> Tensor:
        return coefficients(self.dense, made.slopes, self.sizes[k])


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, steps: list[Step], times: Tensor, dynamics: Dynamics, initial: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.taken, ctx.dynamics, ctx.num_tensors = Taken.of(plan, steps, times, initial), dynamics, len(tensors)
        streams, layers, dim = initial.shape
        out = torch.empty(streams, layers, len(times), dim, dtype=initial.dtype, device=initial.device)
        read(steps, ctx.taken.times, out)
        ctx.save_for_backward(*tensors, *(step.state for step in steps))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        # Grad mode is on only under create_graph=True.
        run = partial(_RefuseSecondOfSolve.apply, _back) if torch.is_grad_enabled() else _back
        return None, None, None, None, *run(ctx, grad_out, *ctx.saved_tensors)


def _back(ctx: Any, grad_out: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the initial state and of the dynamics' tensors, None for those that need none."""
    tensors, states = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
    needed = ctx.needs_input_grad[5:]
    wanted = [x for x, need in zip(tensors, needed) if need]
    run = lambda field: _retrace(ctx.taken, grad_out, field, wanted, states)
    grad_initial, grads = ctx.dynamics.with_tensors(tensors).use(run)
    given = iter(grads)
    return grad_initial if ctx.needs_input_grad[4] else None, *(next(given) if need else None for need in needed)


def _retrace(
    taken: Taken, grad_out: Tensor, field: Field, tensors: list[Tensor], states: tuple[Tensor, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """One step made again at a time, the last one first."""
    grad_state: Tensor | None = None
    grads: list[Tensor | None] = [None] * len(tensors)
    for k in reversed(range(len(states))):
        read_here = taken.times.bounds[k] < taken.times.bounds[k + 1]
        if grad_state is None and not read_here:
            continue
        with torch.enable_grad(), no_autocast(grad_out.device.type):
            state = states[k].detach().requires_grad_()
            made = taken.again(k, field, state)
            pairs = [] if grad_state is None else [(made.end, grad_state)]
            here = torch.zeros_like(state)
            if read_here:
                here, grad_coefficients = gradients(grad_out, taken.times, k)
                pairs.append((taken.coefficients(k, made), grad_coefficients))
            pairs = [(made, grad) for made, grad in pairs if made.requires_grad]
            asked = (state, *tensors)
            found: tuple[Tensor | None, ...] = (None,) * len(asked)
            if pairs:
                outputs, arriving = zip(*pairs)
                found = torch.autograd.grad(outputs, asked, arriving, allow_unused=True)
        first, *more = found
        grad_state = here if first is None else here + first
        grads = [new if old is None else old if new is None else old + new for old, new in zip(grads, more)]
    return grad_state, grads


class _RefuseSecondOfSolve(_RefuseSecond):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(SECOND)


def _refuse_second(grad: Tensor) -> None:
    if torch.is_grad_enabled():  # under create_graph=True only
        raise RuntimeError(SECOND)


def _direct(taken: Taken, state: Tensor, field: Field) -> Tensor:
    states, parts, slope = [], [], None
    for k in range(len(taken.sizes)):
        made = taken.again(k, field, state, slope)
        states.append(state)
        parts.append(taken.coefficients(k, made))
        state, slope = made.end, made.slopes[-1]
    return read_with_grad(states, parts, taken.times)


def _adjoint(taken: Taken, initial: Tensor, dynamics: Dynamics) -> Tensor:
    from torchdiffeq import odeint_adjoint

    plan, starts, sizes = taken.plan, taken.starts, taken.sizes
    field = lambda time, state: dynamics.use(lambda module: module(time, state))
    part = lambda k, state: taken.coefficients(k, taken.again(k, field, state))
    ends = torch.tensor([*starts, starts[-1] + sizes[-1]], dtype=torch.float64, device=initial.device)
    adaptive = METHODS[plan.method].adaptive
    states = odeint_adjoint(
        field,
        initial,
        ends,
        rtol=plan.rtol,
        atol=plan.atol,
        method=plan.method,
        options={"first_step": sizes[0], "norm": worst_vector} if adaptive else None,
        adjoint_params=tuple(x for x in dynamics.tensors.values() if x.requires_grad),
    )
    parts = [checkpoint(part, k, states[k], use_reentrant=False) for k in range(len(sizes))]
    out = read_with_grad(states.unbind(), parts, taken.times)
    if out.requires_grad:
        out.register_hook(_refuse_second)
    return out
