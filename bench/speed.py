"""`python -m bench speed`: the table of goals, measured on the GPU at hand beside the peers, all in one run.

bf16, causal, 32768 tokens of width 2048 at every length, medians of triton.testing.do_bench over three input sets, the
peers taking turns. The job stops before a piece that does not fit in its budget, and every finished piece is kept: the
same command goes on where it stopped, also after a kill. A peer that fails is a row with the reason; one that breaks
the GPU or never ends ends the process (status 3), and the same command goes on without it. On the CPU: a rehearsal.

results/speed-<machine>.json:
  machine     as machine.describe writes it, and: capability, nvidia_smi, nvidia_smi_after (driver, clocks), configs
              (rows of kernels/configs.py), rehearsal
  goals       a line a goal: key, what, reach, measured (text), value, goal, ratio (how much of the goal), verdict,
              where (the worst place), peers (beside it), places (all of them)
  not_reached names of pieces that the budget did not reach; seconds of this call
  plan        what a later call must agree with to go on; code is a digest of the package and of this benchmark
  parts       name of a piece -> part, clocks (at work: speed_watch.summary), seconds, rows. A row has the place
              (head_dim, length, batch, heads), peer, and not_run (why), or with `failed` (direction: why) for the rest:
    forward   forward_ms, forward_all (a median an input set), forward_tflops
    schedules the same, of the forward's other schedules
    training  the same for forward, both (forward and backward), backward (alone) and difference: both - forward
    error     errors: {out, dq, dk, dv, dtable: rms error by rms of float64}
    radial    both_ms, both_all, of all pairs, with learned Gaussians of the distance
    memory    peak_bytes; extra_bytes and share: what is beyond inputs, outputs, lse and gradients; B 1
    decode    median (seconds), copy_bandwidth (bytes a second), share: bytes of K and V by time and by that bandwidth
    mixing    (DAPE) and spe: direction, ms, floor_ms, times: how many times the floor
    first     cold and warm: {import, wake, call} in seconds
              A part "broken: <part>: <peer>": piece in which it ended the process, why, times (2: left out since)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import mixing_speed, speed_report
from .gate import nvidia_smi
from .machine import describe, slug
from .resume import Finished
from .speed_goals import goals
from .speed_parts import PARTS, Cell, cells
from .speed_timing import DeviceBroken, Row, Timer
from .speed_watch import BROKEN, SECONDS, STATUS, Clocks, Watch, ending_in_order

RESULTS = Path(__file__).parent / "results"
# What makes other kernels of the same code; a run with one of these set goes to a file of its own.
ENVIRONMENT = ("POSATTN_SCHEDULE", "POSATTN_BACKWARD", "POSATTN_AUTOTUNE", "TRITON_PTXAS_PATH")


def digest() -> str:
    """Of all that is timed and of how: a run goes on only with what the same code has measured."""
    found = hashlib.sha256(mixing_speed.digest().encode())
    folder = Path(__file__).parent
    others = (folder / f"{name}.py" for name in ("contest", "decode", "gate_spe_speed", "measure"))
    for path in sorted([*folder.glob("speed*.py"), *others]):
        if path.stem not in ("speed_goals", "speed_report"):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def run(cell: Cell, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    try:
        timer.started("all")
        return cell.run(timer, left_out)
    except DeviceBroken:
        raise
    except Exception as error:  # the pieces that follow are worth more
        why = f"{type(error).__name__}: {str(error)[:200]}"
        timer.check_alive("all", why)
        return [{"peer": "all", "not_run": why}]


def measure(cell: Cell, timer: Timer, finished: Finished, watch: Watch) -> None:
    """Run one piece and keep it. Raises DeviceBroken, after it has noted who broke it."""
    start, left_out = time.perf_counter(), watch.left_out(cell.part, cell.name)
    watch.begin(cell.part, cell.name)
    try:
        with Clocks(timer.device) as clocks:
            if "all" in left_out:
                rows = [{"peer": "all", "not_run": f"left out: {left_out['all']}"}]
            else:
                rows = run(cell, timer, left_out)
    except DeviceBroken as error:
        name, why = str(error).split(": ", 1)
        watch.broken(cell.part, cell.name, name, why)
        raise
    finally:
        watch.ended()
    part = {"part": cell.part, "clocks": clocks.summary(), "rows": rows}
    finished.add(cell.name, {**part, "seconds": time.perf_counter() - start})


def expected(part: str, finished: Finished) -> float:
    """Seconds that a piece may take: the longest of its part so far, 0 where there is none."""
    known = (piece for name, piece in finished.parts.items() if not name.startswith(BROKEN))
    return max((piece["seconds"] for piece in known if piece["part"] == part), default=0.0)


def work(left: list[Cell], timer: Timer, finished: Finished, end: float) -> int:
    """Piece after piece until one would not be done by `end`; the exit status."""
    cuda = timer.device == "cuda"
    watch = Watch(finished, SECONDS if cuda else 5 * SECONDS, hard=cuda)
    timer.started = watch.started
    try:
        with ending_in_order():
            for cell in left:
                remaining, needed = end - time.perf_counter(), expected(cell.part, finished)
                if remaining < needed or remaining < 0:
                    text = f"stopped before {cell.name}, which may take {needed:.0f} s"
                    print(f"{text}: {max(0.0, remaining):.0f} s of the budget are left", flush=True)
                    break
                measure(cell, timer, finished, watch)
                print(speed_report.lines(cell.name, finished.parts[cell.name], not cuda), flush=True)
    except DeviceBroken as error:
        print(f"the GPU answers no more, after {error}\nthe same command goes on without it", flush=True)
        return STATUS
    finally:
        watch.close()
    return 0


def results_of(finished: Finished, machine: Row, rehearsal: bool, missing: list[str], seconds: float) -> Row:
    pieces = {name: part for name, part in finished.parts.items() if not name.startswith(BROKEN)}
    return {
        "machine": {**machine, "rehearsal": rehearsal},
        "goals": goals(list(pieces.values()), rehearsal),
        "not_reached": missing,
        "seconds": seconds,
    }


def plan_of(machine: Row, quick: bool, names: list[str]) -> Row:
    same = ("device_name", "torch", "triton", "posattn", "python")
    plan = {"environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}}
    plan |= {"job": "speed", "code": digest(), "quick": quick, "cells": names}
    return {**plan, **{key: machine[key] for key in same}}


def variant() -> str:
    """The part of a file's name for runs with a variable of ENVIRONMENT set."""
    named = [os.environ[name] for name in ENVIRONMENT[:2] if os.environ.get(name)]
    named += [name.split("_")[1].lower() for name in ENVIRONMENT[2:] if name in os.environ]
    return "".join(f"-{name}" for name in named)


def machine_of(device: str) -> Row:
    machine = describe(device)
    if device == "cuda":
        machine["capability"] = list(torch.cuda.get_device_capability())
        machine["cuda"] = torch.version.cuda
        machine["nvidia_smi"] = nvidia_smi()
        machine["configs"] = rows_in_use()
    return machine


def rows_in_use() -> Row:
    """The rows of kernels/configs.py that this GPU runs in 16 bits."""
    from posattn.kernels import configs

    chip = configs.arch(torch.device("cuda"))
    return {f"{d} {width}": list(config) for (c, d, bits, width), config in configs.CONFIGS.items()
            if (c, bits) == (chip, 16)}  # fmt: skip


def main(argv: list[str] | None = None, do_bench: Callable[[Callable[[], Any]], float] | None = None) -> int:
    parser = argparse.ArgumentParser("bench speed", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--part", metavar="A,B", help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="one length a part, some minutes on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="when to stop (540)")
    parser.add_argument("--fresh", action="store_true", help="do not go on from what an earlier run has finished")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results")
    table = "print README's table from a file of results (default: all speed-*.json in the output folder)"
    parser.add_argument("--table", nargs="?", const="", metavar="JSON", help=table)
    options = parser.parse_args(argv)
    if options.table is not None:
        paths = [Path(options.table)] if options.table else sorted(options.output.glob("speed-*.json"))
        paths = [path for path in paths if ".unfinished-" not in path.name]
        print("\n\n".join(speed_report.text(json.loads(path.read_text("utf-8"))) for path in paths) or "no results yet")
        return 0
    chosen = tuple(options.part.split(",")) if options.part else PARTS
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")

    start = time.perf_counter()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    quick, rehearsal = options.quick or device == "cpu", device == "cpu"
    machine = machine_of(device)
    every = cells(device, quick)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{'quick-' if quick else ''}speed-{slug(machine)}{variant()}.json"
    finished = Finished(path, plan_of(machine, quick, [cell.name for cell in every]), options.fresh)
    left = [cell for cell in every if cell.part in chosen and cell.name not in finished]
    print(f"{machine['device_name']}, torch {machine['torch']}, triton {machine['triton']}", machine.get("nvidia_smi"))
    print(f"{len(every)} pieces, {sum(cell.name in finished for cell in every)} of them done before", flush=True)
    status = work(left, Timer(device, do_bench, quick), finished, start + options.budget)
    finished.look()
    missing = [cell.name for cell in every if cell.name not in finished]
    if device == "cuda" and status == 0:
        machine["nvidia_smi_after"] = nvidia_smi()
    results = results_of(finished, machine, rehearsal, missing, time.perf_counter() - start)
    finished.finish(results)
    print(f"\n{speed_report.text(results)}\n\nwritten: {path}")
    if drawn := speed_report.plot(results | {"parts": finished.parts}, path.with_suffix(".png")):
        print(f"drawn: {drawn}")
    if missing:
        print(f"not reached, the same command goes on: {len(missing)}: {'; '.join(missing[:6])}")
    return status
