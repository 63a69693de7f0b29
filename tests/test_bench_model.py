"""The model of Hopper's kernels, on invented counts."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from bench import model, model_report
from bench.speed_goals import GOALS

LIKE = dict(block_m=128, block_n=128, warps=8, width=128, programs=1, exponentials=64, path=600, far_path=500,
            accesses={}, per_score=9.0, registers=200)  # fmt: skip


def test_the_model_adds_or_overlaps():
    plain = {**LIKE, "direction": "forward", "rule": "Plain"}
    made = model.clocks(plain)
    assert made["products"] == 2048
    assert made["special"] == 1024
    assert made["issue"] == 1200
    assert made["operands"] == 2 * (8 * 6144 + 8 * 4096) / 128
    assert made["total"] == 2048 + 1200
    assert made["binds"] == "products + issue"
    shared = model.clocks({**plain, "programs": 2})
    assert shared["total"] == max(2048, made["L2"])
    specialised = model.clocks({**plain, "warps": 12, "computing": 8})
    assert specialised["issue"] == made["issue"]
    assert specialised["total"] == max(2048, made["L2"])
    assert model.clocks(plain, far=True)["total"] == 2048 + 1024
    # A number known from before: 790 * 2048 / 3248.
    assert model.predicted_tflops(plain) == pytest.approx(790 * 2048 / 3248)
    causal = [model.predicted_tflops(plain, n) for n in (2048, 8192, 32768)]
    assert causal == sorted(causal)
    assert causal[-1] < model.predicted_tflops(plain)


def test_the_model_counts_loads_and_gradients():
    row = {**LIKE, "direction": "rows", "rule": "Toeplitz", "block_n": 64}
    assert model.flop_a_score(row) == 768
    assert model.flop_a_score({**row, "rule": "Gradient+span"}) == 768 + 64
    accesses = {"LDG.E.CONSTANT": 3, "LDS.128": 1, "LDSM.16.MT88.4": 2, "REDG.E.ADD.F32x4": 1}
    assert model.wavefronts({**row, "accesses": accesses}) == 3 + 4 + 8 + 4


def invented():
    rows = []
    for _, direction, bits, width, rule in model.jobs():
        more = dict(chip="sm_90", bits=bits, direction=direction, rule=rule, width=width)
        rows.append({**LIKE, **more, "path": 600 + 50 * ("Gradient" in rule), "block_n": 64})
    return rows


def test_predictions_stand_beside_measurements(tmp_path):
    places = [{"where": "D 128 N 8192", "value": 0.955}, {"where": "D 128 N 2048", "value": 0.5}]
    report = {"machine": {"capability": [9, 0]}, "goals": [{"key": "forward KERPLE / none", "places": places}]}
    (tmp_path / "speed-nvidia-h200.json").write_text(json.dumps(report))
    report["machine"]["capability"] = [8, 0]
    report["goals"][0]["places"][0]["value"] = 0.1
    (tmp_path / "speed-other.json").write_text(json.dumps(report))
    found = model_report.measured(tmp_path)
    assert found["forward KERPLE / none", "D 128"] == 0.955
    rows = invented()
    rows.append({**rows[-1], "rule": "Linear", "error": "too much shared memory"})
    text = model_report.text(rows, found)
    assert "does not compile" not in text
    without = [row for row in rows if (row["direction"], row["rule"]) != ("cols", "Toeplitz")]
    assert "does not compile" in model_report.text(without, found)
    (line,) = [line for line in text.splitlines() if line.startswith("forward KERPLE / none") and "D 128" in line]
    assert line.split()[-1] == "0.955"
    assert "too much shared memory" in text
    keys = {key for key, *_ in model.predictions(model.Kernels(invented()))}
    assert keys <= {goal.key for goal in GOALS}


def test_the_model_knows_what_backward_allocates():
    extra, part = model.extra_bytes(128)
    assert extra > 2 * 4 * 16 * 32768
    assert part == pytest.approx(extra / (16 * 32768 * (8 * 256 + 4)))
    assert model.operations("ALiBi") == 0
    assert 5 < model.operations("KERPLE") < 40
