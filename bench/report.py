"""What a run has found: Markdown tables for the terminal and the README, and the plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .contest import DIRECTIONS

Row = dict[str, Any]
# Colours that stay apart for the colour-blind (Okabe & Ito), posattn's own first.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#000000")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned for a terminal too: first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if c == 0 else ":") for c, w in enumerate(widths)) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def kind_label(kind: str, model: Row) -> str:
    window = model["recipe"]["length"]
    return {"absolute": "absolute", "tisa": "TISA", "tisa_window": f"TISA, window {window}"}[kind]


def lengths_table(model: Row) -> str:
    """Bits per byte against the length of the window: of all bytes, and of the last 256."""
    header = ["length"]
    for kind in model["kinds"]:
        header += [f"{kind_label(kind, model)}: all", "last 256"]
    rows = []
    for index, length in enumerate(model["lengths"]):
        trained = model["recipe"]["length"]
        line = [f"{length}" + (" (trained)" if length == trained else f" ({length / trained:g}x)")]
        for result in model["kinds"].values():
            found = result["lengths"][index]
            line += [f"{found['all']:.3f}", f"{found['last']:.3f}"]
        rows.append(line)
    return markdown(header, rows)


def gate_table(gate: list[Row]) -> str:
    names = max((list(row["errors"]) for row in gate), key=len)
    rows = []
    for row in gate:
        errors = [f"{row['errors'][n]:.0e}" if n in row["errors"] else "-" for n in names]
        rows.append([row["label"], *errors, "passed" if row["passed"] else "FAILED", row["note"]])
    return markdown(["error against float64", *names, "gate", "note"], rows)


def attention_tables(cells: list[Row]) -> str:
    """Time and peak memory, a table for each direction, and below it why cells are empty."""
    parts = []
    for direction in DIRECTIONS:
        here = [cell for cell in cells if cell["direction"] == direction]
        lengths = sorted({cell["length"] for cell in here})
        rows, notes = [], []
        for label in dict.fromkeys(cell["label"] for cell in here):
            by_length = {cell["length"]: cell for cell in here if cell["label"] == label}
            rows.append([label, *(_cell_text(by_length[n], notes) for n in lengths)])
        header = [f"{direction}: time, peak memory", *(f"N = {n}" for n in lengths)]
        if any("seconds" in cell and cell["seconds"]["runs"] == 1 for cell in here):
            notes.append("* one run; the others are medians of at least three")
        parts.append("\n".join([markdown(header, rows), "", *notes]).rstrip())
    return "\n\n".join(parts)


def _cell_text(cell: Row, notes: list[str]) -> str:
    if "seconds" in cell:
        time = _seconds(cell["seconds"]["median"]) + ("*" if cell["seconds"]["runs"] == 1 else "")
        if "peak_bytes" in cell:
            return f"{time}, {_bytes(cell['peak_bytes'])}"
        return f"{time}, {_note(cell['peak_note'], notes)}"
    return _note(cell["note"], notes)


def _note(reason: str, notes: list[str]) -> str:
    """The reason itself when it fits a cell, else a number that stands for it below the table."""
    if len(reason) <= 18:
        return reason
    numbered = [line.split(") ", 1)[1] for line in notes]
    if reason not in numbered:
        notes.append(f"({len(notes) + 1}) {reason}")
        numbered.append(reason)
    return f"cannot ({numbered.index(reason) + 1})"


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 100 * 2**20 else f"{size / 2**20:.0f} MiB"


def plot_results(results: Row, path: Path) -> None:
    """Bits per byte, time and memory against the length, side by side."""
    pyplot = drawing()
    panels = ("model" in results) + 2 * ("attention" in results)
    figure, axes = pyplot.subplots(
        1, panels, figsize=(5.6 * panels, 4.9), layout="constrained", squeeze=False
    )
    left = list(axes[0])
    if "model" in results:
        _plot_lengths(left.pop(0), results["model"])
    if "attention" in results:
        backward = [c for c in results["attention"]["cells"] if c["direction"] == DIRECTIONS[1]]
        problem = results["attention"]["problem"]
        title = "B {batch}, H {num_heads}, D {head_dim}, {dtype}, causal".format(**problem)
        for ax, what in zip(left, ("time", "memory")):
            _plot_cells(ax, backward, what)
            ax.set_title(f"{what}, forward + backward\n{title}", fontsize="medium")
    machine = results["machine"]
    figure.suptitle(
        f"{machine['device_name']}, {machine['cores']} cores, torch {machine['torch']}", fontsize="small"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _plot_lengths(ax: Any, model: Row) -> None:
    for colour, (kind, result) in zip((COLOURS[5], COLOURS[0], COLOURS[2]), model["kinds"].items()):
        for what, style in (("all", "o-"), ("last", "o--")):
            values = [row[what] for row in result["lengths"]]
            label = f"{kind_label(kind, model)}, " + ("all bytes" if what == "all" else "last 256")
            ax.plot(model["lengths"], values, style, color=colour, label=label, markersize=4)
    ax.axvline(model["recipe"]["length"], color="grey", linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set_xticks(model["lengths"], [str(n) for n in model["lengths"]])
    ax.set(xlabel=f"length, bytes (trained at {model['recipe']['length']})", ylabel="bits per held-out byte")
    ax.set_title("the model beyond its training length", fontsize="medium")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _plot_cells(ax: Any, cells: list[Row], what: str) -> None:
    lengths = sorted({cell["length"] for cell in cells})
    for colour, marker, label in zip(COLOURS, "os^vDx", dict.fromkeys(cell["label"] for cell in cells)):
        here = [cell for cell in cells if cell["label"] == label]
        if what == "time":
            points = [(c["length"], c["seconds"]["median"]) for c in here if "seconds" in c]
        else:
            points = [(c["length"], c["peak_bytes"] / 2**20) for c in here if c.get("peak_bytes")]
        if points:
            ax.plot(*zip(*points), marker + "-", color=colour, label=label, markersize=5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set(xlabel="sequence length", ylabel="seconds" if what == "time" else "MiB beyond the inputs")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def plot_biases(model: Any, path: Path) -> None:
    """What TISA has learned: a panel for each layer, a line for each head."""
    pyplot = drawing()
    biases = [block.bias for block in model.blocks]
    columns = min(len(biases), 2)
    rows = -(-len(biases) // columns)
    size = (5.6 * columns, 3.4 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for layer, (ax, bias) in enumerate(zip(axes.flat, biases)):
        bias.plot(max_distance=64, ax=ax)
        # Causal: a query never meets a key that stands after it.
        ax.axvspan(0.5, 64, color="grey", alpha=0.15, linewidth=0)
        ax.set_title(f"layer {layer}", fontsize="medium")
        ax.grid(alpha=0.3)
    figure.suptitle(
        "TISA after training: bias added to the score (grey: the future, never seen)", fontsize="medium"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def drawing() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
