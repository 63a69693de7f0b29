"""What the GPU gate checks of FLOATER: vectors and gradients of a solve on the device, against float64 on the CPU.

The truth is torchdiffeq's dopri8 at a tolerance of 1e-10, through autograd, for dynamics that are smooth: there an
error is WIDE times rtol of the largest value at most (RK4 for a fixed step). The published dynamics have kinks, where
gradients of any two choices of steps differ: their vectors are held against the truth, and their gradients to KINKS
against the same code on the CPU. Also: evaluation gives the bits of training with "checkpoint", an extension those of
one solve (on a GPU to WIDE times rtol, where sums may change their order), and how often the host waits for the device
in a solve and in its backward pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import posattn

WIDE, RK4, KINKS = 100.0, 1e-4, 2e-3


class Case(NamedTuple):
    dtype: torch.dtype
    dim: int
    layers: int
    length: int
    method: str = "dopri5"
    gradient: str = "checkpoint"
    rtol: float = 1e-5
    smooth: bool = True

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        dynamics = "smooth" if self.smooth else "published"
        return f"{kind} {dynamics} dim {self.dim} layers {self.layers} N {self.length} {self.method} {self.gradient}"


class Smooth(nn.Module):
    """Vectors that turn and are drawn to a circle of their own; time matters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim + 1, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor, p: Tensor) -> Tensor:
        clock = torch.sin(0.3 * t).expand(*p.shape[:-1], 1)
        return self.outer(torch.tanh(self.inner(torch.cat([p, clock], dim=-1)))) - 0.1 * p


def cases() -> Iterator[Case]:
    for gradient in ("checkpoint", "direct", "adjoint"):
        yield Case(torch.float32, 64, 3, 257, gradient=gradient)
    yield Case(torch.float64, 33, 2, 65, rtol=1e-8)
    for dtype in (torch.bfloat16, torch.float16):
        yield Case(dtype, 64, 3, 257)
    for method in ("bosh3", "rk4"):
        yield Case(torch.float32, 64, 3, 257, method)
    yield Case(torch.float32, 64, 3, 257, smooth=False)
    yield Case(torch.float32, 512, 12, 512, smooth=False)
    yield Case(torch.float32, 512, 6, 8192, smooth=False)


def rehearsal() -> Iterator[Case]:
    for case in cases():
        yield case._replace(dim=min(case.dim, 12), layers=min(case.layers, 2), length=min(case.length, 65))


def make(case: Case) -> posattn.FLOATER:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(method=case.method, rtol=case.rtol, atol=case.rtol, gradient=case.gradient)
    options |= dict(dynamics=Smooth(case.dim)) if case.smooth else dict(gain=1e-3)
    made = posattn.FLOATER(case.dim, case.layers, **options)
    torch.nn.init.normal_(made.initial)
    return made.to(case.dtype)


def check(case: Case, device: torch.device, rehearse: bool) -> dict[str, Any]:
    encoder = make(case)
    grad = torch.randn(3, case.layers, case.length, case.dim, dtype=torch.float64) / case.length
    want = truth(encoder, case.length, grad)
    # 16-bit parameters are solved in fp32 and rounded once, their gradients too
    bound = (RK4 if case.method == "rk4" else WIDE * case.rtol) + torch.finfo(case.dtype).eps
    bounds = dict.fromkeys(want, bound)
    if not case.smooth:
        made = outcome(copy.deepcopy(encoder), case.length, grad, {})
        want |= {name: value for name, value in made.items() if name != "vectors"}
        bounds = {name: bound if name == "vectors" else KINKS for name in want}
    encoder, waits = encoder.to(device), {}
    got = outcome(encoder, case.length, grad, waits)
    with torch.no_grad():
        again = encoder(case.length)
        encoder.clear()
        encoder(case.length // 2)
        extended = encoder(case.length)
    errors = {name: (relative(value, want[name]), bounds[name]) for name, value in got.items()}
    exact = device.type == "cpu"
    errors["evaluation"] = relative(again, got["vectors"]), 0.0 if case.gradient == "checkpoint" and exact else bound
    errors["extension"] = relative(extended, again), 0.0 if exact else bound
    failed = [name for name, (error, limit) in errors.items() if not error <= limit]
    return {"case": str(case), "errors": errors, "failed": failed, "waits": waits, "solve": encoder.last_solve}


def outcome(encoder: posattn.FLOATER, length: int, grad: Tensor, waits: dict[str, int]) -> dict[str, Tensor]:
    """The vectors and every gradient; `waits` as `counted` says."""
    out = counted(waits, "solve", lambda: encoder(length))
    counted(waits, "backward", lambda: out.backward(grad.to(out)))
    return named(out, encoder)


def named(out: Tensor, encoder: posattn.FLOATER) -> dict[str, Tensor]:
    gradients = {f"d{name}": x.grad for name, x in encoder.named_parameters() if x.grad is not None}
    return {"vectors": out.detach(), **gradients}


def truth(encoder: posattn.FLOATER, length: int, grad: Tensor) -> dict[str, Tensor]:
    exact = copy.deepcopy(encoder).double()
    times = torch.arange(max(length, 2), dtype=torch.float64) * encoder.delta_t
    solved = odeint(exact.dynamics, exact.initial, times, method="dopri8", rtol=1e-10, atol=1e-10)
    out = solved[:length].permute(1, 2, 0, 3)
    out.backward(grad)
    return named(out, exact)


def relative(got: Tensor, want: Tensor) -> float:
    want = want.detach().double().cpu()
    return float((got.detach().double().cpu() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def counted(waits: dict[str, int], name: str, run: Callable[[], Any]) -> Any:
    """What run() gives; on a GPU `waits` gets how often the host waited for it."""
    if not torch.cuda.is_available():
        return run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits[name] = sum("synchroniz" in str(warning.message) for warning in caught)
    return made
