"""The GPU gate's cases of DAPE and FIRE, rehearsed through plain PyTorch: what is right passes, what is wrong fails."""

from __future__ import annotations

import functools

import pytest
import torch

from bench import gate, gate_mixing
from bench.gate_mixing import Case
from bench.mixing_truth import NEAR, expected, leaky

FP32 = torch.float32
attend = gate_mixing.attend


@pytest.fixture(autouse=True)
def blockwise(monkeypatch):
    monkeypatch.setattr(gate_mixing, "attend", functools.partial(attend, backend="blockwise"))


def check(case):
    return gate_mixing.check(case, torch.device("cpu"), rehearse=True)


FORMS = [
    *(Case(FP32, 16, 4, "DAPE", base) for base in ("none", "ALiBi", "KERPLE", "FIRE")),
    *(Case(FP32, 16, 3, "V2", base, hidden=8, taps=5) for base in ("KERPLE", "FIRE")),
    *(Case(FP32, 16, 6, "published", base, hidden=8, taps=3) for base in ("none", "ALiBi")),
    Case(FP32, 16, 4, "FIRE", "FIRE", deterministic=True),
    Case(FP32, 16, 1, "DAPE", hidden=8, length=33),
]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_forms(case):
    assert check(case)["failed"] == []


@pytest.mark.parametrize("variant", gate_mixing.VARIANTS)
def test_variants(variant):
    for form, base, taps in (("DAPE", "KERPLE", 1), ("V2", "FIRE", 3), ("FIRE", "FIRE", 1)):
        row = check(Case(FP32, 8, 4, form, base, variant, 8, taps))
        assert row["failed"] == [], row


def test_half_precision_has_room_for_rounding():
    row = check(Case(torch.bfloat16, 16, 4, "DAPE"))
    assert row["failed"] == []
    assert 1e-4 < row["relative"]["dbase.p"][1] < 0.1, "plain PyTorch's own error, by the gradient's size"


@pytest.mark.parametrize(
    "output", ["out", "lse", "dq", "dk", "dv", "dfirst_weight", "dsecond_weight", "dbase.p", "dbase.a"]
)
def test_a_wrong_result_fails(monkeypatch, output):
    def wrong(given):
        found = attend(given, "blockwise")
        found[output] = found[output] * (1 + 1e-3)
        return found

    monkeypatch.setattr(gate_mixing, "attend", wrong)
    assert check(Case(FP32, 16, 4, "DAPE", variant="gradient of lse", hidden=8))["failed"] == [output]


def test_chunks_do_not_change_the_truth(monkeypatch):
    case = Case(FP32, 8, 3, "V2", "FIRE", "padding", 8, 3)
    given = gate_mixing.make_inputs(case, torch.device("cpu"), rehearse=True)
    truths = []
    for chunks in (1, 5):
        monkeypatch.setattr("bench.mixing_truth.CHUNKS", chunks)
        truths.append(expected(given, "FIRE", False, True)[0])
    assert truths[0].keys() == truths[1].keys()
    for name, value in truths[0].items():
        torch.testing.assert_close(truths[1][name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_a_slope_jumps_only_next_to_zero():
    x = torch.tensor([-1.0, -0.5 * NEAR, 0.5 * NEAR, 0.7], requires_grad=True)
    (slope,) = torch.autograd.grad(leaky(x, 0.01, NEAR).sum(), x)
    torch.testing.assert_close(slope, torch.tensor([0.01, 1.0, 0.01, 1.0]))
    torch.testing.assert_close(leaky(x, 0.01, NEAR), torch.nn.functional.leaky_relu(x, 0.01))


def test_cases_cover_what_dape_serves():
    cases = list(gate_mixing.cases())
    for field, values in {
        "heads": {1, 3, 8, 12, 16, 32, 64}, "hidden": {8, 32, 64, 128}, "head_dim": {40, 64, 128, 256},
        "form": {"DAPE", "V2", "published", "FIRE"}, "base": {"none", "ALiBi", "KERPLE", "FIRE"},
        "taps": {1, 3, 5, 7}, "dtype": {torch.bfloat16, torch.float16, FP32}, "variant": set(gate_mixing.VARIANTS),
    }.items():  # fmt: skip
        assert {getattr(case, field) for case in cases} == values
    assert {2048, 4096, 8192} <= {case.length for case in cases if case.form == "DAPE"}
    assert len(set(cases)) == len(cases)
    for case in cases:  # what is not defined is not asked for
        assert (case.taps > 1) == (case.form in ("V2", "published"))
        assert case.form != "published" or ("causal" in case.variant and "window" not in case.variant)


def test_what_is_printed_of_a_gradient():
    row = {"relative": {"dfirst_bias": [0.5, 0.1], "dbase.p": [0.008, 0.002], "dbase.a": [0.001, 0.002]}}
    assert gate.furthest_gradient(row) == ", dbase.p 8.0e-03/2e-03"
    assert gate.furthest_gradient({"errors": {}}) == ""
