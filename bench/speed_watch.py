"""Who is at work in `python -m bench speed`: noted in a file before it starts, so that what ends the process is known.

A peer that breaks the GPU, or that is not done in time (the watch then ends the process), is left out of every piece of
its part from then on. One that the process ended with, killed or by itself, is left out after the second time: a kill
from outside hits whoever is at work.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from .resume import Finished

Row = dict[str, Any]
BROKEN = "broken: "
SECONDS = 120.0  # for one peer in one direction: what FlexAttention takes to compile, and more
SLOWER = {"first": 520.0}  # its processes have limits of their own
GRACE = 30.0  # longer, and the process is ended without the watch's thread
STATUS = 3  # of a process that ended because of a peer


class Watch:
    """`started(peer)` before each peer of a piece; after the piece `ended()`; in the end `close()`.

    `hard`: should the interpreter itself hang, which the watch's thread needs, the process still ends, with status 1.
    """

    def __init__(
        self, finished: Finished, seconds: float = SECONDS, hard: bool = False,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.finished, self.seconds, self.hard, self.leave = finished, seconds, hard, leave
        self.note = finished.work.with_suffix(".started")
        self.part = self.piece = self.peer = ""
        self.deadline: float | None = None
        self.lock, self.stop = threading.Lock(), threading.Event()
        if finished.fresh:
            self.note.unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError, TypeError):
            left = json.loads(self.note.read_text("utf-8"))
            self.broken(**left, why="the process ended in it", certain=False)
        self.note.unlink(missing_ok=True)
        threading.Thread(target=self.look, daemon=True).start()

    def begin(self, part: str, piece: str) -> None:
        self.part, self.piece = part, piece

    def started(self, peer: str) -> None:
        self.note.write_text(json.dumps({"part": self.part, "piece": self.piece, "peer": peer}), "utf-8")
        with self.lock:
            self.peer = peer
            self.deadline = time.monotonic() + self.limit()
        if self.hard:
            faulthandler.dump_traceback_later(self.limit() + GRACE, exit=True, file=sys.__stderr__ or 2)

    def limit(self) -> float:
        return max(self.seconds, SLOWER.get(self.part, 0.0))

    def ended(self) -> None:
        with self.lock:
            self.deadline = None
        if self.hard:
            faulthandler.cancel_dump_traceback_later()
        self.note.unlink(missing_ok=True)

    def close(self) -> None:
        self.ended()
        self.stop.set()

    def broken(self, part: str, piece: str, peer: str, why: str, certain: bool = True) -> None:
        # "all" is a piece as a whole, the others of its part may well run
        name = f"{BROKEN}{piece if peer == 'all' else part}: {peer}"
        times = 2 if certain else self.finished.parts.get(name, {}).get("times", 0) + 1
        note = {"why": why, "part": part, "piece": piece, "peer": peer, "times": times}
        self.finished.add(name, note)

    def left_out(self, part: str, piece: str) -> dict[str, str]:
        """Peers that this piece is to do without, and why."""
        notes = [note for name, note in self.finished.parts.items() if name.startswith(BROKEN)]
        return {
            note["peer"]: f"{note['why']} ({note['piece']})"
            for note in notes
            if note["times"] >= 2 and (note["piece"] == piece if note["peer"] == "all" else note["part"] == part)
        }

    def look(self) -> None:
        late = False
        while not late:
            if self.stop.wait(min(1.0, self.seconds / 4)):
                return
            with self.lock:
                late = self.deadline is not None and time.monotonic() > self.deadline
        why = f"not done after {self.limit():.3g} s"
        self.broken(self.part, self.piece, self.peer, why)
        self.note.unlink(missing_ok=True)
        text = f"{self.piece}: {self.peer}: {why}\nthe process ends; the same command goes on without it"
        print(text, file=sys.__stdout__, flush=True)
        self.leave(STATUS)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """A polite kill (SIGTERM, as timeout sends it) ends the job as an exception does: nobody at work is blamed."""

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -------------------------------------------------------------------------------------------------------------- clocks

# The last one's older name is clocks_throttle_reasons.active.
KEYS = ("clocks.sm", "power.draw", "clocks_event_reasons.active")


def sample() -> list[str] | None:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(KEYS)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in text.strip().split(",")]
    return values if len(values) == len(KEYS) else None


def summary(samples: list[list[str]]) -> Row | None:
    """{sm: [lowest, median, highest] MHz, power: highest W, reasons: bit masks of why clocks were held back}."""
    try:
        sm = [float(s[0]) for s in samples]
        power = [float(s[1]) for s in samples]
    except ValueError:
        return None
    if not samples:
        return None
    return {"sm": [min(sm), median(sm), max(sm)], "power": max(power), "reasons": sorted({s[2] for s in samples})}


class Clocks:
    """Looks at the GPU's clocks while a piece is at work: an idle GPU's clocks say nothing."""

    def __init__(self, device: str, seconds: float = 2.0, sample: Callable[[], list[str] | None] = sample) -> None:
        self.device, self.seconds, self.sample = device, seconds, sample
        self.samples: list[list[str]] = []
        self.stop = threading.Event()

    def __enter__(self) -> Clocks:
        if self.device == "cuda":
            threading.Thread(target=self.look, daemon=True).start()
        return self

    def look(self) -> None:
        while not self.stop.wait(self.seconds):
            if (found := self.sample()) is None:
                return
            self.samples.append(found)

    def __exit__(self, *_: object) -> None:
        self.stop.set()

    def summary(self) -> Row | None:
        return summary(list(self.samples))
