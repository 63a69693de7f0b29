"""The table of goals: its verdicts on invented measurements, and its run at toy size."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("triton")

from bench import speed, speed_first, speed_parts, speed_peers, speed_report
from bench.speed_goals import GOALS, REHEARSAL, Goal, goals, verdict
from bench.speed_timing import DeviceBroken, Place, Timer

PLACE = Place(128, 8192, 4, 16)


# ------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("value", "expected"),
    [(640, "reached"), (700, "reached"), (639, "accepted"), (550, "accepted"), (549, "missed"), (None, "not measured"),
     (math.nan, "missed")],
)  # fmt: skip
def test_verdict_with_a_lower_bar(value, expected):
    assert verdict(Goal("x", "", 640, True, accepted=550), value) == expected


def test_verdict_where_less_is_better():
    assert [verdict(Goal("x", "", 3.0, False), v) for v in (2.9, 3.0, 3.1)] == ["reached", "reached", "missed"]
    strict = Goal("x", "", 0.08, False, strict=True)
    assert [verdict(strict, v) for v in (0.079, 0.08, 0.081)] == ["reached", "missed", "missed"]


def row(place, peer, **values):
    return {**place._asdict(), "peer": peer, **values}


def forward(place, **ms):
    rows = []
    for name, t in ms.items():
        tflops = place.flop() / t / 1e9
        rows.append(row(place, name.replace("_", " "), forward_ms=t, forward_tflops=tflops))
    return {"part": "forward", "rows": rows}


def training(place, **ms):
    rows = []
    for name, (both, backward) in ms.items():
        tflops = 2.5 * place.flop() / backward / 1e9
        more = dict(both_ms=both, backward_ms=backward, backward_tflops=tflops, difference_tflops=tflops)
        rows.append(row(place, name.replace("_", " "), **more))
    return {"part": "training", "rows": rows}


def answered(parts, rehearsal=False):
    return {line["key"]: line for line in goals(parts, rehearsal)}


def test_goals_on_invented_measurements():
    short = PLACE._replace(length=2048, batch=16)
    # At N 8192 of D 128: 2 * 8192^2 * 128 * 64 flop, so 2 ms are 549.8 TFLOP/s and 1.99 ms 552.
    lines = answered([
        forward(PLACE, posattn_none=1.99, posattn_TISA=2.05, posattn_KERPLE=2.2, SDPA_flash=1.8, SDPA_cudnn=1.7,
                Flex_KERPLE=3.3, posattn_ALiBi_skipping=1.0),
        forward(short, posattn_none=0.5, posattn_TISA=0.6, SDPA_flash=0.6),
        training(PLACE, posattn_none=(9.0, 7.0), posattn_KERPLE=(10.0, 8.0), posattn_KERPLE_frozen=(9.5, 7.5),
                 Flex_KERPLE=(35.0, 30.0), posattn_TISA=(9.1, 7.1), posattn_TISA_frozen=(9.0, 7.0)),
    ])  # fmt: skip
    got = {key: (line["value"], line["verdict"]) for key, line in lines.items() if line["value"] is not None}
    assert got["forward TISA / none"] == (pytest.approx(0.5 / 0.6), "missed")
    assert lines["forward TISA / none"]["where"] == "D 128 N 2048", "the worst place decides"
    assert len(lines["forward TISA / none"]["places"]) == 2
    assert got["forward KERPLE / none"] == (pytest.approx(1.99 / 2.2), "missed")
    assert got["forward none"] == (pytest.approx(552.5, abs=0.1), "accepted")
    assert got["forward TISA"][1] == "missed"
    assert got["forward / SDPA"] == (pytest.approx(1.7 / 1.99), "accepted"), "beside the best of SDPA's backends"
    assert got["forward / Flex"] == (pytest.approx(1.5), "reached")
    assert got["training / Flex"] == (pytest.approx(3.5), "reached")
    assert got["backward none"] == (pytest.approx(2.5 * PLACE.flop() / 7 / 1e9), "missed")
    assert got["share KERPLE"] == (pytest.approx(0.5 / 8), "reached")
    assert got["share TISA"] == (pytest.approx(0.1 / 7.1), "reached")
    assert got["ALiBi skipping / none"][1] == "reached"
    assert lines["forward T5 / none"]["verdict"] == "not measured"
    assert lines["forward KERPLE / none"]["ratio"] == pytest.approx(1.99 / 2.2 / 0.97)
    assert set(lines) == {goal.key for goal in GOALS}


def test_goals_of_single_rows():
    radial = [row(PLACE._replace(length=n), "posattn", both_ms=1.0) for n in (512, 1024)]
    radial[1]["not_run"] = "out of memory"
    flex = row(PLACE._replace(length=512), "Flex", both_ms=6.0)
    errors = [
        row(PLACE, name, errors={"dq": 2e-3, "dtable": x}) for name, x in (("posattn", 1e-3), ("Flex", 9e-4))
    ]
    lines = answered(
        [
            {"part": "radial", "rows": [radial[0], flex]},
            {"part": "radial", "rows": [radial[1]]},
            {"part": "error", "rows": errors},
            {"part": "memory", "rows": [row(PLACE, "posattn none", share=0.004, extra_bytes=1),
                                        row(PLACE, "posattn TISA", share=0.04, extra_bytes=9),
                                        row(PLACE, "SDPA flash", share=0.5, extra_bytes=9),
                                        row(PLACE._replace(length=4096), "posattn none", share=0.9, extra_bytes=9)]},
            {"part": "decode", "rows": [{"peer": "posattn TISA", "place": "B 1", "share": 0.9, "median": 1e-5,
                                         "copy_bandwidth": 4e12}]},
            {"part": "first", "rows": [{"peer": "posattn TISA", "cold": {"call": 4.0, "import": 2},
                                        "warm": {"call": 1.5, "import": 2}}]},
        ]
    )  # fmt: skip
    verdicts = {key: line["verdict"] for key, line in lines.items() if line["value"] is not None}
    assert verdicts == {
        "radial runs": "missed", "radial / Flex": "reached", "error / Flex": "missed", "memory": "missed",
        "decode": "reached", "first cold": "reached", "first warm": "missed",
    }  # fmt: skip
    assert lines["radial runs"]["where"] == "not at 1024"
    assert "dtable" in lines["error / Flex"]["peers"]
    assert "posattn TISA" in lines["memory"]["peers"]


def test_what_failed_in_one_direction_counts_in_the_others():
    part = training(PLACE, posattn_none=(9.0, 7.0), posattn_KERPLE=(10.0, 8.0), posattn_KERPLE_frozen=(9.5, 7.5),
                    Flex_KERPLE=(35.0, 30.0), Flex_none=(35.0, 30.0), SDPA_flash=(8.0, 6.0))  # fmt: skip
    for peer in part["rows"][2:]:
        del peer["backward_ms"], peer["backward_tflops"]
    lines = answered([part])
    assert lines["training / Flex"]["value"] == 3.5
    assert lines["share KERPLE"]["verdict"] == "not measured"
    assert "Flex none, as both - forward" in lines["backward none"]["peers"]
    assert "SDPA" not in lines["backward none"]["peers"]


def test_a_nan_is_not_hidden_and_a_rehearsal_reaches_nothing():
    parts = [forward(PLACE, posattn_none=none, posattn_TISA=2.0) for none in (2.0, math.nan)]
    assert answered(parts)["forward TISA / none"]["verdict"] == "missed"
    schedules = {**forward(PLACE, posattn_none=9.0, posattn_none_specialised=1.5), "part": "schedules"}
    line = answered([forward(PLACE, posattn_none=2.0), schedules])["forward none"]
    assert "posattn none specialised 733" in line["peers"], "beside it"
    assert line["value"] == pytest.approx(549.8, abs=0.1), "but not in its place"
    errors = [row(PLACE, name, errors={"dq": x}) for name, x in (("posattn", 1.015e-3), ("Flex", 1e-3))]
    assert answered([{"part": "error", "rows": errors}])["error / Flex"]["verdict"] == "accepted"
    lines = answered([forward(PLACE, posattn_none=0.001, posattn_TISA=0.001)], rehearsal=True)
    assert lines["forward none"]["verdict"] == lines["forward none"]["measured"] == REHEARSAL
    assert lines["forward TISA / none"]["verdict"] == REHEARSAL


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.fixture
def without_compilers(monkeypatch):
    """FlexAttention takes a C++ compiler ten seconds, and the first call two new processes."""

    def flex(*_):
        raise NotImplementedError("not here")

    monkeypatch.setattr(speed_peers, "flex_table", flex)
    once = {"import": 1.0, "wake": 0.1, "call": 0.2}
    monkeypatch.setattr(speed_first, "cold_and_warm", lambda *_: (once, once))


def run(tmp_path, *options, do_bench=None):
    status = speed.main(["--device", "cpu", "--output", str(tmp_path), *options], do_bench)
    return status, json.loads((tmp_path / "quick-speed-cpu.json").read_text("utf-8"))


def test_the_whole_at_toy_size(tmp_path, capsys, without_compilers):
    status, report = run(tmp_path)
    printed = capsys.readouterr().out
    assert status == 0
    assert not report["not_reached"]
    assert {part["part"] for part in report["parts"].values()} == set(speed_parts.PARTS)
    reasons = {(part["part"], r["peer"]) for part in report["parts"].values() for r in part["rows"] if "not_run" in r}
    # Of posattn's own nothing fails but what only a GPU has.
    schedules = {f"posattn {b} {s}" for b in ("none", "KERPLE") for s in speed_peers.SCHEDULES}
    assert {peer for _, peer in reasons if peer.startswith("posattn")} <= schedules
    assert ("forward", "Flex KERPLE") in reasons
    assert all(line["verdict"] in (REHEARSAL, "not measured") for line in report["goals"])
    assert report["machine"]["rehearsal"]
    assert "rehearsal" in printed
    assert "not run: not here" in printed
    assert speed.main(["--table", str(tmp_path / "quick-speed-cpu.json")]) == 0
    assert capsys.readouterr().out.strip() in printed, "the table comes from the file alone"
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(tmp_path / "quick-speed-cpu.png")
    assert pixels[..., :3].std() > 0.05, "blank"


def test_it_goes_on_where_it_was_killed(tmp_path, monkeypatch, without_compilers):
    done = []

    def cells(device, quick):
        def piece(name):
            def work(timer, left_out):
                if name == "error second" and not done.count(name):
                    done.append(name)
                    raise KeyboardInterrupt
                done.append(name)
                return [{"peer": name, "not_run": "invented"}]

            return speed_parts.Cell("error", name, work)

        return [piece(f"error {which}") for which in ("first", "second", "third")]

    monkeypatch.setattr(speed, "cells", cells)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    (work,) = tmp_path.glob("*.unfinished-*.json")
    assert list(json.loads(work.read_text("utf-8"))["parts"]) == ["error first"]
    _, report = run(tmp_path)
    assert done == ["error first", "error second", "error second", "error third"]
    assert set(report["parts"]) == {"error first", "error second", "error third"}
    run(tmp_path)
    assert len(done) == 4
    assert not list(tmp_path.glob("*.unfinished-*"))
    assert run(tmp_path, "--fresh", "--budget", "0")[1]["not_reached"] == list(report["parts"])


def test_a_broken_gpu_ends_the_process_and_is_left_out_after(tmp_path, monkeypatch, capsys):
    asked = []

    def work(timer, left_out):
        asked.append(dict(left_out))
        if not left_out:
            raise DeviceBroken("Flex KERPLE: an illegal memory access")
        return [{"peer": "Flex KERPLE", "not_run": left_out["Flex KERPLE"]}]

    monkeypatch.setattr(speed, "cells", lambda *_: [speed_parts.Cell("error", "error D 64", work)])
    status, report = run(tmp_path)
    assert status == 3
    assert report["not_reached"] == ["error D 64"]
    assert "goes on without it" in capsys.readouterr().out
    assert run(tmp_path)[0] == 0
    assert asked == [{}, {"Flex KERPLE": "an illegal memory access (error D 64)"}]


def test_a_piece_that_fails_as_a_whole(tmp_path, monkeypatch):
    broken = []
    monkeypatch.setattr(Timer, "wait", lambda self: broken and 1 / 0)
    cell = speed_parts.Cell("error", "error D 64", lambda *_: [][0])
    monkeypatch.setattr(speed, "cells", lambda *_: [cell])
    _, report = run(tmp_path, "--fresh")
    assert report["parts"]["error D 64"]["rows"] == [{"peer": "all", "not_run": "IndexError: list index out of range"}]
    broken.append("the GPU too")
    assert run(tmp_path, "--fresh")[0] == 3
    status, report = run(tmp_path)
    assert status == 0
    assert "left out" in report["parts"]["error D 64"]["rows"][0]["not_run"]


def test_places_fill_a_gpu_and_unknown_parts_are_refused(capsys):
    every = speed_parts.cells("cuda", False)
    assert len({cell.name for cell in every}) == len(every)
    for dim in (64, 128):
        for length in speed_parts.LENGTHS:
            place = speed_parts.place_of(dim, length)
            assert place.batch * place.length * place.heads * place.head_dim == 32768 * 2048
    assert {cell.part for cell in every} == set(speed_parts.PARTS)
    names = [cell.name for cell in every]
    order = ["training D 64 N 8192", "error D 128", "memory D 128", "schedules D 128 N 8192",
             "training D 128 N 32768", "training D 64 N 2048", "radial N 16384", "forward D 128 N 4096"]  # fmt: skip
    assert sorted(order, key=names.index) == order, "the most important first"
    assert not [peer for peer in speed_peers.forward_peers(PLACE, "cuda", True) if peer.endswith("specialised")]
    with pytest.raises(SystemExit):
        speed.main(["--part", "forwards"])
    assert "unknown part forwards" in capsys.readouterr().err


def test_the_plot_needs_measurements(tmp_path):
    assert speed_report.plot({"parts": {}, "machine": {}}, tmp_path / "x.png") is None
