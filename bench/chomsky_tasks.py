"""Tasks of the Chomsky hierarchy as they are defined in Deletang et al., "Neural Networks and the Chomsky
Hierarchy", ICLR 2023 (arXiv 2207.02098, app. A), made here from their definitions.

A task makes (batch, length) strings and their answers: two int64 tensors, (B, n) and (B, m). n is the length that
was asked for, or the nearest that the task has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

MODULUS = 5  # of modular arithmetic; also the length of the cycle that is navigated
PLUS, MINUS, TIMES = MODULUS, MODULUS + 1, MODULUS + 2
HOLE, BLANK = 2, 3  # beside 0 and 1, in missing duplicate


class Task(NamedTuple):
    label: str
    inputs: int  # how many different tokens a string has
    outputs: int  # and how many its answer may have: 1 / outputs is what guessing scores
    make: Callable[[int, int, Generator], tuple[Tensor, Tensor]]


def _strings(symbols: int, batch: int, length: int, generator: Generator) -> Tensor:
    return torch.randint(symbols, (batch, length), generator=generator)


def parity_check(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Is the number of ones odd?"""
    x = _strings(2, batch, length, generator)
    return x, x.sum(1, keepdim=True) % 2


def even_pairs(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Is the number of neighbours that differ even? (That is: are the first and the last token the same?)"""
    x = _strings(2, batch, length, generator)
    return x, 1 - (x[:, 1:] != x[:, :-1]).sum(1, keepdim=True) % 2


def cycle_navigation(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Where on a cycle of five does one end that starts at 0 and stays (0), goes on (1) or goes back (2)?"""
    x = _strings(3, batch, length, generator)
    return x, ((x == 1).sum(1, keepdim=True) - (x == 2).sum(1, keepdim=True)) % MODULUS


def modular_arithmetic(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The value modulo 5 of a sum of products of digits below 5, without brackets; an odd number of tokens."""
    x = _strings(MODULUS, batch, length - 1 + length % 2, generator)
    x[:, 1::2] = PLUS + _strings(3, batch, x.shape[1] // 2, generator)
    total, term = torch.zeros(batch, dtype=torch.int64), x[:, 0]
    for place in range(2, x.shape[1], 2):
        sign, digit = x[:, place - 1], x[:, place]
        times = sign == TIMES
        total = total + torch.where(times, 0, term)
        term = torch.where(times, term * digit, torch.where(sign == MINUS, -digit, digit)) % MODULUS
    return x, ((total + term) % MODULUS)[:, None]


def reverse_string(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The string, from its end."""
    x = _strings(2, batch, length, generator)
    return x, x.flip(1)


def bucket_sort(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The string, sorted."""
    x = _strings(5, batch, length, generator)
    return x, x.sort(1).values


def missing_duplicate(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The token behind the hole in a string that was written twice; a blank ends strings of odd length."""
    half = max(1, length // 2)
    once = _strings(2, batch, half, generator)
    x = torch.cat([once, once], dim=1)
    hole = torch.randint(2 * half, (batch, 1), generator=generator)
    y = x.gather(1, hole)
    x = x.scatter(1, hole, HOLE)
    if length % 2 and length > 1:
        x = torch.cat([x, torch.full((batch, 1), BLANK)], dim=1)
    return x, y


def odds_first(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The first, third, fifth ... token, then the second, fourth, ..."""
    x = _strings(2, batch, length, generator)
    return x, torch.cat([x[:, ::2], x[:, 1::2]], dim=1)


def duplicate_string(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The string, twice."""
    x = _strings(2, batch, length, generator)
    return x, torch.cat([x, x], dim=1)


TASKS = {
    "even-pairs": Task("even pairs", 2, 2, even_pairs),
    "modular-arithmetic": Task("modular arithmetic (simple)", MODULUS + 3, MODULUS, modular_arithmetic),
    "parity": Task("parity check", 2, 2, parity_check),
    "cycle-navigation": Task("cycle navigation", 3, MODULUS, cycle_navigation),
    "reverse": Task("reverse string", 2, 2, reverse_string),
    "missing-duplicate": Task("missing duplicate", 4, 2, missing_duplicate),
    "duplicate": Task("duplicate string", 2, 2, duplicate_string),
    "odds-first": Task("odds first", 2, 2, odds_first),
    "bucket-sort": Task("bucket sort", 5, 5, bucket_sort),
}
