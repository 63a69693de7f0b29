"""What stochastic positional encoding costs: time and peak memory beside the same formula with codes in memory.

Causal, B 1, R 64, K 10 sines or 128 taps, gated, noise drawn anew in each call; fp32 with 8 heads of 64 on a CPU,
bf16 with 16 on a GPU. "codes in memory" differs from "posattn" in the codes alone (spe_published.py). "no positions"
is the same linear attention of the queries and keys themselves; the softmax peers see every pair.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import posattn

from . import spe_published
from .contest import DIRECTIONS, why_not
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

REALIZATIONS, SINES, TAPS = 64, 10, 128
FEATURES = "relu"  # the map of the paper's Long Range Arena runs
PEERS = ("posattn", "codes in memory", "no positions", "SDPA", "TISA")
OF_KIND = {"sine": PEERS, "conv": PEERS[:2]}
QUADRATIC = ("SDPA", "TISA")


class Place(NamedTuple):
    kind: str  # sine or conv
    heads: int
    head_dim: int
    length: int
    realizations: int = REALIZATIONS
    sines: int = SINES
    taps: int = TAPS

    def __str__(self) -> str:
        return f"{self.kind} H {self.heads} D {self.head_dim} N {self.length}"


def places(device: str, quick: bool) -> list[Place]:
    heads = 16 if device == "cuda" else 8
    if quick:
        sizes = {"sine": (256, 512, 1024), "conv": (256,)}
        return [Place(kind, 4, 64, n, sines=5, taps=32) for kind, lengths in sizes.items() for n in lengths]
    sizes = {"sine": [2**n for n in range(10, 18)], "conv": [1024, 2048, 4096, 8192]}
    return sorted((Place(k, heads, 64, n) for k, lengths in sizes.items() for n in lengths), key=lambda p: p.length)


def make_spe(place: Place, device: str) -> Any:
    torch.manual_seed(0)
    sizes = {"num_realizations": place.realizations, "gated": True}
    if place.kind == "sine":
        return posattn.SineSPE(place.heads, place.head_dim, num_sines=place.sines, **sizes).to(device)
    return posattn.ConvSPE(place.heads, place.head_dim, kernel_size=place.taps, **sizes).to(device)


def make_tensors(place: Place, device: str) -> list[Tensor]:
    torch.manual_seed(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (1, place.heads, place.length, place.head_dim)
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(4)]


def make_peer(name: str, place: Place, device: str) -> tuple[Callable[..., Tensor], Any]:
    """A function of query, key and value, and the module whose parameters it uses (None: it has none)."""
    linear = partial(posattn.linear_attention, feature_map=FEATURES, is_causal=True, backend=backend_of(device))
    if name == "no positions":
        return linear, None
    if name == "SDPA":
        return partial(F.scaled_dot_product_attention, is_causal=True), None
    if name == "TISA":
        torch.manual_seed(0)
        bias = posattn.TISA(place.heads).to(device)
        return lambda q, k, v: posattn.attention(q, k, v, bias, is_causal=True, backend=backend_of(device)), bias
    spe = make_spe(place, device)
    if name == "posattn":
        return partial(linear, spe=spe), spe
    return lambda q, k, v: linear(*spe_published.features(q, k, spe), v), spe


def backend_of(device: str) -> str:
    return "triton" if device == "cuda" else "blockwise"


def run(direction: str, peer: tuple[Callable[..., Tensor], Any], tensors: list[Tensor]) -> Any:
    (attend, module), (*qkv, grad) = peer, tensors
    if direction == DIRECTIONS[0]:
        with torch.no_grad():
            return attend(*qkv)
    leaves = [t.detach().requires_grad_() for t in qkv]
    parameters = [] if module is None else list(module.parameters())
    out = attend(*leaves)
    return out, torch.autograd.grad(out, [*leaves, *parameters], grad)


def agreement(kind: str) -> dict[str, float]:
    """Largest difference of posattn and the codes in memory for equal noise, float64: of the output and of each
    gradient, as a part of its largest value."""
    place = Place(kind, 2, 8, 70, realizations=16, sines=3, taps=9)
    spe = make_spe(place, "cpu").double()
    generator = torch.Generator().manual_seed(2)
    noise = spe.draw(generator=generator)
    if kind == "conv":
        codes = torch.randn(2, 8, place.length + place.taps - 1, 16, generator=generator, dtype=torch.float64)
        noise = noise._replace(codes=codes)
    noise = type(noise)(*(None if t is None else t.double() for t in noise))
    query, key, value, grad = (t.double() for t in make_tensors(place, "cpu"))
    made = []
    for form in ("posattn", "codes in memory"):
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        if form == "posattn":
            out = posattn.linear_attention(*leaves, spe=spe(noise=noise), feature_map=FEATURES, is_causal=True)
        else:
            hats = spe_published.features(*leaves[:2], spe, noise)
            out = posattn.linear_attention(*hats, leaves[2], feature_map=FEATURES, is_causal=True)
        made.append([out.detach(), *torch.autograd.grad(out, [*leaves, *spe.parameters()], grad)])
    names = ("out", "dquery", "dkey", "dvalue", *("d" + name for name, _ in spe.named_parameters()))
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, a, b in zip(names, *made)}


# ---------------------------------------------------------------------------------------------------- one cell


class Bench:
    """Cell after cell; what a shorter length has taken tells whether a peer is tried at a longer one."""

    def __init__(self, device: str, patience: Patience) -> None:
        self.device, self.patience = device, patience
        self.last: dict[tuple[str, str, str], dict[str, Any]] = {}  # (kind, peer, direction) -> its last cell

    def free(self) -> float:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            return float(torch.cuda.mem_get_info()[0])
        return 0.8 * available_memory()

    def expected(self, peer: str, direction: str, place: Place) -> tuple[float, float]:
        """Seconds and bytes, from the length before; 0 where nothing is known."""
        last = self.last.get((place.kind, peer, direction), {})
        times = place.length / last.get("length", place.length)
        seconds = last["seconds"]["median"] if "seconds" in last else 0.0
        return seconds * times ** (2 if peer in QUADRATIC else 1), last.get("peak_bytes", 0) * times

    def why_not_try(self, peer: str, direction: str, place: Place) -> str:
        last = self.last.get((place.kind, peer, direction), {})
        if last.get("dropped"):
            return str(last["note"])
        seconds, need = self.expected(peer, direction, place)
        if peer == "posattn":
            return ""
        if seconds > self.patience.longest:
            return f"> {self.patience.longest:.0f} s"
        if peer == "codes in memory" and not need:  # nothing seen yet: Qbar and Kbar, gated, and their gradients
            code = place.heads * place.head_dim * place.realizations * place.length
            need = (6 if direction == DIRECTIONS[0] else 10) * code * (2 if self.device == "cuda" else 4)
        return f"needs {need / 2**30:.0f} GiB" if need > self.free() else ""

    def at(self, place: Place) -> list[dict[str, Any]]:
        tensors = make_tensors(place, self.device)
        cells = []
        for direction in DIRECTIONS:
            runs: dict[str, Callable[[], Any]] = {}
            first: dict[str, float] = {}
            here = []
            for peer in OF_KIND[place.kind]:
                note = self.why_not_try(peer, direction, place)
                slow = self.expected(peer, direction, place)[0] > self.patience.slow
                # What is slow runs once, where its memory is measured.
                if not note and (self.device == "cuda" or not slow):
                    try:
                        call = partial(run, direction, make_peer(peer, place, self.device), tensors)
                        if self.device == "cuda":
                            call()  # compiles
                        first[peer] = seconds_of(call, self.device)
                        runs[peer] = call
                    except Exception as error:
                        note = why_not(error)
                here.append({**place._asdict(), "peer": peer, "direction": direction, "note": note})
            times = self.timed(runs, first)
            for cell in here:
                self.finish(cell, place, times, runs)
                self.remember(cell)
            cells += here
        return cells

    def timed(self, runs: dict[str, Callable[[], Any]], first: dict[str, float]) -> dict[str, list[float]]:
        try:
            return interleaved(runs, first, self.device, self.patience)
        except torch.OutOfMemoryError:  # side by side they do not fit
            return {name: [seconds] for name, seconds in first.items()}

    def finish(self, cell: dict[str, Any], place: Place, times: dict[str, Any], runs: dict[str, Any]) -> None:
        """The cell's peak memory, and its time where that is still missing."""
        peer = cell["peer"]
        if not cell["note"]:
            try:
                if self.device == "cuda":
                    cell["peak_bytes"] = peak_memory(runs[peer], "cuda")
                else:
                    arguments = (peer, place, cell["direction"])
                    cell["peak_bytes"], once = in_fresh_process(by_itself, *arguments, timeout=600.0)
                    times.setdefault(peer, [once])
            except (RuntimeError, TimeoutError) as error:
                cell["peak_note" if peer in times else "note"] = why_not(error)
            if peer in times:
                cell["seconds"] = summary(times[peer])
        cell["dropped"] = bool(cell["note"])

    def remember(self, cell: dict[str, Any]) -> None:
        self.last[cell["kind"], cell["peer"], cell["direction"]] = cell


def by_itself(peer: str, place: Place, direction: str) -> tuple[int, float]:
    """Peak bytes on the CPU and the seconds of that run; called in a process of its own, after a small call that
    brings threads and code."""
    small = place._replace(length=128)
    run(direction, make_peer(peer, small, "cpu"), make_tensors(small, "cpu"))
    made, tensors = make_peer(peer, place, "cpu"), make_tensors(place, "cpu")
    start = time.perf_counter()
    peak = peak_memory(partial(run, direction, made, tensors), "cpu")
    return peak, time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------- the job


def digest() -> str:
    """Of all that is timed: a run goes on only with what the same code has measured."""
    package = Path(posattn.__file__).parent
    timed = [Path(__file__), Path(spe_published.__file__), *sorted(package.rglob("*.py"))]
    found = hashlib.sha256()
    for path in [*timed, *sorted((package / "kernels").glob("*.py"))]:  # a link, which rglob may not follow
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def measure(
    path: Path, machine: dict[str, Any], quick: bool, fresh: bool, budget: float, patience: Patience | None = None
) -> int:
    """All places, as far as the budget of seconds goes; the results go to `path` and a plot beside it."""
    from . import spe_report as report

    start = time.perf_counter()
    device = machine["device"]
    todo = places(device, quick)
    plan = {"job": "spe speed", "code": digest(), "places": [str(place) for place in todo], "features": FEATURES}
    plan.update({key: machine[key] for key in ("device_name", "torch", "triton", "posattn", "threads")})
    finished = Finished(path, plan, fresh or quick)
    left = [place for place in todo if str(place) not in finished]
    backend = backend_of(device)
    print(
        f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}, backend {backend}\n"
        f"{len(todo)} places, {len(todo) - len(left)} of them done before; time (peak memory) of {', '.join(PEERS)}",
        flush=True,
    )
    errors = {kind: agreement(kind) for kind in OF_KIND}
    for kind, found in errors.items():
        worst = max(found, key=lambda name: found[name])
        print(f"  {kind}: equal noise, float64: the two forms differ by {found[worst]:.1e} of {worst} at most")
    usual = Patience(most=3, seconds=0.3) if quick else Patience(most=7, seconds=2.0, longest=45.0, slow=5.0)
    bench = Bench(device, patience or usual)
    for cell in (cell for place in todo if str(place) in finished for cell in finished.parts[str(place)]["cells"]):
        bench.remember(cell)
    for place in left:
        if time.perf_counter() - start > budget:
            break
        finished.add(str(place), {"cells": bench.at(place)})
        print(report.speed_lines(finished.parts[str(place)]["cells"]), flush=True)
    missing = [str(place) for place in todo if str(place) not in finished]
    cells = [cell for place in todo if str(place) in finished for cell in finished.parts[str(place)]["cells"]]
    plot = path.with_suffix(".png")
    results = {"machine": machine, "backend": backend, "agreement": errors, "rows": report.speed_rows(cells)}
    results.update({"not_reached": missing, "seconds": time.perf_counter() - start})
    if cells:
        report.plot_speed(cells, machine, plot)
    finished.finish(results)
    print(f"\n{report.speed_text(cells)}\n\nwritten: {path}, {plot}")
    if missing:
        print(f"not reached in the budget, the same command goes on: {len(missing)}: {'; '.join(missing[:6])}")
    return 0
