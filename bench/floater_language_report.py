"""The tables and plots of the language models with FLOATER: `python -m bench floater --part language`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from .extrapolate_report import summary
from .floater_model import KINDS
from .floater_report import seconds_text
from .report import COLOURS, Row, drawing, markdown

# Seed by seed: both start from the same numbers and see the same batches.
PAIRS = (
    ("floater", "none"), ("floater", "sinusoidal"), ("floater", "learned"), ("floater-slow", "sinusoidal"),
    ("floater-slow", "floater"), ("floater-sinusoidal", "sinusoidal"), ("warm", "longer"), ("warm-slow", "longer"),
)  # fmt: skip
COLOUR = {
    "none": "#999999", "sinusoidal": COLOURS[3], "learned": COLOURS[5], "floater": COLOURS[0],
    "floater-slow": COLOURS[0], "floater-sinusoidal": COLOURS[1], "longer": COLOURS[3], "warm": COLOURS[2],
    "warm-slow": COLOURS[2],
}  # fmt: skip
DASHED = ("floater-slow", "longer", "warm-slow")


def gather(plan: Row, parts: Iterable[Row]) -> Row:
    """By kind and length, mean and spread over seeds; differences; the warm starts; what solves took."""
    runs: dict[str, dict[int, Row]] = {kind: {} for kind in KINDS}
    for part in parts:
        runs[part["kind"]][part["seed"]] = part
    kinds, differences, starts, solves = {}, [], [], {}
    for kind, by_seed in ((kind, dict(sorted(found.items()))) for kind, found in runs.items() if found):
        these = list(by_seed.values())
        seconds = [run["training"]["seconds"] for run in these if run["training"]["seconds"] is not None]
        kinds[kind] = {
            "parameters": these[0]["parameters"],
            "seeds": list(by_seed),
            "training_seconds": mean(seconds) if seconds else None,
            "lengths": [_of_length(rows) for rows in zip(*(run["lengths"] for run in these))],
        }
        starts += [{"kind": kind, "seed": run["seed"], **run["start"]} for run in these if "start" in run]
        if solved := [run["solve"] for run in these if "solve" in run]:
            solves[kind] = _of_solves(solved)
    for kind, base in PAIRS:
        seeds = [seed for seed in runs[kind] if seed in runs[base]]
        if seeds:
            rows = [
                {"length": first["length"], **_minus([runs[kind][s]["lengths"][i] for s in seeds],
                                                     [runs[base][s]["lengths"][i] for s in seeds])}
                for i, first in enumerate(runs[kind][seeds[0]]["lengths"])
            ]  # fmt: skip
            differences.append({"kind": kind, "base": base, "lengths": rows})
    found = {"kinds": kinds, "differences": differences, "starts": starts, "solves": solves}
    recipe, further = plan["recipe"], plan["further"]
    return {**found, "trained": recipe["length"], "last": plan["last"], "steps": [recipe["steps"], further["steps"]]}


def _of_length(rows: tuple[Row, ...]) -> Row:
    """Of the seeds that have a number; how many have none, and why."""
    notes = [row["note"] for row in rows if row["last"] is None]
    found = {"length": rows[0]["length"], "without": len(notes), "notes": notes}
    if len(notes) < len(rows):
        found.update({what: summary([r[what] for r in rows if r[what] is not None]) for what in ("last", "all")})
    return found


def _minus(ours: list[Row], theirs: list[Row]) -> Row:
    pairs = [(a["last"], b["last"]) for a, b in zip(ours, theirs) if None not in (a["last"], b["last"])]
    return {"without": len(ours) - len(pairs), **({"last": summary([a - b for a, b in pairs])} if pairs else {})}


def _of_solves(solved: list[Row]) -> Row:
    lengths = []
    for rows in zip(*(each["lengths"] for each in solved)):
        row: Row = {"length": rows[0]["length"]}
        for what in ("evaluations", "steps", "rejected", "largest"):
            if found := [each[what] for each in rows if what in each]:
                row[what] = mean(found)
        lengths.append(row)
    return {
        "share": mean(each["share"] for each in solved),
        "seconds": {what: mean(each["seconds"][what]["median"] for each in solved) for what in ("solve", "step")},
        "training": {what: mean(each["training"][what] for each in solved) for what in ("evaluations", "steps")},
        "lengths": lengths,
    }


# --------------------------------------------------------------------------------------------------------- printing


def line(part: Row, seconds: float) -> str:
    """One model, as it is printed while the job runs."""
    bits = ", ".join("diverges" if row["last"] is None else f"{row['last']:.3f}" for row in part["lengths"])
    text = f"  {KINDS[part['kind']].label}, seed {part['seed']}: {bits} bits per byte, after {seconds:.0f} s"
    if "start" in part:
        text += f"; loss at step 0 {part['start']['difference']:+.1e} from the trained model's"
    return text


def _cell(row: Row, form: str) -> str:
    if "last" not in row:
        return "diverges"
    value = row["last"]
    text = format(value["mean"], form)
    text += "" if value["spread"] is None else f" ± {value['spread']:.3f}"
    return text + (f" ({row['without']} diverge)" if row["without"] else "")


def text(found: Row) -> str:
    trained, kinds = found["trained"], found["kinds"]
    lengths = [row["length"] for row in next(iter(kinds.values()))["lengths"]]
    header = [f"{n} (trained)" if n == trained else str(n) for n in lengths]
    seeds = max(len(result["seeds"]) for result in kinds.values())
    rows = []
    for kind, result in kinds.items():
        seconds = "-" if result["training_seconds"] is None else f"{result['training_seconds']:.0f} s"
        cells = [_cell(row, ".3f") for row in result["lengths"]]
        rows.append([KINDS[kind].label, f"{result['parameters']:,}", seconds, *cells])
    steps, more = found["steps"]
    parts = [
        f"Bits per byte of the same held-out bytes, the last {found['last']} of every {lengths[-1]}, from windows of"
        f" each length; trained at {trained}, {steps} steps and {more} more of what goes on; seeds: {seeds}, mean ±"
        " standard deviation; lower is better.",
        markdown(["positions", "parameters", "training", *header], rows),
    ]
    notes = {note for result in kinds.values() for row in result["lengths"] for note in row["notes"]}
    parts += [f"diverges: {note}." for note in sorted(notes)]
    if "learned" in kinds:
        parts.append(f"The learned positions beyond {trained} were never trained; they are counted.")
    if any(KINDS[kind].goes_on for kind in kinds):
        parts.append(
            f"Warm start: the trained sinusoidal model with FLOATER attached, trained on for {more} steps at half the"
            f' rate, beside "{KINDS["longer"].label}", the same without.'
        )
    if found["differences"]:
        parts.append("Seed by seed, bits per byte (negative: the first is better):")
        names = [f"{KINDS[row['kind']].label} - {KINDS[row['base']].label}" for row in found["differences"]]
        cells = [[_cell(each, "+.3f") for each in row["lengths"]] for row in found["differences"]]
        parts.append(markdown(["difference", *header], [[name, *row] for name, row in zip(names, cells)]))
    if found["starts"]:
        parts.append("Warm start: loss at step 0, bits per byte, of the trained model and with FLOATER attached:")
        parts.append(starts_table(found["starts"]))
    if found["solves"]:
        parts.append(solves_table(found["solves"], trained))
    return "\n\n".join(parts)


def starts_table(starts: list[Row]) -> str:
    head = ["warm start", "seed", "trained model", "attached", "difference", "of a logit at most", "largest logit"]
    rows = [
        [KINDS[row["kind"]].label, str(row["seed"]), f"{row['base']:.6f}", f"{row['model']:.6f}",
         f"{row['difference']:+.1e}", f"{row['logits']:.1e}", f"{row['largest_logit']:.1f}"]
        for row in starts
    ]  # fmt: skip
    return markdown(head, rows)


def solves_table(solves: dict[str, Row], trained: int) -> str:
    """Means over seeds, after training."""
    lengths = [row["length"] for row in next(iter(solves.values()))["lengths"]]
    head = ["solve, forward and backward", f"at {trained}", "training step", "share", "evaluations (steps)"]
    head += [f"at {n}" for n in lengths[1:]] + [f"largest p(t) - p(0) at {n}" for n in (lengths[0], lengths[-1])]
    rows = []
    for kind, found in solves.items():
        took = [seconds_text(found["seconds"][what]) for what in ("solve", "step")]
        counts = [
            f"{row['evaluations']:.0f} ({row['steps']:.0f})" if "steps" in row else "diverges"
            for row in [found["training"], *found["lengths"][1:]]
        ]
        ends = found["lengths"][0], found["lengths"][-1]
        largest = [f"{row['largest']:.3g}" if "largest" in row else "-" for row in ends]
        rows.append([KINDS[kind].label, *took, f"{100 * found['share']:.1f} %", *counts, *largest])
    return markdown(head, rows)


# --------------------------------------------------------------------------------------------------------- plotting


def plot(found: Row, machine: Row, path: Path) -> None:
    """Bits per byte against the length, a line a kind; one that diverges ends."""
    pyplot = drawing()
    figure, ax = pyplot.subplots(figsize=(8.0, 5.6), layout="constrained")
    lengths: list[int] = []
    for kind, result in found["kinds"].items():
        lengths = [row["length"] for row in result["lengths"]]
        here = [(row["length"], row["last"]["mean"], row["last"]["spread"] or 0.0)
                for row in result["lengths"] if "last" in row]  # fmt: skip
        if here:
            style = {"marker": "o", "markersize": 4, "capsize": 2, "linestyle": "--" if kind in DASHED else "-"}
            ax.errorbar(*zip(*here), color=COLOUR[kind], label=KINDS[kind].label, **style)
    ax.axvline(found["trained"], color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set(xlabel=f"length, bytes (trained at {found['trained']})", ylabel=f"bits per byte, last {found['last']} bytes")
    ax.set_title(f"{machine['device_name']}, torch {machine['torch']}; bars: standard deviation", fontsize="small")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plane(vectors: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Principal components: (layers, length, dim) to (layers, length, 2) in the plane in which these differ most, all
    layers' the same, and the parts of the variance along its axes."""
    flat = vectors.detach().double().cpu().flatten(0, 1)
    flat = flat - flat.mean(0)
    values, axes = torch.linalg.eigh(flat.mT @ flat)
    share = (values.flip(0)[:2] / values.sum().clamp_min(1e-300)).tolist()
    return (flat @ axes.flip(1)[:, :2]).unflatten(0, vectors.shape[:2]), (share[0], share[1])


def plot_trajectories(vectors: Tensor, path: Path, label: str, trained: int) -> None:
    """Where positions lie: p(t) - p(0) of `vectors` (streams, layers, length, dim) in the plane in which they differ
    most. A panel a stream, a line a layer, colour by position; below them the trained positions alone."""
    pyplot = drawing()
    added = vectors - vectors[:, :, :1]
    count, _, length = added.shape[:3]
    spans = [length, trained] if length > trained else [length]
    figure, axes = pyplot.subplots(
        len(spans), count, figsize=(4.8 * count, 4.4 * len(spans)), layout="constrained", squeeze=False
    )
    for row, span in zip(axes, spans):
        for ax, stream, of_stream in zip(row, ("query", "key", "value"), added):
            points, share = plane(of_stream[:, :span])
            for layer, line_of in enumerate(points.tolist()):
                x, y = zip(*line_of)
                ax.plot(x, y, color="grey", linewidth=0.6, zorder=1)
                shown = ax.scatter(x, y, c=range(span), cmap="viridis", s=6, zorder=2)
                ax.annotate(str(layer), (x[-1], y[-1]), fontsize="small", zorder=4)
                if trained < span:
                    ax.plot(x[trained], y[trained], "x", color=COLOURS[3], markersize=7, zorder=3)
            ax.set(xlabel=f"{100 * share[0]:.0f} % of the variance", ylabel=f"{100 * share[1]:.0f} %")
            ax.set_title(f"{stream}, positions 0 to {span - 1}", fontsize="medium")
            ax.locator_params(axis="x", nbins=5)
            ax.grid(alpha=0.3)
        figure.colorbar(shown, ax=list(row), label="position", shrink=0.8)
    figure.suptitle(
        f"{label}: p(t) - p(0), trained; layers numbered where they end, x: position {trained}, the first not trained",
        fontsize="small",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
