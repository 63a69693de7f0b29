"""The GPU gate's cases of FLOATER, rehearsed: what is right passes, what is wrong fails."""

from __future__ import annotations

import pytest
import torch

import posattn
from bench import gate, gate_floater
from bench.gate_floater import Case

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", list(gate_floater.rehearsal()), ids=str)
def test_rehearsal(case):
    row = gate_floater.check(case, CPU, rehearse=True)
    assert row["failed"] == [], row["errors"]
    wanted = {"vectors", "dinitial", "evaluation", "extension"}
    assert wanted < set(row["errors"])
    assert any(name.startswith("ddynamics.") for name in row["errors"])


def test_wrong_vectors_fail(monkeypatch):
    """States a fifth of a position late, as the published solver returns some of them."""
    late = lambda self, length: self.at(torch.arange(length) + 0.2)
    monkeypatch.setattr(posattn.FLOATER, "_along", late)
    assert "vectors" in gate_floater.check(Case(torch.float32, 6, 1, 33), CPU, rehearse=True)["failed"]


def test_lost_gradients_fail(monkeypatch):
    """As with vectors that are kept from call to call without their graph."""
    outcome = gate_floater.outcome

    def stale(encoder, length, grad, waits):
        got = outcome(encoder, length, grad, waits)
        return {name: torch.zeros_like(x) if name.startswith("ddynamics") else x for name, x in got.items()}

    monkeypatch.setattr(gate_floater, "outcome", stale)
    failed = gate_floater.check(Case(torch.float32, 6, 1, 33), CPU, rehearse=True)["failed"]
    assert len(failed) == 4
    assert all(name.startswith("ddynamics.") for name in failed)


def test_part(capsys):
    assert gate.main(["--part", "floater", "--interpret", "--budget", "60"]) == 0
    assert f"passed, {len(list(gate_floater.cases()))} cases" in capsys.readouterr().out
