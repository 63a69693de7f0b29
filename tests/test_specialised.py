"""Attention by tensor descriptors: its algebra in the interpreter, and which calls it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import attention_oracle
from specialised_cases import HALF, INTERPRETED, NAN, called, expected, row

pytest.importorskip("triton")
from test_kernels import Case, computed, error, problem
from test_kernels import expected as gradients

from posattn.kernels import configs, launch, schedules
from posattn.kernels.descriptors import Described, rows_of
from posattn.kernels.toeplitz import prepare


@pytest.fixture
def chosen(monkeypatch):
    """POSATTN_SCHEDULE=specialised, and nothing judged yet."""
    monkeypatch.setenv("POSATTN_SCHEDULE", "specialised")
    monkeypatch.setattr(schedules, "_verdicts", {})
    return monkeypatch


# ------------------------------------------------------------------------------------------------------- the algebra

CASES = {
    "table causal": Case("table", right=0, head_dim=64),
    "table, all keys, other length": Case("table", queries=53, keys=64, head_dim=64),
    "table window": Case("table", left=20, right=3, queries=70, keys=96, head_dim=64),
    "rows that see nothing": Case("table", left=30, right=0, queries=95, keys=33, head_dim=64),
    "long keys, GQA": Case("table", batch=2, heads=4, key_heads=2, queries=65, keys=127, right=0, head_dim=64),
    "support": Case("table", support=(-20, -3), right=0, head_dim=64),
    "far keys": Case("table", shift=-37, left=50, right=0, keys=80, head_dim=64),
    "nothing visible": Case("table", shift=200, left=3, right=0, head_dim=64),
    "no bias": Case(keys=80, head_dim=64),
    "no bias causal, d 128": Case(right=0, head_dim=128, queries=40, keys=40),
    "no bias, negative scale": Case(scale=-0.3, queries=33, keys=48, head_dim=64),
    "slopes, d 256": Case("slopes", queries=33, keys=48, head_dim=256),
    "slopes window": Case("slopes", left=20, right=7, queries=33, keys=96, head_dim=64),
    "one-sided slopes": Case("one-sided slopes", batch=2, right=0, head_dim=64),
    "one query": Case("table", queries=1, keys=63, right=0, head_dim=64),
}


@INTERPRETED
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str) -> None:
    case = CASES[name]
    call, p = called(case)
    assert called(case._replace(dtype=torch.float16))[0].serves(row("specialised"))
    for schedule in ("specialised", "persistent"):
        out, lse = (torch.full_like(x, NAN) for x in call.outputs)
        call.launch(row(schedule), out, lse)
        for mine, right in zip((out, lse), expected(case, p)):
            assert error(mine, right) < 4e-6, schedule


@INTERPRETED
def test_tiles_of_the_shipped_size() -> None:
    case = Case("table", batch=1, queries=200, keys=200, right=0, head_dim=64)
    call, p = called(case)
    call.launch(row("specialised", 128, 64), *call.outputs)
    for mine, right in zip(call.outputs, expected(case, p)):
        assert error(mine, right) < 4e-6


@INTERPRETED
def test_sinks() -> None:
    case = Case("table", left=30, right=0, queries=50, keys=33, head_dim=64)
    sinks = torch.tensor([0.7, -2.0])
    call, p = called(case, sinks)
    call.launch(row("persistent"), *call.outputs)
    out, lse = expected(case, p)
    joined = torch.logaddexp(lse, sinks.double()[None, :, None])
    assert error(call.outputs[1], joined) < 4e-6
    assert error(call.outputs[0], out * (lse - joined).exp()[..., None]) < 4e-6


@INTERPRETED
@pytest.mark.parametrize("schedule", ["specialised", "persistent"])
def test_near_keys_alone_are_read(schedule: str) -> None:
    """Rows 0 to 31 read keys 16 to 31, the others 16 to 63: the rest of K and V is NaN, and nothing shows it."""
    case = Case("table", head_dim=64, queries=70, keys=80)
    ranges = torch.tensor([[16, 32], [17, 32], [20, 50], [40, 48], [21, 49]], dtype=torch.int32)
    call, p = called(case, near=ranges.expand(1, 2, -1, -1).contiguous())
    right = torch.full((1, 2, 70, 64), NAN, dtype=torch.float64), torch.full((1, 2, 70), NAN, dtype=torch.float64)
    bias = p["bias"]
    for rows, keys in ((slice(0, 32), slice(16, 32)), (slice(32, 70), slice(16, 64))):
        dense = bias[:, rows, keys]
        made = attention_oracle(p["q"][:, :, rows], *(p[n][:, :, keys] for n in "kv"), dense, scale=p["told"]["scale"])
        for whole, part in zip(right, made):
            whole[:, :, rows] = part.detach()
    for x in (p["k"], p["v"]):
        x[:, :, :16], x[:, :, 64:] = NAN, NAN
    call.launch(row(schedule), *call.outputs)
    assert error(call.outputs[0], right[0]) < 4e-6
    assert error(call.outputs[1], right[1]) < 4e-6


@INTERPRETED
@pytest.mark.parametrize("layout", ["transposed", "fused", "expanded batch"])
def test_layouts(layout: str) -> None:
    case = Case("table", batch=2, heads=2, key_heads=2, right=0, queries=40, keys=40, head_dim=64)
    p = problem(case)
    moved = {n: p[n] for n in "qkv"}
    if layout == "transposed":
        moved = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in moved.items()}
    elif layout == "fused":
        fused = torch.stack([x.transpose(1, 2) for x in moved.values()], 2)  # [B, L, 3, H, D]
        moved = {n: fused[:, :, m].transpose(1, 2) for m, n in enumerate("qkv")}
    else:
        moved = {n: x[:1].expand_as(x) for n, x in moved.items()}
    call, p = called(case, **moved)
    if layout == "expanded batch":
        assert not call.serves(row("specialised"))
        return
    assert rows_of(moved["q"]) is not None
    call.launch(row("specialised"), *call.outputs)
    for mine, right in zip(call.outputs, expected(case, p)):
        assert error(mine, right) < 4e-6


BACKWARD = {
    "table causal": Case("table", right=0, head_dim=64),
    "table window, lengths of no tile": Case("table", left=20, right=3, queries=70, keys=90, head_dim=64),
    "rows that see nothing": Case("table", left=30, right=0, queries=95, keys=33, head_dim=64),
    "groups of heads": Case("table", batch=2, heads=4, key_heads=2, queries=33, keys=50, right=0, head_dim=64),
    "no bias": Case(queries=33, keys=41, head_dim=64, scale=-0.3),
    "slopes, d 128": Case("one-sided slopes", right=0, head_dim=128, queries=40, keys=40),
}


@INTERPRETED
@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_of_keys_and_values(chosen, name: str) -> None:
    case = BACKWARD[name]
    # fp32, which is not served: the algebra shows to more digits.
    chosen.setattr(Described, "takes", lambda self, *tensors: True)
    chosen.setattr(schedules, "differs", lambda made, plain: "")
    p = problem(case)
    dlse = torch.randn(p["q"].shape[:3])
    right = gradients(case, p, dlse)
    for schedule in ("plain", "specialised"):
        made = computed(case, p, dlse)
        assert configs.ran["cols"].schedule == schedule
        for key in ("dk", "dv"):
            assert error(made[key], right[key]) < 4e-6, (schedule, key)


@INTERPRETED
def test_gradients_of_near_rows_alone(chosen) -> None:
    """Slopes so steep that most pairs are left out: the same as without, in both schedules."""
    case = Case("one-sided slopes", right=0, head_dim=64, queries=200, keys=200, dtype=torch.float16)
    p = problem(case)
    p["told"]["slopes"] = torch.tensor([2.0, 0.5])
    p["bias"] = None
    made = []
    for skip in (True, True, False):
        out, lse = launch.forward(p["q"], p["k"], p["v"], **p["told"], skip=skip)
        grads = launch.backward(
            p["do"], None, p["q"], p["k"], p["v"], out, lse, **p["told"], need_q=False, need_kv=True, need_table=False,
            deterministic=False, tails_need_grad=False, skip=skip,
        )  # fmt: skip
        made.append((configs.ran["cols"].schedule, *grads[1:3]))
    assert [schedule for schedule, *_ in made] == ["plain", "specialised", "plain"]
    for right, mine in zip(made[2][1:], made[1][1:]):
        assert error(mine, right) < 2e-3


def test_the_mask_is_in_the_table() -> None:
    table = torch.arange(9.0, device=launch_device())[None]
    rule = prepare(table, None, 5, 0, False, -2, 1)
    row = rule.base[0].cpu()
    inside = row[rule.zero - 2 : rule.zero + 2] * torch.log(torch.tensor(2.0))
    assert torch.allclose(inside, torch.tensor([2.0, 3.0, 4.0, 5.0]))
    ends = row[:2] * torch.log(torch.tensor(2.0))  # what far tiles add
    assert torch.allclose(ends, torch.tensor([0.0, 8.0]))
    row[rule.zero - 2 : rule.zero + 2] = row[:2] = -1e30
    assert bool((row == -1e30).all())


def launch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------- calls served

@pytest.mark.parametrize(
    ("change", "serves"),
    [
        ({}, True),
        ({"bias": "none"}, True),
        ({"bias": "slopes"}, True),
        ({"support": (-9, 0)}, True),
        ({"keys": 64, "queries": 40}, True),
        ({"right": -1, "keys": 64}, True),
        ({"right": -1}, False),  # 40 keys in tiles of 16: those from 40 on would be seen
        ({"right": 3}, False),
        ({"queries": 1, "bias": "none", "keys": 33}, False),  # causal, and the one query sees all
        ({"keys": 0}, False),
        ({"head_dim": 40}, False),
        ({"head_dim": 32}, False),
        ({"value_dim": 128}, False),
        ({"dtype": torch.float32}, False),
        ({"softcap": 2.0}, False),
        ({"padding": True}, False),
    ],
)
def test_serves(change: dict[str, Any], serves: bool) -> None:
    call, _ = called(HALF._replace(**change))
    assert call.serves(row("specialised")) is serves


def test_tensors_that_descriptors_do_not_take() -> None:
    wide = torch.randn(1, 2, 40, 65, device=launch_device()).half()
    assert not called(HALF, q=wide[..., :64])[0].serves(row("specialised"))  # rows of 130 bytes
    shifted = torch.randn(1 * 2 * 40 * 64 + 1, device=launch_device()).half()[1:].view(1, 2, 40, 64)
    assert not called(HALF, k=shifted)[0].serves(row("specialised"))  # base at 2 bytes
