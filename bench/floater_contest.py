"""The contest of FLOATER's solve with other ways to the same position vectors: time, memory, evaluations, error.

What would take too long is solved for one layer where layers are solved one by one; time and evaluations are then
taken as many times as there are layers, memory is not given: layers follow each other, and what one needs for itself is
free again for the next. Else figures are those of a shorter length times the ratio of lengths. Cells say which.
"""

from __future__ import annotations

import time
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
    one_layer: float = 30.0
    other: float = 20.0  # all but the published way
    five: float = 12.0  # five steps a position
    headline_whole: float = 100.0  # the published way where the targets are
    headline: float = 130.0  # one layer of it
    part: float = 150.0  # all contestants at one place and in one direction


class Bench:
    """Place after place; what a shorter length has taken tells how much of a longer one is measured."""

    def __init__(self, device: str, patience: Patience, limits: Limits, truths: Truths, headline: Place) -> None:
        self.device, self.patience, self.limits = device, patience, limits
        self.truths, self.headline = truths, headline
        self.measured: dict[tuple[float, str, str], list[dict[str, Any]]] = {}  # cells by (gain, peer, direction)
        self.tolerances: dict[Place, Pair | None] = {}  # with which posattn has the error of the published way
        self.began = time.perf_counter()

    def left(self) -> float:
        """Seconds that this place and direction may still take."""
        return self.limits.part - (time.perf_counter() - self.began)

    def remember(self, cell: dict[str, Any]) -> None:
        if cell["peer"] == SAME and cell["direction"] == DIRECTIONS[0]:
            found = cell["tolerance"]
            self.tolerances[Place(*(cell[name] for name in Place._fields))] = found and (found[0], found[1])
        if "seconds" in cell and not cell["longer_than"]:
            self.measured.setdefault((cell["gain"], cell["peer"], cell["direction"]), []).append(cell)

    def nearest(self, place: Place, peer: str, direction: str) -> dict[str, Any]:
        """The cell of the longest length up to this one, else of the shortest one; {} where there is none."""
        cells = sorted(self.measured.get((place.gain, peer, direction), []), key=lambda cell: cell["length"])
        shorter = [cell for cell in cells if cell["length"] <= place.length]
        return shorter[-1] if shorter else cells[0] if cells else {}

    def at(self, place: Place, direction: str) -> list[dict[str, Any]]:
        """A cell for each contestant; with backward, after forward at the same place."""
        self.began = time.perf_counter()
        here: list[dict[str, Any]] = []
        for peer in OF_DIRECTION[direction]:
            cell = {**place._asdict(), "peer": peer, "direction": direction, "note": "", "longer_than": 0}
            if peer == SAME and direction == DIRECTIONS[0]:
                target = next(c for c in here if c["peer"] == PUBLISHED)
                self.tolerances[place] = self.tolerance_for(place, target)
            tolerance = self.tolerances.get(place)
            cell["tolerance"] = tolerance if peer == SAME else TOLERANCE if peer in (OURS, DENSE) else None
            if peer == SAME and tolerance is None:
                cell["note"] = "error unknown"
            else:
                self.once(cell, place)
            here.append(cell)
        self.side_by_side([cell for cell in here if "seconds" in cell and not cell["longer_than"]], place)
        for cell in here:
            self.remember(cell)
        return here

    def expected(self, cell: dict[str, Any], place: Place) -> float:
        """Seconds with all layers; 0 where nothing is known."""
        backward = cell["direction"] == DIRECTIONS[1]
        last = self.nearest(place, cell["peer"], cell["direction"])
        if not last and backward:  # known by its forward run here
            peer = PUBLISHED if cell["peer"] == ADJOINT else cell["peer"]
            forward = self.nearest(place, peer, DIRECTIONS[0])
            times = 16 if cell["peer"] == ADJOINT else 5
            return times * float(forward["seconds"]["median"]) * place.length / forward["length"] if forward else 0.0
        if not last:
            return 0.0
        # In backward torchdiffeq copies the gradient of the whole output once a position, but for its adjoint.
        power = 1.4 if backward and cell["peer"] not in (OURS, SAME, ADJOINT) else 1.0
        return float(last["seconds"]["median"]) * (place.length / last["length"]) ** power

    def layers_for(self, cell: dict[str, Any], place: Place) -> int:
        """How many layers are solved: all of them, one, or none because that would take too long."""
        seconds, limits, left = self.expected(cell, place), self.limits, self.left()
        if cell["peer"] in (OURS, SAME):
            return place.layers
        if "most_layers" in cell:
            return int(cell["most_layers"])
        if cell["peer"] not in A_LAYER:
            longest = limits.five if cell["peer"] == FIVE else limits.other
            return place.layers if seconds <= min(longest, left) else 0
        head = place == self.headline
        whole, one = (limits.headline_whole, limits.headline) if head else (limits.whole, limits.one_layer)
        if cell["direction"] == DIRECTIONS[1]:  # what is not repeated is timed while its memory is measured: slower
            whole = min(whole, self.patience.slow)
        return place.layers if seconds <= min(whole, left) else 1 if seconds / place.layers <= min(one, left) else 0

    def once(self, cell: dict[str, Any], place: Place) -> None:
        """Error, evaluations and a first time of a cell; all there is to measure of a slow one."""
        peer, direction = cell["peer"], cell["direction"]
        cell["layers_measured"] = layers = self.layers_for(cell, place)
        tolerance = cell["tolerance"] or TOLERANCE
        last = self.nearest(place, peer, direction)
        if not layers or (self.left() <= 0 and last):
            self.scale_up(cell, place)
            return
        need = last.get("peak_measured", 0) * place.length / last.get("length", place.length)
        if need * layers / last.get("layers_measured", layers) > self.free():
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
                several = peer in A_LAYER and layers > 1  # if it takes too long there is time for one
                timeout = max(self.left() * (0.75 if several else 1.0), 10.0)
                peak, first, evaluations, found = in_fresh_process(by_itself, *arguments, timeout=timeout)
                got = None if found is None else torch.from_numpy(found)
        except TimeoutError:
            self.take_too_long(cell, place)
            return
        except Exception as error:
            cell["note"] = why_not(error)
            return
        self.take(cell, place, peak, [first], evaluations)
        if got is not None:
            cell["error"] = error_of(got, self.truths[place])

    def take_too_long(self, cell: dict[str, Any], place: Place) -> None:
        if cell["peer"] in A_LAYER and cell["layers_measured"] > 1:
            cell["most_layers"] = 1
            self.once(cell, place)
            del cell["most_layers"]
        else:
            self.scale_up(cell, place)

    def cotangent(self, place: Place, direction: str, layers: int) -> Tensor | None:
        return make_cotangent(place, self.device, layers) if direction == DIRECTIONS[1] else None

    def side_by_side(self, cells: list[dict[str, Any]], place: Place) -> None:
        """The times of what is not slow, taking turns."""
        calls: dict[str, Callable[[], Any]] = {}
        first: dict[str, float] = {}
        slow = min(self.patience.slow, max(self.left(), 0.0) / (4 * max(len(cells), 1)))
        cotangents: dict[int, Tensor | None] = {}
        for cell in cells:
            one = cell["seconds"]["median"] * cell["layers_measured"] / place.layers
            if one <= slow:
                peer, layers, direction = cell["peer"], cell["layers_measured"], cell["direction"]
                made = make(peer, place, self.device, layers, cell["tolerance"] or TOLERANCE)
                if layers not in cotangents:
                    cotangents[layers] = self.cotangent(place, direction, layers)
                calls[peer] = partial(run, direction, made, cotangents[layers])
                first[peer] = one
        times = interleaved(calls, first, self.device, self.patience)
        for cell in cells:
            if cell["peer"] in times:
                layers = cell["layers_measured"]
                cell["seconds"] = summary([s * place.layers / layers for s in times[cell["peer"]]])

    @staticmethod
    def take(cell: dict[str, Any], place: Place, peak: int, seconds: list[float], evaluations: int) -> None:
        """Write down what was measured; of one layer time and evaluations as many times as there are layers."""
        times = place.layers / cell["layers_measured"]
        cell["seconds"] = summary([s * times for s in seconds])
        cell["evaluations"], cell["peak_measured"] = round(evaluations * times), peak
        if cell["layers_measured"] == place.layers:
            cell["peak_bytes"] = peak

    def scale_up(self, cell: dict[str, Any], place: Place) -> None:
        """What is too slow here: the longest length measured, times the ratio of lengths; too little, if anything."""
        last = self.nearest(place, cell["peer"], cell["direction"])
        if not last or last["length"] >= place.length:
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
