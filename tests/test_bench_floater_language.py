"""`python -m bench floater --part language` at toy size: its models, the warm start, its results."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import floater_language
from bench import floater_language_report as report
from bench.floater_language import Plan, gone_on, half_of, measure, tasks_of, trained
from bench.floater_language_report import gather, line, text
from bench.floater_model import KINDS, Guarded, LanguageModel, Size, attempt, encoder_of, make_model
from bench.machine import describe
from bench.train import Recipe

SIZE = Size(width=16, depth=2, num_heads=2, max_length=512)
RECIPE = Recipe(length=32, batch_size=2, steps=3, warmup=1)
TINY = Plan(SIZE, RECIPE, half_of(RECIPE)._replace(steps=2), (32, 256, 512), 512)
FLOATERS = [name for name, kind in KINDS.items() if kind.delta_t and not kind.goes_on]


def tokens() -> torch.Tensor:
    return torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))


def test_unknown_vectors():
    with pytest.raises(ValueError, match="none, sinusoidal, learned"):
        LanguageModel("rope", SIZE, 0)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.goes_on])
def test_models_start_equal_and_see_no_future(kind):
    model, plain = make_model(kind, SIZE, seed=3), make_model("none", SIZE, seed=3)
    mine = dict(model.named_parameters())
    shared = [name for name, _ in plain.named_parameters() if name in mine]
    assert len(shared) >= len(list(plain.parameters())) - SIZE.depth  # biases of projections have become p(0)
    assert all(torch.equal(mine[name], plain.get_parameter(name)) for name in shared)
    if kind in FLOATERS:  # a flow that is not zero, so that positions are told
        torch.nn.init.normal_(encoder_of(model).dynamics.linear2.weight, std=0.1)
    inputs, changed = tokens(), tokens()
    changed[:, 30:] = 255 - changed[:, 30:]
    for mode in (True, False):
        before, after = (model.train(mode)(x) for x in (inputs, changed))
        torch.testing.assert_close(before[:, :30], after[:, :30], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before[:, 30:], after[:, 30:])
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), before, rtol=1e-4, atol=1e-4)
        differs = not torch.allclose(model(inputs), plain(inputs), atol=1e-3)
    assert differs == (kind != "none")


def test_warm_start_is_the_trained_model():
    base = make_model("sinusoidal", SIZE, 0)
    for layer in base.transformer.layers:
        torch.nn.init.normal_(layer.self_attn.in_proj_bias)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    part = gone_on(TINY, "warm", 0, base, "cpu", None)
    assert part["start"]["difference"] == pytest.approx(0, abs=1e-5)
    assert part["start"]["logits"] < 1e-5 * part["start"]["largest_logit"]
    assert part["training"]["first"] == pytest.approx(part["start"]["base"], abs=1e-5)
    control = gone_on(TINY, "longer", 0, base, "cpu", None)
    assert control["training"]["first"] == pytest.approx(part["start"]["base"], abs=1e-5)  # the same batches
    assert "start" not in control
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("kind", FLOATERS)
def test_floater_learns(kind):
    model = make_model(kind, SIZE, 0)
    encoder = encoder_of(model)
    assert encoder.delta_t == KINDS[kind].delta_t
    assert encoder(8).eq(0).all()  # no positions at first
    before = {name: value.clone() for name, value in model.named_parameters()}
    part = trained(TINY, kind, 0, model, RECIPE, "cpu", None)
    same = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert same == []
    assert 0 < part["solve"]["share"] < 1
    assert part["solve"]["training"]["evaluations"] > 0
    assert all(row["evaluations"] > 0 and row["largest"] > 0 for row in part["solve"]["lengths"])
    assert all(0 < row["last"] < 20 for row in part["lengths"])


def test_what_diverges_is_told():
    model = make_model("floater", SIZE, 0)
    with torch.no_grad():
        encoder_of(model).dynamics.linear2.weight.fill_(1.0)
        encoder_of(model).dynamics.linear2.bias.fill_(1.0)
    recipe = RECIPE._replace(steps=1, learning_rate=0.0, length=2)
    part = trained(TINY._replace(recipe=recipe), "floater", 0, model, recipe, "cpu", None)
    last = part["lengths"][-1]
    assert last["last"] is None
    assert "diverges near position" in last["note"]
    assert "steps" not in part["solve"]["lengths"][-1]
    found = gather(plan_of(TINY), [part])
    assert found["kinds"]["floater"]["lengths"][-1]["without"] == 1
    for shown in (text(found), line(part, 1.0)):
        assert "diverges" in shown
    assert math.isnan(float(Guarded(model, {40: "lost"})(tokens())[0, 0, 0]))


def test_other_errors_are_not_kept_quiet():
    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        attempt(fails)


def plan_of(todo: Plan) -> dict:
    return json.loads(json.dumps(floater_language.whole_plan(todo, describe("cpu"))))


def test_it_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    path, machine = tmp_path / "floater-language-cpu.json", {**describe("cpu"), "torchdiffeq": "1"}
    drawn = {}
    monkeypatch.setattr(report, "plot_trajectories", lambda vectors, file, *_: drawn.update({file.name: vectors.shape}))
    assert measure(path, machine, True, False, 2, ("none", "longer"), 1, TINY) == 0
    assert list(json.loads(path.read_text("utf-8"))["kinds"]) == ["none", "longer"]
    assert measure(path, machine, True, False, 1, workers=1, todo=TINY) == 0
    printed = capsys.readouterr().out
    assert "9 models, 2 of them finished before" in printed
    for words in ("Warm start: loss at step 0", "solve, forward and backward", "FLOATER - sinusoidal", "trained at 32"):
        assert words in printed
    found = json.loads(path.read_text("utf-8"))
    assert set(found) == {
        "machine", "quick", "kinds", "differences", "starts", "solves", "trained", "last", "steps", "seconds",
        "plan", "parts",
    }  # fmt: skip
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["device"] == "cpu"
    assert found["plan"]["torchdiffeq"] == "1"
    assert list(found["kinds"]) == list(KINDS)
    for kind, result in found["kinds"].items():
        assert result["seeds"] == ([0, 1] if kind in ("none", "longer") else [0])
        assert [row["length"] for row in result["lengths"]] == [32, 256, 512]
        assert result["lengths"][0]["without"] == 0
        assert 1 < result["lengths"][0]["last"]["mean"] < 12, kind
    assert {row["kind"] for row in found["starts"]} == {"warm", "warm-slow"}
    assert all(abs(row["difference"]) < 1e-5 for row in found["starts"])
    assert set(found["solves"]) == {name for name, kind in KINDS.items() if kind.delta_t}
    width, extra = SIZE.width, {kind: found["kinds"][kind]["parameters"] for kind in ("none", "learned", "floater")}
    assert extra["learned"] - extra["none"] == SIZE.max_length * width
    assert extra["floater"] - extra["none"] == 2 * width * (width + 2)
    assert drawn == dict.fromkeys((f"{path.stem}-trajectories-{kind}.png" for kind in found["solves"]), (3, 2, 512, 16))
    assert path.with_suffix(".png").stat().st_size > 10_000

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(floater_language, "some_models", never)
    assert measure(path, machine, True, False, 1, workers=1, todo=TINY) == 0
    assert "9 models, 9 of them finished before" in capsys.readouterr().out


@pytest.mark.parametrize("length", [20, 48])
def test_trajectories_are_drawn(tmp_path, length):
    report.plot_trajectories(torch.randn(3, 2, length, 8).cumsum(2), tmp_path / "p.png", "FLOATER", trained=32)
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_interrupted(tmp_path, capsys, monkeypatch):
    path, machine = tmp_path / "floater.json", describe("cpu")

    def stopped(todo, kinds, seed, *_):
        if kinds != ("none",):
            raise KeyboardInterrupt
        rows = [{"length": n, "last": 4.0, "all": 4.0, "note": ""} for n in todo.evaluated]
        return [{"kind": "none", "seed": seed, "parameters": 1, "training": {"seconds": 1.0}, "lengths": rows}]

    monkeypatch.setattr(floater_language, "some_models", stopped)
    assert measure(path, machine, True, False, 1, ("none", "learned"), 1, TINY) == 130
    assert "goes on after the last finished model" in capsys.readouterr().out
    assert measure(path, machine, True, False, 1, ("none",), 1, TINY) == 0
    assert "1 models, 1 of them finished before" in capsys.readouterr().out


def test_kinds_of_one_trained_model_are_one_task():
    assert tasks_of([("none", 0), ("sinusoidal", 0), ("warm", 0), ("longer", 0), ("longer", 1), ("none", 1)]) == [
        (("sinusoidal", "longer", "warm"), 0), (("longer",), 1), (("none",), 0), (("none",), 1),
    ]  # fmt: skip
