"""posattn.attention(skip_negligible=...), by both backends."""

from __future__ import annotations

import json
import math

import pytest
import torch
from backends import BACKENDS, HALF, by
from skip_cases import at_the_bound, normal, small_blocks, weights

from bench import skip as benchmark
from posattn import attention
from posattn.biases.alibi import ALiBi
from posattn.biases.kerple import KERPLE


@pytest.fixture(autouse=True)
def cut_all(monkeypatch):
    small_blocks(monkeypatch)


def called(backend, tensors, bias, **more):
    """out, lse and the gradients of q, k and v, by `posattn.attention`."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = by(backend, attention, *tensors, bias, return_lse=True, **more)
    make = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=make).to(t.dtype) for t in (out, lse)]
    loss = sum((torch.where(t.isfinite(), t, 0.0) * w).sum() for t, w in zip((out, lse), weights))
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


class Slopes(ALiBi):
    """ALiBi with slopes that leave some ten keys."""

    def __init__(self, *slopes, symmetric=True):
        super().__init__(len(slopes), symmetric=symmetric)
        self.register_constants(slope=torch.tensor(slopes))


CALLS = {
    "causal": dict(is_causal=True),
    "both sides": dict(),
    "window": dict(window=(30, 5)),
    "one-sided": dict(is_causal=True),
    "gqa": dict(is_causal=True, enable_gqa=True),
    "sinks": dict(is_causal=True, sinks=torch.tensor([0.5, 3.0])),
    "padding": dict(key_padding_mask=torch.arange(128)[None] < torch.tensor([[90]])),
    "cross": dict(is_causal=True, query_start=20),
    "table": dict(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_attention_with_and_without(backend, call):
    """The error against float64 is not larger with skipping than without, but by what the bound allows."""
    key_heads, queries = 1 if call == "gqa" else 2, 70 if call == "cross" else 128
    tensors = normal(1, 2, key_heads, queries, 128, 16, torch.float32)
    bias = Slopes(4.0, 2.5, symmetric=call != "one-sided")
    if call == "table":
        bias = bias.table(128, 128)
        bias[:, 20:26] = 3.0  # a hill far away
    more = CALLS[call]
    doubles = [t.double() if t.is_floating_point() else t for t in tensors]
    in_double = {name: t.double() if name == "sinks" else t for name, t in more.items()}
    exact = called("blockwise", doubles, bias, **in_double, skip_negligible=False)
    plain, made = (called(backend, tensors, bias, **more, skip_negligible=skip) for skip in (False, True))
    for a, b, c in zip(exact, plain, made):
        seen = a.isfinite()
        assert torch.equal(seen, c.isfinite())
        scale = a[seen].abs().max()
        usual = (b.double() - a)[seen].abs().max()
        assert (c.double() - a)[seen].abs().max() <= 1.5 * usual + 2**-22 * scale


@pytest.mark.parametrize(("backend", "dtype"), HALF)
def test_half_precision(backend, dtype):
    """Here all that differs are the blocks, or nothing."""
    tensors = normal(1, 2, 1, 128, 128, 16, dtype)
    plain, made = (
        called(backend, tensors, Slopes(4.0, 2.5), is_causal=True, enable_gqa=True, skip_negligible=skip)
        for skip in (False, True)
    )
    for a, b in zip(plain, made):
        assert (a.float() - b.float()).abs().max() <= torch.finfo(dtype).eps * a.float().abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("excess", [-0.05, 0.6])
def test_attention_at_the_bound(backend, excess):
    """Far keys of the whole strength a bound can know, values a million: all there, or all gone.

    Kernels add up in another order and may keep a little more, so the distance from the threshold is larger.
    """
    (q, k, v), rule = at_the_bound(excess, dtype=torch.float32)
    q, k, v = (torch.nn.functional.pad(t, (0, 12)) for t in (q, k, v))
    v[:] = 0.0
    v[0, 0, :20] = 1e6
    out = by(backend, attention, q, k, v, rule["table"], scale=1.0, skip_negligible=True)
    share = out[0, 0, 63, 1].item()  # of the far keys, times a million
    expected = weights((q, k), rule)[0, 0, 63, :20].sum().item() * 1e6
    assert expected > 1e-3
    if excess > 0:
        assert share == pytest.approx(expected, rel=1e-3)
    elif backend == "blockwise":
        assert share == 0.0
    else:
        assert share == 0.0 or share == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_next_to_what_is_not_a_number(backend):
    for value in (math.nan, math.inf):
        tensors = normal(queries=120, dim=16, dtype=torch.float32)
        tensors[1][0, 0, 4, 2] = value
        plain, made = (
            called(backend, tensors, Slopes(4.0, 2.5), is_causal=True, skip_negligible=skip)
            for skip in (False, True)
        )
        assert plain[0][0, 0, 64:].isnan().any()
        for a, b in zip(plain, made):
            assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_leaves_something_out(backend):
    """Seen by a NaN among the values, which weights of 0 do not hide, and which are no part of the bound."""
    tensors = normal(dim=16, dtype=torch.float32)
    tensors[2][0, :, 4] = math.nan
    for skip in (False, True):
        out = by(backend, attention, *tensors, Slopes(4.0, 2.5), is_causal=True, skip_negligible=skip)
        assert out[0, :, :32].isnan().any()
        assert out[0, :, 160:].isnan().any() != skip


def test_by_default_it_is_for_long_calls_of_biases_that_decay():
    for bias, length, skips in (
        (ALiBi(1), 2048, True),
        (ALiBi(1), 2047, False),
        (KERPLE(1, "power"), 2048, False),
    ):
        tensors = normal(heads=1, queries=length, dim=4, dtype=torch.float32)
        tensors[2][0, 0, 1] = math.nan
        if isinstance(bias, ALiBi):
            bias.register_constants(slope=torch.tensor([1.0]))
        out = attention(*tensors, bias, is_causal=True, backend="blockwise")
        assert out[0, 0, -1].isnan().any() != skips


# ------------------------------------------------------------------------------------------ the benchmark


def test_the_benchmark_runs(tmp_path, capsys):
    assert benchmark.main(["--quick", "--device", "cpu", "--lengths", "256", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("quick-skip-*.json")
    report = json.loads(path.read_text("utf-8"))
    assert [(row["bias"], row["heads"]) for row in report["rows"]] == [case[:2] for case in benchmark.CASES]
    for row in report["rows"]:
        assert all(len(part) == row["heads"] for part in row["shares"].values())
        assert set(row["times"]["both"]) == {"all pairs", "skipping", benchmark.SDPA}
        usual, made = (row["errors"][name] for name in benchmark.WAYS)
        assert all(made[name] <= 2 * usual[name] + 1e-6 for name in usual)
    assert not report["not_timed"]
    assert "ALiBi, 16, 256" in capsys.readouterr().out


def test_the_budget_stops_timing(tmp_path, capsys):
    assert (
        benchmark.main(["--device", "cpu", "--budget", "0", "--lengths", "64", "--output", str(tmp_path)])
        == 0
    )
    assert "not timed, the budget was spent: ALiBi, 8, 64;" in capsys.readouterr().out


def test_tiles():
    """Rows 0 .. 383 in groups of 16, of which the later tiles of rows need their own 128 keys and one more."""
    first = (torch.arange(24) * 16 - 1).clamp(min=0).expand(1, 2, 24).clone()
    last = (torch.arange(24) * 16 + 16).expand(1, 2, 24).clone()
    first[0, 1] = 0
    # Tiles of 128 rows and 128 keys that causality leaves: 1, 2 and 3; needed by the first head: 1, 2 and 2.
    assert benchmark.tiles_left_out(first, last, 384) == pytest.approx([1 / 6, 0.0])


def test_tiles_are_those_of_the_kernel():
    configs = pytest.importorskip("posattn.kernels.configs")
    for width in (64, 128):
        row = configs.CONFIGS["sm_90", "forward", 16, width]
        assert (row.block_m, row.block_n) == benchmark.TILE
