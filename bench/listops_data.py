"""ListOps, made here by the rules of Long Range Arena (Tay et al., ICLR 2021; the task: Nangia & Bowman, 2018).

An expression is a digit or, with probability 0.25 where the depth still allows it, an operator of 2 to 10 expressions
in brackets: [MAX 2 9 [MIN 4 7 ] 0 ] is 9. MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10).
Only expressions longer than 500 and shorter than 2000 tokens are kept, a bracket with its operator counting as one
token. Brackets stay in the text that a model reads: without them an expression has no value.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

PAD, START, DIGIT = 0, 1, 2
OPERATORS = ("MIN", "MAX", "MED", "SM")
OPERATOR = DIGIT + 10
CLOSE = OPERATOR + len(OPERATORS)
TOKENS = CLOSE + 1  # how many there are
SHARD = 500  # expressions made from one seed


class Rules(NamedTuple):
    """As published when nothing is given."""

    shorter: int = 500  # expressions are longer than this
    longer: int = 2000  # and shorter than this, in tokens
    depth: int = 10  # levels, the root's own included: nine operators above each other at most
    arguments: int = 10
    operators: float = 0.25  # the share of operators where there is a choice


class Expressions(NamedTuple):
    """Many, one after the other in `tokens`; expression i is tokens[starts[i] : starts[i + 1]]."""

    tokens: Tensor  # uint8
    starts: Tensor  # (n + 1,) int64
    values: Tensor  # (n,) int64, 0 to 9

    def __len__(self) -> int:
        return self.values.numel()

    def lengths(self) -> Tensor:
        return self.starts.diff()

    def one(self, index: int) -> Tensor:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + longest) int64 tokens, START before each and PAD behind; (B,) values."""
        width = 1 + int(self.lengths()[chosen].max())
        made = torch.full((len(chosen), width), PAD)
        made[:, 0] = START
        for row, index in zip(made, chosen.tolist()):
            tokens = self.one(index)
            row[1 : 1 + len(tokens)] = tokens
        return made, self.values[chosen]


class _TooLong(Exception):
    pass


def make_one(rules: Rules, source: random.Random) -> tuple[list[int], int]:
    """Tokens and value of one expression within the limits; what is outside is made and thrown away."""
    while True:
        tokens: list[int] = []
        try:
            value = _add(tokens, 1, rules, source)
        except _TooLong:
            continue
        if rules.shorter < len(tokens) < rules.longer:
            return tokens, value


def _add(tokens: list[int], depth: int, rules: Rules, source: random.Random) -> int:
    """Append an expression; its value."""
    if depth >= rules.depth or source.random() >= rules.operators:
        value = int(source.random() * 10)
        tokens.append(DIGIT + value)
        return value
    if len(tokens) >= rules.longer:
        raise _TooLong
    operator = source.randrange(len(OPERATORS))
    tokens.append(OPERATOR + operator)
    count = source.randint(2, rules.arguments)
    values = [_add(tokens, depth + 1, rules, source) for _ in range(count)]
    tokens.append(CLOSE)
    return evaluate(OPERATORS[operator], values)


def evaluate(operator: str, values: list[int]) -> int:
    if operator == "MIN":
        return min(values)
    if operator == "MAX":
        return max(values)
    if operator == "SM":
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def make_shard(rules: Rules, seed: str, number: int, count: int) -> list[tuple[bytes, int]]:
    source = random.Random(f"listops {seed} {number}")
    made = (make_one(rules, source) for _ in range(count))
    return [(bytes(tokens), value) for tokens, value in made]


def make_splits(rules: Rules, counts: dict[str, int], seed: int = 0, workers: int = 1) -> dict[str, Expressions]:
    """Expressions by name of a split; no expression is twice in all of them, so a split may be a little smaller.

    The seed alone decides what they are. What comes first in `counts` keeps an expression that two splits have.
    """
    from .workers import each

    calls = [
        (rules, f"{seed} {name}", number, min(SHARD, count - number * SHARD))
        for name, count in counts.items()
        for number in range(-(-count // SHARD))
    ]
    if len(calls) < 20:
        workers = 1  # sooner done than other processes have started
    shards = {(call[1], call[2]): found for call, found in each(make_shard, calls, workers)}
    seen: set[bytes] = set()
    splits = {}
    for name, count in counts.items():
        kept = []
        for number in range(-(-count // SHARD)):
            for text, value in shards[f"{seed} {name}", number]:
                if text not in seen:
                    seen.add(text)
                    kept.append((text, value))
        splits[name] = Expressions(
            torch.frombuffer(bytearray(b"".join(text for text, _ in kept)), dtype=torch.uint8),
            torch.tensor([0, *(len(text) for text, _ in kept)]).cumsum(0),
            torch.tensor([value for _, value in kept]),
        )
    return splits


def text_of(tokens: Tensor) -> str:
    """As Long Range Arena writes it, without its round brackets: [MAX 2 9 [MIN 4 7 ] 0 ]"""
    words = []
    for token in tokens.tolist():
        if token == CLOSE:
            words.append("]")
        elif token >= OPERATOR:
            words.append("[" + OPERATORS[token - OPERATOR])
        elif token >= DIGIT:
            words.append(str(token - DIGIT))
    return " ".join(words)
