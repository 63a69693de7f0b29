"""The tables of `python -m bench dape`: time, memory, and how many times less than the same formula with matrices."""

from __future__ import annotations

from typing import Any

from .contest import DIRECTIONS
from .mixing_speed import PEERS, Place, floor_seconds
from .report import markdown

Row = dict[str, Any]
SHORT = dict(zip(DIRECTIONS, ("fwd", "fwd+bwd")))
HEADER = "time (peak memory) of " + ", ".join(PEERS)


def rows(cells: list[Row]) -> list[Row]:
    """A row a place and direction, with ratios: times faster and times less memory than each peer; the floor."""
    made: dict[tuple[Any, ...], Row] = {}
    for cell in cells:
        place = Place(*(cell[key] for key in Place._fields))
        row = made.setdefault((place, cell["direction"]), {**place._asdict(), "direction": cell["direction"]})
        row[cell["peer"]] = {key: cell[key] for key in ("seconds", "peak_bytes", "note", "peak_note") if cell.get(key)}
    for (place, direction), row in made.items():
        mine = row.get("posattn", {})
        for peer in PEERS[1:]:
            other = row.get(peer, {})
            if "seconds" in mine and "seconds" in other:
                row[f"times_faster_than_{peer}"] = other["seconds"]["median"] / mine["seconds"]["median"]
            if mine.get("peak_bytes") and other.get("peak_bytes"):
                row[f"times_less_memory_than_{peer}"] = other["peak_bytes"] / mine["peak_bytes"]
        floor = floor_seconds(place, direction)
        if floor is not None:
            row["floor_seconds"] = floor
            if "seconds" in mine:
                row["times_the_floor"] = mine["seconds"]["median"] / floor
    return list(made.values())


def cell_text(cell: Row) -> str:
    if "seconds" not in cell:
        return str(cell.get("note", "-"))[:40] or "-"
    time = f"{cell['seconds']['median'] * 1e3:.3g} ms"
    return f"{time}, {cell['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in cell else time


def lines(cells: list[Row]) -> str:
    """One place, as it is printed while the job runs."""
    made = []
    for row in rows(cells):
        name = f"{row['kind']} H {row['heads']} D {row['head_dim']} N {row['length']} {SHORT[row['direction']]}"
        made.append(f"  {name:38} " + "; ".join(cell_text(row.get(peer, {})) for peer in PEERS))
    return "\n".join(made)


def ratio(row: Row, key: str) -> str:
    return f"{row[key]:.3g}" if key in row else ""


def text(cells: list[Row], device: str) -> str:
    ratios = (f"{what} than {peer}" for what in ("faster", "less memory") for peer in PEERS[1:])
    head = ["", *PEERS, *ratios]
    if device == "cuda":
        head += ["floor", "times the floor"]
    table = []
    for row in sorted(rows(cells), key=order):
        name = f"{row['kind']}, H {row['heads']}, D {row['head_dim']}, N {row['length']}, {SHORT[row['direction']]}"
        line = [name, *(cell_text(row.get(peer, {})) for peer in PEERS)]
        line += [ratio(row, f"times_{what}_than_{peer}") for what in ("faster", "less_memory") for peer in PEERS[1:]]
        if device == "cuda":
            floor = f"{row['floor_seconds'] * 1e3:.3f} ms" if "floor_seconds" in row else ""
            line += [floor, ratio(row, "times_the_floor")]
        table.append(line)
    return markdown(head, table)


def order(row: Row) -> tuple[Any, ...]:
    kinds = ("KERPLE", "V2", "FIRE", "FIRE alone")
    return DIRECTIONS.index(row["direction"]), kinds.index(row["kind"]), row["head_dim"], row["heads"], row["length"]
