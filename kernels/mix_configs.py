"""Which tile each of DAPE's kernels runs with: rows of numbers by GPU, kernel, dtype width and size, as in configs.py.

The kernels of mix_products.py go by head dim. Those that mix go by what a pair of positions keeps in registers: heads
and hidden units, each padded to a power of two, and FIRE's units; a row serves sizes up to its own, and beyond the last
one backward spills. BLOCK_N is how many pairs of a row are mixed at a time, `run` how many rows a program takes. Chosen
by spills and instructions, ahead of time; none is measured yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import configs
from .configs import Config
from .problem import padded


class MixConfig(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int
    run: int
    fp32: str = "ieee"


# fmt: off
PRODUCTS: dict[tuple[str, str, int, int], Config] = {
    ("sm_80", "scores", 16, 64): Config(128, 128, 8, 2),
    ("sm_80", "scores", 16, 128): Config(128, 128, 8, 2),
    ("sm_80", "scores", 16, 256): Config(128, 64, 8, 1),
    ("sm_80", "attend", 16, 64): Config(128, 128, 8, 2),
    ("sm_80", "attend", 16, 128): Config(128, 64, 8, 2),
    ("sm_80", "attend", 16, 256): Config(64, 64, 8, 1),
    ("sm_80", "stored rows", 16, 64): Config(128, 64, 4, 3),
    ("sm_80", "stored rows", 16, 128): Config(128, 64, 8, 3),
    ("sm_80", "stored rows", 16, 256): Config(64, 64, 8, 2),
    ("sm_80", "stored columns", 16, 64): Config(64, 128, 8, 2),
    ("sm_80", "stored columns", 16, 128): Config(64, 64, 4, 2),
    ("sm_80", "stored columns", 16, 256): Config(64, 64, 8, 2),
    ("sm_80", "scores", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "scores", 32, 128): Config(16, 16, 8, 1, "ieee"),
    ("sm_80", "attend", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_80", "attend", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "stored rows", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_80", "stored rows", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("sm_80", "stored columns", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "stored columns", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("sm_86", "scores", 16, 64): Config(128, 128, 8, 2),
    ("sm_86", "scores", 16, 128): Config(128, 64, 8, 1),
    ("sm_86", "scores", 16, 256): Config(64, 64, 8, 1),
    ("sm_86", "attend", 16, 64): Config(128, 128, 8, 2),
    ("sm_86", "attend", 16, 128): Config(128, 64, 8, 2),
    ("sm_86", "attend", 16, 256): Config(64, 64, 8, 1),
    ("sm_86", "stored rows", 16, 64): Config(128, 64, 4, 3),
    ("sm_86", "stored rows", 16, 128): Config(128, 64, 8, 3),
    ("sm_86", "stored rows", 16, 256): Config(64, 64, 8, 2),
    ("sm_86", "stored columns", 16, 64): Config(64, 128, 8, 2),
    ("sm_86", "stored columns", 16, 128): Config(64, 64, 4, 2),
    ("sm_86", "stored columns", 16, 256): Config(64, 64, 8, 2),
    ("sm_86", "scores", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "scores", 32, 128): Config(16, 16, 8, 1, "ieee"),
    ("sm_86", "attend", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_86", "attend", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "stored rows", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_86", "stored rows", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("sm_86", "stored columns", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "stored columns", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("sm_90", "scores", 16, 64): Config(128, 128, 8, 2),
    ("sm_90", "scores", 16, 128): Config(128, 128, 8, 2),
    ("sm_90", "scores", 16, 256): Config(128, 64, 8, 1),
    ("sm_90", "attend", 16, 64): Config(128, 128, 8, 2),
    ("sm_90", "attend", 16, 128): Config(128, 128, 8, 2),
    ("sm_90", "attend", 16, 256): Config(64, 64, 8, 2),
    ("sm_90", "stored rows", 16, 64): Config(128, 64, 4, 3),
    ("sm_90", "stored rows", 16, 128): Config(128, 64, 8, 3),
    ("sm_90", "stored rows", 16, 256): Config(64, 64, 8, 2),
    ("sm_90", "stored columns", 16, 64): Config(64, 128, 8, 2),
    ("sm_90", "stored columns", 16, 128): Config(64, 64, 4, 2),
    ("sm_90", "stored columns", 16, 256): Config(64, 64, 8, 2),
    ("sm_90", "scores", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_90", "scores", 32, 128): Config(64, 32, 8, 1),
    ("sm_90", "attend", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_90", "attend", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_90", "stored rows", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_90", "stored rows", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("sm_90", "stored columns", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_90", "stored columns", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "scores", 16, 64): Config(128, 128, 8, 2),
    ("sm_100", "scores", 16, 128): Config(128, 128, 8, 2),
    ("sm_100", "scores", 16, 256): Config(128, 64, 8, 1),
    ("sm_100", "attend", 16, 64): Config(128, 64, 8, 2),
    ("sm_100", "attend", 16, 128): Config(128, 64, 8, 2),
    ("sm_100", "attend", 16, 256): Config(64, 64, 8, 1),
    ("sm_100", "stored rows", 16, 64): Config(128, 64, 4, 3),
    ("sm_100", "stored rows", 16, 128): Config(128, 64, 4, 3),
    ("sm_100", "stored rows", 16, 256): Config(128, 64, 8, 3),
    ("sm_100", "stored columns", 16, 64): Config(64, 128, 8, 2),
    ("sm_100", "stored columns", 16, 128): Config(64, 128, 8, 2),
    ("sm_100", "stored columns", 16, 256): Config(64, 64, 8, 2),
    ("sm_100", "scores", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "scores", 32, 128): Config(16, 16, 8, 1, "ieee"),
    ("sm_100", "attend", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_100", "attend", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "stored rows", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("sm_100", "stored rows", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("sm_100", "stored columns", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "stored columns", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "scores", 16, 64): Config(128, 64, 8, 1),
    ("gfx942", "scores", 16, 128): Config(128, 64, 8, 1),
    ("gfx942", "scores", 16, 256): Config(128, 64, 8, 1),
    ("gfx942", "attend", 16, 64): Config(128, 64, 8, 1),
    ("gfx942", "attend", 16, 128): Config(128, 64, 8, 1),
    ("gfx942", "attend", 16, 256): Config(128, 64, 8, 1),
    ("gfx942", "stored rows", 16, 64): Config(128, 64, 4, 1),
    ("gfx942", "stored rows", 16, 128): Config(128, 64, 4, 1),
    ("gfx942", "stored rows", 16, 256): Config(128, 64, 4, 1),
    ("gfx942", "stored columns", 16, 64): Config(64, 128, 8, 1),
    ("gfx942", "stored columns", 16, 128): Config(64, 128, 8, 1),
    ("gfx942", "stored columns", 16, 256): Config(64, 64, 4, 1),
    ("gfx942", "scores", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "scores", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "attend", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "attend", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "stored rows", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "stored rows", 32, 128): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "stored columns", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "stored columns", 32, 128): Config(32, 16, 16, 1, "ieee"),
}

MIXING: dict[tuple[str, str, int], dict[int, MixConfig]] = {
    ("sm_90", "mix", 16): {96: MixConfig(128, 4, 2, 32), 192: MixConfig(64, 4, 2, 32)},
    ("sm_90", "mix backward", 16): {
        80: MixConfig(64, 4, 2, 32), 96: MixConfig(32, 4, 1, 32),
        144: MixConfig(32, 8, 1, 32), 192: MixConfig(16, 8, 1, 32),
    },
    ("sm_90", "conv", 16): {
        48: MixConfig(128, 4, 2, 32), 80: MixConfig(64, 4, 2, 32),
        96: MixConfig(32, 4, 1, 32), 192: MixConfig(16, 8, 1, 32),
    },
    ("sm_90", "conv backward", 16): {
        48: MixConfig(64, 4, 2, 32), 80: MixConfig(32, 4, 1, 32),
        96: MixConfig(32, 8, 1, 32), 192: MixConfig(16, 8, 1, 32),
    },
    ("sm_80", "mix", 16): {80: MixConfig(128, 4, 2, 32), 192: MixConfig(16, 8, 1, 32)},
    ("sm_80", "mix backward", 16): {80: MixConfig(32, 4, 1, 32), 160: MixConfig(16, 8, 1, 32)},
    ("sm_80", "conv", 16): {80: MixConfig(64, 4, 2, 32), 192: MixConfig(16, 8, 1, 32)},
    ("sm_80", "conv backward", 16): {80: MixConfig(32, 4, 1, 32), 192: MixConfig(16, 8, 1, 32)},
    ("sm_86", "mix", 16): {80: MixConfig(128, 4, 2, 32), 192: MixConfig(16, 8, 1, 32)},
    ("sm_86", "mix backward", 16): {80: MixConfig(32, 4, 1, 32), 160: MixConfig(16, 8, 1, 32)},
    ("sm_86", "conv", 16): {80: MixConfig(64, 4, 2, 32), 192: MixConfig(16, 8, 1, 32)},
    ("sm_86", "conv backward", 16): {80: MixConfig(32, 4, 1, 32), 192: MixConfig(16, 8, 1, 32)},
    ("sm_100", "mix", 16): {96: MixConfig(128, 4, 2, 32), 192: MixConfig(64, 4, 2, 32)},
    ("sm_100", "mix backward", 16): {
        48: MixConfig(64, 4, 2, 32), 96: MixConfig(32, 4, 1, 32),
        144: MixConfig(32, 8, 1, 32), 192: MixConfig(16, 8, 1, 32),
    },
    ("sm_100", "conv", 16): {80: MixConfig(64, 4, 2, 32), 192: MixConfig(16, 8, 1, 32)},
    ("sm_100", "conv backward", 16): {80: MixConfig(32, 4, 1, 32), 192: MixConfig(16, 8, 1, 32)},
    ("gfx942", "mix", 16): {80: MixConfig(64, 4, 1, 32)},
    ("gfx942", "mix backward", 16): {80: MixConfig(32, 4, 1, 32)},
    ("gfx942", "conv", 16): {80: MixConfig(32, 4, 1, 32)},
    ("gfx942", "conv backward", 16): {80: MixConfig(32, 4, 1, 32)},
    ("sm_80", "mix", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_80", "mix backward", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_80", "conv", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_80", "conv backward", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_86", "mix", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_86", "mix backward", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_86", "conv", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_86", "conv backward", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_90", "mix", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_90", "mix backward", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_90", "conv", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_90", "conv backward", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_100", "mix", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_100", "mix backward", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_100", "conv", 32): {80: MixConfig(32, 8, 1, 32)},
    ("sm_100", "conv backward", 32): {80: MixConfig(16, 8, 1, 32)},
    ("gfx942", "mix", 32): {80: MixConfig(32, 8, 1, 32)},
    ("gfx942", "mix backward", 32): {80: MixConfig(16, 8, 1, 32)},
    ("gfx942", "conv", 32): {80: MixConfig(32, 8, 1, 32)},
    ("gfx942", "conv backward", 32): {80: MixConfig(32, 8, 1, 32)},
}
# fmt: on


def pick_products(q: torch.Tensor, kernel: str, width: int) -> Config:
    chip = configs.arch(q.device)
    if chip == "interpreter":
        return Config(32, 32, 4, 1)
    return PRODUCTS[chip, kernel, q.element_size() * 8, max(64, width)]


def pick_mixing(q: torch.Tensor, kernel: str, size: int) -> MixConfig:
    chip = configs.arch(q.device)
    if chip == "interpreter":
        return MixConfig(64, 4, 1, 4)
    rows = MIXING[chip, kernel, q.element_size() * 8]
    return rows[min(limit for limit in rows if limit >= size)]


def channels(sizes: Iterable[int]) -> int:
    """What a pair of positions keeps: heads, hidden units, FIRE's units, each padded as the kernels do."""
    return sum(padded(size) for size in sizes)


def largest(device: torch.device, bits: int) -> int:
    """The size up to which there is a row for every kernel."""
    chip = configs.arch(device)
    if chip == "interpreter":
        return 192
    return min(max(rows) for (c, _, b), rows in MIXING.items() if (c, b) == (chip, bits))
