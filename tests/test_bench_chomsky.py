"""The tasks of `python -m bench chomsky` against definitions written another way, and the job at toy size."""

from __future__ import annotations

import json

import pytest
import torch

from bench import chomsky
from bench.byte_model import Size, Transformer
from bench.chomsky_tasks import TASKS
from bench.positions import attention_of
from bench.resume import Finished


def parity(x):
    return [str(x).count("1") % 2]


def even_pairs(x):
    text = "".join("ab"[token] for token in x)
    return [sum(text[i : i + 2] in ("ab", "ba") for i in range(len(text))) % 2 == 0]


def cycle_navigation(x):
    places, at = [0, 1, 2, 3, 4], 0
    for move in x:
        at = {0: at, 1: (at + 1) % 5, 2: at - 1 if at else 4}[move]
    return [places[at]]


def modular_arithmetic(x):
    assert len(x) % 2
    return [eval("".join("01234+-*"[token] for token in x)) % 5]


def missing_duplicate(x):
    if len(x) % 2:
        assert x[-1] == 3, "a blank"
        x = x[:-1]
    assert x.count(2) == 1
    hole, half = x.index(2), len(x) // 2
    fitting = [token for token in (0, 1) if (y := [*x[:hole], token, *x[hole + 1 :]])[:half] == y[half:]]
    assert len(fitting) == 1
    return fitting


def odds_first(x):
    return [t for n, t in enumerate(x, 1) if n % 2] + [t for n, t in enumerate(x, 1) if not n % 2]


def bucket_sort(x):
    return [token for token in range(5) for other in x if other == token]


ANSWERS = {
    "even-pairs": even_pairs,
    "modular-arithmetic": modular_arithmetic,
    "parity": parity,
    "cycle-navigation": cycle_navigation,
    "reverse": lambda x: [x[-1 - i] for i in range(len(x))],
    "missing-duplicate": missing_duplicate,
    "duplicate": lambda x: x * 2,
    "odds-first": odds_first,
    "bucket-sort": bucket_sort,
}


@pytest.mark.parametrize("name", TASKS)
def test_answers(name):
    task, generator = TASKS[name], torch.Generator().manual_seed(1)
    inputs, outputs = set(), set()
    for length in [*range(1, 12), 40, 41]:
        x, y = task.make(16, length, generator)
        assert x.dtype == y.dtype == torch.int64
        assert x.shape[0] == y.shape[0] == 16
        assert abs(x.shape[1] - length) <= 1
        for string, right in zip(x.tolist(), y.tolist()):
            assert right == ANSWERS[name](string), string
            inputs |= set(string)
            outputs |= set(right)
    assert inputs == set(range(task.inputs))
    assert outputs == set(range(task.outputs))


@pytest.mark.parametrize("name", TASKS)
def test_strings_depend_on_the_generator_alone(name):
    first, again, other = (TASKS[name].make(8, 20, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


TINY = chomsky.Plan(Size(width=16, depth=1, num_heads=2, fire_length=4), 4, 3, longest=5, tested=(6, 9), samples=4)


def test_the_answer_is_read_at_the_placeholders():
    task = TASKS["duplicate"]
    model = Transformer("kerple", TINY.size, 0, attention_of("kerple", causal=False), task.inputs + 1, task.outputs)
    x, y = task.make(3, 5, torch.Generator().manual_seed(0))
    logits = chomsky.answer(model, task, x, y)
    assert logits.shape == (3, 10, 2)
    # Not causal: what the first placeholder says depends on all of the string, the last token included.
    changed = x.clone()
    changed[:, -1] = 1 - changed[:, -1]
    assert not torch.allclose(chomsky.answer(model, task, changed, y)[:, 0], logits[:, 0])


def test_an_easy_task_is_learned():
    todo = TINY._replace(steps=150, batch_size=32, size=TINY.size._replace(width=32), learning_rate=3e-3)
    assert chomsky.one_model(todo, "bucket-sort", "alibi", 0, "cpu")["trained_accuracy"] > 0.5


def test_the_job_resumes_and_reports(tmp_path, monkeypatch, capsys):
    made = []
    one_model = chomsky.one_model

    def interrupted(todo, name, kind, seed, device):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((name, kind, seed))
        return one_model(todo, name, kind, seed, device)

    monkeypatch.setattr(chomsky, "one_model", interrupted)
    arguments = (TINY, ("parity", "reverse"), ("none", "alibi", "dape-alibi"), range(1), "cpu", tmp_path)
    assert chomsky.run(*arguments) == 130
    assert not (tmp_path / "chomsky-cpu.json").exists()
    made.clear()
    assert chomsky.run(*arguments) == 0
    assert made == [("reverse", kind, 0) for kind in ("none", "alibi", "dape-alibi")]
    assert [path.name for path in tmp_path.iterdir()] == ["chomsky-cpu.json"]

    results = json.loads((tmp_path / "chomsky-cpu.json").read_text())
    assert set(results["tasks"]) == {"parity", "reverse"}
    for cells in results["tasks"].values():
        assert all(0 <= cell["score"]["mean"] <= 1 for cell in cells.values())
    assert len(Finished(tmp_path / "chomsky-cpu.json", results["plan"]).parts) == 6
    printed = capsys.readouterr().out
    assert "| parity check" in printed
    assert "DAPE-ALiBi is above ALiBi in" in printed


def test_quick_and_default_plans():
    assert chomsky.plan(False, "cuda").batch_size == 128
    for quick, device in ((False, "cuda"), (False, "cpu"), (True, "cpu")):
        todo = chomsky.plan(quick, device)
        assert min(todo.tested) == todo.longest + 1
        assert 3 * max(todo.tested) <= todo.size.max_length
    assert max(chomsky.plan(False, "cpu").tested) == 500


def test_unknown_names_are_refused(capsys):
    for option in ("--tasks", "--methods"):
        with pytest.raises(SystemExit):
            chomsky.main([option, "nothing"])
        assert "nothing; there are" in capsys.readouterr().err
