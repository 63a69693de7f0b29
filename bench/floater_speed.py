"""What FLOATER's position vectors cost: solves beside the published way, the cache, gradients, a training step.

Solves: 3 streams, dim 512, 6 layers, delta_t 0.1, fp32, the published dynamics with small weights (W2's Xavier times
1e-3 and 1e-2: at 1, as published for a start, vectors leave all bounds near t = 80, position 800). Errors are against
torchdiffeq's dopri5 in float64 at 1e-10: of any entry, as a part of the largest entry of its vector, the worst of all
vectors at 257 positions from first to last. Backward has a fixed random cotangent. Training steps are measured at
gain 0.1, too. Parts are kept as they come, so the same command goes on where it stopped; what the targets are about
comes first, longer lengths last. No part should take more than about 150 seconds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import posattn

from . import floater_contest, floater_peers, floater_published, floater_training
from .contest import DIRECTIONS
from .floater_contest import Bench, Limits
from .floater_peers import Made, Place, Truths, make_cotangent, make_encoder, run
from .measure import Patience
from .resume import Finished

ROUGH = 1e-2  # gain of the rougher dynamics


class Plan(NamedTuple):
    dim: int = 512
    layers: int = 6
    gain: float = 1e-3
    lengths: tuple[int, ...] = (512, 2048, 8192, 32768, 65536)
    rough: tuple[int, ...] = (512, 8192)
    headline: int = 8192  # where the targets are
    more: int = 128  # positions by which vectors are extended
    gradients: tuple[int, ...] = (512, 8192)
    step_layers: int = 12
    step_length: int = 512
    heads: int = 8
    batches: tuple[int, ...] = (1, 8)
    rough_steps: tuple[float, ...] = (1e-2, 1e-1)  # gains, with the largest batch
    passes: int = 8  # backward passes of one solve that is held, with the smallest batch
    horizon: float = 50.0


def plan(quick: bool) -> Plan:
    if not quick:
        return Plan()
    small = {"dim": 64, "layers": 2, "lengths": (64, 128), "rough": (64,), "headline": 128, "more": 16}
    return Plan(**small, gradients=(64, 128), step_layers=2, step_length=64, heads=4, batches=(1, 2), passes=2)


def digest() -> str:
    """Of all that is timed: a run goes on only with what the same code has measured."""
    package = Path(posattn.__file__).parent / "floater"
    modules = (floater_contest, floater_peers, floater_published, floater_training)
    own = [Path(__file__), *(Path(module.__file__) for module in modules)]
    found = hashlib.sha256()
    for path in [*own, *sorted(package.glob("*.py"))]:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


class Job(NamedTuple):
    """What is measured, by name and in the order of what matters most."""

    todo: Plan
    device: str
    bench: Bench
    patience: Patience

    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        todo, device, patience = self.todo, self.device, self.patience
        head = Place(todo.gain, todo.headline, todo.dim, todo.layers)
        deep = Place(todo.gain, todo.step_length, todo.dim, todo.step_layers)
        made: dict[str, Callable[[], dict[str, Any]]] = {}

        def solve(place: Place) -> None:
            for direction in DIRECTIONS:
                name = f"{place} {direction}"
                made.setdefault(name, lambda direction=direction: {"cells": self.bench.at(place, direction)})

        def step(name: str, place: Place, batch: int, seconds: float, passes: int = 1) -> None:
            made[name] = lambda: floater_training.training_step(place, batch, todo.heads, device, seconds, passes)

        solve(Place(todo.gain, todo.lengths[0], todo.dim, todo.layers))  # tells what the next may cost
        solve(head)
        made["cache"] = lambda: floater_training.cached(head, todo.more, device, patience)
        for batch in todo.batches:
            step(f"step batch {batch}", deep, batch, 140.0)
        step(f"step batch {todo.batches[0]}, {todo.passes} passes", deep, todo.batches[0], 50.0, todo.passes)
        for length in todo.gradients:
            place = head._replace(length=length)
            compare = length == todo.gradients[0]
            made[f"gradients N {length}"] = lambda place=place, compare=compare: floater_training.gradients(
                place, device, patience, compare
            )
        made["fixed horizon"] = lambda: {"rows": fixed_horizon(todo.lengths, todo.horizon, device)}
        made["host waits"] = lambda: {"waits": host_waits(head, device)}
        for gain in todo.rough_steps:
            step(f"step batch {todo.batches[-1]}, gain {gain:g}", deep._replace(gain=gain), todo.batches[-1], 60.0)
        for length in todo.rough:
            solve(Place(ROUGH, length, todo.dim, todo.layers))
        for length in todo.lengths:
            solve(head._replace(length=length))
        return made


class Swing(nn.Module):
    """A smooth field that needs no parameters: every entry swings at a pace of its own and is drawn to zero."""

    def forward(self, t: Tensor, p: Tensor) -> Tensor:
        pace = torch.linspace(0.5, 2.0, p.shape[-1], dtype=p.dtype, device=p.device)
        return torch.sin(pace * t) - 0.2 * p


def fixed_horizon(lengths: tuple[int, ...], horizon: float, device: str) -> list[dict[str, Any]]:
    """Evaluations for so many positions in one and the same stretch of time, and those of a step a position."""
    rows = []
    for length in lengths:
        encoder = posattn.FLOATER(64, 1, dynamics=Swing(), delta_t=horizon / (length - 1)).to(device)
        with torch.no_grad():
            encoder(length)
        rows.append({"length": length, "evaluations": encoder.last_solve.evaluations, "a_step_each": 4 * (length - 1)})
    return rows


def host_waits(place: Place, device: str) -> dict[str, int] | None:
    """How often one solve waits for the GPU, forward and forward with backward; None without a GPU."""
    if device != "cuda":
        return None
    import warnings

    encoder = make_encoder(place, device)
    cotangent = make_cotangent(place, device, place.layers)
    counts = {}
    for direction in DIRECTIONS:
        made = Made(lambda: encoder(place.length), list(encoder.parameters()), encoder.clear, lambda: 0)
        run(direction, made, cotangent)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(direction, made, cotangent)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts[direction] = sum("synchronizing" in str(w.message) for w in found)
    return counts


def measure(path: Path, machine: dict[str, Any], quick: bool, fresh: bool, budget: float) -> int:
    """All parts, as far as the budget of seconds goes; the results go to `path` and a plot beside it."""
    from . import floater_report as report
    from .floater_targets import gather

    start = time.perf_counter()
    todo, device = plan(quick), machine["device"]
    described = {"job": "floater speed", "code": digest(), **todo._asdict()}
    described.update({key: machine[key] for key in ("device_name", "torch", "posattn", "threads")})
    finished = Finished(path, described, fresh or quick)
    patience = Patience(most=3, seconds=0.3) if quick else Patience(most=5, seconds=2.0)
    headline = Place(todo.gain, todo.headline, todo.dim, todo.layers)
    bench = Bench(device, patience, Limits(), Truths(), headline)
    parts = Job(todo, device, bench, patience).parts()
    left = [name for name in parts if name not in finished]
    print(
        f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}\n"
        f"{len(parts)} parts, {len(parts) - len(left)} of them done before",
        flush=True,
    )
    for cell in (cell for name in parts if name in finished for cell in finished.parts[name].get("cells", [])):
        bench.remember(cell)
    for name in left:
        if time.perf_counter() - start > budget:
            break
        began = time.perf_counter()
        finished.add(name, parts[name]())
        print(report.line(name, finished.parts[name], time.perf_counter() - began), flush=True)
    done = {name: finished.parts[name] for name in parts if name in finished}
    missing = [name for name in parts if name not in finished]
    found = gather(done, headline)
    plot = path.with_suffix(".png")
    if found["cells"]:
        report.plot_speed(found["cells"], machine, plot)
    results = {"machine": machine, **found, "not_reached": missing}
    finished.finish({**results, "seconds": time.perf_counter() - start})
    print(f"\n{report.text(found)}\n\nwritten: {path}, {plot}")
    if quick:
        print("toy sizes: what the targets ask for begins at thousands of positions")
    if missing:
        print(f"not reached in the budget, the same command goes on: {len(missing)}: {'; '.join(missing[:6])}")
    return 0
