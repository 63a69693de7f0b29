"""FLOATER: position vectors that are the solution of a learned differential equation (Liu et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..biases.bias import check_integer, no_autocast
from .checks import check_length, check_number, check_one_of, check_positions, check_streams
from .dynamics import MLPDynamics
from .gradient import GRADIENTS, Dynamics, solve, vectors
from .held import Held
from .official import official_parts
from .path import Path, Plan, Solve
from .reading import narrowed
from .runge_kutta import METHODS
from .table import Key, Table, key_of


class FLOATER(nn.Module):
    r"""Position vectors p(0), p(delta_t), p(2 delta_t), ... of ``dp/dt = h(t, p)`` with a learned h.

    Liu, Yu, Dhillon and Hsieh, "Learning to Encode Position for Transformer with Continuous Dynamical Model", ICML 2020
    (arXiv 2003.09229), equations 8 to 13. As published the vectors take the place of the biases of a transformer's
    projections: ``q_i = W_q x_i + p_query(t_i)``, and so for keys and values, in every layer, before scores are
    scaled; h is one for all layers and streams, p(0) is each one's own. `posattn.floater.attach` does that to a model.
    With one stream and one layer they are vectors to be added to the input.

    Args:
        dim: width of the vectors.
        num_layers: layers that each have a trajectory of their own.
        streams: names of what each layer adds vectors to.
        dynamics: h, any nn.Module called as ``h(t, p)`` with t a 0-dim tensor and p (streams, layers, dim), and giving
            dp/dt of p's shape: a function of these and of its own parameters and buffers alone. None:
            `MLPDynamics(dim, gain=gain)`.
        delta_t: time from one position to the next; 0.1 in the paper (0.01 in the authors' code).
        method: an adaptive solver of torchdiffeq, "dopri5" or "bosh3", whose steps follow the trajectory whatever the
            number of positions; or a fixed step: "rk4" (torchdiffeq's, the 3/8 rule), "midpoint", "euler".
        rtol, atol: of an adaptive method: the largest error of a step is ``atol + rtol * abs(p)``, in the root mean
            square of each single vector.
        step_size: of a fixed-step method, in time; None: delta_t.
        gradient: how training differentiates. "checkpoint" keeps one state a step and makes steps again in backward,
            "direct" keeps everything and can be differentiated twice, "adjoint" solves backward in time
            (torchdiffeq.odeint_adjoint) and is right within the tolerance.
        max_steps: in one call; more is an error.
        gain: of MLPDynamics. 0: the flow starts at zero; 1: as published.

    Parameters: initial (streams, layers, dim), p(0), zeros at first; those of dynamics.

    While gradients are wanted (grad mode on, some parameter requires one) each call solves. Otherwise vectors are kept:
    solved once, extended when more are asked for, made again after any change of parameters, dtype or device, after
    `load_state_dict`, a step of any optimizer, a switch of `train` and `eval`, and `clear`. Changes in place through
    ``parameter.data``, and of what dynamics keep outside of parameters and buffers, cannot be seen: call `clear` then.
    What is returned is a view of what is kept; do not write into it. Solved in fp32 at least, whatever the parameters'
    dtype, which is that of the result. Threads may share an encoder. Raises TypeError and ValueError for arguments out
    of these ranges, and RuntimeError that names stream, layer and position for a trajectory that diverges or needs more
    than max_steps.

        >>> encoder = FLOATER(dim=8, num_layers=2)
        >>> encoder(length=5).shape  # streams, layers, length, dim
        torch.Size([3, 2, 5, 8])
        >>> encoder.at(torch.tensor([[0.5, 100.25]])).shape
        torch.Size([3, 2, 1, 2, 8])
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        streams: Sequence[str] = ("query", "key", "value"),
        dynamics: nn.Module | None = None,
        delta_t: float = 0.1,
        *,
        method: str = "dopri5",
        rtol: float = 1e-4,
        atol: float = 1e-5,
        step_size: float | None = None,
        gradient: str = "checkpoint",
        max_steps: int = 10_000,
        gain: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim, minimum=1)
        self.num_layers = check_integer("num_layers", num_layers, minimum=1)
        self.streams = check_streams(streams)
        self.delta_t = check_number("delta_t", delta_t)
        self.method = check_one_of("method", method, tuple(METHODS))
        self.rtol, self.atol = check_number("rtol", rtol), check_number("atol", atol, zero=True)
        self.step_size = None if step_size is None else check_number("step_size", step_size)
        if step_size is not None and METHODS[method].adaptive:
            raise ValueError(f'step_size is for fixed-step methods; "{method}" chooses its steps by rtol and atol')
        self.gradient = check_one_of("gradient", gradient, GRADIENTS)
        self.max_steps = check_integer("max_steps", max_steps, minimum=1)
        if dynamics is not None and not isinstance(dynamics, nn.Module):
            raise TypeError(f"dynamics must be an nn.Module or None, got {type(dynamics).__name__}")
        if dynamics is not None and gain != 0.0:
            raise ValueError(f"gain is for the dynamics made here (dynamics=None), got gain={gain} and dynamics")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype or None, got {type(dtype).__name__}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
        self.dynamics = MLPDynamics(dim, gain=gain) if dynamics is None else dynamics
        self.initial = nn.Parameter(torch.zeros(len(self.streams), num_layers, dim))
        self._table = Table()
        self._last_solve: Solve | None = None
        self._held: Held | None = None
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def forward(self, length: int | Tensor) -> Tensor:
        """The vectors of positions 0 to length - 1: (streams, layers, length, dim). Of a Tensor, what `at` gives.

        TypeError or ValueError if length is no integer of at least 0.
        """
        if isinstance(length, Tensor):
            return self._made(FLOATER._anywhere, length)
        return self._made(FLOATER._along, check_length(length))

    def at(self, positions: Tensor) -> Tensor:
        """The vectors at any positions, whole or not, in any order: (streams, layers, *positions.shape, dim).

        positions: integers or floating-point numbers, finite, at least 0; no gradient goes to them. TypeError or
        ValueError otherwise.
        """
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions must be a Tensor, got {type(positions).__name__}")
        made: Tensor = self(positions)  # not forward: hooks, as of FSDP, make parameters ready
        return made

    @property
    def last_solve(self) -> Solve | None:
        """What the latest solve or extension cost: (evaluations, steps, rejected, end); None before the first."""
        return self._last_solve

    def clear(self) -> None:
        """Forget the vectors that are kept; the next call solves."""
        self._table.clear()

    @contextmanager
    def hold(self, local: bool = False) -> Iterator[None]:
        """Solve once for all calls of forward in this block, and differentiate the solve once, at the end of it.

        For the steps of gradient accumulation, or for several steps of the optimizer: parameters of this module get no
        gradient within the block, so that an optimizer leaves them alone, and at its end the sum of what all its
        backward passes would have given, exactly; step the optimizer after it. Calls of `at` are not held. If an
        exception ends the block, there are no gradients.

        DistributedDataParallel averages what arrives in its own backward passes, and these gradients arrive later: with
        more than one process say local=True, and average them yourself.

        Raises RuntimeError if a block is open already, with several processes and not local, at the end if these
        parameters have changed within the block, and in a backward pass that comes after it.

            >>> encoder = FLOATER(dim=8, num_layers=2)
            >>> with encoder.hold():
            ...     for _ in range(4):
            ...         encoder(length=5).square().sum().backward()
        """
        if self._held is not None:
            raise RuntimeError("hold is in use already: blocks of it cannot be nested")
        if not local and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError("hold in one of several processes needs local=True: its gradients are not averaged")
        self._held = held = Held(self._key)
        try:
            yield
            held.settle()
        finally:
            held.open, self._held = False, None

    @classmethod
    def from_official(
        cls, state_dict: Mapping[str, Tensor], prefix: str = "encoder.", part: str = "self", **options: Any
    ) -> FLOATER:
        """A FLOATER with the parameters of the authors' translation models (github.com/xuanqing94/FLOATER).

        Args:
            state_dict: that of a model. Below `prefix` it holds proj_bias (3, layers, dim) and proj_flow for an
                encoder, proj_bias_selfattn (4, layers, dim) and proj_flow_selfattn for a decoder, whose streams are
                cross_query, query, key, value.
            prefix: "encoder." or "decoder.", or what else stands before these names.
            part: "cross" for the other flow of a decoder: proj_bias_encattn_kv (2, layers, dim), proj_flow_encattn_kv;
                streams cross_key, cross_value.
            options: of FLOATER; delta_t is the state dict's time_dt if not given, or 0.01, which it is in their code.

        Raises TypeError, and ValueError for missing keys, wrong shapes and convolutional flows. Vectors are those that
        the equation defines: the authors' solver returns some float32 states a fifth of a position late.
        """
        found = official_parts(state_dict, prefix, check_one_of("part", part, ("self", "cross")))
        options = {"delta_t": found.delta_t, **options}
        layers, dim = found.initial.shape[1:]
        encoder = cls(dim, layers, found.streams, **options)
        with torch.no_grad():
            encoder.initial.copy_(found.initial)
            encoder.dynamics.load_state_dict(found.dynamics)
        return encoder

    def train(self, mode: bool = True) -> FLOATER:
        if mode != self.training:
            self.clear()
        return super().train(mode)

    def _plan(self) -> Plan:
        step = self.delta_t if self.step_size is None else self.step_size
        return Plan(self.method, self.rtol, self.atol, step, self.max_steps, self.delta_t, self.streams)

    def _state(self) -> tuple[Plan, Tensor, Dynamics]:
        """How to solve, p(0) and the dynamics, in the dtype of the solve."""
        dtype = torch.promote_types(self.initial.dtype, torch.float32)
        adaptive, smallest = METHODS[self.method].adaptive, torch.finfo(dtype).eps
        if adaptive and self.rtol < smallest:
            raise ValueError(f"rtol must be at least {smallest:.2g}, what {dtype} resolves, got {self.rtol:g}")
        return self._plan(), self.initial.to(dtype), Dynamics.of(self.dynamics, dtype)

    def _tensors(self) -> Iterator[Tensor]:
        yield self.initial
        yield from self.dynamics.parameters()
        yield from self.dynamics.buffers()

    def _key(self) -> Key:
        modes = tuple(module.training for module in self.dynamics.modules())
        return key_of(self._tensors(), self.dynamics, modes, self._plan())

    def _made(self, how: Callable[[FLOATER, Any], Tensor], what: Any) -> Tensor:
        """how(self, what), outside of graphs that are being compiled: the number of steps depends on the numbers."""
        if torch.compiler.is_compiling():
            # what torch.compiler.disable does, without importing the compiler when posattn is imported
            made: Tensor = _disable_dynamo(FLOATER._eager)(self, how, what)
            return made
        return self._eager(how, what)

    def _eager(self, how: Callable[[FLOATER, Any], Tensor], what: Any) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(self.initial):
            raise RuntimeError("FLOATER has no rules for torch.func's grad, vmap and the like: use torch.autograd")
        return how(self, what)

    def _along(self, length: int) -> Tensor:
        if length == 0 or self.initial.is_meta:
            return self._blank(length)
        if self._differentiates():
            times = torch.arange(length, dtype=torch.float64) * self.delta_t
            solve: Callable[[], Tensor] = lambda: self._solved(times)
            return solve() if self._held is None else self._held.vectors(length, solve)
        return self._table.vectors(length, self._key(), self._path, self._reach, self.initial.dtype)

    def _anywhere(self, positions: Tensor) -> Tensor:
        if not positions.numel() or self.initial.is_meta:
            return self._blank(*positions.shape)
        times, place = torch.unique(check_positions(positions), return_inverse=True)
        times = times * self.delta_t
        if self._differentiates():
            found = self._solved(times)
        else:
            found = self._table.at(times, self._key(), self._path, self._reach, self.initial.dtype)
        rows = found.index_select(2, place.flatten().to(found.device))
        return rows.view(*found.shape[:2], *positions.shape, self.dim)

    def _blank(self, *shape: int) -> Tensor:
        """Where there is nothing to solve: no positions, or no numbers. Every parameter has a gradient, which is 0."""
        made = self.initial.new_empty((len(self.streams), self.num_layers, *shape, self.dim))
        return made + 0 * torch.stack([x.sum() for x in self.parameters()]).sum() if self._differentiates() else made

    def _differentiates(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.parameters())

    def _solved(self, times: Tensor) -> Tensor:
        """In training: (streams, layers, n, dim) at ascending times, with autograd."""
        with no_autocast(self.initial.device.type):
            plan, initial, dynamics = self._state()
            path = Path(plan, initial.detach())
            try:
                out = vectors(path, initial, dynamics, times, self.gradient)
            finally:
                self._last_solve = path.solve
            return narrowed(out, self.initial.dtype)

    def _path(self) -> Path:
        """Of evaluation: a trajectory that begins."""
        plan, initial, _ = self._state()
        return Path(plan, initial.detach().clone())

    def _reach(self, path: Path, end: float) -> None:
        with no_autocast(self.initial.device.type):
            try:
                solve(path, end, self._state()[2])
            finally:
                self._last_solve = path.solve

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is kept."""
        return {**self.__dict__, "_table": None, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._table = Table()

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_layers={self.num_layers}, streams={self.streams}, delta_t={self.delta_t:g}"
        return f'{shown}, method="{self.method}", rtol={self.rtol:g}, atol={self.atol:g}'
