"""Which tile each of DAPE's kernels runs with: rows of numbers by GPU, kernel, dtype width and size, as in configs.py.

The kernels of mix_products.py go by head dim. Those that mix go by what a pair of positions keeps in registers: heads
and hidden units, each padded to a power of two, and FIRE's units; a row serves sizes up to its own. BLOCK_N is how many
pairs of a row are mixed at a time, `run` how many rows a program takes. None is measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .configs import Config, arch


class MixConfig(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int
    run: int
    fp32: str = "ieee"


# fmt: off
PRODUCTS: dict[tuple[str, str, int, int], Config] = {
    ("sm_90", "scores", 16, 64): Config(128, 128, 8, 2),
}

MIXING: dict[tuple[str, str, int], dict[int, MixConfig]] = {
    ("sm_90", "mix", 16): {64: MixConfig(128, 4, 2, 32), 192: MixConfig(64, 4, 2, 32), 224: MixConfig(32, 8, 1, 32)},
    ("sm_90", "mix backward", 16): {
        80: MixConfig(64, 4, 2, 32), 96: MixConfig(32, 4, 1, 32), 144: MixConfig(32, 8, 1, 32), 224: MixConfig(16, 8, 1, 32),
    },
}
# fmt: on


def pick_products(q: torch.Tensor, kernel: str, width: int) -> Config:
    chip = arch(q.device)
    if chip == "interpreter":
        return Config(32, 32, 4, 1)
    return PRODUCTS[chip, kernel, q.element_size() * 8, max(64, width)]


def pick_mixing(q: torch.Tensor, kernel: str, size: int) -> MixConfig:
    chip = arch(q.device)
    if chip == "interpreter":
        return MixConfig(64, 4, 1, 4)
    rows = MIXING[chip, kernel, q.element_size() * 8]
    return rows[min(limit for limit in rows if limit >= size)]
