"""What `python -m bench speed` measures, in pieces that are kept one by one, the most important first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posattn

from . import speed_rest
from .speed_peers import Make, backend_of, flex, forward_peers, radial_peers, schedule_peers, training_peers
from .speed_timing import Peer, Place, Row, Timer

PARTS = ("forward", "training", "error", "first", "memory", "schedules", "decode", "radial", "mixing", "spe")
TOKENS, WIDTH = 32768, 2048  # batch * length, heads * head dim
LENGTHS = (8192, 32768, 2048, 4096, 16384)
FLEX_LENGTHS = (8192, 32768, 2048)  # a compilation each
RADIAL_LENGTHS = (512, 4096, 16384, 1024, 2048, 8192)


class Cell(NamedTuple):
    part: str
    name: str
    run: Callable[[Timer, dict[str, str]], list[Row]]


def place_of(dim: int, length: int) -> Place:
    return Place(dim, length, max(1, TOKENS // length), WIDTH // dim)


def cells(device: str, quick: bool) -> list[Cell]:
    """On the CPU a rehearsal at toy size: it shows that each piece runs."""
    made: list[Cell] = []

    def add(part: str, name: Any, run: Any, *arguments: Any) -> None:
        made.append(Cell(part, f"{part} {name}", partial(run, *arguments)))

    cpu = device == "cpu"
    dims = (64,) if cpu else (128, 64)
    lengths = (128,) if cpu else (2048,) if quick else LENGTHS

    def place(dim: int, length: int) -> Place:
        return Place(dim, length, 1, 2) if cpu else place_of(dim, length)

    def speeds(chosen: tuple[int, ...]) -> None:
        for shape in (place(dim, length) for length in chosen for dim in dims):
            flex = cpu or shape.length in FLEX_LENGTHS
            add("forward", shape, forward_cell, shape, flex)
            add("training", shape, training_cell, shape, flex and not cpu)

    def radials(chosen: tuple[int, ...]) -> None:
        for length in chosen:
            shape = Place(64, length, 1 if cpu else 16384 // length, 2 if cpu else 4, causal=False)
            add("radial", f"N {length}", radial_cell, shape)

    radial = (128,) if cpu else (512,) if quick else RADIAL_LENGTHS
    speeds(lengths[:1])
    for dim in dims:
        add("error", f"D {dim}", error_cell, Place(dim, 128 if cpu else 2048, 1, 2 if cpu else 4))
    add("first", "call", speed_rest.first_cell)
    for dim in dims:
        add("memory", f"D {dim}", speed_rest.memory_cell, [place(dim, n)._replace(batch=1) for n in sorted(lengths)])
    for dim in dims:  # kernels that nobody runs unless asked: they may hang, so behind what is needed most
        add("schedules", place(dim, lengths[0]), schedules_cell, place(dim, lengths[0]))
    for shape in speed_rest.decode_places(cpu, quick):
        add("decode", shape, speed_rest.decode_cell, shape)
    speeds(lengths[1:3])
    radials(radial[:3])
    for length in (128,) if cpu else (2048,) if quick else (8192, 32768):
        add("mixing", f"DAPE N {length}", speed_rest.mixing_cell, length)
        add("spe", f"N {length}", speed_rest.spe_cell, length)
    speeds(lengths[3:])
    radials(radial[3:])
    return made


# ------------------------------------------------------------------------------------------------------------- pieces


def forward_cell(place: Place, with_flex: bool, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    return forwards(place, forward_peers(place, timer.device, with_flex), timer, left_out)


def schedules_cell(place: Place, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    return forwards(place, schedule_peers(place, timer.device), timer, left_out)


def forwards(place: Place, peers: dict[str, Make], timer: Timer, left_out: dict[str, str]) -> list[Row]:
    torch.compiler.reset()  # each shape is compiled anew, and there is a limit to how often
    rows = timer.turns(place, peers, ("forward",), left_out)
    for row in rows:
        if "forward_ms" in row:
            row["forward_tflops"] = place.flop() / row["forward_ms"] / 1e9
    return rows


def training_cell(place: Place, with_flex: bool, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    torch.compiler.reset()
    peers = training_peers(place, timer.device, with_flex)
    rows = timer.turns(place, peers, ("forward", "both", "backward"), left_out)
    for row in rows:
        if {"both_ms", "forward_ms"} <= row.keys():
            # The forward of a training step also keeps what backward needs.
            row["difference_ms"] = row["both_ms"] - row["forward_ms"]
        for direction, times in (("forward", 1.0), ("both", 3.5), ("backward", 2.5), ("difference", 2.5)):
            if row.get(f"{direction}_ms", 0.0) > 0:
                row[f"{direction}_tflops"] = times * place.flop() / row[f"{direction}_ms"] / 1e9
    return rows


def radial_cell(place: Place, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    torch.compiler.reset()
    return timer.turns(place, radial_peers(place, timer.device), ("both",), left_out)


def error_cell(place: Place, timer: Timer, left_out: dict[str, str]) -> list[Row]:
    """Root mean square errors of out, dq, dk, dv and the table's gradient, by the size of the truth in float64."""
    torch.compiler.reset()
    inputs = timer.inputs(place, 0)
    torch.manual_seed(1)
    table = torch.randn(place.heads, 2 * place.length - 1, device=timer.device).requires_grad_()
    truth = exact(inputs, table)
    rows: list[Row] = []
    for name, make in {"posattn": our_table, "Flex": flex_leaf}.items():

        def measure(make: Any = make) -> Row:
            leaves = [t.detach().requires_grad_() for t in inputs[:3]]
            out = make(place, timer.device, table).attend(*leaves)
            found = [out.detach(), *torch.autograd.grad(out, [*leaves, table], inputs.grad)]
            timer.wait()
            pairs = zip(("out", "dq", "dk", "dv", "dtable"), found, truth)
            return {"errors": {key: distance(got, want) for key, got, want in pairs}}

        rows.append(timer.careful(name, {**place._asdict(), "peer": name}, left_out, measure))
    return rows


def distance(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


def exact(inputs: Any, table: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv, dtable] in float64 from the formula, causal."""
    length = inputs.query.shape[2]
    leaves = [t.double().requires_grad_() for t in (*inputs[:3], table.detach())]
    query, key, value, bias = leaves
    score = query.shape[3] ** -0.5 * (query @ key.mT) + bias.unfold(1, length, 1).flip(1)
    hidden = torch.ones(length, length, dtype=torch.bool, device=score.device).triu(1)
    out = torch.softmax(score.masked_fill(hidden, -torch.inf), dim=-1) @ value
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.double())]


def our_table(place: Place, device: str, table: Tensor) -> Peer:
    more: dict[str, Any] = dict(is_causal=True, backend=backend_of(device))
    return Peer(lambda q, k, v: posattn.attention(q, k, v, table, **more), [table])  # type: ignore[arg-type, return-value]


def flex_leaf(place: Place, device: str, table: Tensor) -> Peer:
    zero = place.length - 1

    def score(tensors: list[Tensor], s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + tensors[0][h, j - i + zero]

    return flex(place, device, score, lambda: [table], [table])
