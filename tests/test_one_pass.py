"""dQ, dK, dV and a table's gradient in one pass over the tiles, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from test_kernels import CASES, DEVICE, Case, by_cause, computed, error, expected, problem, tolerance

import posattn
from posattn.kernels import configs, launch

IN_ONE_PASS = [
    "plain", "plain causal", "plain, negative scale", "table", "table causal, batch", "table window",
    "table GQA padding, d 40, dv 24", "table MQA, d 80", "table, one query", "table, one key", "table, keys far ahead",
    "table, nothing visible", "table, half precision", "slopes, long keys", "one-sided slopes",
]  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions of the kernels that run."""
    monkeypatch.setenv("POSATTN_BACKWARD", "once")
    run, seen = configs.run, []
    monkeypatch.setattr(
        configs, "run", lambda direction, *rest, **more: (seen.append(direction), run(direction, *rest, **more))
    )
    return seen


@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_every_gradient(name: str, passes: list[str]) -> None:
    case = CASES[name]
    p = problem(case)
    dlse = torch.randn(p["q"].shape[:3], device=DEVICE) if case.lse_grad else None
    correct, actual = expected(case, p, dlse), computed(case, p, dlse)
    assert passes == ["forward", "rows", "once"]
    for key, value in correct.items():
        assert actual[key].shape == value.shape, key
        assert error(actual[key], value) < tolerance(case.dtype), key


@pytest.mark.parametrize("tile", [(64, 128), (32, 128), (64, 64)])
def test_tiles_of_the_shipped_sizes(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], passes: list[str]) -> None:
    pick = configs.pick
    config = configs.Config(*tile, 4, 1)
    monkeypatch.setattr(configs, "pick", lambda chip, d, *rest: config if d == "once" else pick(chip, d, *rest))
    case = Case("table", queries=150, keys=190, right=0, heads=1, key_heads=1)
    p = problem(case)
    correct, actual = expected(case, p, None), computed(case, p, None)
    assert "once" in passes
    for key, value in correct.items():
        assert error(actual[key], value) < tolerance(case.dtype), key


def test_support_without_tails(passes: list[str]) -> None:
    """As of TISA: outside of the support nothing wants a gradient."""
    case = CASES["support, window, padding"]
    p = problem(case)
    out, lse = launch.forward(p["q"], p["k"], p["v"], **p["told"])
    made = launch.backward(
        p["do"], None, p["q"], p["k"], p["v"], out, lse, **p["told"], tails_need_grad=False, need_q=True, need_kv=True,
        need_table=True, deterministic=False,
    )  # fmt: skip
    assert "once" in passes
    correct = expected(case, p, None)
    for key, got in zip(("dq", "dk", "dv"), made):
        assert error(got, correct[key]) < tolerance(case.dtype), key
    start = case.queries - 1 - p["shift"]  # of offset 0
    inside = slice(start + case.support[0], start + case.support[1] + 1)
    assert error(made[3][:, inside], correct["dtable"][:, inside]) < tolerance(case.dtype)


@pytest.mark.parametrize("why", ["in order", "tails", "a softcap", "dq alone", "packed", "off"])
def test_where_two_passes_stay(why: str, passes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "off":
        monkeypatch.delenv("POSATTN_BACKWARD")
    if why == "packed":
        rows = torch.randn(3, 40, 2, 16, device=DEVICE).requires_grad_()
        cu = torch.tensor([0, 15, 40], dtype=torch.int32, device=DEVICE)
        posattn.attention_varlen(*rows, cu, cu, 25, 25, backend="triton").sum().backward()
    else:
        name = {"tails": "support", "a softcap": "plain softcap"}.get(why, "table")
        p = problem(CASES[name])
        asked = dict(deterministic=True) if why == "in order" else dict(need_kv=False) if why == "dq alone" else {}
        correct, actual = expected(CASES[name], p, None), computed(CASES[name], p, None, **asked)
        got, value = actual["dq"], correct["dq"]
        assert error(got, value) < tolerance(torch.float32)
        if why == "tails":
            got, value = (by_cause(CASES[name], x["dtable"], p["shift"]) for x in (actual, correct))
            assert error(got, value) < tolerance(torch.float32)
    assert "rows" in passes and "once" not in passes


def test_dropout_and_skipping(passes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same dropped pairs, and the same tiles, as two passes."""
    bias = posattn.ALiBi(2, learnable=True).to(DEVICE)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 150, 16, device=DEVICE))
    grads = []
    for way in ("once", "twice"):
        monkeypatch.setenv("POSATTN_BACKWARD", way)
        torch.manual_seed(3)
        out = posattn.attention(q, k, v, bias, is_causal=True, dropout_p=0.3, skip_negligible=True, backend="triton")
        grads.append(torch.autograd.grad(out.square().sum(), [q, k, v, bias.slope]))
    assert passes.count("once") == 1
    for once, twice in zip(*grads):
        assert error(once, twice) < 1e-5


@pytest.mark.parametrize("way", ["once", "twice"])
@pytest.mark.parametrize("searched", ["rows", "cols", "once"])
def test_a_search_changes_nothing(searched: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As POSATTN_AUTOTUNE=1 does: several launches, then a reset if there is one, then the launch that counts."""
    monkeypatch.setenv("POSATTN_BACKWARD", way)
    run, seen = configs.run, []

    def search(direction, q, width, rule, length, launch, reset, *more):
        seen.append(direction)
        if direction == searched:
            launch(configs.pick("interpreter", direction, 32, width))
            if reset is not None:
                reset()
        run(direction, q, width, rule, length, launch, reset, *more)

    monkeypatch.setattr(configs, "run", search)
    case = CASES["table causal, batch"]
    p = problem(case)
    correct, actual = expected(case, p, None), computed(case, p, None)
    assert seen == ["forward", "rows", "once" if way == "once" else "cols"]
    for key, value in correct.items():
        assert error(actual[key], value) < tolerance(case.dtype), key
