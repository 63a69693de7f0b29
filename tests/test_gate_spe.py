"""The GPU gate's cases of linear attention and SPE, rehearsed: what is right passes, what is wrong fails."""

from __future__ import annotations

import functools
import json

import pytest
import torch

pytest.importorskip("triton")

from bench import gate, gate_spe, gate_spe_speed, spe_truth
from bench.gate_spe import Case
from bench.gate_spe_cases import RARE, VARIANTS

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CPU = torch.device("cpu")
attend = gate_spe.attend


@pytest.fixture
def blockwise(monkeypatch):
    monkeypatch.setattr(gate_spe, "attend", functools.partial(attend, backend="blockwise"))


def check(case):
    return gate_spe.check(case, CPU, rehearse=True)


KINDS = ("sine", "exact", "conv", "seed", "none")


@pytest.mark.usefixtures("blockwise")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    for gated in (True, False):
        for feature_map in ("favor",) if kind == "exact" else ("elu", "relu", "favor"):
            row = check(Case(FP32, 6, 2, kind, feature_map, "odd", 10, 3, gated))
            assert row["failed"] == [], row


@pytest.mark.usefixtures("blockwise")
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in RARE])
def test_variants(variant):
    for kind, feature_map in (("sine", "elu"), ("seed", "relu"), ("none", "favor")):
        row = check(Case(FP32, 6, 2, kind, feature_map, variant, 8, 2))
        assert row["failed"] == [], row


@pytest.mark.usefixtures("blockwise")
@pytest.mark.parametrize("kind", ["sine", "seed"])
def test_one_token_after_many(kind):
    row = check(Case(FP32, 6, 2, kind, "elu", "one token after 1,000,000", 8, 2, length=70))
    assert row["failed"] == []
    assert set(row["errors"]) == {"out", "kv", "sums"}


@pytest.mark.usefixtures("blockwise")
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_16_bits_have_room_for_rounding(dtype):
    for kind, feature_map in (("sine", "elu"), ("seed", "elu"), ("sine", "favor")):
        row = check(Case(dtype, 8, 2, kind, feature_map, "in pieces", 16, 3))
        assert row["failed"] == [], row
        assert {"out", "out rms", "kv", "dq", "dk", "dv", "dgate"} <= set(row["errors"])
        for error, plain in row["relative"].values():
            assert error < 0.1
            assert 1e-5 < plain < 0.1, "plain PyTorch's own error, by the gradient's size"


OUTPUTS = ("out", "kv", "sums", "dq", "dk", "dv", "dbefore.kv", "dbefore.sums", "dfreqs", "doffsets", "dgains", "dgate")


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_wrong_result_fails(monkeypatch, output):
    def wrong(given):
        found = attend(given, "blockwise")
        return {**found, output: found[output] * (1 + 1e-3)}

    monkeypatch.setattr(gate_spe, "attend", wrong)
    assert check(Case(FP32, 6, 1, variant="after a state", realizations=8, rows=2))["failed"] == [output]


def test_a_wrong_result_fails_in_16_bits(monkeypatch):
    def wrong(given):
        found = attend(given, "blockwise")
        return {**found, "dk": found["dk"] * 1.01}

    monkeypatch.setattr(gate_spe, "attend", wrong)
    assert "dk rms" in check(Case(FP16, 8, 2, variant="padding", realizations=16, rows=3))["failed"]


def test_a_nan_and_a_run_that_does_not_repeat_fail(monkeypatch):
    runs = []

    def drifting(given):
        runs.append(None)
        found = attend(given, "blockwise")
        return {**found, "dv": found["dv"] * float("nan"), "dq": found["dq"] * (1 + 2.0**-22 * len(runs))}

    monkeypatch.setattr(gate_spe, "attend", drifting)
    failed = check(Case(FP32, 6, 1, variant="odd", realizations=8, rows=2))["failed"]
    assert {"dv", "dq differs when repeated"} <= set(failed)


def test_slices_and_the_other_backend_give_the_same_truth(monkeypatch):
    for kind in KINDS:
        feature_map = "favor" if kind == "exact" else "elu"
        case = Case(FP32, 6, 2, kind, feature_map, "fewer queries", 8, 3)
        given = gate_spe.make_inputs(case, CPU, rehearse=True)
        truths = [gate_spe.blockwise(given)]
        for size in (2**31, 5 * 8 * 2 * 6 * 8):
            monkeypatch.setattr(spe_truth, "CODE_BYTES", size)
            truths.append(spe_truth.Formula("exact", case, given).run(given))
        for other in truths[1:]:
            assert other.keys() == truths[0].keys()
            for name, value in truths[0].items():
                torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9, msg=name, check_dtype=False)


@pytest.mark.usefixtures("blockwise")
def test_a_long_case_is_held_against_the_other_backend(monkeypatch):
    monkeypatch.setattr(gate_spe, "LONG", 30)
    formulas = []
    monkeypatch.setattr(gate_spe, "Formula", lambda *x: formulas.append(x[0]) or spe_truth.Formula(*x))
    assert check(Case(BF16, 8, 2, realizations=16, rows=3, length=30))["failed"] == []
    assert formulas == ["plain"]


@pytest.mark.usefixtures("blockwise")
def test_errors_of_few_rows_are_drawn_more_often(monkeypatch):
    drawn = []
    make = gate_spe.make_inputs
    monkeypatch.setattr(gate_spe, "make_inputs", lambda *x: drawn.append(x[3:]) or make(*x))
    case = Case(FP16, 8, 1, variant="one token after a state", realizations=16, rows=3)
    assert check(case)["failed"] == []
    assert drawn == [(), *((n,) for n in range(1, gate_spe.DRAWS))]
    monkeypatch.setattr(gate_spe, "FEW", 1)
    drawn.clear()
    check(case)
    assert drawn == [()]


def test_a_slope_jumps_only_next_to_zero():
    case = Case(FP32, 4, 1, "none", "relu", "odd")
    formula = spe_truth.Formula("jumped", case, gate_spe.make_inputs(case, CPU, rehearse=True))
    near = spe_truth.NEAR
    x = torch.tensor([-1.0, -0.5 * near, 0.5 * near, 0.7], dtype=torch.float64, requires_grad=True)
    made = formula.features(x, True)
    (slope,) = torch.autograd.grad(made.sum(), x)
    torch.testing.assert_close(slope, torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(made, torch.relu(x) + 1e-3)


def test_philox_of_the_paper():
    """Its authors' test vectors, with a last counter of 0 the first of them."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [f"{int(word):08x}" for word in spe_truth.philox(0, zero, zero, zero)]
    assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_cases_cover_what_is_served():
    cases = list(gate_spe.cases())
    for field, values in {
        "heads": {1, 3, 4, 8, 12, 16}, "head_dim": {40, 64, 128}, "realizations": {64, 128, 256}, "spe": set(KINDS),
        "rows": {1, 2, 5, 7, 10, 16, 128}, "feature_map": {"elu", "relu", "favor"}, "gated": {True, False},
        "dtype": {BF16, FP16, FP32}, "variant": set(VARIANTS), "length": {None, 8192},
    }.items():  # fmt: skip
        assert {getattr(case, field) for case in cases} == values
    assert {1, 5, 10, 16} == {case.rows for case in cases if case.spe == "sine"}
    assert len(set(cases)) == len(cases)
    for case in cases:  # what the blockwise backend alone serves, or a GPU's memory does not hold, is not asked for
        assert case.spe != "exact" or (case.feature_map == "favor" and case.heads <= 4)
        assert case.realizations <= 128 or (case.dtype != FP32 and case.feature_map != "favor")
        assert case.length is None or not (case.dtype == FP32 and case.feature_map == "relu")


def test_floors():
    """What the products of H 16, D 64, K 10, R 64, N 8192 take at 790 TFLOP/s."""
    floor = gate_spe_speed.floors(16, 64, 10, 64, 8192)
    assert floor["features"][0] == pytest.approx(0.0544, rel=1e-2)
    assert floor["attention"][0] == pytest.approx(0.0054, rel=1e-2)
    assert floor["whole"][1] > 2 * floor["features"][0]


# ----------------------------------------------------------------------------------------------- in the interpreter

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")


@interpreted
def test_without_a_gpu_nothing_runs(capsys):
    for part in ("spe", "spe-speed"):
        assert gate.main(["--part", part]) == 0
        assert "nothing was run" in capsys.readouterr().out


@interpreted
@pytest.mark.triton
def test_rehearsal_of_the_fastest(tmp_path, capsys):
    path = tmp_path / "gate.json"
    assert gate.main(["--interpret", "--part", "spe", "--cases", "4::2", "--json", str(path)]) == 0
    assert "noise alone" in capsys.readouterr().out
    report = json.loads(path.read_text("utf-8"))
    assert [bool(row["errors"]) for row in report["spe"]["rows"]] == [True, True]
    assert "numerics" not in report
    assert "mixing" not in report


@interpreted
@pytest.mark.triton
def test_a_kernel_s_wrong_noise_fails(monkeypatch):
    case = Case(FP32, 3, 1, "seed", "elu", "noise alone", 4, 2)
    assert check(case)["failed"] == []
    right = spe_truth.noise_at
    monkeypatch.setattr(gate_spe, "noise_at", lambda seed, *x: right(seed + 1, *x))
    assert all("of the CPU" in name for name in check(case)["failed"])
    assert check(case)["failed"]


@interpreted
@pytest.mark.triton
def test_speed_rehearsal(monkeypatch, tmp_path, capsys):
    def fla(q, k, v, normalize):
        scores = torch.einsum("blhr,bmhr->bhlm", q, k).tril()
        scores = scores / scores.sum(-1, keepdim=True) if normalize else scores
        return torch.einsum("bhlm,bmhd->blhd", scores, v)

    monkeypatch.setattr(gate_spe_speed, "fla_of", lambda: (fla, ""))
    path = tmp_path / "speed.json"
    assert gate.main(["--interpret", "--part", "spe-speed", "--json", str(path)]) == 0, capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(path.read_text("utf-8"))["spe_speed"]["rows"]}
    assert list(rows) == [
        "posattn", "features", "attention", "codes in memory", "fla", "fla, numerators alone"
    ]  # fmt: skip
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in rows.values())
    assert rows["fla"]["differs"] < 1e-3


def test_speed_without_fla_and_without_time(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    made = gate_spe_speed.speed(CPU, lambda: False, lengths=(64,))
    assert made["rows"] == []
    assert made["not_reached"] == ["N 64, R 64", "N 64, R 128"]
    assert "without fla, which is not here" in capsys.readouterr().out


def test_what_does_not_fit_is_not_tried_at_longer_lengths(monkeypatch):
    tried = []

    def measured(peer, *_):
        tried.append(peer[1][0].shape[2])
        if peer[2] and len(peer[1]) == 3 and tried[-1] >= 20:
            raise torch.OutOfMemoryError("too much")
        return {f"{name}_ms": 1.0 for name in ("forward", "both")}

    def peers(length, **_):
        x = torch.zeros(1, 1, length, 4)
        return {"codes in memory": (None, [x, x, x], [x]), "attention": (None, [x, x, x], [])}

    monkeypatch.setattr(gate_spe_speed, "measured", measured)
    monkeypatch.setattr(gate_spe_speed, "peers", peers)
    made = gate_spe_speed.speed(CPU, lambda: True, lengths=(20, 10, 40), realizations=(8,))
    assert tried == [20, 20, 10, 10, 40]
    assert [row["name"] for row in made["rows"] if "not_run" in row] == ["codes in memory"] * 2
    assert made["failed"] == []
