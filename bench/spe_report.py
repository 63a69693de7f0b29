"""The tables and plots of `python -m bench spe`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .contest import DIRECTIONS
from .extrapolate_report import summary
from .report import COLOURS, Row, drawing, markdown
from .spe_language import KINDS
from .spe_speed import OF_KIND, PEERS, Place

SHORT = dict(zip(DIRECTIONS, ("fwd", "fwd+bwd")))
COLOUR_OF = dict(zip(PEERS, (COLOURS[0], COLOURS[3], COLOURS[2], COLOURS[5], COLOURS[4])))
ROW_OF = ("sine", "conv")
LABEL = {"sine": "SineSPE", "conv": "ConvSPE"}


# ------------------------------------------------------------------------------------------------- time, memory


def speed_rows(cells: list[Row]) -> list[Row]:
    """A row a place and direction: each peer's cell; posattn's time a token; how many times faster than the codes in
    memory and of how many times less memory; how many times the time and memory of no positions."""
    made: dict[tuple[Any, ...], Row] = {}
    for cell in cells:
        place = Place(*(cell[key] for key in Place._fields))
        row = made.setdefault((place, cell["direction"]), {**place._asdict(), "direction": cell["direction"]})
        row[cell["peer"]] = {key: cell[key] for key in ("seconds", "peak_bytes", "note", "peak_note") if cell.get(key)}
    for row in made.values():
        mine = row.get("posattn", {})
        if "seconds" in mine:
            row["microseconds_a_token"] = mine["seconds"]["median"] / row["length"] * 1e6
        for other, faster, less in (
            ("codes in memory", "times_faster_than_codes_in_memory", "times_less_memory_than_codes_in_memory"),
            ("SDPA", "times_faster_than_sdpa", "times_less_memory_than_sdpa"),
        ):
            row.update(_ratios(row.get(other, {}), mine, faster, less))
        plain = row.get("no positions", {})
        row.update(_ratios(mine, plain, "times_the_time_of_no_positions", "times_the_memory_of_no_positions"))
    return list(made.values())


def _ratios(above: Row, below: Row, of_time: str, of_memory: str) -> Row:
    found = {}
    if "seconds" in above and "seconds" in below:
        found[of_time] = above["seconds"]["median"] / below["seconds"]["median"]
    if above.get("peak_bytes") and below.get("peak_bytes"):
        found[of_memory] = above["peak_bytes"] / below["peak_bytes"]
    return found


def cell_text(cell: Row) -> str:
    if "seconds" not in cell:
        return str(cell.get("note", "-"))[:40] or "-"
    seconds = cell["seconds"]["median"]
    time = (f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s") + "*" * (cell["seconds"]["runs"] == 1)
    return f"{time}, {cell['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in cell else time


def speed_lines(cells: list[Row]) -> str:
    """One place, as it is printed while the job runs."""
    made = []
    for row in speed_rows(cells):
        name = f"{row['kind']} N {row['length']} {SHORT[row['direction']]}"
        made.append(f"  {name:24} " + "; ".join(cell_text(row.get(peer, {})) for peer in OF_KIND[row["kind"]]))
    return "\n".join(made)


def speed_text(cells: list[Row]) -> str:
    found = speed_rows(cells)
    parts = []
    for kind in ROW_OF:
        head = [LABEL[kind], *OF_KIND[kind], "us a token", "faster than codes", "less memory than codes"]
        extra = ["times_the_time_of_no_positions"] * (kind == "sine")
        head += ["times no positions"] * len(extra)
        keys = ["microseconds_a_token", "times_faster_than_codes_in_memory", "times_less_memory_than_codes_in_memory"]
        here = sorted((r for r in found if r["kind"] == kind), key=lambda r: (r["direction"], r["length"]))
        table = []
        for row in here:
            name = f"N {row['length']}, {SHORT[row['direction']]}"
            figures = [f"{row[key]:.3g}" if key in row else "" for key in [*keys, *extra]]
            table.append([name, *(cell_text(row.get(peer, {})) for peer in OF_KIND[kind]), *figures])
        if table:
            parts.append(markdown(head, table))
    return "\n\n".join([*parts, "* one run; the others are medians of at least three"])


def plot_speed(cells: list[Row], machine: Row, path: Path) -> None:
    """Time and memory against the length, forward and backward together."""
    pyplot = drawing()
    figure, axes = pyplot.subplots(1, 2, figsize=(11.2, 4.9), layout="constrained")
    backward = [cell for cell in cells if cell["direction"] == DIRECTIONS[1]]
    for ax, what in zip(axes, ("time", "memory")):
        for kind in ROW_OF:
            for peer in OF_KIND[kind]:
                here = [c for c in backward if (c["kind"], c["peer"]) == (kind, peer)]
                points = _points(here, what)
                name = f"{LABEL[kind]}, {peer}" if peer in PEERS[:2] else peer
                if points:
                    style = "o-" if kind == "sine" else "s--"
                    ax.plot(*zip(*points), style, color=COLOUR_OF[peer], label=name, markersize=4)
        lengths = sorted({cell["length"] for cell in backward})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
        ax.set(xlabel="sequence length", ylabel="seconds" if what == "time" else "MiB beyond the inputs")
        ax.set_title(f"{what}, forward + backward; a line ends where a peer was dropped", fontsize="medium")
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=4)
    shape = "B 1, H {heads}, D {head_dim}, R {realizations}, causal".format(**cells[0])
    figure.suptitle(f"{machine['device_name']}, torch {machine['torch']}; {shape}", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _points(cells: list[Row], what: str) -> list[tuple[int, float]]:
    if what == "time":
        return [(c["length"], c["seconds"]["median"]) for c in cells if "seconds" in c]
    return [(c["length"], c["peak_bytes"] / 2**20) for c in cells if c.get("peak_bytes")]


# ------------------------------------------------------------------------------------------------------ quality


def quality_text(kinds: Row) -> str:
    counts = [row["realizations"] for row in next(iter(kinds.values()))["rows"]]
    table = []
    for kind, found in kinds.items():
        table.append([LABEL[kind], *(f"{row['error'] / row['size']:.4f}" for row in found["rows"])])
        table.append([f"{LABEL[kind]}, predicted", *(f"{row['predicted'] / row['size']:.4f}" for row in found["rows"])])
    lines = ["Error of qhat . khat / sqrt(R), root mean square, as a part of what it stands for:"]
    lines.append(markdown(["R", *map(str, counts)], table))
    for kind, found in kinds.items():
        lines.append(
            f"{LABEL[kind]}: the error falls as R^{found['slope']:.3f} (-0.5 expected); the mean of"
            f" {found['mean_of']} realisations is {found['mean_error_over_predicted']:.2f} predicted errors away from"
            f" the expectation (1 if unbiased); position_kernel is right to {found['position_kernel_error']:.0e}."
        )
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def plot_quality(kinds: Row, machine: Row, path: Path) -> None:
    pyplot = drawing()
    figure, ax = pyplot.subplots(figsize=(6.4, 4.6), layout="constrained")
    for colour, (kind, found) in zip((COLOURS[0], COLOURS[3]), kinds.items()):
        counts = [row["realizations"] for row in found["rows"]]
        error, predicted = ([row[what] / row["size"] for row in found["rows"]] for what in ("error", "predicted"))
        ax.plot(counts, error, "o", color=colour, label=f"{LABEL[kind]}: slope {found['slope']:.3f}")
        ax.plot(counts, predicted, "-", color=colour, linewidth=1, label="predicted, no fit")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.set(xlabel="realisations R", ylabel="error / root mean square of the expectation")
    ax.set_title(f"qhat . khat against its expectation over the noise; torch {machine['torch']}", fontsize="small")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------- language


def gather_language(plan: Row, parts: Iterable[Row]) -> Row:
    """Per kind and length, mean and spread over seeds; and seed by seed the difference to no positions."""
    runs = {kind: {p["seed"]: p for p in parts if p["kind"] == kind} for kind in KINDS}
    kinds = {}
    for kind, by_seed in ((kind, dict(sorted(found.items()))) for kind, found in runs.items() if found):
        kinds[kind] = {
            "parameters": next(iter(by_seed.values()))["parameters"],
            "seeds": list(by_seed),
            "training_seconds": sum(run["training"]["seconds"] for run in by_seed.values()) / len(by_seed),
            "lengths": [_of_length(rows) for rows in zip(*(run["lengths"] for run in by_seed.values()))],
        }
        pairs = [(run, runs["none"][seed]) for seed, run in by_seed.items() if kind != "none" and seed in runs["none"]]
        if pairs:
            kinds[kind]["minus_none"] = [
                {"length": ours["length"], **summary([run["lengths"][i]["last"] - base["lengths"][i]["last"]
                                                      for run, base in pairs])}
                for i, ours in enumerate(kinds[kind]["lengths"])
            ]  # fmt: skip
    return {"kinds": kinds, "trained": plan["recipe"]["length"], "last": plan["last"]}


def _of_length(rows: tuple[Row, ...]) -> Row:
    values = {what: summary([row[what] for row in rows]) for what in ("last", "all")}
    return {"length": rows[0]["length"], **values}


def language_text(found: Row) -> str:
    trained, kinds = found["trained"], found["kinds"]
    lengths = [row["length"] for row in next(iter(kinds.values()))["lengths"]]
    header = [f"{n} (trained)" if n == trained else str(n) for n in lengths]
    rows, differences = [], []
    for kind, result in kinds.items():
        cells = [_spread(row["last"], ".3f") for row in result["lengths"]]
        rows.append([KINDS[kind], f"{result['parameters']:,}", f"{result['training_seconds']:.0f} s", *cells])
        if "minus_none" in result:
            cells = [_spread(row, "+.3f") for row in result["minus_none"]]
            differences.append([f"{KINDS[kind]} - none", *cells])
    seeds = max(len(result["seeds"]) for result in kinds.values())
    parts = [
        f"Bits per byte of the same held-out bytes, the last {found['last']} of every {lengths[-1]}, from windows of"
        f" each length; trained at {trained}; seeds: {seeds}, mean ± standard deviation; lower is better.",
        markdown(["positions", "parameters", "training", *header], rows),
    ]
    if "absolute" in kinds:
        parts.append(f"The rows of the learned absolute positions beyond {trained} were never trained, but counted.")
    if differences:
        parts += ["Seed by seed, bits per byte (negative: better than no positions):"]
        parts.append(markdown(["difference", *header], differences))
    return "\n\n".join(parts)


def _spread(value: Row, form: str) -> str:
    cell = format(value["mean"], form)
    return cell if value["spread"] is None else f"{cell} ± {value['spread']:.3f}"


def plot_language(found: Row, machine: Row, path: Path) -> None:
    pyplot = drawing()
    figure, ax = pyplot.subplots(figsize=(7.2, 4.8), layout="constrained")
    for kind, colour in zip(KINDS, ("#999999", COLOURS[5], COLOURS[0], COLOURS[3])):
        if kind in found["kinds"]:
            rows = found["kinds"][kind]["lengths"]
            lengths = [row["length"] for row in rows]
            mean, spread = [row["last"]["mean"] for row in rows], [row["last"]["spread"] or 0.0 for row in rows]
            style = {"marker": "o", "markersize": 4, "capsize": 2}
            ax.errorbar(lengths, mean, spread, color=colour, label=KINDS[kind], **style)
    ax.axvline(found["trained"], color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set(xlabel=f"length, bytes (trained at {found['trained']})", ylabel=f"bits per byte, last {found['last']} bytes")
    ax.set_title(f"linear attention, {machine['device_name']}, torch {machine['torch']}", fontsize="small")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
