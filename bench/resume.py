"""What a long job has finished so far, kept in a file so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Finished:
    """The finished parts of one plan, by name.

    They are found again in the job's results (`path`) and in a work file next to it, wherever the plan there is
    the same one, number for number. Every new part is written at once, to a new file that then takes the old
    one's place, so a file is never half written. Two processes may do different parts of one plan side by side:
    each write takes in what the other has written. Better one at a time: what one writes between another's look and
    its write is lost, and done again. `fresh` starts over.
    """

    def __init__(self, path: Path, plan: Row, fresh: bool = False) -> None:
        self.plan = json.loads(json.dumps(plan))  # as it will be read: tuples are lists
        text = json.dumps(self.plan, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.results = path
        self.work = path.with_name(f"{path.stem}.unfinished-{digest}.json")
        self.parts: dict[str, Row] = {}
        self.fresh = fresh
        if fresh:
            self.work.unlink(missing_ok=True)
        self.look()

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def look(self) -> None:
        """Take in what the files have by now."""
        if not self.fresh:
            self._take_in(self.results)
        self._take_in(self.work)

    def add(self, name: str, part: Row) -> None:
        self.look()
        self.parts[name] = json.loads(json.dumps(part))
        _replace(self.work, {"plan": self.plan, "parts": self.parts})

    def finish(self, results: Row) -> None:
        """Write the job's results with plan and parts, another process's too, and drop the work file."""
        self.look()
        _replace(self.results, {**results, "plan": self.plan, "parts": self.parts})
        self.work.unlink(missing_ok=True)

    def _take_in(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if found.get("plan") == self.plan:
            self.parts = {**found["parts"], **self.parts}


def name_of(kind: str, seed: int) -> str:
    """Of the part that is one model."""
    return f"{kind}, seed {seed}"


def _replace(path: Path, content: Row) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)
