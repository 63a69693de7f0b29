"""The contest of FLOATER's solve with other ways to the same position vectors: time, memory, evaluations, error.

What would take too long is solved for one layer where layers are solved one by one, and the figures are taken as many
times as there are layers; else they are those of a shorter length times the ratio of lengths. Cells say which.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contest import DIRECTIONS, why_not
from .floater_peers import (
    A_LAYER,
    ADJOINT,
    DENSE,
    FIVE,
    OF_DIRECTION,
    OURS,
    PUBLISHED,
    SAME,
    TOLERANCE,
    Pair,
    Place,
    Truths,
    by_itself,
    error_of,
    make,
    make_cotangent,
    run,
    samples,
)
from .measure import (
    Patience,
    available_memory,
    in_fresh_process,
    interleaved,
    peak_memory,
    seconds_of,
    summary,
)

# rtol and atol from loose to tight; float32 resolves 1.2e-7.
LADDER: tuple[Pair, ...] = (
    *((rtol, rtol / 10) for rtol in (1e-3, 1e-4, 1e-5, 1e-6)),
    *((1e-6, atol) for atol in (1e-8, 1e-9)),
    *((1.2e-7, atol) for atol in (1e-8, 1e-9, 1e-10, 0.0)),
)


class Limits(NamedTuple):
    """Seconds: a call expected to take longer is made for one layer, or not at all."""

    whole: float = 20.0
    one_layer: float = 45.0
    other: float = 40.0  # all but the published way
    five: float = 12.0  # five steps a position
    headline: float = 150.0  # one layer of the published way where the targets are


class Bench:
    """Place after place; what a shorter length has taken tells how much of a longer one is measured."""

    def __init__(self, device: str, patience: Patience, limits: Limits, truths: Truths, headline: Place) -> None:
        self.device, self.patience, self.limits = device, patience, limits
        self.truths, self.headline = truths, headline
        self.last: dict[tuple[float, str, str], dict[str, Any]] = {}  # (gain, peer, direction): its last measured cell

    def remember(self, cell: dict[str, Any]) -> None:
        if "seconds" in cell and not cell["longer_than"]:
            self.last[cell["gain"], cell["peer"], cell["direction"]] = cell

    def at(self, place: Place) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = []
        target: dict[str, Any] = {}
        tolerance: Pair | None = None
        for direction, peers in OF_DIRECTION.items():
            here: list[dict[str, Any]] = []
            for peer in peers:
                cell = {**place._asdict(), "peer": peer, "direction": direction, "note": "", "longer_than": 0}
                if peer == SAME and direction == DIRECTIONS[0]:
                    tolerance = self.tolerance_for(place, target)
                cell["tolerance"] = tolerance if peer == SAME else TOLERANCE if peer in (OURS, DENSE) else None
                if peer == SAME and tolerance is None:
                    cell["note"] = "error unknown"
                else:
                    self.once(cell, place)
                target = cell if (peer, direction) == (PUBLISHED, DIRECTIONS[0]) else target
                here.append(cell)
            self.side_by_side([cell for cell in here if "seconds" in cell and not cell["longer_than"]], place)
            for cell in here:
                self.remember(cell)
            cells += here
        return cells

    def expected(self, cell: dict[str, Any], place: Place) -> float:
        """Seconds with all layers; 0 where nothing is known."""
        backward = cell["direction"] == DIRECTIONS[1]
        last = self.last.get((place.gain, cell["peer"], cell["direction"]))
        if last is None and backward:  # known by its forward run here
            peer = PUBLISHED if cell["peer"] == ADJOINT else cell["peer"]
            forward = self.last.get((place.gain, peer, DIRECTIONS[0]))
            return 8 * float(forward["seconds"]["median"]) * place.length / forward["length"] if forward else 0.0
        if last is None:
            return 0.0
        # In backward torchdiffeq copies the gradient of the whole output once a position, but for its adjoint.
        power = 1.4 if backward and cell["peer"] not in (OURS, SAME, ADJOINT) else 1.0
        return float(last["seconds"]["median"]) * (place.length / last["length"]) ** power

    def layers_for(self, cell: dict[str, Any], place: Place) -> int:
        """How many layers are solved: all of them, one, or none because that would take too long."""
        seconds, limits = self.expected(cell, place), self.limits
        if cell["peer"] in (OURS, SAME):
            return place.layers
        if cell["peer"] not in A_LAYER:
            return place.layers if seconds <= (limits.five if cell["peer"] == FIVE else limits.other) else 0
        longest = limits.headline if place == self.headline else limits.one_layer
        return place.layers if seconds <= limits.whole else 1 if seconds / place.layers <= longest else 0

    def once(self, cell: dict[str, Any], place: Place) -> None:
        """Error, evaluations and a first time of a cell; all there is to measure of a slow one."""
        peer, direction = cell["peer"], cell["direction"]
        cell["layers_measured"] = layers = self.layers_for(cell, place)
        if not layers:
            self.scale_up(cell, place)
            return
        tolerance = cell["tolerance"] or TOLERANCE
        last = self.last.get((place.gain, peer, direction), {})
        need = last.get("peak_bytes", 0) * place.length / last.get("length", place.length)
        if need > self.free():
            cell["note"] = f"needs {need / 2**30:.0f} GiB"
            return
        try:
            if self.device == "cuda":
                made = make(peer, place, self.device, layers, tolerance)
                call = partial(run, direction, made, self.cotangent(place, direction, layers))
                call()  # compiles
                kept: list[Any] = []
                first = seconds_of(lambda: kept.append(call()), self.device)
                evaluations = made.evaluations()
                got = samples(kept.pop()) if direction == DIRECTIONS[0] else None
                peak = peak_memory(call, self.device)
            else:
                arguments = (peer, place, direction, layers, tolerance)
                peak, first, evaluations, found = in_fresh_process(by_itself, *arguments, timeout=600.0)
                got = None if found is None else torch.from_numpy(found)
        except Exception as error:
            cell["note"] = why_not(error)
            return
        self.take(cell, place, peak, [first], evaluations)
        if got is not None:
            cell["error"] = error_of(got, self.truths[place])

    def cotangent(self, place: Place, direction: str, layers: int) -> Tensor | None:
        return make_cotangent(place, self.device, layers) if direction == DIRECTIONS[1] else None

    def side_by_side(self, cells: list[dict[str, Any]], place: Place) -> None:
        """The times of what is not slow, taking turns."""
        calls: dict[str, Callable[[], Any]] = {}
        first: dict[str, float] = {}
        for cell in cells:
            one = cell["seconds"]["median"] * cell["layers_measured"] / place.layers
            if one <= self.patience.slow:
                peer, layers, direction = cell["peer"], cell["layers_measured"], cell["direction"]
                made = make(peer, place, self.device, layers, cell["tolerance"] or TOLERANCE)
                calls[peer] = partial(run, direction, made, self.cotangent(place, direction, layers))
                first[peer] = one
        times = interleaved(calls, first, self.device, self.patience)
        for cell in cells:
            if cell["peer"] in times:
                layers = cell["layers_measured"]
                cell["seconds"] = summary([s * place.layers / layers for s in times[cell["peer"]]])

    @staticmethod
    def take(cell: dict[str, Any], place: Place, peak: int, seconds: list[float], evaluations: int) -> None:
        """Write down what was measured, of one layer as many times as there are layers."""
        times = place.layers / cell["layers_measured"]
        cell["seconds"] = summary([s * times for s in seconds])
        cell["evaluations"], cell["peak_bytes"] = round(evaluations * times), round(peak * times)

    def scale_up(self, cell: dict[str, Any], place: Place) -> None:
        """What is too slow here: the longest length measured, times the ratio of lengths; too little, if anything."""
        last = self.last.get((place.gain, cell["peer"], cell["direction"]))
        if last is None:
            cell["note"] = "too slow"
            return
        times = place.length / last["length"]
        cell["longer_than"], cell["layers_measured"] = last["length"], last["layers_measured"]
        cell["seconds"] = {**{k: v * times for k, v in last["seconds"].items()}, "runs": 0}
        if cell["peer"] != DENSE:  # a number of calls a position
            cell["evaluations"] = round(last["evaluations"] * times)

    def tolerance_for(self, place: Place, target: dict[str, Any]) -> Pair | None:
        """The loosest tolerance whose error, in all layers, is at most that of the published way in those solved that
        way; where none is, the one that comes closest."""
        if "error" not in target:
            return None
        errors: dict[Pair, float] = {}
        for tolerance in LADDER:
            try:
                got = samples(run(DIRECTIONS[0], make(OURS, place, self.device, place.layers, tolerance), None))
            except RuntimeError:
                continue
            errors[tolerance] = error_of(got, self.truths[place])
            if errors[tolerance] <= target["error"]:
                break
        return min(errors, key=lambda tolerance: errors[tolerance], default=None)

    def free(self) -> float:
        return float(torch.cuda.mem_get_info()[0]) if self.device == "cuda" else 0.8 * available_memory()
