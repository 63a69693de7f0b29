"""The tables and plots of `python -m bench floater`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .contest import DIRECTIONS
from .floater_peers import A_LAYER, DENSE, FIVE, OF_DIRECTION, OURS, PUBLISHED, SAME, TOGETHER
from .floater_targets import SHORT, mark, seconds_text, verdict
from .floater_training import GRADIENTS
from .report import COLOURS, Row, drawing, markdown

PEERS = list(dict.fromkeys(peer for peers in OF_DIRECTION.values() for peer in (OURS, SAME, *peers)))
COLOUR_OF = dict(zip((OURS, SAME, TOGETHER, PUBLISHED, FIVE, DENSE, A_LAYER[1]), (*COLOURS, "#D55E00")))
FOOTNOTES = (
    "* extrapolated from one layer: its time and evaluations times the number of layers, its error as it is, no\n"
    "memory given; ** extrapolated from a shorter length, times the ratio of lengths, so at least that; (1) a single\n"
    "run, the others are medians. MiB beyond parameters and cotangent; vectors themselves are part of it."
)


# --------------------------------------------------------------------------------------------------------- printing


def bytes_text(size: float) -> str:
    return f"{size / 2**20:.3g} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def cell_text(cell: Row | None) -> str:
    """Time and peak memory."""
    if cell is None or "seconds" not in cell:
        return (cell or {}).get("note", "") or "-"
    one = " (1)" if cell["seconds"]["runs"] == 1 else ""
    text = ("> " if cell["longer_than"] else "") + seconds_text(cell["seconds"]["median"])
    text += mark(cell) + one
    return f"{text}, {bytes_text(cell['peak_bytes'])}" if "peak_bytes" in cell else text


def accuracy_text(cell: Row | None) -> str:
    """Evaluations and error."""
    if cell is None or "evaluations" not in cell:
        return "-"
    text = f"{cell['evaluations']}{mark(cell)}" + (f", {cell['error']:.1e}" if "error" in cell else "")
    if cell["peer"] == SAME:
        text += " (rtol {:g}, atol {:g})".format(*cell["tolerance"])
    return text


def line(name: str, part: Row, seconds: float) -> str:
    """One part, as it is printed while the job runs."""
    if "cells" in part:
        shown = [f"{SHORT[c['direction']]} {c['peer']} {cell_text(c)}" for c in part["cells"]]
        return f"  {name} ({seconds:.0f} s): " + "; ".join(shown)
    return f"  {name} ({seconds:.0f} s)"


def solves_text(cells: list[Row]) -> str:
    parts = []
    for gain in dict.fromkeys(cell["gain"] for cell in cells):
        lengths = sorted({cell["length"] for cell in cells if cell["gain"] == gain})
        by_place = {(c["peer"], c["direction"], c["length"]): c for c in cells if c["gain"] == gain}
        for direction, peers in OF_DIRECTION.items():
            names = [peer for peer in PEERS if peer in peers]
            rows = [[f"N = {n}", *(cell_text(by_place.get((p, direction, n))) for p in names)] for n in lengths]
            parts.append(markdown([f"gain {gain:g}, {SHORT[direction]}", *names], rows))
        names = [peer for peer in PEERS if peer in OF_DIRECTION[DIRECTIONS[0]]]
        rows = [[f"N = {n}", *(accuracy_text(by_place.get((p, DIRECTIONS[0], n))) for p in names)] for n in lengths]
        parts.append(markdown([f"gain {gain:g}: evaluations, error", *names], rows))
    return "\n\n".join([*parts, FOOTNOTES])


def cache_text(cache: Row) -> str:
    seconds = {name: seconds_text(value["median"]) for name, value in cache["seconds"].items()}
    total = cache["length"] + cache["more"]
    share = seconds_text(cache["seconds"]["from scratch"]["median"] * cache["more"] / total)
    return (
        f"Evaluation, {cache['length']} positions kept: {seconds['kept']} a call; {cache['more']} more on top of them:"
        f" {seconds['extended']} (median of {cache['extensions']} in a row, which made"
        f" {cache['evaluations_of_extensions']} evaluations; the slowest of a row {seconds['slowest of a row']}); what"
        f" that is compared with, the first {cache['more']} from an empty table: {seconds['first alone']}; {total} from"
        f" scratch: {seconds['from scratch']}, of which {cache['more']} positions' share is {share}"
    )


def gradients_text(found: list[Row]) -> str:
    rows = []
    for part in found:
        cells = []
        for name in GRADIENTS:
            way = part["ways"][name]
            if "note" in way:
                cells.append(way["note"])
                continue
            cells.append(f"{seconds_text(way['seconds']['median'])}, {bytes_text(way['peak_bytes'])}, {errors(way)}")
        rows.append([f"N = {part['length']}", bytes_text(part["output_bytes"]), *cells])
    longest = {name: way for name, way in found[-1]["ways"].items() if "seconds" in way}
    fastest = min(longest, key=lambda name: longest[name]["seconds"]["median"])
    smallest = min(longest, key=lambda name: longest[name]["peak_bytes"])
    head = ["forward + backward: time, peak, gradient errors", "vectors alone", *GRADIENTS]
    compared = [f"{errors(part['rk4'])} at {part['length']}" for part in found if "rk4" in part]
    text = markdown(head, rows) + "\n\nErrors: of the largest entry, of the norm, of the worst parameter's gradient"
    text += f"; rk4 with a step a position: {'; '.join(compared)}" if compared else ""
    text += f".\nAt {found[-1]['length']} positions the fastest is {fastest}, the smallest {smallest}."
    return text


def errors(row: Row) -> str:
    return f"{row['error']:.1e} / {row['norm_error']:.1e}"


def steps_text(found: list[Row]) -> str:
    rows = []
    for step in found:
        times = [f"{seconds_text(value['median'])} ({value['runs']})" for value in step["seconds"].values()]
        percent = [f"{step['solve_percent']:.2f} %", f"{step['difference_percent']:+.2f} %"]
        name = "gain {gain:g}, batch {batch}, length {length}, {layers} layers".format(**step)
        rows.append([name, f"{step['evaluations']}", *times, *percent])
    names = [f"{name} (runs)" for name in found[0]["seconds"]]
    passes = found[0]["passes"]
    head = "training step" if passes == 1 else f"{passes} training steps"
    return markdown([head, "evaluations", *names, "solve alone / step", "step with - without"], rows)


def text(found: Row) -> str:
    parts = []
    if found["cells"]:
        parts.append(solves_text(found["cells"]))
    if found["fixed_horizon"]:
        head = ["a smooth field, one stretch of time", "posattn, evaluations", "a step a position"]
        rows = [[f"N = {r['length']}", f"{r['evaluations']}", f"{r['a_step_each']}"] for r in found["fixed_horizon"]]
        parts.append(markdown(head, rows))
    if found["cache"]:
        parts.append(cache_text(found["cache"]))
    if found["gradients"]:
        parts.append(gradients_text(found["gradients"]))
    if found["steps"]:
        parts.append(steps_text(found["steps"]))
    if found["held"]:
        parts.append(steps_text(found["held"]))
    if found["host_waits"]:
        waits = ", ".join(f"{SHORT[d]} {n}" for d, n in found["host_waits"].items())
        parts.append(f"One solve waits for the GPU: {waits} times")
    rows = []
    for row in found["targets"]:
        most = "<= " if row["note"] == "**" else ""  # the other's time is at least that
        measured, limit = f"{most}{row['value']:.3g}{row['note']}", f"{row['limit']:.3g}"
        rows.append([row["what"], measured, limit, verdict(row), row["detail"]])
    if rows:
        parts.append(markdown(["target", "measured", "at most", "", "of which"], rows))
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------------- plotting


def plot_speed(cells: list[Row], machine: Row, path: Path) -> None:
    """Time of forward, of forward and backward, and evaluations with errors, against the length."""
    pyplot = drawing()
    gain = cells[0]["gain"]
    cells = [cell for cell in cells if cell["gain"] == gain]
    lengths = sorted({cell["length"] for cell in cells})
    figure, axes = pyplot.subplots(1, 4, figsize=(19, 4.9), layout="constrained")
    forward, backward = DIRECTIONS
    panels = [(forward, "time"), (backward, "time"), (forward, "evaluations"), (forward, "error")]
    labels: dict[str, Any] = {}
    for ax, (direction, what) in zip(axes, panels):
        for peer in PEERS:
            here = [c for c in cells if (c["peer"], c["direction"], c["longer_than"]) == (peer, direction, 0)]
            if what == "time":
                points = [(c["length"], c["seconds"]["median"]) for c in here if "seconds" in c]
            else:
                points = [(c["length"], c[what]) for c in here if what in c]
            if points:
                (labels[peer],) = ax.plot(*zip(*sorted(points)), "o-", color=COLOUR_OF[peer], markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
        ax.set(xlabel="positions", ylabel="seconds" if what == "time" else what)
        ax.set_title(f"{direction}: {what}", fontsize="medium")
        ax.grid(alpha=0.3)
    figure.legend(labels.values(), labels, fontsize="small", loc="outside lower center", ncols=7)
    shape = "3 streams, {layers} layers, dim {dim}, delta_t {delta_t:g}, gain {gain:g}".format(**cells[0])
    note = "published: one layer times the layers where it is slow"
    figure.suptitle(f"{machine['device_name']}, torch {machine['torch']}; {shape}; {note}", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
