"""Copies of a FLOATER that keeps a table: pickles, state dicts, deepcopy; and threads that share one."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from floater_cases import counted as build


def saved(encoder):
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda e: pickle.loads(pickle.dumps(e)), "torch.save": saved, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", COPIES)
def test_copies(way):
    """Without the table, and independent."""
    encoder = build()
    size = len(pickle.dumps(encoder))
    before = encoder(5000).clone()
    assert len(pickle.dumps(encoder)) < size + 500
    other = COPIES[way](encoder)
    calls = other.dynamics.calls
    assert torch.equal(other(5000), before)
    assert other.dynamics.calls > calls
    with torch.no_grad():
        other.initial.add_(1)
    assert not torch.equal(other(5000), before)
    assert torch.equal(encoder(5000), before)


def test_state_dict():
    encoder, other = build(), build()
    keys = set(encoder.state_dict())
    assert keys == {"initial", "dynamics.inner.matrix", "dynamics.inner.slope", "dynamics.inner.shift"}
    encoder(50)
    assert set(encoder.state_dict()) == keys
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    other(50)
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file), strict=True) == ([], [])
    assert torch.equal(other(50), encoder(50))


# ------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(("method", "step_size"), [("dopri5", None), ("rk4", 1.0)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads(dtype, trained, method, step_size):
    """Eight at once, each asks for lengths that others are just adding, and for positions between."""
    encoder, whole = (build(dtype, method=method, step_size=step_size) for _ in range(2))
    between, whole = whole.at(torch.tensor([0.5, 77.25])), whole(600)
    encoder.requires_grad_(trained)  # then each thread turns gradients off for itself
    failures, start = [], threading.Barrier(8)

    def ask(number):
        try:
            start.wait()
            with torch.no_grad():
                for i in range(4):
                    length = 1 + (37 * number + 150 * i) % 600
                    if not torch.equal(encoder(length), whole[:, :, :length]):
                        failures.append(f"length {length} in thread {number}")
                    if not torch.equal(encoder.at(torch.tensor([0.5, 77.25])), between):
                        failures.append(f"positions between in thread {number}")
                    if i == 2 and number == 3:
                        encoder.clear()
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
