"""How the matrix of scores is cut into cells that fit a scratch of fixed size: rows times keys of all heads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from .problem import Problem

# Bytes. Beside it there are only sums by row, by offset and by weight, so that a call keeps below 64 MB.
SCRATCH = 48 << 20
GRAIN = 128  # rows and keys of a cell are multiples of it, where there are so many


class Cell(NamedTuple):
    """Batch entries b0 .., rows m0 .. m1 - 1, `keys` keys from n0 on: multiples of 16, maybe beyond the last key."""

    b0: int
    batch: int
    m0: int
    m1: int
    n0: int
    keys: int
    first: bool  # of the cells of its rows
    last: bool

    def wider(self, margin: int, length: int) -> Cell:
        """The same rows with so many keys more on either side, as far as there are any."""
        n0 = max(0, self.n0 - margin)
        stop = min(round_up(length, 16), self.n0 + self.keys + margin)
        return self._replace(n0=n0, keys=stop - n0)


class Grid:
    """Room for `batch` entries of `rows` rows and `width` keys, of which the outermost `margin` are neighbours'.

    `beyond` keys after the last visible one count too: hidden units of the published form that later keys have.
    """

    def __init__(self, p: Problem, bytes_per_pair: int, margin: int, beyond: int, tall: bool):
        self.p, self.margin, self.beyond = p, margin, beyond
        pairs = SCRATCH // bytes_per_pair
        queries, keys = round_up(p.queries, 16), round_up(p.keys, 16)
        # What is added up in fp32 from cell to cell is moved once for so many rows (dK, dV) or keys (dQ; forward, out).
        side = math.isqrt(pairs * 3 // 2 if tall else pairs // 2) // GRAIN * GRAIN
        self.rows = min(queries, max(GRAIN, side, pairs // (keys + 2 * margin) // GRAIN * GRAIN))
        self.step = min(keys, max(GRAIN, (pairs // self.rows - 2 * margin) // GRAIN * GRAIN))
        self.width = self.step + 2 * margin
        self.batch = max(1, min(p.batch, pairs // (self.rows * self.width)))

    def shape(self, planes: int) -> tuple[int, int, int, int]:
        return self.batch, planes, self.rows, self.width

    def cells(self) -> Iterator[Cell]:
        """Every cell that holds a visible pair, row by row; rows that see none have one, so that they are written."""
        p = self.p
        for b0 in range(0, p.batch, self.batch):
            batch = min(self.batch, p.batch - b0)
            for m0 in range(0, p.queries, self.rows):
                m1 = min(m0 + self.rows, p.queries)
                start = min(max(0, m0 + p.low), p.keys - 1) // 16 * 16
                stop = max(start + 1, min(p.keys, m1 + p.high + self.beyond))
                for n0 in range(start, stop, self.step):
                    keys = min(self.step, round_up(stop - n0, 16))
                    yield Cell(b0, batch, m0, m1, n0, keys, n0 == start, n0 + self.step >= stop)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step
