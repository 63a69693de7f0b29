"""`python -m bench dape --where`: which kernel costs what in one forward and one backward, by torch.profiler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .contest import DIRECTIONS
from .measure import seconds_of
from .mixing_speed import Place, floor_seconds, make_bias, make_tensors, ours, run

SHAPES = ((16, 64), (16, 128), (8, 64), (32, 64), (12, 64))
PLACES = [
    *(Place("KERPLE", *shape, 8192) for shape in SHAPES),
    *(Place(kind, 16, 64, 8192) for kind in ("V2", "FIRE", "FIRE alone")),
    *(Place("KERPLE", 16, 64, n) for n in (2048, 32768)),
]


def by_kernel(events: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """(name, microseconds) of every launch -> name, launches and milliseconds together, the costliest first."""
    made: dict[str, dict[str, Any]] = {}
    for name, microseconds in events:
        row = made.setdefault(name, {"kernel": name, "launches": 0, "ms": 0.0})
        row["launches"] += 1
        row["ms"] += microseconds / 1e3
    return sorted(made.values(), key=lambda row: -row["ms"])


def device_events(call: Callable[[], Any]) -> list[tuple[str, float]]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = (event for event in found.events() or [] if event.device_type == DeviceType.CUDA)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def where(path: Path, machine: dict[str, Any], quick: bool) -> int:
    rows = []
    for place in PLACES[:1] if quick else PLACES:
        tensors, bias = make_tensors(place, "cuda"), make_bias(place, "cuda")
        for direction in DIRECTIONS:
            call = partial(run, direction, ours, tensors, bias)
            row: dict[str, Any] = {**place._asdict(), "direction": direction}
            rows.append(row)
            print(f"{place}, {direction}", flush=True)
            try:
                call()
                seconds = min(seconds_of(call, "cuda") for _ in range(3))
                row["kernels"] = by_kernel(device_events(call))
            except Exception as error:  # the report of the others is worth more
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"  {row['failed']}")
                continue
            row.update(ms=seconds * 1e3, kernels_ms=sum(kernel["ms"] for kernel in row["kernels"]))
            floor = floor_seconds(place, direction)
            row["floor_ms"] = None if floor is None else floor * 1e3
            for kernel in row["kernels"]:
                share = kernel["ms"] / max(row["kernels_ms"], 1e-9)
                print(f"  {kernel['ms']:9.3f} ms {share:6.1%} {kernel['launches']:5}  {kernel['kernel'][:70]}")
            print(f"  {row['kernels_ms']:9.3f} ms in kernels, {row['ms']:.3f} ms by the clock", flush=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", "utf-8")
    print(f"written: {path}")
    return 0
