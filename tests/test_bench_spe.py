"""`python -m bench spe`: the published form against posattn, its guards, and each part at toy size."""

from __future__ import annotations

import json

import pytest
import torch

from bench import spe_language, spe_quality, spe_speed
from bench.__main__ import main
from bench.byte_model import Size
from bench.contest import DIRECTIONS
from bench.measure import Patience
from bench.spe_language import KINDS
from bench.spe_published import features, kernels_of
from bench.spe_report import gather_language, language_text, speed_rows, speed_text
from bench.spe_speed import OF_KIND, Bench, Place, agreement, make_peer, make_spe, make_tensors, places, run
from bench.train import Recipe
from bench.workers import each

TINY = [Place(kind, 2, 8, n, realizations=8, sines=2, taps=4) for n in (32, 64) for kind in ("sine", "conv")]
MODEL = Size(width=16, depth=2, num_heads=2, max_length=512)
LANGUAGE = spe_language.Plan(
    MODEL, Recipe(length=32, batch_size=2, steps=3, warmup=1), (256, 512), 512, realizations=8, sines=2, taps=4
)


@pytest.mark.parametrize("kind", ["sine", "conv"])
def test_the_published_form_is_the_same_function(kind):
    found = agreement(kind)
    assert {"out", "dquery", "dkey", "dvalue", "dgate"} < set(found)
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("kind", ["sine", "conv"])
def test_the_published_form_draws_for_itself(kind):
    place = TINY[kind == "conv"]
    spe, (query, key, *_) = make_spe(place, "cpu"), make_tensors(place, "cpu")
    first, second = features(query, key, spe), features(query, key, spe)
    assert first[0].shape == (1, 2, 32, 8)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("kind", ["sine", "conv"])
def test_kernels_are_the_mean_of_published_codes(kind):
    torch.manual_seed(0)
    spe = make_spe(Place(kind, 2, 4, 0, realizations=20000, sines=2, taps=3), "cpu")
    query, key = torch.eye(4).expand(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    qhat, khat = features(query, key, spe)  # query m has dimension m alone
    got = torch.einsum("hmr,hnr->hmn", qhat[0], khat[0]).double() * (4 / 20000) ** 0.5
    cross, own_q, own_k = kernels_of(spe, torch.arange(-3, 4))
    for m in range(4):
        for n in range(4):
            expected = cross[:, m, m - n + 3]
            spread = ((own_q[:, m] * own_k.sum(1) + expected**2) / 20000).sqrt()
            assert ((got[:, m, n] - expected).abs() < 5 * spread).all(), (m, n)


@pytest.mark.parametrize("place", TINY[:2], ids=str)
def test_every_peer_runs_there_and_back(place):
    for peer in OF_KIND[place.kind]:
        made = make_peer(peer, place, "cpu")
        out, grads = run(DIRECTIONS[1], made, make_tensors(place, "cpu"))
        assert out.shape == (1, 2, 32, 8)
        assert all(grad.isfinite().all() for grad in grads)


def test_guards():
    bench = Bench("cpu", Patience(longest=10.0))
    place = Place("sine", 8, 64, 4096)
    forward = DIRECTIONS[0]
    assert bench.why_not_try("SDPA", forward, place) == ""
    old = {**place._replace(length=1024)._asdict(), "direction": forward, "note": "", "dropped": False}
    bench.remember({**old, "peer": "SDPA", "seconds": {"median": 1.0}})
    assert bench.why_not_try("SDPA", forward, place) == "> 10 s"
    bench.remember({**old, "peer": "no positions", "seconds": {"median": 1.0}})
    assert bench.why_not_try("no positions", forward, place) == ""
    bench.remember({**old, "peer": "codes in memory", "seconds": {"median": 0.1}, "peak_bytes": 2**50})
    assert bench.why_not_try("codes in memory", forward, place).startswith("needs ")
    bench.remember({**old, "peer": "SDPA", "note": "> 10 s", "dropped": True})
    assert bench.why_not_try("SDPA", forward, place) == "> 10 s"
    assert max(place.length for place in places("cpu", False)) == 131072


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(spe_speed, "places", lambda device, quick: TINY)
    monkeypatch.setattr(spe_speed, "in_fresh_process", lambda *_, **__: (2**20, 1.0))
    quality = spe_quality.Plan(2, 4, 16, sines=2, taps=4, realizations=(4, 16, 64), draws=24, many=64, few=16)
    monkeypatch.setattr(spe_quality, "plan", lambda quick: quality)
    monkeypatch.setattr(spe_language, "plan", lambda quick, device: LANGUAGE)


def test_it_runs_and_goes_on(tiny, tmp_path, capsys, monkeypatch):
    command = ["spe", "--quick", "--device", "cpu", "--workers", "1", "--seeds", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for words in ("less memory than codes", "falls as R^-0.", "learned absolute - none", "equal noise, float64"):
        assert words in printed
    speed, quality, language = (
        json.loads((tmp_path / f"quick-spe-{part}-cpu.json").read_text("utf-8"))
        for part in ("speed", "quality", "language")
    )
    for part in ("speed", "quality", "language"):
        assert (tmp_path / f"quick-spe-{part}-cpu.png").stat().st_size > 10_000
    assert speed["backend"] == "blockwise"
    assert speed["machine"]["torch"] == torch.__version__
    assert len(speed["rows"]) == len(TINY) * len(DIRECTIONS)
    for row in speed["rows"]:
        assert row["times_faster_than_codes_in_memory"] > 0
        assert row["times_less_memory_than_codes_in_memory"] == 1
    for kind, found in quality["kinds"].items():
        assert found["slope"] == pytest.approx(-0.5, abs=0.1), kind
        for row in found["rows"]:
            assert row["error"] == pytest.approx(row["predicted"], rel=0.4), kind
        assert found["mean_error_over_predicted"] < 2
        assert found["position_kernel_error"] < 1e-5
    assert set(language["kinds"]) == set(KINDS)
    assert all(result["seeds"] == [0, 1] for result in language["kinds"].values())
    assert all(1 < row["last"]["mean"] < 10 for result in language["kinds"].values() for row in result["lengths"])

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(spe_language, "one_model", never)
    assert main([*command, "--part", "language"]) == 0
    assert "8 models, 8 of them finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["spe", "--kinds", "rope"])
    assert "no kind rope" in capsys.readouterr().err


def test_speed_goes_on_after_its_budget(tiny, tmp_path, capsys):
    command = ["spe", "--part", "speed", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*command, "--budget", "-1"]) == 0
    assert "not reached in the budget, the same command goes on: 4" in capsys.readouterr().out
    assert main(command) == 0
    assert not json.loads((tmp_path / "spe-speed-cpu.json").read_text("utf-8"))["not_reached"]


def test_ratios_and_empty_cells():
    base = {**TINY[0]._asdict(), "direction": DIRECTIONS[0], "note": ""}
    one = {"median": 0.5, "runs": 1}
    cells = [
        {**base, "peer": "posattn", "seconds": one, "peak_bytes": 2**20},
        {**base, "peer": "codes in memory", "seconds": {"median": 2.0, "runs": 3}, "peak_bytes": 2**24},
        {**base, "peer": "SDPA", "note": "> 45 s"},
    ]
    (row,) = speed_rows(cells)
    assert row["times_faster_than_codes_in_memory"] == 4
    assert row["times_less_memory_than_codes_in_memory"] == 16
    assert row["microseconds_a_token"] == pytest.approx(0.5e6 / 32)
    text = speed_text(cells)
    assert "500 ms*, 1 MiB" in text
    assert "2.00 s, 16 MiB" in text
    assert "> 45 s" in text


@pytest.mark.parametrize("kind", KINDS)
def test_language_models_start_equal_and_see_no_future(kind):
    model, plain = (spe_language.make_model(name, LANGUAGE, seed=3) for name in (kind, "none"))
    mine = dict(model.named_parameters())
    assert all(torch.equal(mine[name], value) for name, value in plain.named_parameters())
    inputs = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
    changed = inputs.clone()
    changed[:, 30:] = 255 - changed[:, 30:]
    made = []
    for tokens in (inputs, changed):
        torch.manual_seed(5)  # the same noise
        made.append(model(tokens))
    torch.testing.assert_close(made[0][:, :30], made[1][:, :30], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made[0][:, 30:], made[1][:, 30:])


def test_language_differences_are_taken_seed_by_seed():
    def part(kind, seed, bits):
        rows = [{"length": n, "last": bits, "all": bits} for n in (256, 512)]
        return {"kind": kind, "seed": seed, "parameters": 10, "training": {"seconds": 1.0}, "lengths": rows}

    parts = [part("none", 0, 4.0), part("none", 1, 3.0), part("sine", 0, 3.5), part("sine", 1, 2.4)]
    found = gather_language({"recipe": {"length": 256}, "last": 256}, parts)
    difference = found["kinds"]["sine"]["minus_none"][0]
    assert difference["values"] == pytest.approx([-0.5, -0.6])
    assert "SineSPE, gated - none" in language_text(found)
    assert "-0.550 ± 0.071" in language_text(found)


def square(x):
    return x * x


def test_workers():
    calls = [(n,) for n in range(5)]
    for workers in (1, 2):
        assert sorted(each(square, calls, workers)) == [((n,), n * n) for n in range(5)]
