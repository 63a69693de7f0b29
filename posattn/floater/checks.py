"""Checks of what FLOATER is given: which argument, what came, what is accepted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..biases.bias import check_integer


def check_number(name: str, number: float, zero: bool = False) -> float:
    """A finite float above 0, or 0 too. Raises TypeError and ValueError naming the argument."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if not (0 <= number < float("inf")) or (number == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'at least' if zero else 'above'} 0, got {number}")
    return float(number)


def check_streams(streams: Any, accepted: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Names, each once; any, or out of `accepted`."""
    if isinstance(streams, str) or not isinstance(streams, Sequence):
        kind = f"out of {accepted}" if accepted else 'such as ("query", "key", "value")'
        raise TypeError(f"streams must be a sequence of names {kind}, got {streams!r}")
    known = all(isinstance(name, str) and (accepted is None or name in accepted) for name in streams)
    if not streams or not known or len(set(streams)) < len(streams):
        kind = f"of {accepted}, each once" if accepted else "different names"
        raise ValueError(f"streams must be one or more {kind}, got {streams!r}")
    return tuple(streams)


def check_one_of(name: str, value: Any, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return str(value)


def check_length(length: Any) -> int:
    if isinstance(length, bool) or not hasattr(length, "__index__"):
        raise ValueError(f"length must be an integer or a Tensor of positions, got {length!r}")
    return check_integer("length", operator.index(length), minimum=0)


def check_positions(positions: Tensor) -> Tensor:
    """In float64, on the CPU."""
    if positions.dtype == torch.bool or positions.is_complex():
        raise ValueError(f"positions must be integers or floating-point numbers, got {positions.dtype}")
    if positions.requires_grad and torch.is_grad_enabled():
        raise ValueError("positions must not require a gradient: FLOATER gives none to them; pass positions.detach()")
    made = positions.detach().cpu().double()
    if not bool((torch.isfinite(made) & (made >= 0)).all()):
        raise ValueError(f"positions must be finite and at least 0, got {made.min()} to {made.max()}")
    return made
