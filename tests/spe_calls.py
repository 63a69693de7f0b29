"""The functions behind the operators, by backend, and how the tests compare what they give."""

from __future__ import annotations

import importlib

import pytest
import torch
from spe_cases import close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = 3e-5 if torch.cuda.is_available() else 1e-5
_BLOCKWISE = pytest.param("blockwise", "cpu", torch.float64, 1e-12, id="blockwise-fp64")
_TRITON = pytest.param("triton", DEVICE, torch.float32, NEAR, id="triton-fp32", marks=pytest.mark.triton)
BACKENDS = pytest.mark.parametrize(("backend", "device", "dtype", "tolerance"), [_BLOCKWISE, _TRITON])


def functions(backend: str, family: str):
    """The module that has forward and backward."""
    name = f"posattn.kernels.{family}_launch" if backend == "triton" else f"posattn.{family}_blockwise"
    return importlib.import_module(name)


def compare(got, want, tolerance):
    for number, (ours, wanted) in enumerate(zip(got, want)):
        try:
            close(ours, wanted, tolerance)
        except AssertionError as error:
            raise AssertionError(f"result {number}: {error}") from None


def at_most_twice(errors):
    """errors: of each run (ours, plain, exact), lists of tensors. Root mean squares over runs."""
    sums = 0
    for ours, eager, exact in errors:
        rows = zip(ours, eager, exact)
        squares = lambda t: t.detach().cpu().double().square().sum()
        sums = sums + torch.tensor([[squares(a.cpu() - t), squares(b - t), squares(t)] for a, b, t in rows]).T
    error, allowed, size = sums.sqrt()
    assert (error <= 2 * allowed + 2**-16 * size).all(), (error / size, allowed / size)
