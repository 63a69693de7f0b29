"""`python -m bench dape`: its peers compute the same, it runs, goes on where it stopped, and says what it left out."""

from __future__ import annotations

import json

import pytest
import torch

from bench import mixing_speed
from bench.__main__ import main
from bench.contest import DIRECTIONS
from bench.measure import Patience
from bench.mixing_report import rows, text
from bench.mixing_speed import Bench, Place, eager, floor_seconds, make_bias, make_tensors, ours, places, run
from bench.mixing_where import by_kernel


@pytest.mark.parametrize("kind", ["KERPLE", "V2", "FIRE", "FIRE alone"])
def test_eager_computes_the_same(kind):
    place = Place(kind, 4, 8, 40)
    tensors, bias = make_tensors(place, "cpu"), make_bias(place, "cpu")
    found, wanted = (run(DIRECTIONS[1], attend, tensors, bias) for attend in (ours, eager))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    for mine, other in zip(found[1], wanted[1]):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.fixture
def tiny(monkeypatch):
    """Two small places, memory not measured in processes of their own."""
    todo = [Place("KERPLE", 2, 8, 32), Place("FIRE alone", 2, 8, 32)]
    monkeypatch.setattr(mixing_speed, "places", lambda device, quick: todo)
    monkeypatch.setattr(mixing_speed, "in_fresh_process", lambda *_: 2**20)
    return todo


def test_it_runs_and_goes_on(tiny, tmp_path, capsys, monkeypatch):
    command = ["dape", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert main([*command, "--budget", "-1"]) == 0
    assert "not reached in the budget, the same command goes on: 2: KERPLE H 2 D 8 N 32" in capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "faster than eager" in printed
    found = json.loads((tmp_path / "quick-dape-cpu.json").read_text("utf-8"))
    assert found["machine"]["torch"] == torch.__version__
    assert len(found["rows"]) == 2 * len(DIRECTIONS)
    assert not found["not_reached"]
    for row in found["rows"]:
        assert row["times_faster_than_eager"] > 0
        assert row["times_less_memory_than_eager"] == 1
        assert ("times_the_floor" in row) == (row["kind"] == "KERPLE")

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "__init__", lambda self, *_, **__: None)
    monkeypatch.setattr(Bench, "remember", lambda *_: None)
    monkeypatch.setattr(Bench, "at", lambda self, place: [])
    command.remove("--quick")
    assert main(command) == 0  # another plan: nothing was done before
    assert "0 of them done before" in capsys.readouterr().out
    monkeypatch.setattr(Bench, "at", never)
    assert main(command) == 0
    assert "2 of them done before" in capsys.readouterr().out


def test_without_a_gpu_there_are_no_kernels_to_time(capsys):
    assert main(["dape", "--where", "--device", "cpu"]) == 0
    assert "no GPU here" in capsys.readouterr().out


def test_what_would_not_fit_is_not_tried(monkeypatch):
    bench = Bench("cuda", Patience(), compiled=True)
    monkeypatch.setattr(bench, "free", lambda: 100 * 2.0**30)
    forward, both = DIRECTIONS
    assert bench.why_not_try("eager", forward, Place("KERPLE", 16, 64, 1024)) == ""
    cell = {"peer": "eager", "direction": both, "peak_bytes": 2.0**30}
    bench.remember(cell, Place("KERPLE", 16, 64, 2048))
    assert bench.why_not_try("eager", both, Place("KERPLE", 16, 64, 16384)) == ""
    assert bench.why_not_try("eager", both, Place("KERPLE", 16, 64, 32768)) == "needs 256 GiB"
    assert bench.why_not_try("posattn", both, Place("KERPLE", 16, 64, 32768)) == ""


def test_a_peer_that_fails_leaves_the_others(monkeypatch):
    monkeypatch.setattr(mixing_speed, "eager", lambda *_: 1 / 0)
    monkeypatch.setattr(mixing_speed, "in_fresh_process", lambda *_: 2**20)
    cells = Bench("cpu", Patience(most=3), compiled=False).at(Place("KERPLE", 2, 8, 32))
    assert [cell["note"] for cell in cells] == ["", "division by zero"] * 2
    assert "division by zero" in text(cells, "cuda")
    assert all("times_faster_than_eager" not in row for row in rows(cells))


def test_floor():
    place = Place("KERPLE", 16, 64, 8192)
    assert floor_seconds(place, DIRECTIONS[0]) == pytest.approx(0.26e-3, rel=0.01)
    both = 2 * 8192**2 // 2 * (7 * 16 * 64 + 256 * 16) / 790e12  # forward and backward
    assert floor_seconds(place, DIRECTIONS[1]) == pytest.approx(both)
    assert floor_seconds(place._replace(kind="FIRE alone"), DIRECTIONS[0]) is None


def test_places_on_a_gpu():
    todo = places("cuda", quick=False)
    assert len(set(todo)) == len(todo)
    plain = {place[1:] for place in todo if place.kind == "KERPLE"}
    assert plain == {(h, d, 2**n) for h in (8, 12, 16, 32) for d in (64, 128) for n in range(10, 16)}
    assert all(place.heads == 16 and place.head_dim == 64 for place in todo[:6])


def test_kernels_are_added_up():
    events = [("mix", 10.0), ("scores", 1.0), ("mix", 20.0)]
    assert by_kernel(events) == [
        {"kernel": "mix", "launches": 2, "ms": pytest.approx(0.03)},
        {"kernel": "scores", "launches": 1, "ms": pytest.approx(0.001)},
    ]
