"""`python -m bench listops`: its expressions against an evaluator of its own, its batches, and the job at toy size."""

from __future__ import annotations

import json
import random
from statistics import median

import pytest
import torch

from bench import listops
from bench.__main__ import main
from bench.listops import Plan, batches, plan, score
from bench.listops_data import (
    CLOSE,
    OPERATOR,
    PAD,
    START,
    TOKENS,
    Rules,
    evaluate,
    make_one,
    make_splits,
    text_of,
)
from bench.listops_model import KINDS, Encoder, Shape

SMALL = Rules(shorter=8, longer=40)
SHAPE = Shape(16, 2, 2, 32, tied=False, dropout=0.0, longest=40, realizations=8, sines=2, taps=4)
TINY = Plan(SMALL, SHAPE, 60, 20, 30, batch_size=4, steps=3, warmup=1)
OF_VALUES = {"MIN": min, "MAX": max, "MED": lambda v: int(median(v)), "SM": lambda v: sum(v) % 10}


def value_of(text):
    """What an expression is worth, read from its text alone."""
    words = text.split()

    def read(at):
        if not words[at].startswith("["):
            return int(words[at]), at + 1
        operator, values, at = words[at][1:], [], at + 1
        while words[at] != "]":
            value, at = read(at)
            values.append(value)
        return OF_VALUES[operator](values), at + 1

    value, end = read(0)
    assert end == len(words), "something is behind the expression"
    return value


def depth_of(text):
    depth = deepest = 0
    for word in text.split():
        depth += word.startswith("[")
        deepest = max(deepest, depth)
        depth -= word == "]"
    assert depth == 0
    return deepest


def test_the_independent_evaluator():
    assert value_of("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert value_of("[SM [MED 1 4 4 8 ] [MED 3 8 ] 7 ]") == (4 + 5 + 7) % 10
    assert [evaluate("MED", values) for values in ([3], [1, 2], [9, 0, 5], [4, 1, 8, 4])] == [3, 1, 5, 4]


@pytest.mark.parametrize("rules", [SMALL, Rules(), Rules(20, 90, depth=4, arguments=3)], ids=str)
def test_expressions_are_worth_what_they_say(rules):
    source = random.Random(5)
    for _ in range(10 if rules.longer == 2000 else 200):
        tokens, value = make_one(rules, source)
        text = text_of(torch.tensor(tokens))
        assert value == value_of(text)
        assert rules.shorter < len(tokens) < rules.longer
        assert len(text.split()) == len(tokens)
        assert 1 <= depth_of(text) < rules.depth
        assert text.startswith("[") and text.endswith("]")
        assert text.count("[") == text.count("]")


def test_numbers_of_arguments_and_share_of_operators():
    source, rules = random.Random(1), Rules(0, 10**6, depth=3)
    trees = [make_one(rules, source)[0] for _ in range(4000)]
    # At the third level only digits are left; the root is an operator a quarter of the time.
    operators = [tree for tree in trees if len(tree) > 1]
    assert len(operators) / len(trees) == pytest.approx(0.25, abs=0.03)
    flat = [len(tree) - 2 for tree in operators if tree.count(CLOSE) == 1]
    assert min(flat) == 2
    assert max(flat) == 10
    shares = [sum(tree[0] == OPERATOR + n for tree in operators) / len(operators) for n in range(4)]
    assert shares == pytest.approx([0.25] * 4, abs=0.05)


def test_splits_depend_on_the_seed_alone_and_share_nothing():
    counts = {"test": 300, "train": 700}
    first, again, other = (make_splits(SMALL, counts, seed) for seed in (0, 0, 1))
    assert torch.equal(first["train"].tokens, again["train"].tokens)
    assert not torch.equal(first["train"].tokens[:500], other["train"].tokens[:500])
    texts = {name: [bytes(split.one(i).tolist()) for i in range(len(split))] for name, split in first.items()}
    assert len(set(texts["test"])) == len(first["test"]) == 300
    assert not set(texts["test"]) & set(texts["train"])
    assert len(set(texts["train"])) == len(first["train"]) > 690
    assert first["train"].tokens.max() < TOKENS


def test_every_value_occurs_and_none_is_most_of_them():
    values = make_splits(SMALL, {"train": 1000})["train"].values
    shares = torch.bincount(values, minlength=10) / len(values)
    assert shares.min() > 0.03
    assert shares.max() < 0.3


def test_batches_hold_every_expression_once_an_epoch():
    data = make_splits(SMALL, {"train": 50})["train"]
    source = batches(data, 8, seed=3)
    seen = []
    for _ in range(7):
        tokens, values = next(source)
        assert tokens[:, 0].eq(START).all()
        assert (tokens != PAD).sum(1).max() == tokens.shape[1]
        for row, value in zip(tokens, values):
            text = text_of(row[row != PAD])
            assert value_of(text) == value
            seen.append(text)
    assert sorted(seen) == sorted(text_of(data.one(i)) for i in range(50))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_kind_learns_and_ignores_padding(kind, pooling):
    data = make_splits(SMALL, {"train": 6})["train"]
    tokens, values = data.batch(torch.arange(6))
    model = Encoder(kind, SHAPE._replace(pooling=pooling), seed=0)
    torch.nn.functional.cross_entropy(model(tokens), values).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    torch.manual_seed(1)
    short = model(tokens)
    torch.manual_seed(1)
    longer = model(torch.nn.functional.pad(tokens, (0, 1), value=PAD)[:, : 1 + SHAPE.longest])
    if kind != "conv":  # whose noise is a function of a seed and the place; all draw the same here
        torch.testing.assert_close(short, longer, rtol=1e-4, atol=1e-4)


def test_kinds_start_from_the_same_weights():
    models = {kind: dict(Encoder(kind, SHAPE, seed=4).named_parameters()) for kind in KINDS}
    for kind, parameters in models.items():
        for name, parameter in models["none"].items():
            assert torch.equal(parameters[name], parameter), (kind, name)
    assert "positions" in models["absolute"]
    assert any(".spe." in name for name in models["sine"])


def test_score_and_rate():
    found = score(20, 100)
    assert (found["low"], found["high"]) == pytest.approx((0.1334, 0.2888), abs=1e-3)
    assert score(0, 10)["low"] == pytest.approx(0)
    full = plan("full", "cpu")
    assert (full.rules, full.steps, full.batch_size) == (Rules(), 10000, 8)
    assert full.rate_at(0) == pytest.approx(0.0125 / 1000**1.5)
    assert full.rate_at(999) == pytest.approx(0.0125 / 1000**0.5)
    assert full.rate_at(3999) == pytest.approx(0.0125 / 4000**0.5)


def test_it_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(listops, "plan", lambda size, device: TINY)
    command = ["listops", "--quick", "--device", "cpu", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for part in ("% = 9", "learned absolute", "SineSPE, gated", "brackets kept", "always ", "binomial 95 %"):
        assert part in printed
    found = json.loads((tmp_path / "quick-listops-cpu.json").read_text("utf-8"))
    assert found["machine"]["torch"] == torch.__version__
    assert set(found["kinds"]) == {"absolute", "sine"}
    assert sum(found["data"]["train"]["share_of_each_value"]) == pytest.approx(1)
    assert (tmp_path / "quick-listops-cpu.png").stat().st_size > 10_000

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(listops, "one_model", never)
    assert main(command) == 0
    assert "2 models, 2 of them finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["listops", "--kinds", "rope"])
    assert "no kind rope" in capsys.readouterr().err
