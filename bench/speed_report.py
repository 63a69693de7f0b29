"""What `python -m bench speed` prints and draws, from its results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import COLOURS, drawing, markdown

Row = dict[str, Any]
NOTE = "a rehearsal on a CPU: no figure here is one of a GPU"


def lines(name: str, part: Row, rehearsal: bool) -> str:
    """One piece, as it is printed while the job runs."""
    clocks = part["clocks"]
    about = ""
    if clocks is not None:
        about = f", SM {clocks['sm'][0]:.0f} to {clocks['sm'][2]:.0f} MHz, {clocks['power']:.0f} W"
    made = [f"{name}  ({part['seconds']:.0f} s{about})"]
    return "\n".join(made + [f"  {row['peer']:28} {values(part['part'], row, rehearsal)}" for row in part["rows"]])


def values(part: str, row: Row, rehearsal: bool) -> str:
    if "not_run" in row:
        return f"not run: {row['not_run'][:110]}"
    if part == "error":
        return ", ".join(f"{name} {error:.2e}" for name, error in row["errors"].items())
    if part == "memory":
        return f"{row['extra_bytes'] / 2**20:.2f} MiB extra, {row['share']:.2%}"
    if part == "decode":
        return f"{row['place']}: {row['median'] * 1e6:.1f} us, {row['share']:.1%} of the copy's bandwidth"
    if part in ("mixing", "spe"):
        return f"{row['direction']}: {row['ms']:.3f} ms, {row['times']:.2f} times the floor"
    if part == "first":
        return ", ".join(f"{name} {row[name]['call']:.2f} s" for name in ("cold", "warm"))
    made = []
    for direction in ("forward", "both", "backward"):
        if f"{direction}_ms" in row:
            tflops = f" {row[f'{direction}_tflops']:6.1f} TFLOP/s" if f"{direction}_tflops" in row else ""
            tflops = "" if rehearsal else tflops
            made.append(f"{direction} {row[f'{direction}_ms']:9.3f} ms{tflops}")
    made += [f"{direction} not run: {why[:60]}" for direction, why in row.get("failed", {}).items()]
    return "   ".join(made)


def text(results: Row) -> str:
    """README's table: a line a goal, and below it what the machine was."""
    machine = results["machine"]
    table = []
    for line in results["goals"]:
        ratio = "-" if line["ratio"] is None else f"{line['ratio']:.2f}"
        table.append(
            [line["what"], line["reach"], line["measured"], ratio, line["verdict"], line["where"], line["peers"]]
        )
    head = ["what", "reach", "measured", "of the goal", "verdict", "worst at", "beside it"]
    clocks = machine.get("nvidia_smi") or {}
    about = f"{machine['device_name']}, " + ", ".join(f"{key} {machine[key]}" for key in ("python", "torch", "triton"))
    if clocks:
        about += f", driver {clocks.get('driver_version')}, SM {clocks.get('clocks.sm')} before"
        about += f" and {(machine.get('nvidia_smi_after') or {}).get('clocks.sm')} after"
    about += f", commit {machine['commit']}, {machine['date']}"
    notes = [about] + [f"{NOTE[0].upper()}{NOTE[1:]}."] * bool(machine.get("rehearsal"))
    return "\n\n".join([markdown(head, table), *notes])


# ------------------------------------------------------------------------------------------------------------ the plot


def series(parts: dict[str, Row], part: str, dim: int, key: str) -> dict[str, list[tuple[int, float]]]:
    """Per peer its values by length."""
    made: dict[str, list[tuple[int, float]]] = {}
    for piece in parts.values():
        for row in piece.get("rows", ()) if piece.get("part") == part else ():
            if row.get("head_dim") == dim and key in row:
                made.setdefault(row["peer"], []).append((row["length"], row[key]))
    return {name: sorted(points) for name, points in made.items()}


def memory_series(parts: dict[str, Row], dim: int) -> dict[str, list[tuple[int, float]]]:
    found = series(parts, "memory", dim, "peak_bytes")
    return {name: [(n, size / 2**20) for n, size in points] for name, points in found.items()}


def plot(results: Row, path: Path) -> Path | None:
    """TFLOP/s of forward and of backward, and peak memory, by N; nothing without measurements or matplotlib."""
    parts = results["parts"]
    dims = sorted({row["head_dim"] for p in parts.values() for row in p.get("rows", ()) if "head_dim" in row})
    dim = 128 if 128 in dims else next(iter(dims), 0)
    panels = {
        "forward, TFLOP/s": series(parts, "forward", dim, "forward_tflops"),
        "backward, TFLOP/s": series(parts, "training", dim, "backward_tflops"),
        "forward + backward, peak MiB": memory_series(parts, dim),
    }
    if not any(panels.values()):
        return None
    try:
        pyplot = drawing()
    except ImportError:
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16.8, 5.2), layout="constrained")
    for ax, (title, found) in zip(axes, panels.items()):
        draw(ax, title, {name: points for name, points in found.items() if not name.endswith(("frozen", "kernel"))})
    machine = results["machine"]
    about = f"{machine['device_name']}, torch {machine['torch']}, D {dim}, causal"
    figure.suptitle(f"{about}: {NOTE}" if machine.get("rehearsal") else about, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def draw(ax: Any, title: str, found: dict[str, list[tuple[int, float]]]) -> None:
    """posattn in full lines, SDPA dashed, FlexAttention dotted."""
    styles = {"posattn": "-", "SDPA": "--", "Flex": ":"}
    seen = dict.fromkeys(styles, 0)
    for name, points in found.items():
        family = name.split()[0]
        number, marker = seen[family], "os^vDxP*"[seen[family] % 8]
        seen[family] += 1
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(*zip(*points), marker + styles[family], color=colour, label=name, markersize=5)
    lengths = sorted({length for points in found.values() for length, _ in points})
    ax.set_xscale("log", base=2)
    if lengths:
        ax.set_xticks(lengths, [str(length) for length in lengths])
        ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    ax.set_ylim(bottom=0)
    ax.set(xlabel="sequence length", title=title)
    ax.grid(alpha=0.3)
