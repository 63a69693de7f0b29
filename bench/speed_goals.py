"""The goals of `python -m bench speed`, and what a set of measurements says about each.

A goal asks for a number at every place that was measured; the worst place decides. "reached" is the goal itself,
"accepted" a lower bar that some goals have, "missed" neither. Nothing measured, or only failures: "not measured".
Goals in TFLOP/s are an H200's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from . import speed_peers

Row = dict[str, Any]
REHEARSAL = "rehearsal, not a figure of a GPU"
SDPA = tuple(f"SDPA {name.lower()}" for name in speed_peers.SDPA)


class Found(NamedTuple):
    """One place's answer to a goal."""

    value: float
    where: str
    peers: str = ""


class Goal(NamedTuple):
    key: str
    what: str
    goal: float
    higher: bool  # the larger the better
    unit: str = ""  # of the value: "", "%", "TFLOP/s", "s", "x"
    accepted: float | None = None
    strict: bool = False  # the goal itself is not enough

    def reach(self) -> str:
        sign = (">" if self.strict else ">=") if self.higher else ("<" if self.strict else "<=")
        text = f"{sign} {show(self.goal, self.unit)}"
        return text if self.accepted is None else f"{text} ({show(self.accepted, self.unit)} accepted)"


GOALS = [
    *(Goal(f"forward {b} / none", f"forward with {b}: speed by that without a bias", 0.97, True)
      for b in ("TISA", "T5", "KERPLE", "ALiBi")),
    Goal("forward none", "forward, D 128, N 8192, no bias", 640, True, "TFLOP/s", 550),
    Goal("forward TISA", "forward, D 128, N 8192, TISA", 640, True, "TFLOP/s", 550),
    Goal("forward / SDPA", "forward, no bias: speed by that of the best SDPA", 1.0, True, "", 0.85),
    Goal("forward / Flex", "forward: speed by FlexAttention's with the same bias", 1.4, True, "x"),
    Goal("training / Flex", "forward + backward, learned KERPLE: speed by FlexAttention's", 3.0, True, "x"),
    Goal("error / Flex", "error against float64 by FlexAttention's, worst of out, dq, dk, dv, dtable", 1.0, False,
         accepted=1.02),  # of two that round alike, either may be a little ahead
    Goal("backward none", "backward, D 128, N 8192, no bias", 500, True, "TFLOP/s", 400),
    Goal("backward TISA", "backward, D 128, N 8192, TISA", 500, True, "TFLOP/s", 400),
    Goal("share KERPLE", "gradient of the bias and its operations, of backward, KERPLE", 0.08, False, "%", strict=True),
    Goal("share T5", "gradient of the bias and its operations, of backward, T5", 0.08, False, "%", strict=True),
    Goal("share TISA", "gradient of the bias and its operations, of backward, TISA", 0.02, False, "%", strict=True),
    Goal("radial runs", "radial basis of distance, training: part of the lengths that run", 1.0, True, "%"),
    Goal("radial / Flex", "radial basis of distance, training: speed by FlexAttention's", 5.0, True, "x"),
    Goal("memory", "extra memory by q, k, v, o, lse and gradients, N 32768", 0.01, False, "%", strict=True),
    Goal("decode", "decode, TISA: bytes of keys and values by the copy's bandwidth", 0.85, True, "%"),
    Goal("DAPE", "DAPE: times its floor", 3.0, False, "x"),
    Goal("SPE", "SPE: times its floor", 3.0, False, "x"),
    Goal("first cold", "first forward + backward, empty Triton cache", 5.0, False, "s", strict=True),
    Goal("first warm", "first forward + backward, filled Triton cache", 1.0, False, "s", strict=True),
    Goal("ALiBi skipping / none", "forward, ALiBi, negligible keys left out: speed by that without a bias", 1.0, True),
]  # fmt: skip


def show(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.3g} %"
    if unit == "TFLOP/s":
        return f"{value:.0f} TFLOP/s"
    return f"{value:.3g} {unit}" if unit == "s" else f"{value:.3g}"


def verdict(goal: Goal, value: float | None) -> str:
    """"reached", "accepted" or "missed"; NaN has missed."""
    if value is None:
        return "not measured"
    for bar, word in ((goal.goal, "reached"), (goal.accepted, "accepted")):
        if bar is None:
            continue
        better = value > bar if goal.higher else value < bar
        if better or (value == bar and not goal.strict):
            return word
    return "missed"


def goals(parts: list[Row], rehearsal: bool) -> list[Row]:
    """A line a goal; `ratio` is how much of it is reached, above 1 that and more."""
    found = answers(parts)
    made = []
    for goal in GOALS:
        places = found.get(goal.key, [])
        # A NaN is the worst of all, not invisible.
        worst = min(places, key=lambda f: (f.value == f.value, f.value if goal.higher else -f.value), default=None)
        value = None if worst is None else worst.value
        line: Row = dict(key=goal.key, what=goal.what, reach=goal.reach(), goal=goal.goal, value=value, ratio=None)
        line.update(measured="-", verdict=verdict(goal, value), where="", peers="")
        line["places"] = [place._asdict() for place in places]
        if worst is not None:
            ratio = worst.value / goal.goal if goal.higher else goal.goal / worst.value if worst.value > 0 else None
            line.update(measured=show(worst.value, goal.unit), ratio=ratio, where=worst.where, peers=worst.peers)
            if rehearsal:
                line.update(verdict=REHEARSAL)
                if goal.unit == "TFLOP/s":
                    line.update(measured=REHEARSAL)
        made.append(line)
    return made


# ------------------------------------------------------------------------------------- from rows to answers


def where(row: Row) -> str:
    parts = [f"D {row['head_dim']}"] if "head_dim" in row else []
    return " ".join([*parts, *([f"N {row['length']}"] if "length" in row else [])])


def by_place(parts: list[Row], part: str) -> Iterable[tuple[str, dict[str, Row]]]:
    """(place, rows by peer) of each piece; a peer that did not run is not there."""
    for piece in parts:
        if piece["part"] == part:
            ran = {row["peer"]: row for row in piece["rows"] if "not_run" not in row}
            if ran:
                yield where(next(iter(ran.values()))), ran


def answers(parts: list[Row]) -> dict[str, list[Found]]:
    made: dict[str, list[Found]] = {goal.key: [] for goal in GOALS}
    schedules = dict(by_place(parts, "schedules"))
    for place, rows in by_place(parts, "forward"):
        beside = {name: row for name, row in schedules.get(place, {}).items() if name not in rows}
        of_forward(made, place, {name: row["forward_ms"] for name, row in rows.items()}, {**beside, **rows})
    for place, rows in by_place(parts, "training"):
        of_training(made, place, rows)
    for place, rows in by_place(parts, "error"):
        if {"posattn", "Flex"} <= rows.keys():
            mine, theirs = rows["posattn"]["errors"], rows["Flex"]["errors"]
            key = max(mine, key=lambda name: mine[name] / theirs[name])
            text = f"{key}: {mine[key]:.2e} and {theirs[key]:.2e}"
            made["error / Flex"].append(Found(mine[key] / theirs[key], place, text))
    for piece in parts:
        for row in piece["rows"]:
            of_row(made, piece["part"], row)
    of_radial(made, parts)
    of_memory(made, parts)
    return made


def of_forward(made: dict[str, list[Found]], place: str, ms: dict[str, float], rows: dict[str, Row]) -> None:
    def compare(key: str, mine: str, theirs: str, note: str = "") -> None:
        if mine in ms and theirs in ms:
            text = f"{mine} {ms[mine]:.3f} ms, {theirs} {ms[theirs]:.3f} ms{note}"
            made[key].append(Found(ms[theirs] / ms[mine], place, text))

    for bias in ("TISA", "T5", "KERPLE", "ALiBi"):
        kernel, note = ms.get(f"posattn {bias} kernel"), ""
        if kernel and "posattn none" in ms:
            note = f"; its kernel alone {ms['posattn none'] / kernel:.3f}"
        compare(f"forward {bias} / none", f"posattn {bias}", "posattn none", note)
        compare("forward / Flex", f"posattn {bias}", f"Flex {bias}")
    compare("ALiBi skipping / none", "posattn ALiBi skipping", "posattn none")
    best = min((name for name in SDPA if name in ms), key=ms.__getitem__, default="")
    compare("forward / SDPA", "posattn none", best)
    if (place, "posattn none") == ("D 128 N 8192", "posattn none"):
        mine = [f"posattn {b} {s}" for b in ("none", "KERPLE") for s in speed_peers.SCHEDULES]
        others = [name for name in (*SDPA, "Flex none", *mine) if name in rows]
        text = ", ".join(f"{name} {rows[name]['forward_tflops']:.0f}" for name in others)
        for name in ("none", "TISA"):
            if f"posattn {name}" in rows:
                found = Found(rows[f"posattn {name}"]["forward_tflops"], place, text)
                made[f"forward {name}"].append(found)


def of_training(made: dict[str, list[Found]], place: str, rows: dict[str, Row]) -> None:
    def have(key: str, *names: str) -> bool:
        return all(key in rows.get(name, {}) for name in names)

    if have("both_ms", "posattn KERPLE", "Flex KERPLE"):
        mine, theirs = (rows[f"{who} KERPLE"]["both_ms"] for who in ("posattn", "Flex"))
        text = f"posattn {mine:.3f} ms, Flex {theirs:.3f} ms"
        made["training / Flex"].append(Found(theirs / mine, place, text))
    for bias in ("TISA", "T5", "KERPLE"):
        if have("backward_ms", f"posattn {bias}", f"posattn {bias} frozen"):
            learned, frozen = (rows[f"posattn {bias}{more}"]["backward_ms"] for more in ("", " frozen"))
            text = f"backward {learned:.3f} ms, frozen {frozen:.3f} ms"
            made[f"share {bias}"].append(Found(1 - frozen / learned, place, text))
    if place == "D 128 N 8192":
        others = [f"{name} {rows[name]['backward_tflops']:.0f}" for name in SDPA if have("backward_tflops", name)]
        if have("difference_tflops", "Flex none"):  # whose backward does not run by itself
            others.append(f"Flex none, as both - forward, {rows['Flex none']['difference_tflops']:.0f}")
        for name in ("none", "TISA"):
            if have("backward_tflops", f"posattn {name}"):
                row, text = rows[f"posattn {name}"], ", ".join(others)
                if "difference_tflops" in row:
                    text += f"; as both - forward {row['difference_tflops']:.0f}"
                made[f"backward {name}"].append(Found(row["backward_tflops"], place, text))


def of_radial(made: dict[str, list[Found]], parts: list[Row]) -> None:
    rows = [piece["rows"] for piece in parts if piece["part"] == "radial"]
    if not rows:
        return
    tried = {row["length"]: "not_run" not in row for piece in rows for row in piece if row["peer"] == "posattn"}
    if tried:
        failed = [str(length) for length, ran in tried.items() if not ran]
        text = f"not at {', '.join(failed)}" if failed else f"{len(tried)} lengths"
        made["radial runs"].append(Found(sum(tried.values()) / len(tried), text))
    for place, ran in by_place(parts, "radial"):
        if {"posattn", "Flex"} <= ran.keys():  # one direction: a row without not_run has it
            text = ", ".join(f"{name} {row['both_ms']:.3f} ms" for name, row in ran.items())
            made["radial / Flex"].append(Found(ran["Flex"]["both_ms"] / ran["posattn"]["both_ms"], place, text))


def of_memory(made: dict[str, list[Found]], parts: list[Row]) -> None:
    """Of the longest that was measured."""
    rows = [row for piece in parts if piece["part"] == "memory" for row in piece["rows"] if "not_run" not in row]
    longest = max((row["length"] for row in rows), default=0)
    for row in rows:
        if row["length"] == longest and row["peer"].startswith("posattn"):
            text = f"{row['peer']}, {row['extra_bytes'] / 2**20:.1f} MiB"
            made["memory"].append(Found(row["share"], where(row), text))


def of_row(made: dict[str, list[Found]], part: str, row: Row) -> None:
    """The goals that one row answers by itself."""
    if "not_run" in row:
        return
    if part == "decode" and row["peer"] == "posattn TISA":
        text = f"{row['median'] * 1e6:.1f} us, copy {row['copy_bandwidth'] / 1e12:.2f} TB/s"
        made["decode"].append(Found(row["share"], row["place"], text))
    elif part in ("mixing", "spe"):
        more = f", R {row['realizations']}" if part == "spe" else ""
        text = f"{row['ms']:.3f} ms, floor {row['floor_ms']:.3f} ms"
        name = "SPE" if part == "spe" else "DAPE"
        made[name].append(Found(row["times"], f"{row['direction']}, N {row['length']}{more}", text))
    elif part == "first":
        for name in ("cold", "warm"):
            text = f"imports {row[name]['import']:.1f} s before it"
            made[f"first {name}"].append(Found(row[name]["call"], "", text))
