"""Which pairs dropout keeps: against integers without a limit, and the statistics of the generator."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_features import kept_pairs, philox

from posattn.dropout import Dropout, kept


def test_philox_is_the_published_one():
    """Known answers of Random123."""
    assert [f"{w:08x}" for w in philox(0, (0, 0, 0, 0))] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    every = 2**32 - 1
    assert [f"{w:08x}" for w in philox(2**64 - 1, (every,) * 4)] == [
        "408f276d",
        "41c83b0e",
        "a20bc7c6",
        "6d5451fd",
    ]


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-9, 1 - 1e-9])
@pytest.mark.parametrize(
    "seed", [[0, 0, 0, 0], [123456789 << 32 | 5, 7, 3, 2], [2**62 - 1, 2**31, 2**32 - 2, 9], [-5, -1, -3, 0]]
)
def test_bits(seed, p):
    """Places before 0 wrap around in 32 bits."""
    rows, columns = torch.arange(2, 6), torch.arange(1, 8)
    got = kept(Dropout(p, torch.tensor(seed)), slice(1, 3), slice(0, 2), rows, columns)
    expected = kept_pairs(p, seed, 3, 2, 6, 8)
    assert torch.equal(got, expected[1:, :, 2:, 1:])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_statistics(p):
    """Rates, and pairs of neighbours in every direction, within 4 sigma of independent draws."""

    def bits(seed):
        rows, columns = torch.arange(128), torch.arange(128)
        made = kept(Dropout(p, torch.tensor([seed, 0, 0, 0])), slice(0, 2), slice(0, 4), rows, columns)
        return (made.double() - (1 - p)) / math.sqrt(p * (1 - p))

    x = bits(1)
    near = {
        "mean": x,
        "keys": x[..., 1:] * x[..., :-1],
        "keys 2": x[..., 2:] * x[..., :-2],
        "keys 64": x[..., 64:] * x[..., :-64],
        "rows": x[:, :, 1:] * x[:, :, :-1],
        "diagonal": x[:, :, 1:, 1:] * x[:, :, :-1, :-1],
        "heads": x[:, 1:] * x[:, :-1],
        "batches": x[1:] * x[:-1],
        "seeds": x * bits(2),
        "far seeds": x * bits(1 + 2**32),
        "mirrored": x[..., :64, :64] * x[..., :64, :64].mT.triu(1),
    }
    for name, product in near.items():
        count = 8 * 64 * 63 / 2 if name == "mirrored" else product.numel()
        assert abs(product.sum().item()) < 4 * math.sqrt(count), name
    # Neither single rows nor single keys stand out: sums of squares of n normal numbers.
    for sums in (x.sum(-1), x.sum(-2)):
        squares = (sums**2 / 128).sum().item()
        assert abs(squares - sums.numel()) < 5 * math.sqrt(2 * sums.numel())


def test_uniform_at_many_thresholds():
    """What is kept at a larger p is a part of what is kept at a smaller one, and as much as it should be."""
    place = slice(0, 1), slice(0, 4), torch.arange(128), torch.arange(128)
    seed, before = torch.tensor([77, 0, 0, 0]), None
    for p in torch.linspace(0.02, 0.98, 25).tolist():
        now = kept(Dropout(p, seed), *place)
        assert abs(now.double().mean().item() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / now.numel())
        assert before is None or not (now & ~before).any()
        before = now
