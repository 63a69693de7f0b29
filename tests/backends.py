"""Any function of the package by a backend's name: on the GPU or interpreted, what comes back is on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from calls import move

from posattn import blockwise

BACKENDS = ["blockwise", pytest.param("triton", marks=pytest.mark.triton)]
# (backend, dtype); the interpreter does not know bfloat16.
HALF = [
    ("blockwise", torch.bfloat16),
    ("blockwise", torch.float16),
    pytest.param("triton", torch.float16, marks=pytest.mark.triton),
    pytest.param("triton", torch.bfloat16, marks=[pytest.mark.triton, pytest.mark.gpu]),
]
# In the interpreter, products of float32 are those of the CPU; on a GPU their sums have another order.
TOLERANCE = {"blockwise": dict(atol=2e-5, rtol=2e-5), "triton": dict(atol=1e-4, rtol=1e-4)}


def by(backend: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if backend == "blockwise":
        return function(*args, backend=backend, **kwargs)
    place = partial(move, device="cuda" if torch.cuda.is_available() else "cpu")
    args, kwargs = map(place, args), {name: place(value) for name, value in kwargs.items()}
    out = function(*args, backend=backend, **kwargs)
    return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()


def small_blocks(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """The blockwise backend with several blocks, and several pieces of the heads, at the lengths of a test."""
    for name, size in dict(dict(ROWS=16, FUSED_ROWS=16, MIN_ROWS=4, SCRATCH=3000, PACK=16), **sizes).items():
        monkeypatch.setattr(blockwise, name, size)
