"""The GPU gate, rehearsed where there is no GPU: it runs, it finds what is wrong, it stops in time."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from bench import gate, gate_decode, gate_features, gate_mixing, gate_numerics, gate_spe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")
SMALLEST = gate_numerics.Case(torch.float32, 16, "T5", "more queries than keys, causal")


def test_without_a_gpu_nothing_runs(capsys):
    assert gate.main([]) == 0
    assert "nothing was run" in capsys.readouterr().out


@pytest.mark.slow
def test_rehearsal_passes(tmp_path, capsys):
    path, some = tmp_path / "gate.json", slice(None, None, 3)  # of the parts that take it; all take minutes
    assert gate.main(["--interpret", "--cases", "::3", "--json", str(path)]) == 0, capsys.readouterr().out
    report = json.loads(path.read_text("utf-8"))
    rows = report["numerics"]["rows"]
    assert len(rows) == len(list(gate_numerics.rehearsal()))
    assert all(set(row["errors"]) >= {"out", "lse", "dq", "dk", "dv"} for row in rows)
    rows = report["mixing"]["rows"]
    assert len(rows) == len(list(gate_mixing.rehearsal())[some])
    assert all(set(row["errors"]) >= {"out", "lse", "dq", "dk", "dv"} for row in rows)
    assert all(row["relative"] for row in rows)
    assert len(report["spe"]["rows"]) == len(list(gate_spe.rehearsal())[some])
    rows = report["features"]["rows"]
    assert len(rows) == len(list(gate_features.rehearsal())[some])
    assert all(set(row["errors"]) >= {"out", "lse", "dq", "dk", "dv"} for row in rows)
    assert not report["failures"]


def test_the_budget_stops_it(capsys):
    assert gate.main(["--interpret", "--budget", "0"]) == 0
    printed = capsys.readouterr().out
    assert "not reached in the budget, numerics" in printed
    assert "not reached in the budget, mixing" in printed
    assert "not reached in the budget, spe" in printed


@pytest.mark.parametrize("output", ["lse", "dk", "dsinks", "drelative"])
def test_a_wrong_result_of_an_option_fails(monkeypatch, output):
    *_, case = gate_features.rehearsal()
    attend = gate_features.posattn.attention

    def blockwise(*args, **options):
        return attend(*args, **{**options, "backend": "blockwise"})

    monkeypatch.setattr(gate_features.posattn, "attention", blockwise)
    assert gate_features.check(case, torch.device("cpu"), rehearse=True)["failed"] == []
    right = gate_features.attend
    monkeypatch.setattr(
        gate_features, "attend", lambda problem: (f := right(problem)) | {output: f[output] * (1 + 1e-3)}
    )
    assert gate_features.check(case, torch.device("cpu"), rehearse=True)["failed"] == [output]


@pytest.mark.parametrize("output", ["lse", "dq", "dv", "dparameter0"])
def test_a_wrong_result_fails(monkeypatch, output):
    right = gate_numerics.attend

    def wrong(given, case):
        found = right(given, case)
        found[output] = found[output] * (1 + 1e-3)
        return found

    monkeypatch.setattr(gate_numerics, "attend", wrong)
    assert gate_numerics.check(SMALLEST, torch.device("cpu"), rehearse=True)["failed"] == [output]


def test_a_nan_and_an_error_fail(monkeypatch, capsys):
    right = gate_numerics.attend
    monkeypatch.setattr(gate_numerics, "attend", lambda *x: {k: v / 0 * 0 for k, v in right(*x).items()})
    assert "dq" in gate_numerics.check(SMALLEST, torch.device("cpu"), rehearse=True)["failed"]
    monkeypatch.setattr(gate_numerics, "rehearsal", lambda: iter([SMALLEST]))
    monkeypatch.setattr(gate_numerics, "attend", lambda *x: 1 // 0)
    assert gate.main(["--interpret", "--part", "attention"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_run_that_does_not_repeat_fails(monkeypatch):
    right, runs = gate_numerics.attend, []

    def drifting(given, case):
        runs.append(None)
        return {k: v * (1 + 2.0**-22 * (len(runs) - 1)) for k, v in right(given, case).items()}

    monkeypatch.setattr(gate_numerics, "attend", drifting)
    row = gate_numerics.check(SMALLEST._replace(deterministic=True), torch.device("cpu"), rehearse=True)
    assert "dq differs when repeated" in row["failed"]


def gpu_run(monkeypatch, folder, numerics):
    """As on a GPU, but for `numerics`, memory and speed."""
    from posattn.kernels import configs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(configs, "arch", lambda device: "sm_90")
    monkeypatch.setattr(gate, "machine", lambda: {"device": "NVIDIA H200", "triton": "3.7.1"})
    monkeypatch.setattr(gate, "numerics", numerics)
    monkeypatch.setattr(gate.gate_speed, "memory", lambda *_: {"rows": [], "failed": ["N 4096: too much"]})
    monkeypatch.setattr(gate.gate_speed, "speed", lambda *_: {"rows": [], "not_reached": ["D 64, N 32768"]})
    monkeypatch.setattr(gate, "RESULTS", folder)


def test_the_report_of_another_schedule(monkeypatch, tmp_path, capsys):
    """Says of each row why it was refused, spends its budget on numerics in 16 bits, and stops at no quarter of it."""
    from posattn.kernels import configs, schedules

    shares, ran = [], []

    def numerics(cases, device, clock, rehearse, share):
        shares.append(share)
        ran.extend(cases)
        return {"rows": [{"case": str(case), "errors": {}, "failed": []} for case in cases], "not_reached": []}

    gpu_run(monkeypatch, tmp_path, numerics)
    monkeypatch.setattr(gate, "SCHEDULE", "specialised")
    row = configs.OTHERS["sm_90", "forward", 16, 128][0]
    kind = ("forward", "cuda:0", torch.bfloat16, 128, "table", row, "3.7.1")
    monkeypatch.setattr(schedules, "_verdicts", {kind: "its warps are one", (*kind[:4], "", *kind[5:]): ""})
    gate.main(["--part", "attention"])
    name = schedules.name("sm_90", "forward", 16, 128, row)
    (path,) = tmp_path.glob("gate-specialised-NVIDIA-H200-*.json")
    report = json.loads(path.read_text("utf-8"))
    assert [(v["row"], v["why"]) for v in report["verdicts"]] == [
        (f"{name}, torch.bfloat16, table", "its warps are one"), (f"{name}, torch.bfloat16, no options", ""),
    ]  # fmt: skip
    assert name in report["configs"]["not_covered"]
    printed = capsys.readouterr().out
    assert f"{name}, torch.bfloat16, table: its warps are one" in printed
    assert f"{name}, torch.bfloat16, no options: agrees with the plain kernel" in printed
    assert shares == [1.0, 1.0]
    every = gate.served(list(gate_numerics.cases()), torch.device("cpu"))
    assert ran == [case for case in every if case.dtype != torch.float32]


def test_the_report_of_a_gpu_run(monkeypatch, tmp_path, capsys):
    """Everything around the parts that need the GPU: order, exit status, file, what was not reached."""
    from posattn.kernels import configs

    kept = {"errors": {"out": [0.0, 1.0]}, "failed": []}
    ran = []

    def numerics(cases, *_):
        ran.extend(cases)
        rows = [{"case": str(case), **kept} for case in cases[:5]]
        return {"rows": rows, "not_reached": [str(case) for case in cases[5:]]}

    gpu_run(monkeypatch, tmp_path, numerics)
    assert gate.main([]) == 1
    printed = capsys.readouterr().out
    assert "N 4096: too much" in printed
    assert "not reached in the budget, speed: 1: D 64, N 32768" in printed
    assert "config rows without a passing case" in printed
    (path,) = tmp_path.glob("gate-NVIDIA-H200-torch*-triton3.7.1.json")
    assert json.loads(path.read_text("utf-8"))["failures"] == ["N 4096: too much"]
    # What the table has no row for is not asked for; all that it has a row for is asked for early.
    rows = {key[2:] for key in configs.CONFIGS if key[0] == "sm_90"}
    sizes = [gate.bits_and_width(case) for case in ran if hasattr(case, "head_dim")]
    assert set(sizes) == set(sizes[:14]) == rows
    # Options, caches, DAPE, SPE and FLOATER stand between the first cases and the mixed ones; nothing else has moved.
    mixing = [case for case in ran if isinstance(case, gate_mixing.Case)]
    first, features, caches = (
        gate.served(list(made()), torch.device("cpu"))
        for made in (gate_numerics.first_cases, gate_features.cases, gate_decode.cases)
    )
    assert ran[: len(first)] == first
    assert ran[len(first) : ran.index(mixing[0])] == features + caches
    others = [case for case in ran if isinstance(case, gate_numerics.Case)]
    every = gate.served(list(gate_numerics.cases()), torch.device("cpu"))
    assert others == first + every[5:]  # what the first share left over comes before the mixed cases
    report = json.loads(path.read_text("utf-8"))
    assert [len(report[part]["rows"]) for part in ("numerics", "mixing")] == [10, 5]

    ran.clear()
    assert gate.main(["--part", "attention", "--cases", "1::4"]) == 0  # which times nothing
    assert ran == every[1::4]

    ran.clear()
    assert gate.main(["--part", "mixing", "--cases", "1::4"]) == 0
    assert ran == mixing[1::4]
    (path,) = tmp_path.glob("gate-mixing-NVIDIA-H200-torch*.json")
    assert "speed" not in json.loads(path.read_text("utf-8"))
