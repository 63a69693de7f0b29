"""What the models were worth beyond their training length: tables, a plot and plain words, all from the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from .positions import POSITIONS
from .report import COLOURS, Row, drawing, markdown

# The base is dashed and its DAPE solid, in one colour; methods without a DAPE are thin.
COLOUR = {
    "alibi": COLOURS[0], "kerple": COLOURS[3], "fire": COLOURS[2],
    "none": "#999999", "absolute": COLOURS[5], "sinusoidal": "#8C564B", "rope": COLOURS[4], "tisa": COLOURS[1],
}  # fmt: skip


def gather(plan: Row, parts: Iterable[Row]) -> Row:
    """Per method and length, mean and spread over seeds; and the paired differences of DAPE and its base.

    Spread is the standard deviation of the sample, None for a single seed. A difference is taken seed by seed:
    both models start from the same numbers and see the same batches.
    """
    by_kind: dict[str, dict[int, Row]] = {kind: {} for kind in POSITIONS}
    for part in parts:
        by_kind[part["kind"]][part["seed"]] = part
    by_kind = {kind: dict(sorted(runs.items())) for kind, runs in by_kind.items() if runs}
    methods, pairs = {}, {}
    for kind, runs in by_kind.items():
        methods[kind] = {
            "parameters": next(iter(runs.values()))["parameters"],
            "seeds": list(runs),
            "training_seconds": mean(run["training"]["seconds"] for run in runs.values()),
            "lengths": _by_length([run["lengths"] for run in runs.values()]),
        }
        base = by_kind.get(POSITIONS[kind].mixes or "", {})
        seeds = [seed for seed in runs if seed in base]
        if seeds:
            pairs[kind] = {
                "base": POSITIONS[kind].mixes,
                "seeds": seeds,
                "lengths": _by_length([_minus(runs[seed], base[seed]) for seed in seeds]),
            }
    return {"methods": methods, "dape_minus_base": pairs, "trained": plan["recipe"]["length"], "last": plan["last"]}


def _by_length(runs: list[list[Row]]) -> list[Row]:
    """Mean and spread of each length's rows."""
    return [
        {"length": rows[0]["length"], **{what: summary([row[what] for row in rows]) for what in ("last", "all")}}
        for rows in zip(*runs)
    ]


def _minus(run: Row, base: Row) -> list[Row]:
    return [
        {"length": ours["length"], **{what: ours[what] - theirs[what] for what in ("last", "all")}}
        for ours, theirs in zip(run["lengths"], base["lengths"])
    ]


def summary(values: list[float]) -> Row:
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None, "values": values}


def text(found: Row) -> str:
    """Everything for the terminal: three tables and the plain words."""
    trained, last = found["trained"], found["last"]
    counts = sorted({len(method["seeds"]) for method in found["methods"].values()})
    number = " or ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
    parts = [
        f"Bits per byte of the same held-out bytes, the last {last} of every {_lengths(found)[-1]}, from windows"
        f" of each length; trained at {trained}; {number}: mean ± standard deviation; lower is better.",
        table(found),
        "The same as perplexity per byte, 2^bits of the mean:",
        table(found, perplexity=True),
    ]
    if "absolute" in found["methods"]:
        parts.append(
            f"The rows of the learned absolute positions beyond {trained} were never trained; they are counted."
        )
    if found["dape_minus_base"]:
        parts += ["DAPE minus its base, bits per byte, seed by seed (negative: DAPE is better):", pairs_table(found)]
        parts.append("\n".join(words(found)))
    return "\n\n".join(parts)


def _lengths(found: Row) -> list[int]:
    method = next(iter(found["methods"].values()))
    return [row["length"] for row in method["lengths"]]


def _header(found: Row) -> list[str]:
    return [f"{n} (trained)" if n == found["trained"] else str(n) for n in _lengths(found)]


def _cell(value: Row, form: str) -> str:
    cell = format(value["mean"], form)
    return cell if value["spread"] is None else f"{cell} ± {value['spread']:.3f}"


def table(found: Row, perplexity: bool = False) -> str:
    rows = []
    for kind, method in found["methods"].items():
        values = [row["last"] for row in method["lengths"]]
        cells = [f"{2 ** v['mean']:.2f}" if perplexity else _cell(v, ".3f") for v in values]
        rows.append([POSITIONS[kind].label, f"{method['parameters']:,}", *cells])
    return markdown(["method", "parameters", *_header(found)], rows)


def pairs_table(found: Row) -> str:
    rows = []
    for kind, pair in found["dape_minus_base"].items():
        name = f"{POSITIONS[kind].label} - {POSITIONS[pair['base']].label}"
        rows.append([name, *(_cell(row["last"], "+.3f") for row in pair["lengths"])])
    return markdown(["difference", *_header(found)], rows)


def words(found: Row) -> list[str]:
    """For each pair, whether DAPE beats its base at the greatest length."""
    lines = []
    for kind, pair in found["dape_minus_base"].items():
        at = pair["lengths"][-1]
        difference, name, base = at["last"], POSITIONS[kind].label, POSITIONS[pair["base"]].label
        values = difference["values"]
        size = f"{difference['mean']:+.3f} bits per byte"
        if len(values) > 1:
            size += " (" + ", ".join(f"{value:+.3f}" for value in values) + " by seed)"
        same_sign = all(v < 0 for v in values) or all(v > 0 for v in values)
        if not same_sign or abs(difference["mean"]) <= (difference["spread"] or 0.0):
            verdict = f"{name} and {base} are not clearly apart at {at['length']}"
        elif values[0] < 0:
            verdict = f"{name} beats {base} at {at['length']}"
        else:
            verdict = f"{name} does not beat {base} at {at['length']}, it is worse"
        if len(values) == 1:
            verdict += ", by one seed"
        lines.append(f"{verdict}: {size}.")
    return lines


def plot(found: Row, machine: Row, path: Path) -> None:
    """Bits per byte against the length, a line for each method."""
    figure, ax = drawing().subplots(figsize=(8.0, 5.6), layout="constrained")
    lengths, trained = _lengths(found), found["trained"]
    for kind, method in found["methods"].items():
        base = POSITIONS[kind].mixes
        values = [row["last"] for row in method["lengths"]]
        ax.errorbar(
            lengths,
            [value["mean"] for value in values],
            [value["spread"] or 0.0 for value in values],
            color=COLOUR[base or kind],
            linestyle="-" if base else "--" if kind in ("alibi", "kerple", "fire") else ":",
            linewidth=2.0 if base else 1.4,
            marker="o",
            markersize=4,
            capsize=2,
            label=POSITIONS[kind].label,
        )
    ax.axvline(trained, color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set(xlabel=f"length, bytes (trained at {trained})", ylabel=f"bits per byte, last {found['last']} bytes")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    seeds = max(len(method["seeds"]) for method in found["methods"].values())
    ax.set_title(
        f"{machine['device_name']}, torch {machine['torch']}, seeds: {seeds}; bars: standard deviation",
        fontsize="small",
    )
    figure.savefig(path, dpi=150)
    drawing().close(figure)
