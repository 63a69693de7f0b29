"""What `python -m bench floater` was to reach, what was measured, and whether that meets it."""

from __future__ import annotations

from .contest import DIRECTIONS
from .floater_peers import A_LAYER, OURS, PUBLISHED, SAME, Place
from .report import Row

SHORT = dict(zip(DIRECTIONS, ("fwd", "fwd+bwd")))
LIMITS = dict(zip(DIRECTIONS, (1 / 20, 1 / 5)))


def gather(parts: dict[str, Row], headline: Place) -> Row:
    """Results by kind, and the targets."""
    steps = [part for name, part in parts.items() if name.startswith("step ")]
    found: Row = {
        "cells": [cell for part in parts.values() for cell in part.get("cells", [])],
        "cache": parts.get("cache"),
        "steps": [step for step in steps if step["passes"] == 1],
        "held": [step for step in steps if step["passes"] > 1],
        "gradients": [part for name, part in parts.items() if name.startswith("gradients ")],
        "fixed_horizon": parts.get("fixed horizon", {}).get("rows", []),
        "host_waits": parts.get("host waits", {}).get("waits"),
    }
    found["targets"] = targets(found, headline)
    return found


def targets(found: Row, headline: Place) -> list[Row]:
    """What was to be reached, what was, and whether that meets it; without rows for what was not measured."""
    cells = found["cells"]
    rows = against_published(cells, headline)
    if found["cache"]:
        rows += of_cache(found["cache"])
    rows += [of_step(step) for step in [*found["steps"], *found["held"]]]
    for gain in dict.fromkeys(cell["gain"] for cell in cells if cell["gain"] != headline.gain):
        rough = [cell for cell in cells if cell["gain"] == gain and cell["peer"] in A_LAYER and measured(cell)]
        if rough:
            longest = max(cell["length"] for cell in rough)
            rows += against_published(cells, headline._replace(gain=gain, length=longest))
    return rows


def row(what: str, value: float, limit: float, detail: str, note: str = "") -> Row:
    return {"what": what, "value": value, "limit": limit, "met": value <= limit, "note": note, "detail": detail}


def verdict(row: Row) -> str:
    if not row["met"]:
        return "MISSED"
    return "met" if row.get("error_reached", True) else "met in time, not in error"


def measured(cell: Row) -> bool:
    return "seconds" in cell and not cell["longer_than"]


def against_published(cells: list[Row], place: Place) -> list[Row]:
    """The times at one place as a part of the faster published way's."""
    rows = []
    here = {(c["peer"], c["direction"]): c for c in cells if Place(*(c[k] for k in Place._fields)) == place}
    for direction in DIRECTIONS:
        others = [here[peer, direction] for peer in A_LAYER if "seconds" in here.get((peer, direction), {})]
        for mine in (here.get((SAME, direction), {}), here.get((OURS, direction), {})):
            if "seconds" not in mine or not others:
                continue
            best = min(others, key=lambda cell: cell["seconds"]["median"])
            error = "at the default tolerance"
            if mine["peer"] == SAME:
                error = same_error(here[SAME, DIRECTIONS[0]], here[PUBLISHED, DIRECTIONS[0]])
            ours, theirs = (cell["seconds"]["median"] for cell in (mine, best))
            name = f"gain {place.gain:g}, {place.length} positions, {SHORT[direction]} {error}"
            detail = f"{seconds_text(ours)} of {time_text(best)}"
            name += f": part of the time of {best['peer']}"
            rows.append(row(name, ours / theirs, LIMITS[direction], detail, mark(best)))
            rows[-1]["error_reached"] = error.startswith("to its error") or mine["peer"] == OURS
    return rows


def same_error(mine: Row, published: Row) -> str:
    """How the error in all layers compares with the published way's in those that were solved."""
    if "error" not in mine or "error" not in published:
        return "to its error"
    ours, theirs, solved = mine["error"], published["error"], published["layers_measured"]
    where = "" if solved == published["layers"] else f" (its error is that of {solved} layer of {published['layers']})"
    return ("to its error" if ours <= theirs else f"to {ours / theirs:.2g} times its error") + where


def of_cache(cache: Row) -> list[Row]:
    seconds, more = cache["seconds"], cache["more"]
    extended, slowest = seconds["extended"]["median"], seconds["slowest of a row"]["median"]
    first, whole = seconds["first alone"]["median"], seconds["from scratch"]["median"]
    share = whole * more / (cache["length"] + more)
    detail = (
        f"median {seconds_text(extended)}, slowest of {cache['extensions']} in a row {seconds_text(slowest)}"
        f" = {slowest / first:.2g} times; {seconds_text(first)} from an empty table; their share of a solve of all"
        f" {seconds_text(share)}"
    )
    kept = seconds["kept"]
    return [
        row(f"{cache['length']} positions kept: milliseconds a call", kept["median"] * 1e3, 1.0,
            f"slowest {seconds_text(kept['slowest'])}"),
        row(f"{more} positions more: times what the first {more} cost from an empty table", extended / first, 1.5,
            detail),
    ]  # fmt: skip


def of_step(step: Row) -> Row:
    """Judged by the larger of the solve alone and of what a step with it takes longer."""
    alone, more, passes = step["solve_percent"], step["difference_percent"], step["passes"]
    runs = min(found["runs"] for found in list(step["seconds"].values())[:2])
    how = f"medians of {runs} steps each, in turn" if runs > 1 else "one step each"
    if passes > 1:
        how = how.replace("steps", f"times {passes} steps").replace("one step", f"once {passes} steps")
    name = f"solve, percent of a training step, gain {step['gain']:g}, batch {step['batch']}"
    name += f", one solve held for {passes} steps" if passes > 1 else ""
    detail = f"alone {alone:.2f}, with - without {more:+.2f} ({how}); {step['evaluations']} evaluations"
    return row(name, max(alone, more), 5.0, detail)


# ---------------------------------------------------------------------------------------------------------- wording


def seconds_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def mark(cell: Row) -> str:
    if cell["longer_than"]:
        return "**"
    return "*" if cell["layers_measured"] < cell["layers"] else ""


def time_text(cell: Row) -> str:
    """A time, with what it was extrapolated from."""
    text = ("> " if cell["longer_than"] else "") + seconds_text(cell["seconds"]["median"]) + mark(cell)
    if cell["longer_than"]:
        return f"{text} (at least: extrapolated from {cell['longer_than']} positions)"
    if cell["layers_measured"] < cell["layers"]:
        return f"{text} (extrapolated from one layer)"
    return text
