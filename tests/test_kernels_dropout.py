"""Dropout and sinks in the kernels, the bits against the generator written out in Python's integers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import DEVICE, Case, call, check, kept, make, words

from posattn.kernels import dropout

pytestmark = pytest.mark.triton

CASES = {
    "plain": Case(dropout=0.1),
    "plain causal, batch, GQA": Case(queries=((37,), (37,)), right=0, dropout=0.7, heads=4, key_heads=2, packed=False),
    "table": Case("table", queries=((33,),), keys=((50,),), dropout=0.5, packed=False),
    "table softcap sinks": Case("table", softcap=2.0, dropout=0.25, sinks=True, packed=False),
    "table sequences": Case("table", queries=((33, 8),), keys=((20, 31),), dropout=0.3, padding=True),
    "support": Case("table", support=(-9, 4), dropout=0.2, packed=False),
    "slopes": Case("slopes", dropout=0.2, packed=False),
    "fire": Case("fire", queries=((20, 7),), keys=((13, 20),), heads=1, key_heads=1, dropout=0.2),
    "sinks": Case(sinks=True, packed=False),
    "sinks, rows that see nothing": Case(sinks=True, padding=True, right=0),
    "sinks, one-sided slopes": Case("one-sided slopes", sinks=True, padding=True, right=0, packed=False),
    "sinks, half precision": Case("table", sinks=True, right=0, dropout=0.2, dtype=torch.float16),
}


def test_the_generator_is_philox() -> None:
    """Random123's own vectors: counter and key all zero, all ones; then the words that a row of ours gets."""
    assert words([0, 0, 0, 0], 0, 0, 0) == (0x6627E8D5, 0xE169C58D)
    # Counter (ffffffff, ffffffff, ffffffff, ffffffff) is not one of ours: its fourth word is never 0.
    assert words([2**64 - 1, 2**32 - 1, 0, 0], 2, 5, 0) != words([2**64 - 1, 2**32 - 1, 0, 0], 2, 6, 0)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_constants(p: float) -> None:
    threshold, scale = dropout.constants(p)
    assert -(2**31) <= threshold < 2**31
    assert threshold % 2**32 == min(round(p * 2**32), 2**32 - 1)
    assert scale == (1 / (1 - p) if p < 1 else 0)


def test_the_share_that_stays() -> None:
    stay = torch.stack([kept(0.3, [5, 0, 0, 0], 0, 0, i, 400) for i in range(50)]).double()
    assert abs(stay.mean() - 0.7) < 4 * (0.21 / stay.numel()) ** 0.5
    assert (stay.mean(0) - 0.7).abs().max() < 5 * (0.21 / 50) ** 0.5
    centred = stay - stay.mean()
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 4 * 0.21 / (50 * 399) ** 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 4 * 0.21 / (49 * 400) ** 0.5


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "in order"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient(name: str, deterministic: bool) -> None:
    if deterministic and (CASES[name].bias != "table" or not CASES[name].dropout):
        pytest.skip("only a table's gradient has an order")
    check(CASES[name], deterministic=deterministic)


def test_everything_is_dropped() -> None:
    case = Case(dropout=0.5, queries=((9,),))
    made = make(case)
    made["dropout"] = made["dropout"]._replace(p=1.0)
    actual = call(case, made)
    assert not actual["out"].any()
    assert not actual["dv"].any()
    assert actual["lse"].isfinite().all()


def test_a_sink_of_minus_infinity_is_none() -> None:
    case = Case(sinks=True, padding=True, right=0)
    made = make(case)
    made["sinks"] = torch.full((2,), -float("inf"), device=DEVICE)
    with_sinks = call(case, made)
    made["sinks"] = None
    for key, value in call(case, made).items():
        torch.testing.assert_close(with_sinks[key], value, atol=0, rtol=0)
