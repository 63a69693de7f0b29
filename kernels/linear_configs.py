"""Which tile each kernel of linear attention and of SPE runs with, as in configs.py: rows of numbers, no code in rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import configs


class ChunkConfig(NamedTuple):
    block_m: int  # rows of a program
    block_n: int  # rows or columns taken at a time
    block_r: int  # features of a program, at most
    block_v: int  # values of a program, at most
    num_warps: int
    num_stages: int
    fp32: str = "ieee"


def pick_chunk(q: torch.Tensor, kernel: str, width: int) -> ChunkConfig:
    chip = configs.arch(q.device)
    if chip == "interpreter":
        return ChunkConfig(16, 16, 32, 32, 4, 1)
    return ChunkConfig(64, 64, 64, 64, 4, 2)


class SineConfig(NamedTuple):
    block_m: int  # rows of a program
    block_r: int  # forward: features of a program, at most; backward: slots taken at a time
    num_warps: int
    num_stages: int
    fp32: str = "ieee"


def pick_sine(q: torch.Tensor, kernel: str, slots: int, realizations: int) -> SineConfig:
    if configs.arch(q.device) == "interpreter":
        return SineConfig(32, 32, 4, 1)
    return SineConfig(128, 64, 8, 2)


def local_rows(q: torch.Tensor) -> int:
    """For how many rows local angles are kept: the largest block_m of a chip."""
    return 32 if configs.arch(q.device) == "interpreter" else 128


def run_of(q: torch.Tensor, blocks: int) -> int:
    """How many blocks of rows a program of the backward takes: more, fewer partial sums; fewer, more programs."""
    return 2 if configs.arch(q.device) == "interpreter" else 4 if blocks >= 2048 else 1


class ConvConfig(NamedTuple):
    block_m: int  # rows of a program
    block_n: int  # noise positions taken at a time
    block_r: int  # realizations of a program of the forward, at most
    num_warps: int
    num_stages: int
    fp32: str = "ieee"


def pick_conv(q: torch.Tensor, kernel: str, realizations: int) -> ConvConfig:
    if configs.arch(q.device) == "interpreter":
        return ConvConfig(32, 32, 32, 4, 1)
    return ConvConfig(64, 64, 64, 4, 1)
