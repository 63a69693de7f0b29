"""`python -m bench dape`: what DAPE and FIRE cost in time and memory, beside the same formula in plain PyTorch.

Causal, B 1, 32 hidden units; bf16 on a GPU, fp32 on the CPU. "eager" is the formula as the authors' code computes it,
with matrices [B, H, N, N] at the dtype; "compiled" the same under torch.compile. The job stops at its budget; the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import posattn

from .contest import DIRECTIONS, why_not
from .machine import describe, slug
from .measure import (
    Patience,
    available_memory,
    in_fresh_process,
    interleaved,
    peak_memory,
    seconds_of,
    summary,
)
from .resume import Finished

HIDDEN = 32
PEERS = ("posattn", "eager", "compiled")
RESULTS = Path(__file__).parent / "results"


class Place(NamedTuple):
    kind: str  # KERPLE: DAPE of it; V2: of 3 taps, as published; FIRE: DAPE of it; FIRE alone
    heads: int
    head_dim: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind} H {self.heads} D {self.head_dim} N {self.length}"


def places(device: str, quick: bool) -> list[Place]:
    """Most important first."""
    if quick:
        heads, length = (16, 1024) if device == "cuda" else (4, 256)
        return [Place(kind, heads, 64, length) for kind in ("KERPLE", "V2")]
    if device == "cpu":
        kinds = [Place(kind, 8, 64, 512) for kind in ("V2", "FIRE", "FIRE alone")]
        return [*(Place("KERPLE", 8, 64, n) for n in (256, 512, 1024)), *kinds, Place("KERPLE", 8, 64, 8192)]
    others = [(heads, dim) for dim in (64, 128) for heads in (12, 8, 32, 16) if (heads, dim) != (16, 64)]

    def every() -> Iterator[Place]:
        yield from (Place("KERPLE", 16, 64, n) for n in (1024, 2048, 4096, 8192, 16384, 32768))
        yield from (Place(kind, 16, 64, n) for n in (2048, 8192) for kind in ("V2", "FIRE", "FIRE alone"))
        yield from (Place("KERPLE", *shape, n) for n in (8192, 2048, 32768) for shape in others)
        yield from (Place(kind, 16, 64, 32768) for kind in ("V2", "FIRE", "FIRE alone"))
        yield from (Place("KERPLE", *shape, n) for n in (4096, 16384, 1024) for shape in others)

    return list(every())


def floor_seconds(place: Place, direction: str) -> float | None:
    """Of the products alone at 790 TFLOP/s in 16 bits, for the visible half of the pairs.

    Of the first layer only the half that takes the scores is counted: what it adds to the base is of the offset.
    """
    if place.kind == "FIRE alone":
        return None
    network = place.heads * HIDDEN * (3 if place.kind == "V2" else 1)
    flop = 4 * place.heads * place.head_dim + 4 * network
    if direction == DIRECTIONS[1]:
        flop += 10 * place.heads * place.head_dim + 12 * network
    return flop * place.length**2 / 2 / 790e12


# ------------------------------------------------------------------------------------------------------ peers


def make_bias(place: Place, device: str) -> Any:
    torch.manual_seed(0)
    fire = place.kind.startswith("FIRE")
    slope = 0.0 if place.kind == "FIRE alone" else 0.01
    base = posattn.FIRE(place.heads, negative_slope=slope) if fire else posattn.KERPLE(place.heads)
    if place.kind != "FIRE alone":
        taps = 3 if place.kind == "V2" else 1
        base = posattn.DAPE(place.heads, base, HIDDEN, taps, prefix_consistent=taps == 1)
    return base.to(device)


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    """Causal attention with matrices, all of it in q's dtype."""
    length = q.shape[2]
    score = (q @ k.mT) * q.shape[3] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    base = getattr(bias, "base", bias).dense(length, length).to(q.dtype).expand(score.shape)
    total = score + base
    if isinstance(bias, posattn.DAPE):
        parameters = bias.first_weight, bias.first_bias, bias.second_weight, bias.second_bias
        w1, b1, w2, b2 = (p.to(q.dtype) for p in parameters)
        both = torch.cat([score, base], 1)
        if bias.kernel_size == 1:
            hidden = F.leaky_relu(F.linear(both.permute(0, 2, 3, 1), w1[..., 0], b1))
            total = total + F.linear(hidden, w2[..., 0], b2).permute(0, 3, 1, 2)
        else:
            pad = (0, bias.kernel_size // 2)
            hidden = F.leaky_relu(F.conv2d(both.tril(), w1[:, :, None], b1, padding=pad))
            total = total + F.conv2d(hidden, w2[:, :, None], b2, padding=pad)
    return torch.softmax(total.masked_fill(future, torch.finfo(q.dtype).min), -1) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    return posattn.attention(q, k, v, bias, is_causal=True, backend="triton" if q.is_cuda else "blockwise")


def make_peer(name: str) -> Any:
    if name == "compiled":
        torch.compiler.reset()  # each length is compiled anew, and there is a limit to how often
        return torch.compile(eager, dynamic=False)
    return {"posattn": ours, "eager": eager}[name]


def make_tensors(place: Place, device: str) -> list[Tensor]:
    torch.manual_seed(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (1, place.heads, place.length, place.head_dim)
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(4)]


def run(direction: str, attend: Any, tensors: list[Tensor], bias: Any) -> Any:
    *qkv, grad = tensors
    if direction == DIRECTIONS[0]:
        with torch.no_grad():
            return attend(*qkv, bias)
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = attend(*leaves, bias)
    return out, torch.autograd.grad(out, [*leaves, *bias.parameters()], grad)


# ---------------------------------------------------------------------------------------------------- one cell


class Bench:
    """Cell after cell; what a shorter length has shown tells whether a peer would fit."""

    def __init__(self, device: str, patience: Patience, compiled: bool):
        self.device, self.patience = device, patience
        self.peers = PEERS if compiled else PEERS[:2]
        self.peaks: dict[tuple[str, str, str], float] = {}  # (kind, peer, direction) -> bytes for a pair, a head

    def free(self) -> float:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            return float(torch.cuda.mem_get_info()[0])
        return 0.8 * available_memory()

    def why_not_try(self, peer: str, direction: str, place: Place) -> str:
        if peer == "posattn":
            return ""
        if self.device == "cpu" and place.length > 1024:
            return "not run at this length"
        pairs = place.heads * place.length**2
        # Nothing seen yet: scores, base, sum, both of them, the hidden layer twice, the network's output, weights.
        unknown = (10 if direction == DIRECTIONS[0] else 16) * (2 if self.device == "cuda" else 4)
        need = self.peaks.get((place.kind, peer, direction), unknown) * pairs
        return f"needs {need / 2**30:.0f} GiB" if need > self.free() else ""

    def remember(self, cell: dict[str, Any], place: Place) -> None:
        """From where all that is not [H, N, N] no longer counts."""
        if "peak_bytes" in cell and place.length >= 2048:
            pairs = place.heads * place.length**2
            self.peaks[place.kind, cell["peer"], cell["direction"]] = cell["peak_bytes"] / pairs

    def at(self, place: Place) -> list[dict[str, Any]]:
        tensors, bias = make_tensors(place, self.device), make_bias(place, self.device)
        cells = []
        calls: dict[str, Any] = {}
        for direction in DIRECTIONS:
            runs, first, here = {}, {}, []
            for peer in self.peers:
                note = self.why_not_try(peer, direction, place)
                if not note:
                    try:
                        calls.setdefault(peer, None)
                        calls[peer] = calls[peer] or make_peer(peer)
                        call = partial(run, direction, calls[peer], tensors, bias)
                        if self.device == "cuda" or peer == "compiled":
                            call()
                        first[peer] = seconds_of(call, self.device)
                        runs[peer] = call
                    except Exception as error:
                        note = why_not(error)
                here.append({**place._asdict(), "peer": peer, "direction": direction, "note": note})
            times = self.timed(runs, first)
            for cell in here:
                if cell["peer"] in times:
                    cell["seconds"] = summary(times[cell["peer"]])
                    try:
                        cell["peak_bytes"] = self.peak(cell["peer"], direction, place, runs[cell["peer"]])
                    except (RuntimeError, TimeoutError) as error:
                        cell["peak_note"] = why_not(error)
                    self.remember(cell, place)
            cells += here
        return cells

    def timed(self, runs: dict[str, Any], first: dict[str, float]) -> dict[str, list[float]]:
        try:
            return interleaved(runs, first, self.device, self.patience)
        except torch.OutOfMemoryError:  # side by side they do not fit
            return {name: [seconds] for name, seconds in first.items()}

    def peak(self, peer: str, direction: str, place: Place, call: Any) -> int:
        if self.device == "cuda":
            return peak_memory(call, "cuda")
        return in_fresh_process(peak_by_itself, peer, place, direction)


def peak_by_itself(peer: str, place: Place, direction: str) -> int:
    """Peak bytes on the CPU; called in a process of its own, after a small call that brings threads and code."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or its workers outlive the process
    small = place if peer == "compiled" else place._replace(length=64)
    call, bias = make_peer(peer), make_bias(place, "cpu")
    run(direction, call, make_tensors(small, "cpu"), bias)
    tensors = make_tensors(place, "cpu")
    return peak_memory(partial(run, direction, call, tensors, bias), "cpu")


# ------------------------------------------------------------------------------------------------------- main


def digest() -> str:
    """Of all that is timed: a run goes on only with what the same code has measured."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(Path(posattn.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    for path in sorted((Path(posattn.__file__).parent / "kernels").glob("*.py")):  # a link, which rglob may not follow
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench dape", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes, under a minute: shows that it works")
    parser.add_argument("--where", action="store_true", help="on a GPU: the time of each kernel, instead of the table")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="when to stop (540)")
    parser.add_argument("--fresh", action="store_true", help="do not go on from what an earlier run has finished")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.where and device == "cpu":
        print("no GPU here: --where times the kernels of one")
        return 0
    from . import mixing_report as report

    machine = describe(device)
    options.output.mkdir(parents=True, exist_ok=True)
    quick = "quick-" if options.quick else ""
    todo = places(device, options.quick)
    if options.where:
        from .mixing_where import where

        return where(options.output / f"{quick}dape-where-{slug(machine)}.json", machine, options.quick)
    path = options.output / f"{quick}dape-{slug(machine)}.json"
    same = ("device_name", "torch", "triton", "posattn", "commit", "threads")
    plan = {"job": "dape", "code": digest(), "places": [str(place) for place in todo]}
    plan.update({key: machine[key] for key in same})
    finished = Finished(path, plan, options.fresh or options.quick)
    left = [place for place in todo if str(place) not in finished]
    done = len(todo) - len(left)
    print(f"{machine['device_name']}, torch {machine['torch']}, {len(todo)} places, {done} of them done before")
    patience = Patience(seconds=0.3) if device == "cuda" else Patience(most=5, slow=2.0)
    bench = Bench(device, patience, compiled=not (options.quick and device == "cpu"))
    for cell in (cell for part in finished.parts.values() for cell in part["cells"]):
        bench.remember(cell, Place(*(cell[key] for key in Place._fields)))
    print(report.HEADER, flush=True)
    for place in left:
        if time.perf_counter() - start > options.budget:
            break
        finished.add(str(place), {"cells": bench.at(place)})
        print(report.lines(finished.parts[str(place)]["cells"]), flush=True)
    missing = [str(place) for place in todo if str(place) not in finished]
    cells = [cell for place in todo if str(place) in finished for cell in finished.parts[str(place)]["cells"]]
    results = {"machine": machine, "rows": report.rows(cells), "not_reached": missing}
    results["seconds"] = time.perf_counter() - start
    finished.finish(results)
    print(f"\n{report.text(cells, device)}\n\nwritten: {path}")
    if missing:
        print(f"not reached in the budget, the same command goes on: {len(missing)}: {'; '.join(missing[:6])}")
    return 0
