"""Which tile each kernel of linear attention and of SPE runs with: rows of numbers by GPU, kernel, dtype and size.

A row serves sizes up to its own: of `states`, `features` and `values` the larger of features and values; of `sine
forward` the slots a dimension has (sines and gate, padded to a power of two); of the others the realizations. Chosen by
spills and instructions, ahead of time (python -m bench kernels); none is measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import configs


class Tile(NamedTuple):
    block_m: int  # rows of a program
    block_n: int  # rows taken at a time; of a convolution, positions of its noise
    block_r: int  # features of a program, at most; of `sine backward`, slots taken at a time
    block_v: int  # values of a program, at most
    num_warps: int
    num_stages: int
    fp32: str = "ieee"


# fmt: off
TILES: dict[tuple[str, str, int], dict[int, Tile]] = {
}
# fmt: on
CHUNKED = ("states", "features", "values")


def pick(x: torch.Tensor, kernel: str, size: int) -> Tile:
    chip = configs.arch(x.device)
    if chip == "interpreter":
        return Tile(16, 16, 32, 32, 4, 1) if kernel in CHUNKED else Tile(32, 32, 32, 32, 4, 1)
    rows = TILES[chip, kernel, x.element_size() * 8]
    return rows[min(limit for limit in rows if limit >= size)]


def largest(chip: str, kernel: str, bits: int) -> int:
    """The size up to which there is a row."""
    return 256 if chip == "interpreter" else max(TILES[chip, kernel, bits])


def run_of(x: torch.Tensor, blocks: int) -> int:
    """How many blocks of rows a program of `sine backward` takes: more, fewer partial sums; fewer, more programs."""
    return 2 if configs.arch(x.device) == "interpreter" else 4 if blocks >= 2048 else 1
