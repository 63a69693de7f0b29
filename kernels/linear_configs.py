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
    ("sm_80", "states", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_80", "features", 16): {128: Tile(64, 64, 64, 64, 4, 2), 256: Tile(64, 64, 64, 64, 8, 2)},
    ("sm_80", "values", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_80", "sine forward", 16): {16: Tile(256, 64, 64, 64, 8, 2), 64: Tile(128, 64, 64, 64, 8, 2)},
    ("sm_80", "sine backward", 16): {
        64: Tile(128, 64, 64, 64, 8, 2),
        128: Tile(128, 64, 64, 64, 8, 1),
        256: Tile(128, 64, 32, 64, 8, 1),
    },
    ("sm_80", "filter forward", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("sm_80", "filter backward", 16): {128: Tile(64, 64, 64, 64, 4, 1), 256: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_80", "filter gradient", 16): {128: Tile(64, 64, 64, 64, 4, 1), 256: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_80", "states", 32): {128: Tile(64, 32, 64, 64, 4, 1, "tf32x3")},
    ("sm_80", "features", 32): {64: Tile(64, 32, 64, 64, 8, 1, "tf32x3"), 128: Tile(16, 16, 64, 32, 8, 1, "tf32x3")},
    ("sm_80", "values", 32): {64: Tile(64, 32, 64, 64, 8, 1, "tf32x3"), 128: Tile(16, 16, 32, 64, 8, 1, "tf32x3")},
    ("sm_80", "sine forward", 32): {
        16: Tile(128, 64, 64, 64, 8, 2, "tf32x3"),
        32: Tile(128, 64, 64, 64, 8, 1, "tf32x3"),
    },
    ("sm_80", "sine backward", 32): {
        64: Tile(128, 64, 32, 64, 8, 1, "tf32x3"),
        128: Tile(32, 64, 16, 64, 8, 1, "tf32x3"),
    },
    ("sm_80", "filter forward", 32): {256: Tile(64, 32, 64, 64, 8, 1, "tf32x3")},
    ("sm_80", "filter backward", 32): {128: Tile(64, 32, 64, 64, 8, 1, "tf32x3")},
    ("sm_80", "filter gradient", 32): {64: Tile(32, 64, 64, 64, 4, 1, "tf32x3"), 128: Tile(32, 64, 64, 64, 4, 1)},
    ("sm_86", "states", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_86", "features", 16): {128: Tile(64, 64, 64, 64, 4, 2), 256: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_86", "values", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_86", "sine forward", 16): {16: Tile(256, 64, 64, 64, 8, 2), 64: Tile(128, 64, 64, 64, 8, 2)},
    ("sm_86", "sine backward", 16): {
        64: Tile(128, 64, 64, 64, 8, 2),
        128: Tile(128, 64, 64, 64, 8, 1),
        256: Tile(128, 64, 32, 64, 8, 1),
    },
    ("sm_86", "filter forward", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("sm_86", "filter backward", 16): {128: Tile(64, 64, 64, 64, 4, 1), 256: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_86", "filter gradient", 16): {128: Tile(64, 64, 64, 64, 4, 1), 256: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_86", "states", 32): {128: Tile(64, 32, 64, 64, 4, 1, "tf32x3")},
    ("sm_86", "features", 32): {64: Tile(64, 32, 64, 64, 8, 1, "tf32x3"), 128: Tile(16, 16, 64, 32, 8, 1, "tf32x3")},
    ("sm_86", "values", 32): {64: Tile(64, 32, 64, 64, 8, 1, "tf32x3"), 128: Tile(16, 16, 32, 64, 8, 1, "tf32x3")},
    ("sm_86", "sine forward", 32): {
        16: Tile(128, 64, 64, 64, 8, 2, "tf32x3"),
        32: Tile(128, 64, 64, 64, 8, 1, "tf32x3"),
    },
    ("sm_86", "sine backward", 32): {
        64: Tile(128, 64, 32, 64, 8, 1, "tf32x3"),
        128: Tile(32, 64, 16, 64, 8, 1, "tf32x3"),
    },
    ("sm_86", "filter forward", 32): {256: Tile(64, 32, 64, 64, 8, 1, "tf32x3")},
    ("sm_86", "filter backward", 32): {128: Tile(64, 32, 64, 64, 8, 1, "tf32x3")},
    ("sm_86", "filter gradient", 32): {64: Tile(32, 64, 64, 64, 4, 1, "tf32x3"), 128: Tile(32, 64, 64, 64, 4, 1)},
    ("sm_90", "states", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_90", "features", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_90", "values", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_90", "sine forward", 16): {16: Tile(256, 64, 64, 64, 8, 2), 64: Tile(128, 64, 64, 64, 8, 2)},
    ("sm_90", "sine backward", 16): {128: Tile(128, 64, 64, 64, 8, 2), 256: Tile(128, 64, 64, 64, 8, 1)},
    ("sm_90", "filter forward", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("sm_90", "filter backward", 16): {128: Tile(64, 64, 64, 64, 4, 1), 256: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_90", "filter gradient", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("sm_90", "states", 32): {128: Tile(64, 64, 64, 64, 4, 2, "tf32x3")},
    ("sm_90", "features", 32): {64: Tile(64, 64, 64, 64, 4, 2, "tf32x3"), 128: Tile(16, 16, 64, 32, 8, 1, "tf32x3")},
    ("sm_90", "values", 32): {64: Tile(64, 64, 64, 64, 4, 2, "tf32x3"), 128: Tile(16, 16, 32, 64, 8, 1, "tf32x3")},
    ("sm_90", "sine forward", 32): {32: Tile(128, 64, 64, 64, 8, 2, "tf32x3")},
    ("sm_90", "sine backward", 32): {
        64: Tile(128, 64, 64, 64, 8, 2, "tf32x3"),
        128: Tile(32, 64, 32, 64, 8, 1, "tf32x3"),
    },
    ("sm_90", "filter forward", 32): {256: Tile(32, 32, 32, 64, 4, 1, "tf32x3")},
    ("sm_90", "filter backward", 32): {128: Tile(32, 32, 64, 64, 8, 1, "tf32x3")},
    ("sm_90", "filter gradient", 32): {64: Tile(32, 64, 64, 64, 4, 1, "tf32x3"), 128: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_100", "states", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_100", "features", 16): {128: Tile(64, 64, 64, 64, 4, 2), 256: Tile(64, 64, 64, 64, 8, 2)},
    ("sm_100", "values", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("sm_100", "sine forward", 16): {16: Tile(256, 64, 64, 64, 8, 2), 64: Tile(128, 64, 64, 64, 8, 2)},
    ("sm_100", "sine backward", 16): {128: Tile(128, 64, 64, 64, 8, 2), 256: Tile(128, 64, 64, 64, 8, 1)},
    ("sm_100", "filter forward", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("sm_100", "filter backward", 16): {128: Tile(64, 64, 64, 64, 4, 1), 256: Tile(64, 64, 64, 64, 8, 1)},
    ("sm_100", "filter gradient", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("sm_100", "states", 32): {128: Tile(64, 64, 64, 64, 4, 2, "tf32x3")},
    ("sm_100", "features", 32): {64: Tile(64, 64, 64, 64, 8, 2, "tf32x3"), 128: Tile(16, 16, 64, 32, 8, 1, "tf32x3")},
    ("sm_100", "values", 32): {64: Tile(64, 64, 64, 64, 4, 2, "tf32x3"), 128: Tile(16, 16, 32, 64, 8, 1, "tf32x3")},
    ("sm_100", "sine forward", 32): {32: Tile(128, 64, 64, 64, 8, 2, "tf32x3")},
    ("sm_100", "sine backward", 32): {
        64: Tile(128, 64, 64, 64, 8, 2, "tf32x3"),
        128: Tile(32, 64, 32, 64, 8, 1, "tf32x3"),
    },
    ("sm_100", "filter forward", 32): {256: Tile(32, 32, 32, 64, 4, 1, "tf32x3")},
    ("sm_100", "filter backward", 32): {128: Tile(32, 32, 64, 64, 8, 1, "tf32x3")},
    ("sm_100", "filter gradient", 32): {64: Tile(32, 64, 64, 64, 4, 1, "tf32x3"), 128: Tile(64, 64, 64, 64, 8, 1)},
    ("gfx942", "states", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("gfx942", "features", 16): {256: Tile(64, 64, 64, 64, 4, 2)},
    ("gfx942", "values", 16): {128: Tile(64, 64, 64, 64, 4, 2), 256: Tile(32, 32, 64, 64, 8, 1)},
    ("gfx942", "sine forward", 16): {32: Tile(256, 64, 64, 64, 8, 2), 64: Tile(128, 64, 64, 64, 8, 2)},
    ("gfx942", "sine backward", 16): {128: Tile(128, 64, 64, 64, 8, 2), 256: Tile(128, 64, 64, 64, 8, 1)},
    ("gfx942", "filter forward", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("gfx942", "filter backward", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("gfx942", "filter gradient", 16): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("gfx942", "states", 32): {128: Tile(64, 64, 64, 64, 4, 2)},
    ("gfx942", "features", 32): {128: Tile(64, 64, 64, 64, 4, 2)},
    ("gfx942", "values", 32): {128: Tile(64, 64, 64, 64, 4, 2)},
    ("gfx942", "sine forward", 32): {
        16: Tile(256, 64, 64, 64, 8, 2),
        32: Tile(128, 64, 64, 64, 8, 2),
        64: Tile(128, 64, 64, 64, 8, 1),
    },
    ("gfx942", "sine backward", 32): {
        64: Tile(128, 64, 64, 64, 8, 2),
        128: Tile(64, 64, 32, 64, 8, 1),
    },
    ("gfx942", "filter forward", 32): {256: Tile(64, 64, 64, 64, 4, 1)},
    ("gfx942", "filter backward", 32): {128: Tile(64, 64, 64, 64, 4, 1)},
    ("gfx942", "filter gradient", 32): {128: Tile(64, 64, 64, 64, 4, 1)},
}
# fmt: on
CHUNKED = ("states", "features", "values")


def pick(x: torch.Tensor, kernel: str, size: int) -> Tile:
    chip = configs.arch(x.device)
    if chip == "interpreter":
        return Tile(16, 16, 32, 32, 4, 1) if kernel in CHUNKED else Tile(32, 32, 32, 32, 4, 1)
    rows = TILES[chip, kernel, x.element_size() * 8]
    return rows[min(limit for limit in rows if limit >= size)]


def run_of(x: torch.Tensor, blocks: int) -> int:
    """How many blocks of rows a program of `sine backward` takes: more, fewer partial sums; fewer, more programs."""
    return 2 if configs.arch(x.device) == "interpreter" else 4 if blocks >= 2048 else 1
