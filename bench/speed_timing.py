"""Timing for `python -m bench speed`: peers take turns over several input sets, medians of Triton's do_bench.

A peer that fails is a row with the reason. One that leaves the GPU unusable (an illegal access is an error of every
later call of the process, too) ends the process; the next one leaves that peer out (speed_watch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contest import why_not
from .gate_speed import release
from .measure import seconds_of

Row = dict[str, Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SEEDS = (0, 1, 2)
SLOW = 150.0  # ms; a call that takes longer is timed with the first input set alone
LONG = 1000.0  # ms; one that takes longer still is timed once


class Place(NamedTuple):
    """Self-attention; batch * length is the same number at every length, so that a GPU is filled at each."""

    head_dim: int
    length: int
    batch: int
    heads: int
    causal: bool = True

    def __str__(self) -> str:
        return f"D {self.head_dim} N {self.length}"

    def flop(self) -> float:
        """Of a forward, by the usual convention: 4 N^2 D a head, half of it when causal; backward is 2.5 times that."""
        return (2 if self.causal else 4) * self.length**2 * self.head_dim * self.heads * self.batch


class Peer(NamedTuple):
    attend: Attend  # from the bias's parameters to the output
    parameters: list[Tensor]  # that want a gradient
    again: bool = True  # backward may run twice; what torch.compile made may not: it writes into its saved tensors


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


class DeviceBroken(RuntimeError):
    """The GPU answers no more; the message is the peer's name and its error."""


class Timer:
    """do_bench of many peers in turn. `do_bench(call)` gives milliseconds; tests bring their own."""

    def __init__(self, device: str, do_bench: Callable[[Callable[[], Any]], float] | None = None, quick: bool = False):
        self.device, self.quick = device, quick
        self.seeds = SEEDS[: 2 if quick else 3]
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.ms = do_bench or (self.triton_ms if device == "cuda" else self.cpu_ms)
        self.started: Callable[[str], None] = lambda peer: None  # told of each peer before it is at work

    def triton_ms(self, call: Callable[[], Any]) -> float:
        from triton.testing import do_bench

        rep = max(50 if self.quick else 100, 10.5e3 * seconds_of(call, self.device))  # ms: ten times or more
        return float(do_bench(call, warmup=25, rep=int(rep), return_mode="median"))

    def cpu_ms(self, call: Callable[[], Any]) -> float:
        return median(seconds_of(call, "cpu") for _ in range(3)) * 1e3

    def inputs(self, place: Place, seed: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (place.batch, place.heads, place.length, place.head_dim)
        more = dict(generator=generator, device=self.device, dtype=self.dtype)
        return Inputs(*(torch.randn(shape, **more) for _ in range(4)))  # type: ignore[call-overload]

    def turns(
        self,
        place: Place,
        peers: dict[str, Callable[[], Peer]],
        directions: tuple[str, ...],
        left_out: dict[str, str] | None = None,
    ) -> list[Row]:
        """A row a peer: `<direction>_ms`, the median over input sets of medians, `<direction>_all`; or `not_run`.

        A direction that fails is in `failed`, with the reason; the row keeps the others.
        """
        rows: dict[str, Row] = {}
        made: dict[str, Peer] = {}
        for name, why in (left_out or {}).items():
            if name in peers:
                rows[name] = {"not_run": f"left out: {why}"}
        for seed in self.seeds:
            inputs = self.inputs(place, seed)
            for name, make in peers.items():
                row = rows.setdefault(name, {})
                if "not_run" in row or row.get("slow"):
                    continue
                if name not in made and (why := self.attempt(name, lambda: made.update({name: make()}))):  # noqa: B023
                    row["not_run"] = why
                    continue
                self.visit(name, row, made[name], inputs, directions)
                if "not_run" in row:
                    del made[name]
            del inputs
        if self.device == "cuda":
            made.clear()
            release()
        return [{**place._asdict(), "peer": name, **finish(rows[name])} for name in peers]

    def visit(self, name: str, row: Row, peer: Peer, inputs: Inputs, directions: tuple[str, ...]) -> None:
        """Time one peer with one input set, in every direction that has not failed."""
        wanted = [direction for direction in directions if direction != "backward" or peer.again]
        for direction in wanted:

            def measure(direction: str = direction) -> None:
                ms = self.time(DIRECTIONS[direction](peer, inputs))
                row.setdefault(f"{direction}_all", []).append(ms)
                row["slow"] = row.get("slow", False) or ms > SLOW

            if direction not in row.get("failed", {}) and (why := self.attempt(name, measure)):
                row.setdefault("failed", {})[direction] = why
        if len(row.get("failed", {})) == len(wanted):
            row["not_run"] = next(iter(row.pop("failed").values()))

    def attempt(self, name: str, act: Callable[[], Any]) -> str:
        """Do it: "", or why it failed. Raises DeviceBroken where the GPU answers no more."""
        self.started(name)
        try:
            act()
            return ""
        except DeviceBroken:
            raise
        except Exception as error:  # with its traceback go the tensors that it holds
            why = why_not(error)
        self.check_alive(name, why)
        if self.device == "cuda":
            release()
        return why

    def careful(self, name: str, row: Row, left_out: dict[str, str], measure: Callable[[], Row]) -> Row:
        """The row with what `measure()` adds to it, or with the reason why there is nothing."""
        left = f"left out: {left_out[name]}" if name in left_out else ""
        if why := left or self.attempt(name, lambda: row.update(measure())):
            row["not_run"] = why
        return row

    def time(self, call: Callable[[], Any]) -> float:
        """Milliseconds of a call that may be its first: what compiles has compiled before the clock starts."""
        call()
        self.wait()
        once = seconds_of(call, self.device) * 1e3
        return once if once > LONG else self.ms(call)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def check_alive(self, name: str, why: str) -> None:
        try:
            self.wait()
        except Exception as error:
            raise DeviceBroken(f"{name}: {why}") from error


def finish(row: Row) -> Row:
    """The row with medians; what a direction has managed before it failed stays, but counts for nothing."""
    row.pop("slow", None)
    if "not_run" not in row:
        for direction in [key.removesuffix("_all") for key in row if key.endswith("_all")]:
            if direction not in row.get("failed", {}):
                row[f"{direction}_ms"] = median(row[f"{direction}_all"])
    return row


# ------------------------------------------------------------------------------------------ what a call of a peer does


def forward(peer: Peer, inputs: Inputs) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return peer.attend(*inputs[:3])

    return call


def both(peer: Peer, inputs: Inputs) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    wanted = [*leaves, *peer.parameters]
    return lambda: torch.autograd.grad(peer.attend(*leaves), wanted, inputs.grad)


def backward(peer: Peer, inputs: Inputs) -> Callable[[], Any]:
    """Backward alone, the bias's parameters included; the forward has run before the clock starts."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    wanted = [*leaves, *peer.parameters]
    out = peer.attend(*leaves)
    return lambda: torch.autograd.grad(out, wanted, inputs.grad, retain_graph=True)


DIRECTIONS = {"forward": forward, "both": both, "backward": backward}
