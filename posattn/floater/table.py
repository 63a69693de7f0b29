"""Vectors kept from call to call at evaluation: solved once, extended, and made again when anything has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..changes import Step, last_step
from .path import Path
from .reading import locate, read

SPARE = 8  # a table has room for an eighth more, and 256 rows: a little more length costs a little
Reach = Callable[[Path, float], None]


class Key(NamedTuple):
    """What the vectors depend on. `facts` tell whether it is still the same; `kept` keeps their addresses taken."""

    facts: tuple[Any, ...]
    kept: tuple[Tensor, ...]


def key_of(tensors: Iterable[Tensor], *settings: Any) -> Key:
    """Of tensors by identity, address, dtype and count of changes in place, and of plain values."""
    tensors = tuple(tensors)
    facts = tuple((id(x), x.data_ptr(), x.dtype, version_of(x)) for x in tensors)
    return Key((facts, settings), (*tensors, *(x.detach() for x in tensors)))


def version_of(tensor: Tensor) -> Any:
    """The count of changes in place; of a tensor without one (made in inference mode) something that never repeats."""
    return object() if tensor.is_inference() else tensor._version


class _Kept(NamedTuple):
    key: Key
    path: Path
    rows: Tensor  # (streams, layers, capacity, dim)
    filled: int
    version: Any  # of `rows` after the last write of our own
    step: Step  # of optimizers, the last before it was solved: a fused one writes into parameters that do not count it


class Table:
    """Positions 0, 1, ... of one trajectory. Any number of threads may read; one at a time solves.

    Positions once written stay as they are, also while others are added behind them; what is no longer true is left
    to those who hold it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: _Kept | None = None

    def clear(self) -> None:
        with self._lock:
            self._kept = None

    def vectors(self, length: int, key: Key, path: Callable[[], Path], reach: Reach, dtype: torch.dtype) -> Tensor:
        """(streams, layers, length, dim), a view of the table. `path` begins a trajectory, `reach` extends it."""
        kept = self._kept
        if kept is None or kept.filled < length or not _holds(kept, key):
            with self._lock, torch.inference_mode(False), torch.no_grad():
                kept = self._extended(length, key, path, reach, dtype)
        return kept.rows[:, :, :length]

    def at(self, times: Tensor, key: Key, path: Callable[[], Path], reach: Reach, dtype: torch.dtype) -> Tensor:
        """(streams, layers, n, dim) at ascending float64 times, from the same trajectory."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            kept = self._extended(0, key, path, reach, dtype)
            reach(kept.path, float(times[-1]))
            out = kept.rows.new_empty(*kept.rows.shape[:2], len(times), kept.rows.shape[-1])
            _fill(kept.path, times, out)
            return out

    def _extended(
        self, length: int, key: Key, path: Callable[[], Path], reach: Reach, dtype: torch.dtype
    ) -> _Kept:
        kept, step = self._kept, last_step()
        if kept is None or not _holds(kept, key):
            begun = path()
            streams, layers, dim = begun.initial.shape
            rows = begun.initial.new_empty((streams, layers, 0, dim), dtype=dtype)
            kept = _Kept(key, begun, rows, 0, version_of(rows), step)
        if kept.filled < length:
            rows, filled, delta_t = kept.rows, kept.filled, kept.path.plan.delta_t
            reach(kept.path, (length - 1) * delta_t)
            if rows.shape[2] < length:
                streams, layers, _, dim = rows.shape
                rows = rows.new_empty((streams, layers, length + length // SPARE + 256, dim))
                rows.data[:, :, :filled] = kept.rows[:, :, :filled]
            # .data: views handed out are of other positions, and are not to count as changed in place
            new = rows.data[:, :, filled:length]
            _fill(kept.path, torch.arange(filled, length, dtype=torch.float64) * delta_t, new)
            kept = _Kept(key, kept.path, rows, length, version_of(rows), kept.step)
        self._kept = kept
        return kept


def _holds(kept: _Kept, key: Key) -> bool:
    """Nothing has changed, no optimizer has made a step, and nobody has written into the table."""
    same = kept.key.facts == key.facts and kept.step is last_step()
    return same and version_of(kept.rows) == kept.version


def _fill(path: Path, times: Tensor, out: Tensor) -> None:
    steps = path.steps
    read(steps, locate(times, [step.start for step in steps], [step.size for step in steps], path.initial), out)
