"""Which schedule of attention's kernels runs: the plain one until another has proved itself; and its rows."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from specialised_cases import HALF, INTERPRETED, NAN, expected
from torch import Tensor

pytest.importorskip("triton")
from test_kernels import Case, error, problem

from posattn.kernels import configs, launch, schedules
from posattn.kernels.schedules import Schedules, differs

RESULTS = Path(__file__).parent.parent / "bench" / "results"


@pytest.fixture
def chosen(monkeypatch):
    """POSATTN_SCHEDULE=specialised, and nothing judged yet."""
    monkeypatch.setenv("POSATTN_SCHEDULE", "specialised")
    monkeypatch.setattr(schedules, "_verdicts", {})
    return monkeypatch


# ------------------------------------------------------------------------------------------------ when it is used


def forward(case: Case, p: dict[str, Any]) -> None:
    """One call by the launcher, which must be right."""
    for mine, right in zip(launch.forward(p["q"], p["k"], p["v"], **p["told"]), expected(case, p)):
        assert error(mine, right) < 4e-3


def two_calls(case: Case = HALF) -> tuple[list[str], list[str]]:
    """(schedules that ran, warnings) of the same call made twice; both must be right."""
    p = problem(case)
    ran = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            forward(case, p)
            ran.append(configs.ran["forward"].schedule)
    return ran, [str(w.message) for w in caught if str(w.message).startswith("attention's")]


@INTERPRETED
@pytest.mark.parametrize("schedule", ["specialised", "persistent", "descriptors"])
def test_it_is_judged_once_and_then_runs(chosen, schedule) -> None:
    chosen.setenv("POSATTN_SCHEDULE", schedule)
    assert two_calls() == (["plain", schedule], [])
    assert [(v["why"], v["config"].schedule) for v in schedules.verdicts()] == [("", schedule)]
    chosen.setattr(Schedules, "judge", None)  # nobody is judged again
    assert two_calls() == ([schedule, schedule], [])


@INTERPRETED
def test_a_call_that_is_not_served_stays_plain(chosen) -> None:
    assert two_calls(HALF._replace(softcap=0.0, right=3)) == (["plain", "plain"], [])
    assert schedules.verdicts() == []


@INTERPRETED
def test_plain_is_the_default(monkeypatch) -> None:
    monkeypatch.delenv("POSATTN_SCHEDULE", raising=False)
    monkeypatch.setattr(Schedules, "run", None)
    assert two_calls() == (["plain", "plain"], [])


@INTERPRETED
def test_a_compiler_that_fails_leaves_the_plain_kernel(chosen, capfd) -> None:
    def fails(call, config):
        os.write(2, b"module { the whole program }")
        raise RuntimeError("PassManager::run failed")

    chosen.setattr(schedules, "warps_compiled", fails)
    ran, said = two_calls()
    assert ran == ["plain", "plain"]
    assert len(said) == 1
    assert "'specialised' is not used" in said[0]
    assert "PassManager::run failed" in said[0]
    assert "whole program" not in capfd.readouterr().err
    print("still there", file=sys.stderr)
    assert "still there" in capfd.readouterr().err


@INTERPRETED
def test_warps_that_are_not_specialised(chosen) -> None:
    chosen.setattr(schedules, "warps_compiled", lambda call, config: config.num_warps)
    ran, said = two_calls()
    assert ran == ["plain", "plain"]
    assert len(said) == 1
    assert "did not specialise" in said[0]
    chosen.setattr(schedules, "warps_compiled", lambda call, config: config.num_warps + 8)
    schedules._verdicts.clear()
    assert two_calls() == (["plain", "specialised"], [])
    chosen.setattr(schedules, "warps_compiled", lambda call, config: config.num_warps)
    chosen.setenv("POSATTN_SCHEDULE", "descriptors")  # which has none to specialise
    assert two_calls() == (["plain", "descriptors"], [])


@INTERPRETED
@pytest.mark.parametrize("wrong", ["a row", "a lse", "a row not written", "too large", "nothing"])
def test_wrong_numbers_and_no_launch(chosen, wrong) -> None:
    from triton.runtime.errors import OutOfResources

    right = Schedules.launch

    def off(call, config, out, lse):
        if wrong == "too large":
            raise OutOfResources(300_000, 232_448, "shared memory")
        right(call, config, out, lse)
        if wrong == "a row":
            out[0, 1, 33] *= 1.05
        elif wrong == "a lse":
            lse[0, 1, 33] += 1e-3
        elif wrong == "a row not written":
            out[0, 0, 39] = NAN

    chosen.setattr(Schedules, "launch", off)
    ran, said = two_calls()
    if wrong == "nothing":
        assert (ran, said) == (["plain", "specialised"], [])
        return
    assert ran == ["plain", "plain"]
    assert len(said) == 1
    assert ("OutOfResources" if wrong == "too large" else "differs") in said[0]
    assert len(schedules.verdicts()) == 1
    assert schedules.verdicts()[0]["why"]


@INTERPRETED
def test_kinds_of_calls_are_judged_one_by_one(chosen) -> None:
    chosen.setattr(schedules, "warps_compiled", lambda call, config: 12 if call.p.head_dim == 64 else 4)
    assert two_calls()[0] == ["plain", "specialised"]
    ran, said = two_calls(HALF._replace(head_dim=128))
    assert ran == ["plain", "plain"]
    assert len(said) == 1
    assert two_calls()[0] == ["specialised", "specialised"]


@INTERPRETED
@pytest.mark.parametrize("when", ["a graph is captured", "memory is short", "there are NaN"])
def test_nothing_is_decided(chosen, when) -> None:
    """Then the plain kernel runs without a word, and the next call decides."""
    p, case = problem(HALF), HALF
    with chosen.context() as now:
        if when == "a graph is captured":
            now.setattr(schedules, "capturing", lambda: True)
        elif when == "memory is short":

            def short(*_):
                raise torch.OutOfMemoryError

            now.setattr(Schedules, "launch", short)
        else:
            p["v"][0, 0, 3, 2] = NAN
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="attention's")
            launch.forward(p["q"], p["k"], p["v"], **p["told"])
        assert configs.ran["forward"].schedule == "plain"
        assert schedules.verdicts() == []
    assert two_calls(case)[0] == ["plain", "specialised"]


def test_what_counts_as_rounding() -> None:
    """Products of bfloat16 weights, rounded on two scales, agree; what a wrong tile, row or scale makes does not."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 64, generator=make) for _ in range(3))
    s = (q @ k.mT / 8).masked_fill(torch.ones(300, 300).triu(1).bool(), -1e30)

    def rounded(top: Tensor) -> tuple[Tensor, Tensor]:
        p = (s - top).exp()
        total = p.sum(3)
        return ((p.bfloat16().float() @ v) / total[..., None]).bfloat16(), top[..., 0] + total.log()

    one, other = rounded(s.amax(3, keepdim=True)), rounded(s.amax(3, keepdim=True) + 0.37)
    assert not torch.equal(one[0], other[0])
    assert differs(one, other) == ""
    for wrong in ("tile", "row", "scale", "lse", "nan", "dead"):
        out, lse = other[0].clone(), other[1].clone()
        if wrong == "tile":
            out[:, :, 64:128] = out[:, :, 128:192]
        elif wrong == "row":
            out[0, 1, 299] = out[0, 1, 298]
        elif wrong == "scale":
            out *= 1.1
        elif wrong == "lse":
            lse[0, 0, 5] += 0.01
        elif wrong == "nan":
            lse[0, 0, 5] = NAN
        else:
            lse[0, 0, 5] = -torch.inf
        assert "differs" in differs((out, lse), one), wrong


# ---------------------------------------------------------------------------------------------------------- rows


def test_rows_beside_the_table() -> None:
    for (_, direction, _, _), rows in configs.OTHERS.items():
        assert len(set(rows)) == len(rows)
        for config in rows:
            assert config.schedule in ("plain", "specialised", "persistent", "descriptors")
            if config.schedule in ("specialised", "persistent"):  # two groups of 64 rows, or of 64 keys
                block = {"forward": config.block_m, "cols": config.block_n}[direction]
                assert (block, config.num_warps) == (128, 4)
    assert all(config.schedule == "plain" for config in configs.CONFIGS.values())  # none is verified
    assert configs.OTHERS.keys() <= configs.CONFIGS.keys()


def test_the_search_takes_rows_of_other_schedules_where_they_serve(monkeypatch) -> None:
    asked: list[configs.Config] = []
    monkeypatch.setenv("POSATTN_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "arch", lambda device: "sm_90")
    monkeypatch.setattr(configs, "_tuned", {})
    search = lambda rows, launch: asked.extend(rows) or max(rows, key=lambda c: (c.schedule == "persistent", c))
    monkeypatch.setattr(configs, "_search", search)
    q = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16)
    made: list[configs.Config] = []
    for serves in (lambda config: True, None):
        asked.clear()
        configs.run("forward", q, 64, "Toeplitz", 8, made.append, None, serves)
        kinds = {config.schedule for config in asked}
        assert kinds == ({"plain", "specialised", "persistent", "descriptors"} if serves else {"plain"})
    assert [config.schedule for config in made] == ["persistent", "plain"]


def test_verified_rows_are_covered_by_a_gate() -> None:
    """Each names a committed report of a gate that did not fail and ran the row."""
    rows = {place: (config, *configs.OTHERS.get(place, ())) for place, config in configs.CONFIGS.items()}
    faults = unproven(configs.VERIFIED, rows)
    assert not faults, "\n".join(faults)


def unproven(verified: dict[Any, str], rows: dict[Any, tuple[configs.Config, ...]]) -> list[str]:
    faults = []
    for (*place, config), file in verified.items():
        report = json.loads((RESULTS / file).read_text("utf-8"))
        name = schedules.name(*place, config)
        if config not in rows.get(tuple(place), ()):
            faults.append(f"{name}: {config} is no row")
        if report["failures"] or name not in report["configs"]["covered"]:
            faults.append(f"{name}: {file} does not show it")
    return faults


def test_an_unproven_row_is_found(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys.modules[__name__], "RESULTS", tmp_path)
    place = ("sm_90", "forward", 16, 64)
    rows = {place: (configs.CONFIGS[place], *configs.OTHERS[place])}
    special = configs.OTHERS[place][0]
    report = {"failures": [], "configs": {"covered": ["sm_90 forward 16 bits 64"]}}
    (tmp_path / "gate.json").write_text(json.dumps(report))
    assert unproven({(*place, configs.CONFIGS[place]): "gate.json"}, rows) == []
    assert len(unproven({(*place, special): "gate.json"}, rows)) == 1
    assert len(unproven({(*place, configs.CONFIGS[place]._replace(num_stages=9)): "gate.json"}, rows)) == 1
    report["configs"]["covered"].append("sm_90 forward 16 bits 64 specialised 128x128")
    (tmp_path / "gate.json").write_text(json.dumps(report))
    assert unproven({(*place, special): "gate.json"}, rows) == []
    (tmp_path / "gate.json").write_text(json.dumps(report | {"failures": ["one"]}))
    assert len(unproven({(*place, special): "gate.json"}, rows)) == 1


def test_the_report_marks_unverified_rows(monkeypatch) -> None:
    from bench import kernels

    place = ("sm_90", "forward", 16, 64)
    config = configs.CONFIGS[place]
    line = dict(zip(("chip", "direction", "bits", "width"), place)) | config._asdict()
    line |= {"rule": "Plain", "error": "none was made"}
    assert " ? " in kernels.show([line]).splitlines()[-1]
    monkeypatch.setitem(configs.VERIFIED, (*place, config), "gate.json")
    assert " ? " not in kernels.show([line]).splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["specialised", "persistent", "descriptors"])
@pytest.mark.parametrize("case", [HALF._replace(queries=n, keys=n, head_dim=d) for n in (300, 1024) for d in (64, 128)])
def test_on_a_gpu(chosen, schedule, case) -> None:
    if configs.arch(torch.device("cuda")) != "sm_90":
        pytest.skip("rows for sm_90")
    chosen.setenv("POSATTN_SCHEDULE", schedule)
    assert two_calls(case) == (["plain", schedule], [])
