"""Autograd through a trajectory.

The steps are chosen without autograd and then fixed: what is differentiated is the computation with those steps.

- "checkpoint": keeps the state at the start of each step; backward makes one step again at a time. Exact gradients,
  memory of one state a step and of one step's graph.
- "direct": plain autograd through all steps; the same gradients, all stages in memory, differentiable twice.
- "adjoint": torchdiffeq.odeint_adjoint from step to step, which solves the adjoint equation backward in time: gradients
  within the solver's tolerance, memory of one state a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from ..attend import RefuseSecond
from ..biases.bias import no_autocast
from .path import Path, Plan, worst_vector
from .reading import Reader, Times, gradients, locate, read_with_grad
from .runge_kutta import METHODS, Field, Slopes, coefficients, step, times_of

GRADIENTS = ("checkpoint", "direct", "adjoint")
SECOND = (
    'the vectors of posattn.FLOATER have a second derivative only with gradient="direct": make it so for a gradient of '
    "their gradient (gradient penalty, Hessian-vector product)"
)


class Dynamics:
    """A module with the tensors that it is to use: a field, and what its gradients belong to.

    `tensors` stand for the module's parameters and buffers: as they were when the forward pass ran, or cast to the
    dtype of the solve. The module itself is left alone, for other threads may be using it.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.module, self.tensors = module, tensors

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Dynamics:
        """With its own parameters and buffers, in the dtype of the solve."""
        own = _tensors_of(module)
        return cls(module, {name: x.to(dtype) if x.is_floating_point() else x for name, x in own.items()})

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Dynamics:
        return Dynamics(self.module, dict(zip(self.tensors, tensors)))

    def field(self) -> Field:
        """The module, or one like it that has the tensors in the place of its own."""
        own = _tensors_of(self.module)
        if all(own[name] is x for name, x in self.tensors.items()):
            return self.module
        for name, module in self.module.named_modules():
            if "forward" in vars(module):
                raise RuntimeError(
                    f"dynamics{'.' * bool(name)}{name} is a {type(module).__name__} whose forward is its own and no "
                    "method (torch.compile, a wrapper's hook): it can be solved with the parameters that it has, in "
                    "float32 or float64, and neither with 16-bit ones nor with others in their place"
                )
        return _like(self.module, {id(own[name]): x for name, x in self.tensors.items()}, {})


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _like(module: nn.Module, instead: dict[int, Tensor], made: dict[int, nn.Module]) -> nn.Module:
    """The same module but for its tensors; what is shared by several places stays shared."""
    if id(module) not in made:
        made[id(module)] = copy = module.__new__(type(module))
        vars(copy).update(vars(module))
        for kind in ("_parameters", "_buffers"):
            tensors = {name: None if x is None else instead.get(id(x), x) for name, x in vars(module)[kind].items()}
            vars(copy)[kind] = tensors
        children = {name: child and _like(child, instead, made) for name, child in module._modules.items()}
        vars(copy)["_modules"] = children
    return made[id(module)]


def solve(path: Path, end: float, dynamics: Dynamics) -> None:
    """Let `path` reach `end`. Raises ValueError for dynamics that draw random numbers."""
    for name, module in dynamics.module.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"dynamics{'.' * bool(name)}{name} is {module} in training mode, but dynamics must be a function of t "
                "and p: a trajectory cannot be followed, or followed again in backward, through random ones"
            )
    path.reach(end, dynamics.field())


def vectors(path: Path, initial: Tensor, dynamics: Dynamics, times: Tensor, gradient: str) -> Tensor:
    """(streams, layers, n, dim) at ascending float64 `times` (CPU), differentiable in initial and the dynamics.

    `path` begins at `initial`; it is solved here, and its steps are dropped.
    """
    if gradient == "checkpoint":
        made: Tensor = _Checkpointed.apply(  # type: ignore[no-untyped-call]
            path, times, dynamics, initial, *dynamics.tensors.values()
        )
        return made
    path.reader = lambda step: None
    with torch.no_grad():
        solve(path, float(times[-1]), dynamics)
    taken = Taken.of(path, times)
    if gradient == "adjoint":
        return _adjoint(taken, initial, dynamics)
    return _direct(taken, initial, dynamics.field())


class Taken(NamedTuple):
    """Steps without their numbers: what is needed to take them again."""

    plan: Plan
    starts: list[float]
    sizes: list[float]
    times: Times
    moments: Tensor  # (steps, stages)
    dense: Tensor

    @classmethod
    def of(cls, path: Path, times: Tensor) -> Taken:
        """Of a path, which loses them."""
        starts, sizes = [step.start for step in path.steps], [step.size for step in path.steps]
        path.steps = []
        moments = times_of(path.method, starts, sizes, path.initial)
        return cls(path.plan, starts, sizes, locate(times, starts, sizes, path.initial), moments, path.dense)

    def again(self, k: int, field: Field, state: Tensor, first: Tensor | None = None) -> Slopes:
        return step(METHODS[self.plan.method], field, self.moments[k], self.sizes[k], state, first)

    def coefficients(self, k: int, made: Slopes) -> Tensor:
        return coefficients(self.dense, made.slopes, self.sizes[k])


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, path: Path, times: Tensor, dynamics: Dynamics, initial: Tensor, *tensors: Tensor
    ) -> Tensor:
        streams, layers, dim = initial.shape
        out = torch.empty(streams, layers, len(times), dim, dtype=initial.dtype, device=initial.device)
        path.reader = Reader(times, out)
        solve(path, float(times[-1]), dynamics)
        ctx.save_for_backward(*tensors, *(step.state for step in path.steps))
        ctx.taken, ctx.dynamics, ctx.num_tensors = Taken.of(path, times), dynamics, len(tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        # Grad mode is on only under create_graph=True.
        run = partial(_RefuseSecondOfSolve.apply, _back) if torch.is_grad_enabled() else _back
        return None, None, None, *run(ctx, grad_out, *ctx.saved_tensors)


def _back(ctx: Any, grad_out: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the initial state and of the dynamics' tensors, None for those that need none."""
    tensors, states = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
    needed = ctx.needs_input_grad[4:]
    wanted = [x for x, need in zip(tensors, needed) if need]
    field = ctx.dynamics.with_tensors(tensors).field()
    grad_initial, found = _retrace(ctx.taken, grad_out, field, wanted, states)
    grads = iter(torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, found))
    return grad_initial if ctx.needs_input_grad[3] else None, *(next(grads) if need else None for need in needed)


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


class _RefuseSecondOfSolve(RefuseSecond):
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
    field = lambda time, state: dynamics.field()(time, state)  # in backward the module may have others
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
