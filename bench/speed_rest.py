"""Pieces of `python -m bench speed` beside the two directions: memory, decoding, DAPE, SPE, the first call.

Each is the code of the job that has it to itself (bench decode, bench dape, bench gate --part spe-speed), at the places
that the table of goals asks for.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch

import posattn

from . import decode, gate_spe_speed, mixing_speed, speed_first
from .contest import DIRECTIONS as DAPE_DIRECTIONS
from .gate_speed import release
from .measure import peak_memory
from .speed_peers import BIASES, backend_of, ours, sdpa, with_bias
from .speed_timing import Place, Row, Timer

GIGABYTE = 1 << 30


# -------------------------------------------------------------------------------------------------------------- memory


def necessary_bytes(place: Place, item: int) -> dict[str, int]:
    """What training holds whatever the kernels are: q, k, v, do before the call; o, lse, dq, dk, dv are made by it."""
    rows = place.batch * place.heads * place.length
    tensor = rows * place.head_dim * item
    return {"before": 4 * tensor, "made": 4 * tensor + 4 * rows}


def memory_cell(places: list[Place], timer: Timer, left_out: dict[str, str]) -> list[Row]:
    """Bytes of forward and backward at their worst moment, beyond inputs, outputs, lse and gradients."""
    rows = []
    for place, name in product(places, ("posattn none", *(f"posattn {kind}" for kind in BIASES), "SDPA flash")):

        def measure(place: Place = place, name: str = name) -> Row:
            inputs = timer.inputs(place, 0)
            make = partial(sdpa, place, "FLASH") if name == "SDPA flash" else partial(ours, place, timer.device)
            kind = name.split()[1]
            peer = with_bias(place, timer.device, kind) if kind in BIASES else make()
            leaves = [t.detach().requires_grad_() for t in inputs[:3]]

            def call() -> Any:
                out = peer.attend(*leaves)
                return out, torch.autograd.grad(out, [*leaves, *peer.parameters], inputs.grad)

            call()
            timer.wait()
            if timer.device == "cuda":
                release()
            peak = peak_memory(call, timer.device)
            needed = necessary_bytes(place, inputs.query.element_size())
            extra = peak - needed["made"]
            return {"peak_bytes": peak, "extra_bytes": extra, "share": extra / sum(needed.values()), **needed}

        rows.append(timer.careful(name, {**place._asdict(), "peer": name}, left_out, measure))
    return rows


# ------------------------------------------------------------------------------------------------------------ decoding


def decode_places(cpu: bool, quick: bool) -> list[decode.Place]:
    if cpu:
        return [decode.Place(1, 2, 2, 64, 128)]
    if quick:
        return [decode.Place(8, 16, 16, 128, 8192)]
    sizes = [(1, 131072), (64, 8192), (1, 8192), (8, 32768), (64, 131072), (8, 8192), (1, 32768), (8, 131072)]
    made = [decode.Place(batch, 16, 16, 128, length) for batch, length in sizes]
    return made + [decode.Place(batch, 16, 2, 128, length) for batch, length in ((64, 131072), (64, 8192), (1, 131072))]


def copy_bandwidth(timer: Timer) -> float:
    """Bytes a second that a copy reads and writes together."""
    size = GIGABYTE if timer.device == "cuda" else 1 << 24
    source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / (timer.ms(partial(target.copy_, source)) * 1e-3)


@torch.no_grad()
def decode_cell(place: decode.Place, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    """Calls inside of a CUDA graph, the cache out of L2; `share` is the bytes of K and V by the copy's bandwidth."""
    bandwidth = copy_bandwidth(timer)
    if timer.device == "cuda":
        release()
    cache = decode.Cache(place, timer.device)
    floor = place.cache_bytes(cache.dtype.itemsize) / bandwidth
    rows = []
    for name in ("posattn none", "posattn TISA", "posattn ALiBi", "SDPA none"):

        def measure(name: str = name) -> Row:
            made = decode.turn(name, cache, timer.device)
            assert made is not None
            run, calls = made
            seconds = timer.ms(run) / calls / 1e3  # by the same clock as the copy
            return {"median": seconds, "calls": calls, "copy_bandwidth": bandwidth, "share": floor / seconds}

        row = {"place": str(place), **place._asdict(), "peer": name}
        rows.append(timer.careful(name, row, left_out, measure))
        if timer.device == "cuda":
            release()
    return rows


# ---------------------------------------------------------------------------------------------------------- DAPE, SPE


def mixing_cell(length: int, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    """DAPE of KERPLE, H 16, D 64, beside the time of its products alone."""
    place = mixing_speed.Place("KERPLE", 16 if timer.device == "cuda" else 2, 64, length)
    rows = []
    for direction in DAPE_DIRECTIONS:

        def measure(direction: str = direction) -> Row:
            bias, tensors = mixing_speed.make_bias(place, timer.device), mixing_speed.make_tensors(place, timer.device)
            call = partial(mixing_speed.run, direction, mixing_speed.ours, tensors, bias)
            ms, floor = timer.time(call), mixing_speed.floor_seconds(place, direction)
            assert floor is not None
            return {"ms": ms, "floor_ms": floor * 1e3, "times": ms / floor / 1e3}

        row = {**place._asdict(), "peer": "posattn DAPE", "direction": direction}
        rows.append(timer.careful("posattn DAPE", row, left_out, measure))
    return rows


def spe_cell(length: int, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    """Linear attention with SineSPE, H 16, D 64, K 10, R 64 and 128, beside the time of its products alone."""
    rows = []
    cuda = timer.device == "cuda"
    sizes: dict[str, int] = dict(heads=16 if cuda else 2, dim=64 if cuda else 8, sines=10 if cuda else 2, length=length)
    for count in (64, 128) if cuda else (8,):
        floors = gate_spe_speed.floors(**sizes, realizations=count)["whole"]
        for direction, floor in zip(("forward", "both"), floors):

            def measure(direction: str = direction, floor: float = floor, count: int = count) -> Row:
                torch.manual_seed(0)
                heads, dim = sizes["heads"], sizes["dim"]
                spe = posattn.SineSPE(heads, dim, sizes["sines"], count).to(timer.device)
                shape = (1, heads, length, dim)
                tensors = [torch.randn(shape, device=timer.device, dtype=timer.dtype) for _ in "qkv"]
                more: dict[str, Any] = dict(spe=spe, feature_map=gate_spe_speed.FEATURES, is_causal=True)
                attend = partial(posattn.linear_attention, backend=backend_of(timer.device), **more)
                peer: gate_spe_speed.Peer = (attend, tensors, list(spe.parameters()))
                call = partial(gate_spe_speed.forward if direction == "forward" else gate_spe_speed.both, peer)
                ms = timer.time(call)
                return {"ms": ms, "floor_ms": floor, "times": ms / floor}

            row = {**sizes, "peer": "posattn SPE", "realizations": count, "direction": direction}
            rows.append(timer.careful("posattn SPE", row, left_out, measure))
    return rows


# ---------------------------------------------------------------------------------------------------------- first call


def first_cell(timer: Timer, left_out: dict[str, str]) -> list[Row]:
    """Seconds of the first call, forward and backward with TISA, in a new process: empty cache, then a filled one."""

    def measure() -> Row:
        cold, warm = speed_first.cold_and_warm("--device", timer.device)
        return {"cold": cold, "warm": warm}

    return [timer.careful("posattn TISA", {"peer": "posattn TISA"}, left_out, measure)]
