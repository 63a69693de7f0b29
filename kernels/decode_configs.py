"""Which tile decoding runs with, and into how many parts it splits the keys: rows of numbers, as in configs.py.

BLOCK_M is not in a row: it is the rows that share a key head, from 16 to what the row says. None is measured yet; what
counts is how many bytes a multiprocessor has under way, two to four programs of two or three tiles each.
"""

from __future__ import annotations

import functools

import torch

from .configs import Config, arch

# fmt: off
# chip, bits of the dtype, head dim: most rows of a tile, keys of a tile, warps, stages.
DECODE: dict[tuple[str, int, int], Config] = {
    (chip, bits, width): config
    for chip, rows in {
        "sm_80": {(16, 64): Config(64, 64, 4, 3), (16, 128): Config(32, 64, 4, 3), (16, 256): Config(32, 32, 4, 3),
                  (32, 64): Config(32, 32, 4, 3), (32, 128): Config(16, 32, 4, 2)},
        "sm_86": {(16, 64): Config(64, 64, 4, 3), (16, 128): Config(32, 64, 4, 2), (16, 256): Config(32, 32, 4, 2),
                  (32, 64): Config(32, 32, 4, 2), (32, 128): Config(16, 32, 4, 2)},
        "sm_90": {(16, 64): Config(64, 64, 4, 3), (16, 128): Config(64, 64, 4, 3), (16, 256): Config(32, 32, 4, 3),
                  (32, 64): Config(32, 32, 4, 3), (32, 128): Config(16, 32, 4, 3)},
        "sm_100": {(16, 64): Config(64, 64, 4, 3), (16, 128): Config(64, 64, 4, 3), (16, 256): Config(32, 32, 4, 3),
                   (32, 64): Config(32, 32, 4, 3), (32, 128): Config(16, 32, 4, 3)},
        "gfx942": {(16, 64): Config(64, 64, 4, 2), (16, 128): Config(64, 32, 4, 2), (16, 256): Config(32, 32, 4, 1),
                   (32, 64): Config(32, 32, 4, 1, "ieee"), (32, 128): Config(16, 32, 4, 1, "ieee")},
    }.items()
    for (bits, width), config in rows.items()
}
# fmt: on
# Bits of the dtype: heads and hidden units of a DAPE, each padded, to that many: keys of a tile, warps.
MIXES = {16: {96: (64, 4), 256: (32, 8)}, 32: {64: (64, 4), 96: (32, 8), 256: (16, 8)}}
PROGRAMS = 2  # that a multiprocessor works on at a time, in the choice of splits
MOST_SPLITS = 128
COMBINE_SPLITS, COMBINE_DIM = 16, 64  # of the tile that decode_combine reads at a time


def pick_decode(chip: str, bits: int, width: int) -> Config:
    if chip == "interpreter":
        return Config(32, 16, 4, 1)
    return DECODE[chip, bits, max(64, width)]


def pick_mix(chip: str, bits: int, channels: int) -> tuple[int, int]:
    if chip == "interpreter":
        return 16, 4
    return next(tile for most, tile in MIXES[bits].items() if channels <= most)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4 if arch(device) == "interpreter" else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(programs: int, tiles: int, slots: int) -> int:
    """Into how many parts to split `tiles` tiles of keys, of `programs` programs each, where `slots` run at a time.

    The fewest parts that leave at most 15 % more idle at the end than the best number does; one where the programs fill
    the device without.
    """
    if programs * 5 >= slots * 4 or tiles <= 1:
        return 1
    most = min(tiles, MOST_SPLITS, max(1, 4 * slots // programs))

    def busy(splits: int) -> float:
        return programs * splits / (slots * -(-programs * splits // slots))

    best = max(busy(n) for n in range(1, most + 1))
    return next(n for n in range(1, most + 1) if busy(n) >= 0.85 * best)
