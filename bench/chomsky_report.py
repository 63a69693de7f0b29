"""How far the tasks of the Chomsky hierarchy were solved: a table, and how DAPE fares against its base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .chomsky_tasks import TASKS
from .extrapolate_report import summary
from .positions import POSITIONS
from .report import Row, markdown


def gather(plan: Row, parts: Iterable[Row]) -> Row:
    """Per task and method, mean and spread over seeds of the accuracy at unseen and at trained lengths."""
    cells: dict[str, dict[str, Row]] = {}
    for task in TASKS:
        for kind in POSITIONS:
            runs = sorted((p for p in parts if (p["task"], p["kind"]) == (task, kind)), key=lambda p: p["seed"])
            if runs:
                cells.setdefault(task, {})[kind] = {
                    "seeds": [run["seed"] for run in runs],
                    "parameters": runs[0]["parameters"],
                    "training_seconds": sum(run["seconds"] for run in runs) / len(runs),
                    "score": summary([run["score"] for run in runs]),
                    "trained_accuracy": summary([run["trained_accuracy"] for run in runs]),
                }
    tested = [min(plan["tested"]), max(plan["tested"])]
    return {"tasks": cells, "tested": tested, "longest": plan["longest"], "steps": plan["steps"]}


def text(found: Row) -> str:
    first, last = found["tested"]
    parts = [
        f"Accuracy in percent, the mean over lengths {first} to {last}; in brackets on the lengths of training,"
        f" 1 to {found['longest']}, at the end of its {found['steps']} steps (200000 as published).",
        table(found),
        *words(found),
    ]
    return "\n\n".join(parts)


def table(found: Row) -> str:
    kinds = [kind for kind in POSITIONS if any(kind in cells for cells in found["tasks"].values())]
    rows = []
    for task, cells in found["tasks"].items():
        line = [TASKS[task].label, f"{100 / TASKS[task].outputs:.0f}"]
        rows.append(line + [_cell(cells[kind]) if kind in cells else "-" for kind in kinds])
    return markdown(["task", "guessing", *(POSITIONS[kind].label for kind in kinds)], rows)


def _cell(cell: Row) -> str:
    score, spread = cell["score"]["mean"], cell["score"]["spread"]
    spread = "" if spread is None else f" ± {100 * spread:.1f}"
    return f"{100 * score:.1f}{spread} ({100 * cell['trained_accuracy']['mean']:.0f})"


def words(found: Row) -> list[str]:
    """For each DAPE, in how many tasks it scores above its base, and by how much in the mean."""
    lines = []
    for kind, position in POSITIONS.items():
        base: Any = position.mixes
        both = [cells for cells in found["tasks"].values() if kind in cells and base in cells]
        if both:
            gains = [100 * (cells[kind]["score"]["mean"] - cells[base]["score"]["mean"]) for cells in both]
            above = sum(gain > 0 for gain in gains)
            lines.append(
                f"{position.label} is above {POSITIONS[base].label} in {above} of {len(gains)} tasks,"
                f" by {sum(gains) / len(gains):+.1f} points in the mean."
            )
    return lines
