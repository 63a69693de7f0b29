"""What FLOATER's position vectors cost: solves beside the published way, the cache, gradients, a training step.

Solves: 3 streams, dim 512, 6 layers, delta_t 0.1, fp32, the published dynamics with small weights (W2's Xavier times
1e-3 and 1e-2: at 1, as published for a start, vectors leave all bounds near t = 80, position 800). Errors are against
torchdiffeq's dopri5 in float64 at 1e-10: of any entry, as a part of the largest entry of its vector, the worst of all
vectors at 257 positions from first to last. Backward has a fixed random cotangent. Parts are kept as they come, so
the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import posattn

from . import floater_contest, floater_peers, floater_published, floater_training
from .floater_contest import Bench, Limits
from .floater_peers import Place, Truths
from .measure import Patience
from .resume import Finished

ROUGH = 1e-2  # gain of the rougher dynamics


class Plan(NamedTuple):
    dim: int = 512
    layers: int = 6
    gain: float = 1e-3
    lengths: tuple[int, ...] = tuple(2**n for n in range(9, 17))
    rough: tuple[int, ...] = (512, 8192)
    headline: int = 8192  # where the targets are
    more: int = 128  # positions by which vectors are extended
    gradients: tuple[int, ...] = (512, 2048, 8192)
    step_layers: int = 12
    step_length: int = 512
    heads: int = 8
    batches: tuple[int, ...] = (1, 8)
    horizon: float = 50.0


def plan(quick: bool) -> Plan:
    if not quick:
        return Plan()
    small = {"dim": 64, "layers": 2, "lengths": (64, 128), "rough": (64,), "headline": 128, "more": 16}
    return Plan(**small, gradients=(64, 128), step_layers=2, step_length=64, heads=4, batches=(1, 2))


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
        solves = {str(place): place for place in places(todo)}

        def solve(name: str) -> None:
            made[name] = lambda: {"cells": self.bench.at(solves[name])}

        main = [name for name, place in solves.items() if place.gain == todo.gain]
        for name in main:
            if solves[name].length <= todo.headline:
                solve(name)
        made["cache"] = lambda: floater_training.cached(head, todo.more, device, patience)
        for batch in todo.batches:
            made[f"step batch {batch}"] = lambda batch=batch: floater_training.training_step(
                deep, batch, todo.heads, device, patience._replace(slow=30.0)
            )
        for length in todo.gradients:
            place = head._replace(length=length)
            compare = length == todo.gradients[0]
            made[f"gradients N {length}"] = lambda place=place, compare=compare: floater_training.gradients(
                place, device, patience, compare
            )
        made["fixed horizon"] = lambda: {"rows": floater_training.fixed_horizon(todo.lengths, todo.horizon, device)}
        made["host waits"] = lambda: {"waits": floater_training.host_waits(head, device)}
        for name in solves:
            if name not in made:
                solve(name)
        return made


def places(todo: Plan) -> list[Place]:
    sizes = {todo.gain: todo.lengths, ROUGH: todo.rough}
    return [Place(gain, n, todo.dim, todo.layers) for gain, lengths in sizes.items() for n in lengths]


def measure(path: Path, machine: dict[str, Any], quick: bool, fresh: bool, budget: float) -> int:
    """All parts, as far as the budget of seconds goes; the results go to `path` and a plot beside it."""
    from . import floater_report as report

    start = time.perf_counter()
    todo, device = plan(quick), machine["device"]
    described = {"job": "floater speed", "code": digest(), **todo._asdict()}
    described.update({key: machine[key] for key in ("device_name", "torch", "posattn", "threads")})
    finished = Finished(path, described, fresh or quick)
    patience = Patience(most=3, seconds=0.3) if quick else Patience(most=5, seconds=2.0)
    headline = Place(todo.gain, todo.headline, todo.dim, todo.layers)
    bench = Bench(device, patience, Limits(), Truths(places(todo)), headline)
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
    found = report.gather(done, headline)
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
