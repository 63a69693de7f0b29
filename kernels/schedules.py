"""Schedules of attention beside the plain one, and when one of them is to be trusted.

A row of configs.py names its schedule; which calls it serves is in descriptors.py. What such a kernel compiles to hangs
on passes of the compiler that fail for reasons of their own, and that at times do nothing and say nothing. So the first
call of a kind (direction, GPU, dtype, head dim, options, row, Triton) runs the plain kernel and, beside it, the other
on the same tensors. The other is taken from then on if

  - it compiles for this GPU,
  - its warps were specialised,
  - it gives what the plain kernel gave, up to rounding.

Otherwise there is one warning that says why, and calls of this kind stay with the plain kernel. While a CUDA graph is
captured nothing can be compared: the plain kernel runs, and the next call outside decides. What no comparison can
tell, a kernel that never ends or that breaks the process's CUDA context, is for the gate to find (python -m bench
gate), before a row is shipped as the default.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .problem import Problem, on

# kind of call -> why the other schedule is not used; "" where it is
_verdicts: dict[tuple[Any, ...], str] = {}
_judging = threading.Lock()  # one at a time: stderr is the whole process's


def verdicts() -> list[dict[str, Any]]:
    """What was tried so far in this process: kind of call, row, and `why` the schedule is not used ("": it is)."""
    names = ("direction", "device", "dtype", "head_dim", "options", "config", "triton")
    return [{**dict(zip(names, kind)), "why": why} for kind, why in _verdicts.items()]


def name(chip: str, direction: str, bits: int, width: int, config: configs.Config) -> str:
    """As the gate's report names a row: "sm_90 forward 16 bits 64", and of another schedule its name and tile."""
    place = f"{chip} {direction} {bits} bits {width}"
    return place if config.schedule == "plain" else f"{place} {config.schedule} {config.block_m}x{config.block_n}"


class Schedules:
    """One call of a kernel, for rows whose schedule is not the plain one."""

    direction: str
    kernel: Any
    p: Problem
    outputs: tuple[Tensor, ...]  # that the plain kernel writes too

    def serves(self, config: configs.Config) -> bool:
        raise NotImplementedError

    def options(self) -> str:
        """What else makes another kernel of it."""
        raise NotImplementedError

    def programs(self, config: configs.Config) -> int:
        raise NotImplementedError

    def arguments(self, config: configs.Config, *outputs: Tensor) -> dict[str, Any]:
        raise NotImplementedError

    def run(self, config: configs.Config, plain: Callable[[], None]) -> None:
        """The schedule of `config` where it has proved itself, `plain` where it has not."""
        p = self.p
        kind = (self.direction, p.q.device, p.q.dtype, p.head_dim, self.options(), config, triton.__version__)
        if kind in _verdicts:
            if _verdicts[kind]:
                return plain()
            configs.ran[self.direction] = config
            self.launch(config, *self.outputs)
            return None
        plain()  # the caller's result, whatever comes of the rest
        if capturing():
            return None
        with _judging:
            if kind in _verdicts:  # by another thread, meanwhile
                return None
            why = self.judge(config)
            if why is not None:
                _verdicts[kind] = why
        if why:
            message = f"attention's {self.direction} keeps its plain schedule, {config.schedule!r} is not used: {why}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None

    def judge(self, config: configs.Config) -> str | None:
        """Why not to use it, "" if there is no reason, None where these tensors do not tell.

        Compiles it, launches it, and compares with what `plain` made.
        """
        try:
            with quiet():
                warps = warps_compiled(self, config)
            if config.schedule != "descriptors" and warps is not None and warps <= config.num_warps:
                return f"the compiler did not specialise its warps (Triton {triton.__version__})"
            made = tuple(torch.full_like(x, float("nan")) for x in self.outputs)
            self.launch(config, *made)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # whatever a compiler of the future fails with, there is the plain kernel
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            return f"{type(cause).__name__}: {str(cause).strip()[:200]} (Triton {triton.__version__})"
        return differs(made, self.outputs)

    def launch(self, config: configs.Config, *outputs: Tensor) -> None:
        with on(self.p.q):
            # Descriptors are made in memory that Triton asks for; its setting is the caller's elsewhere.
            contextvars.copy_context().run(
                _launch, self.kernel, self.programs(config), self.arguments(config, *outputs), self.p.q.device
            )


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], device: torch.device) -> None:
    if hasattr(triton, "set_allocator"):
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    kernel[(programs,)](**arguments)


def warps_compiled(call: Schedules, config: configs.Config) -> int | None:
    """Warps of a program as compiled, nothing launched; None in the interpreter, which compiles nothing."""
    if not isinstance(call.kernel, triton.runtime.JITFunction):
        return None
    with on(call.p.q):
        made = call.kernel.warmup(**call.arguments(config, *call.outputs), grid=(1,))
    return int(made.metadata.num_warps)


def differs(made: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> str | None:
    """How results differ by more than rounding, "" if they do not, None where the plain ones are not finite.

    Weights and outputs are rounded to the dtype, in either kernel on another scale: a row [b, h, i] differs by about
    half an eps of its size. Taken as wrong: by 4 eps of its size and an eighth of its head's. Three dimensions: lse.
    """
    for mine, right in zip(made, plain):
        if right.dim() == 3:
            finite = right.isfinite()
            off = ~((mine - right).abs() <= 1e-4 + 1e-5 * right.abs())
            if bool(((finite & off) | (~finite & (mine != right) & ~right.isnan())).any()):
                return "its log-sum-exp differs from the plain kernel's"
            continue
        if not bool(right.isfinite().all()):
            return None
        eps = torch.finfo(right.dtype).eps
        for x, y in zip(mine, right):  # by batch entry: fp32 copies of one at a time
            size = y.float().square().mean(2)
            error = (x.float() - y.float()).square().mean(2).sqrt()
            if not bool((error <= 4 * eps * (size.sqrt() + size.mean(1, keepdim=True).sqrt() / 8)).all()):
                return f"its result differs from the plain kernel's, by {float(error.max()):.1e} at most"
    return ""


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing reaches the process's stderr: a compiler that fails writes its whole program there."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
