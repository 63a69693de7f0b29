"""`python -m bench floater`: the published way against posattn, what is scaled up, and the speed part at toy size."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench import floater_contest, floater_speed, floater_training
from bench.__main__ import main
from bench.contest import DIRECTIONS
from bench.floater import without_output
from bench.floater_contest import Bench, Limits
from bench.floater_language_report import plane, plot_trajectories
from bench.floater_peers import (
    A_LAYER,
    ADJOINT,
    OF_DIRECTION,
    OURS,
    PUBLISHED,
    SAME,
    Place,
    Truths,
    error_of,
    make,
    make_cotangent,
    make_encoder,
    make_parts,
    run,
    sampled,
    samples,
)
from bench.floater_published import PublishedDynamics, one_by_one, times_of
from bench.floater_report import cell_text
from bench.floater_targets import of_step, targets, verdict
from bench.measure import Patience

TINY = Place(0.1, 24, dim=8, layers=2)
TIGHT = (1.2e-7, 1e-9)
FORWARD, BACKWARD = DIRECTIONS


def test_the_published_dynamics_are_the_same_function():
    dynamics, initial = make_parts(TINY, "cpu")
    t = torch.tensor(0.7)
    torch.testing.assert_close(PublishedDynamics(dynamics)(t, initial), dynamics(t, initial))


@pytest.mark.parametrize("peer", OF_DIRECTION[FORWARD])
def test_every_way_leads_to_the_same_vectors(peer):
    truth = Truths()[TINY]
    made = make(peer, TINY, "cpu", 2, TIGHT)
    assert error_of(samples(run(FORWARD, made, None)), truth) < 5e-5  # kinks are what rk4 steps over
    assert made.evaluations() > 0


@pytest.mark.parametrize("peer", OF_DIRECTION[BACKWARD])
def test_every_way_leads_to_the_same_gradients(peer):
    cotangent = make_cotangent(TINY, "cpu", 2)
    exact = floater_training.exact_gradients(TINY)
    grads = run(BACKWARD, make(peer, TINY, "cpu", 2, TIGHT), cotangent)[1]
    assert floater_training.gradient_error(grads, exact)["error"] < 3e-2  # kinks again


def test_in_float64_the_published_way_is_posattns_rk4():
    encoder = make_encoder(TINY, "cpu", method="rk4").double()
    times = times_of(TINY.length, TINY.delta_t, encoder.initial)
    with torch.no_grad():
        expected = one_by_one(PublishedDynamics(encoder.dynamics), encoder.initial, times)
        torch.testing.assert_close(encoder(TINY.length), torch.stack(expected, 1), rtol=1e-9, atol=1e-12)


def test_one_layer_of_the_published_way_is_that_layer():
    whole, one = (run(FORWARD, make(PUBLISHED, TINY, "cpu", layers), None) for layers in (2, 1))
    torch.testing.assert_close(whole[:1], one)
    assert error_of(samples(one), samples(whole)) < 1e-6


def test_samples():
    assert sampled(3).tolist() == [0, 1, 2]
    at = sampled(1000)
    assert (len(at), at[0].item(), at[-1].item()) == (257, 0, 999)
    places = [TINY._replace(gain=1e-3, length=n) for n in (24, 300)]
    assert [Truths()[p].shape[2] for p in places] == [24, 257]


def cell_at(place, peer, direction, seconds, **more):
    made = {**place._asdict(), "peer": peer, "direction": direction, "note": "", "longer_than": 0}
    one = {"median": seconds, "fastest": seconds, "slowest": seconds, "runs": 3}
    return {**made, "seconds": one, "layers_measured": place.layers, "evaluations": 100, "peak_bytes": 2**20,
            "peak_measured": 2**20, **more}  # fmt: skip


def test_how_much_is_measured():
    place = TINY._replace(length=1000, layers=6)
    longer = place._replace(length=2000)
    bench = Bench("cpu", Patience(), Limits(whole=10, one_layer=10, other=10, headline=50), Truths(), TINY)

    def layers(peer, direction=FORWARD):
        return bench.layers_for({"peer": peer, "direction": direction}, longer)

    assert layers(PUBLISHED) == layers(ADJOINT, BACKWARD) == layers("rk4, all layers") == 6
    for peer, seconds in ((PUBLISHED, 20.0), ("rk4, all layers", 20.0), (OURS, 20.0)):
        bench.remember(cell_at(place, peer, FORWARD, seconds))
    assert layers(PUBLISHED) == 1
    assert layers("rk4, all layers") == 0
    assert layers(OURS) == 6
    assert layers(ADJOINT, BACKWARD) == 0  # sixteen times forward, before anything is known
    bench.headline = longer
    assert layers(ADJOINT, BACKWARD) == 0
    bench.remember(cell_at(place, ADJOINT, BACKWARD, 60.0))
    assert layers(ADJOINT, BACKWARD) == 1
    bench.began -= 140.0  # ten seconds are left
    assert layers(ADJOINT, BACKWARD) == 0
    assert layers(PUBLISHED) == 1
    bench.began += 140.0

    cell = {**longer._asdict(), "peer": "rk4, all layers", "direction": FORWARD, "note": "", "longer_than": 0}
    bench.scale_up(cell, longer)
    assert cell["seconds"]["median"] == 40.0
    assert (cell["longer_than"], cell["evaluations"]) == (1000, 200)
    assert cell_text(cell) == "> 40 s**"
    bench.remember(cell)
    assert bench.nearest(longer, "rk4, all layers", FORWARD)["length"] == 1000
    assert bench.nearest(place._replace(length=500), "rk4, all layers", FORWARD)["length"] == 1000
    bench.scale_up(shorter := {**cell, "length": 500, "note": ""}, place._replace(length=500))
    assert shorter["note"] == "too slow"  # never from a longer one


def test_a_call_that_takes_too_long_is_made_for_one_layer(monkeypatch):
    asked = []

    def in_fresh_process(function, peer, place, direction, layers, tolerance, timeout):
        asked.append((layers, round(timeout)))
        if layers > 1:
            raise TimeoutError
        return 100, 2.0, 7, None

    monkeypatch.setattr(floater_contest, "in_fresh_process", in_fresh_process)
    bench = Bench("cpu", Patience(), Limits(part=40.0), Truths(), TINY)
    cell = cell_at(TINY, ADJOINT, BACKWARD, 0.0, tolerance=None)
    bench.once(cell, TINY)
    assert asked == [(2, 30), (1, 40)]
    assert (cell["seconds"]["median"], cell["layers_measured"], cell["evaluations"]) == (4.0, 1, 14)


def test_one_layer_counts_as_many_times_as_there_are_layers_but_not_its_memory():
    cell = {"layers_measured": 1}
    Bench.take(cell, TINY._replace(layers=6), 100, [1.0, 2.0, 3.0], 10)
    assert (cell["seconds"]["median"], cell["seconds"]["runs"]) == (12.0, 3)
    assert (cell["evaluations"], cell["peak_measured"]) == (60, 100)
    assert "peak_bytes" not in cell


def test_targets():
    place = TINY._replace(length=8192)
    cells = [
        cell_at(place, PUBLISHED, FORWARD, 50.0, error=1e-6),
        cell_at(place, OURS, FORWARD, 2.0, error=1e-4),
        cell_at(place, SAME, FORWARD, 3.0, error=2e-6),
        cell_at(place, PUBLISHED, BACKWARD, 500.0, longer_than=512),
        cell_at(place, ADJOINT, BACKWARD, 90.0),
        cell_at(place, OURS, BACKWARD, 9.0),
    ]
    rough = place._replace(gain=1.0, length=512)
    cells += [cell_at(rough, PUBLISHED, FORWARD, 4.0, layers_measured=1), cell_at(rough, OURS, FORWARD, 1.0)]
    step = step_of(6.0, 2.0)
    found = targets({"cells": cells, "cache": None, "steps": [step], "held": []}, place)
    values = [(0.06, False), (0.04, True), (0.1, True), (6.0, False), (0.25, False)]
    assert [(row["value"], row["met"]) for row in found] == values
    assert "to 2 times its error" in found[0]["what"]
    assert [verdict(row) for row in (found[0], found[1], {**found[0], "met": True})] == [
        "MISSED", "met", "met in time, not in error"]  # fmt: skip
    assert found[2]["what"].endswith("published, adjoint")
    assert found[4]["what"].startswith("gain 1, 512 positions, fwd")
    assert found[4]["note"] == "*"
    assert found[4]["detail"] == "1 s of 4 s* (extrapolated from one layer)"
    cells[4]["seconds"]["median"] = 1000.0
    (backward,) = [row for row in targets({"cells": cells, "cache": None, "steps": [], "held": []}, place)
                   if "fwd+bwd" in row["what"]]  # fmt: skip
    assert backward["note"] == "**"
    assert backward["detail"] == "9 s of > 500 s** (at least: extrapolated from 512 positions)"


def step_of(alone, more, runs=5, passes=1):
    seconds = {name: {"median": 1.0, "runs": runs} for name in ("constant", "solved", "alone")}
    made = {"gain": 1e-3, "batch": 8, "passes": passes, "evaluations": 31, "seconds": seconds}
    return {**made, "solve_percent": alone, "difference_percent": more}


def test_a_step_is_judged_by_the_larger_of_two_shares():
    assert of_step(step_of(2.0, 6.0))["value"] == of_step(step_of(6.0, -1.0))["value"] == 6.0
    assert "alone 2.00, with - without +6.00 (medians of 5 steps each, in turn)" in of_step(step_of(2, 6))["detail"]
    assert "(one step each)" in of_step(step_of(2.0, 6.0, runs=1))["detail"]
    held = of_step(step_of(1.0, 0.5, runs=3, passes=8))
    assert "one solve held for 8 steps" in held["what"]
    assert "medians of 3 times 8 steps each" in held["detail"]


def test_rounds_end_with_the_time():
    calls = {"a": lambda: time.sleep(0.02), "b": lambda: None}
    assert len(floater_training.taking_turns(calls, "cpu", 0.0)["b"]) == 1
    assert len(floater_training.taking_turns(calls, "cpu", 0.3)["a"]) == 5
    assert len(floater_training.taking_turns(calls, "cpu", 100.0)["a"]) == 11


def test_a_held_solve_costs_once_and_gives_gradients_at_the_end():
    calls, encoder = floater_training.make_step(TINY, 1, 2, "cpu", passes=3)
    solved = []
    encoder.dynamics.register_forward_pre_hook(lambda *_: solved.append(1))
    calls[floater_training.HELD_ALONE]()
    assert encoder.initial.grad.abs().sum() > 0
    held = len(solved)
    calls[floater_training.HELD]()
    assert len(solved) - held == held


def test_the_command_is_kept_without_its_folder():
    assert without_output(["--quick", "--out", "/a/b", "--seeds", "1"]) == ["--quick", "--seeds", "1"]
    assert without_output(["--output=/a/b", "--fresh"]) == ["--fresh"]


@pytest.fixture
def tiny(monkeypatch):
    small = {"dim": 8, "layers": 2, "lengths": (16, 32), "rough": (16,), "headline": 32, "more": 4}
    small.update({"gradients": (16,), "step_layers": 2, "step_length": 16, "heads": 2, "batches": (1, 2),
                  "rough_steps": (1.0,), "passes": 2})  # fmt: skip
    monkeypatch.setattr(floater_speed, "plan", lambda quick: floater_speed.Plan(**small))
    monkeypatch.setattr(floater_speed, "Patience", lambda **_: Patience(fewest=1, most=1, seconds=0.0))
    monkeypatch.setattr(floater_contest, "LADDER", ((1e-3, 1e-4), (1e-5, 1e-6)))
    for module in (floater_contest, floater_training):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *arguments, **_: function(*arguments))


def test_it_runs_and_goes_on(tiny, tmp_path, capsys):
    command = ["floater", "--part", "speed", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*command, "--budget", "-1"]) == 0
    assert "not reached in the budget, the same command goes on: 14" in capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr().out
    for words in ("evaluations, error", "forward + backward: time", "solve alone / step", "at most", "4 more on top"):
        assert words in printed
    found = json.loads((tmp_path / "floater-speed-cpu.json").read_text("utf-8"))
    assert (tmp_path / "floater-speed-cpu.png").stat().st_size > 10_000
    assert not found["not_reached"]
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["torchdiffeq"]
    assert str(tmp_path) not in json.dumps(found)
    assert len(found["cells"]) == 3 * sum(map(len, OF_DIRECTION.values()))
    for cell in found["cells"]:
        assert cell["note"] == ""
        assert cell["seconds"]["median"] > 0
        assert cell["peak_bytes"] >= 0
        assert cell["evaluations"] > 0
        assert ("error" in cell) == (cell["direction"] == FORWARD)
        if cell["peer"] in A_LAYER and cell["direction"] == FORWARD:
            assert cell["evaluations"] == 4 * (cell["length"] - 1) * cell["layers"]
    kept = found["cache"]["seconds"]
    assert kept["kept"]["median"] < kept["from scratch"]["median"]
    (gradients,) = found["gradients"]
    assert set(gradients["ways"]) == {"checkpoint", "direct", "adjoint"}
    assert all(way["error"] < 0.5 for way in [*gradients["ways"].values(), gradients["rk4"]])
    assert [(step["batch"], step["gain"]) for step in found["steps"]] == [(1, 1e-3), (2, 1e-3), (2, 1.0)]
    assert [(step["batch"], step["passes"]) for step in found["held"]] == [(1, 2)]
    assert all(step["evaluations"] > 0 for step in [*found["steps"], *found["held"]])
    assert {row["length"] for row in found["fixed_horizon"]} == {16, 32}
    assert found["host_waits"] is None
    assert len(found["targets"]) == 14
    assert all(row["met"] == (row["value"] <= row["limit"]) for row in found["targets"])
    assert main(command) == 0
    assert "14 parts, 14 of them done before" in capsys.readouterr().out


def test_positions_change_what_a_layer_does():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
    x, positions = torch.randn(2, 5, 8), torch.randn(3, 5, 8)
    plain = floater_training.layer_forward(layer, x, torch.zeros_like(positions))
    torch.testing.assert_close(plain, layer(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, floater_training.layer_forward(layer, x, positions))


def test_plane_and_trajectories(tmp_path):
    t = torch.linspace(0, 3, 50)
    axes = torch.linalg.qr(torch.randn(6, 2))[0].T
    vectors = torch.stack([radius * (t.sin()[:, None] * axes[0] + t.cos()[:, None] * axes[1]) for radius in (1.0, 2.0)])
    points, share = plane(vectors)
    assert points.shape == (2, 50, 2)
    assert sum(share) == pytest.approx(1, abs=1e-5)
    apart = torch.pdist(points[0])
    torch.testing.assert_close(apart, torch.pdist(vectors[0].double()), rtol=1e-4, atol=1e-5)
    plot_trajectories(torch.stack([vectors] * 3), tmp_path / "plot.png", "a label", trained=20)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
