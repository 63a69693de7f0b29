"""`python -m bench extrapolate`: the positions, resuming, and what is made of the results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import extrapolate, extrapolate_report
from bench.byte_model import ByteModel, Size
from bench.extrapolate import QUICK, Plan
from bench.positions import POSITIONS, attention_of, chosen, rotary_attention, rotate, sinusoids
from bench.resume import Finished
from bench.train import Recipe, evaluate

ROOT = Path(__file__).resolve().parent.parent
SIZE = Size(width=16, depth=2, num_heads=2, max_length=512, fire_length=16)
TINY = Plan(SIZE._replace(depth=1), Recipe(length=32, batch_size=2, steps=3, warmup=1), (128, 256, 512), 512)


def text(length=48):
    pieces = torch.randint(256, (2, length + 1), generator=torch.Generator().manual_seed(0))
    return pieces[:, :-1], pieces[:, 1:]


@pytest.mark.parametrize("kind", POSITIONS)
def test_every_kind_trains_a_step(kind):
    model = ByteModel(kind, SIZE)
    loss = model.loss(*text())
    loss.backward()
    assert math.isfinite(loss.item())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("second_bias"):  # a constant, which the softmax takes away
            assert parameter.grad.abs().sum() > 0, name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.loss(*text()).item() < loss.item()


@pytest.mark.parametrize("kind", POSITIONS)
def test_no_kind_sees_the_future(kind):
    model = ByteModel(kind, SIZE).eval()
    inputs = text()[0]
    changed = inputs.clone()
    changed[:, 30:] = 255 - changed[:, 30:]
    torch.testing.assert_close(model(inputs)[:, :30], model(changed)[:, :30])
    assert not torch.allclose(model(inputs)[:, 30:], model(changed)[:, 30:])


def test_all_kinds_start_from_the_same_weights():
    models = {kind: dict(ByteModel(kind, SIZE, seed=5).named_parameters()) for kind in POSITIONS}
    for kind, parameters in models.items():
        for name, parameter in models["none"].items():
            assert torch.equal(parameters[name], parameter), (kind, name)
        # What DAPE mixes starts as its base does.
        for name, parameter in models.get(POSITIONS[kind].mixes, {}).items():
            assert torch.equal(parameters[name.replace(".bias.", ".bias.base.")], parameter), (kind, name)


def test_dape_has_a_module_and_a_base_of_its_own_in_each_layer():
    first, second = (block.bias for block in ByteModel("dape-fire", SIZE).blocks)
    assert first is not second
    assert first.base is not second.base
    assert first.base.negative_slope == 0.01
    assert ByteModel("fire", SIZE).blocks[0].bias.negative_slope == 0.0


def test_rope_depends_on_the_offset_alone():
    q, k = torch.randn(2, 3, 20, 8, dtype=torch.float64).unbind()
    near = rotate(q) @ rotate(k).transpose(-2, -1)
    far = rotate(q, start=1000) @ rotate(k, start=1000).transpose(-2, -1)
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(rotate(q).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotate(q)[:, :1], q[:, :1])
    # By the definition: complex numbers x[d] + i x[d + D/2], turned by position * 10000^(-2 d / D).
    turns = torch.arange(20.0, dtype=torch.float64)[:, None] * 10000 ** (-torch.arange(4.0) / 4).double()
    turned = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones_like(turns), turns)
    torch.testing.assert_close(rotate(q), torch.cat([turned.real, turned.imag], dim=-1), rtol=1e-6, atol=1e-6)


def test_attention_of_an_encoder_sees_both_sides():
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    score = rotate(q) @ rotate(k).transpose(-2, -1) / 2
    torch.testing.assert_close(rotary_attention(q, k, v, None, causal=False), score.softmax(-1) @ v)
    assert not torch.allclose(attention_of("none", causal=False)(q, k, v, None)[:, :, 0], v[:, :, 0])


def test_sinusoids_have_mean_square_one():
    assert sinusoids(100, 32, torch.device("cpu")).square().mean().item() == pytest.approx(1, rel=1e-5)


def test_chosen_names():
    assert chosen("KERPLE, alibi", ()) == ("alibi", "kerple")
    assert chosen(None, QUICK) == QUICK
    with pytest.raises(ValueError, match=r"no method alibli; there are none, absolute, "):
        chosen("alibli", ())


def test_evaluation_tells_each_length():
    told = []
    evaluate(ByteModel("none", SIZE), torch.arange(513) % 256, (256, 512), "cpu", lambda *what: told.append(what))
    assert [done for done, _ in told] == [1, 2]


@pytest.mark.parametrize("kind", ["absolute", "rope", "kerple", "dape-kerple"])
def test_bfloat16_as_on_a_gpu(kind):
    corpus = extrapolate.Corpus(torch.arange(999).byte(), torch.arange(513).byte(), 1, "")
    full, half = (extrapolate.one_model(TINY._replace(half=h), kind, 0, corpus, "cpu") for h in (False, True))
    for one, other in zip(full["lengths"], half["lengths"]):
        assert one["all"] == pytest.approx(other["all"], abs=0.1)


def test_finished_parts_survive(tmp_path):
    path, plan = tmp_path / "job.json", {"steps": 3, "lengths": (1, 2)}
    first = Finished(path, plan)
    first.add("a", {"value": 1.25, "rows": [1, 2]})
    second = Finished(path, plan)  # another process, or this one after an interruption
    assert "a" in second
    assert second.parts["a"] == {"value": 1.25, "rows": [1, 2]}
    second.add("b", {"value": 2})
    first.add("c", {"value": 3})
    assert set(first.parts) == {"a", "b", "c"}, "takes in what the other has written"
    assert set(Finished(path, {**plan, "steps": 4}).parts) == set(), "another plan"
    first.finish({"seconds": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["job.json"]
    assert set(Finished(path, plan).parts) == {"a", "b", "c"}
    assert json.loads(path.read_text())["seconds"] == 1
    assert not Finished(path, plan, fresh=True).parts


def test_a_half_written_file_counts_for_nothing(tmp_path):
    first = Finished(tmp_path / "job.json", {})
    first.add("a", {})
    first.work.write_text(first.work.read_text()[:20])
    assert not Finished(tmp_path / "job.json", {}).parts


def test_the_job_resumes(tmp_path, monkeypatch, capsys):
    made, corpus = [], extrapolate.read_corpus()
    monkeypatch.setattr(extrapolate, "read_corpus", lambda: corpus)  # once is enough
    one_model = extrapolate.one_model

    def interrupted(todo, kind, seed, corpus, device):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((kind, seed))
        return one_model(todo, kind, seed, corpus, device)

    monkeypatch.setattr(extrapolate, "one_model", interrupted)
    methods = ("absolute", "alibi", "dape-alibi")
    assert extrapolate.run(TINY, methods, range(1), "cpu", tmp_path) == 130
    assert made == [("absolute", 0), ("alibi", 0)]
    assert not (tmp_path / "extrapolate-cpu.json").exists()
    made.clear()
    assert extrapolate.run(TINY, methods, range(1), "cpu", tmp_path) == 0
    assert made == [("dape-alibi", 0)]
    assert {path.name for path in tmp_path.iterdir()} == {"extrapolate-cpu.json", "extrapolate-cpu.png"}

    results = json.loads((tmp_path / "extrapolate-cpu.json").read_text())
    assert set(results["methods"]) == set(methods)
    assert results["machine"]["torch"] == torch.__version__
    assert results["plan"]["recipe"] == {k: v for k, v in TINY.recipe._asdict().items() if k != "seed"}
    difference = results["dape_minus_base"]["dape-alibi"]["lengths"][-1]["last"]["mean"]
    mixed, base = (results["methods"][kind]["lengths"][-1]["last"]["mean"] for kind in ("dape-alibi", "alibi"))
    assert difference == pytest.approx(mixed - base)
    printed = capsys.readouterr().out
    assert "3 models, 2 of them finished before" in printed
    assert "beyond 32 were never trained" in printed

    # A fourth method of the same plan joins the three; a fresh start forgets them.
    made.clear()
    assert extrapolate.run(TINY, ("rope",), range(1), "cpu", tmp_path) == 0
    assert len(json.loads((tmp_path / "extrapolate-cpu.json").read_text())["methods"]) == 4
    made.clear()
    assert extrapolate.run(TINY, ("rope",), range(1), "cpu", tmp_path, fresh=True) == 0
    assert made == [("rope", 0)]
    assert len(json.loads((tmp_path / "extrapolate-cpu.json").read_text())["methods"]) == 1


def results_of(values):
    """What `gather` gets: per kind and seed, the bits at 128 and at 256."""
    plan = {"lengths": [128, 256], "recipe": {"length": 128}, "last": 256}
    parts = []
    for kind, seeds in values.items():
        for seed, bits in enumerate(seeds):
            rows = [{"length": n, "last": b, "all": b + 1} for n, b in zip(plan["lengths"], bits)]
            training = {"seconds": 1.0}
            parts.append({"kind": kind, "seed": seed, "parameters": 1234, "training": training, "lengths": rows})
    return extrapolate_report.gather(plan, parts)


def test_tables_and_words():
    found = results_of(
        {
            "alibi": [(3, 3), (3.2, 3.2)],
            "dape-alibi": [(2.9, 2.8), (3.1, 3.1)],
            "kerple": [(3, 4), (3, 4)],
            "dape-kerple": [(3, 4.5), (3, 4.4)],
            "fire": [(3, 2), (3, 2)],
            "dape-fire": [(3, 2.1), (3, 1.9)],
        }
    )
    table = extrapolate_report.table(found)
    assert "| ALiBi       |      1,234 | 3.100 ± 0.141 | 3.100 ± 0.141 |" in table
    assert "| DAPE-ALiBi - ALiBi   | -0.100 ± 0.000 | -0.150 ± 0.071 |" in extrapolate_report.pairs_table(found)
    assert "8.57" in extrapolate_report.table(found, perplexity=True)
    assert extrapolate_report.words(found) == [
        "DAPE-ALiBi beats ALiBi at 256: -0.150 bits per byte (-0.200, -0.100 by seed).",
        "DAPE-KERPLE does not beat KERPLE at 256, it is worse: +0.450 bits per byte (+0.500, +0.400 by seed).",
        "DAPE-FIRE and FIRE are not clearly apart at 256: +0.000 bits per byte (+0.100, -0.100 by seed).",
    ]


def test_one_seed_has_no_spread_and_says_so():
    found = results_of({"alibi": [(3, 3)], "dape-alibi": [(2.9, 2.8)]})
    assert "±" not in extrapolate_report.table(found)
    assert extrapolate_report.words(found) == [
        "DAPE-ALiBi beats ALiBi at 256, by one seed: -0.200 bits per byte."
    ]


def test_seeds_of_a_pair_are_matched():
    found = results_of({"alibi": [(3, 3), (9, 9)], "dape-alibi": [(2, 2)]})
    assert found["dape_minus_base"]["dape-alibi"]["seeds"] == [0]
    assert found["dape_minus_base"]["dape-alibi"]["lengths"][0]["last"]["values"] == [-1]


def test_plot(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    values = {kind: [(3 + n / 10, 4 + n / 10)] for n, kind in enumerate(POSITIONS)}
    machine = {"device_name": "a machine", "torch": "2"}
    extrapolate_report.plot(results_of(values), machine, tmp_path / "plot.png")
    pixels = image.imread(tmp_path / "plot.png")
    assert min(pixels.shape[:2]) > 400
    assert pixels[..., :3].std() > 0.05, "blank"


def test_plans():
    for quick, device in ((True, "cpu"), (False, "cpu"), (True, "cuda"), (False, "cuda")):
        todo = extrapolate.plan(quick, device)
        assert todo.recipe.length == (128 if device == "cpu" else 512)
        assert todo.evaluated == (128, 256, 512, 1024, 2048, 4096, 8192)
        assert todo.held_out % 8192 == 0
        assert todo.size.max_length >= 8192
        assert todo.half == (device == "cuda")


def test_help_lists_the_jobs():
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert all(f"python -m bench {job}" in done.stdout for job in ("extrapolate", "chomsky", "gate", "kernels"))
