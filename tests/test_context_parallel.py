"""Context parallel over four gloo processes gives what one process gives."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from conftest import why_no_triton
from context_cases import CASES, HEADS, INTERPRETED, TOLERANCE, WORLD, Case, Run, group_of
from processes import gloo, pass_in_processes
from torch import Tensor

import posattn
from bench import ring
from posattn.distributed import context_parallel_attention, gather, layout, positions, shard


def check(name: str, rank: int) -> None:
    case = CASES[name]
    group = group_of(case.ranks)  # every process of the world makes it
    if rank not in case.ranks:
        return
    run, tolerance = Run(case), TOLERANCE[case.dtype]
    (outs, expected), (got_outs, got) = run.one(), run.here()
    sharded = 3 + (run.relative is not None)
    for i, (theirs, ours) in enumerate(zip([*outs, *expected], [*got_outs, *got])):
        if i < 2 + sharded:
            theirs = shard(theirs, 2, group, case.order)
        limit = max(1.0, theirs.abs().nan_to_num(0.0, 0.0, 0.0).max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours / limit, theirs / limit, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}"
        )


def check_quietly(rank: int) -> None:
    """Without gradients the same numbers, twice the same, and no graph."""
    run = Run(Case("kerple"))
    cut = functools.partial(shard, dim=2)
    call = functools.partial(
        context_parallel_attention, *map(cut, run.streams), run.bias, length=37, is_causal=True
    )
    out = call()
    with torch.no_grad():
        assert not call().requires_grad
        assert torch.equal(call(), out)
    once, again = (
        torch.autograd.grad(call().square().sum(), [*run.streams, *run.shared()]) for _ in range(2)
    )
    assert all(map(torch.equal, once, again))


def check_frozen(rank: int) -> None:
    """Only the bias learns: nothing but keys travels in backward."""
    run = Run(Case("t5"))
    here = [shard(t.detach(), 2) for t in run.streams]
    traffic = ring.Traffic()
    with traffic.counted():
        out = context_parallel_attention(*here, run.bias, length=37)
        (got,) = torch.autograd.grad(out.sin().sum(), run.shared())
    whole = posattn.attention(*(t.detach() for t in run.streams), run.bias)
    torch.testing.assert_close(got, torch.autograd.grad(whole.sin().sum(), run.shared())[0])
    passed = 37 - layout.shard_length(37, WORLD, (rank + 1) % WORLD, "zigzag")
    assert traffic.sent == 2 * passed * 2 * HEADS * (8 + 6) * 8


def check_bench(rank: int) -> None:
    """What `python -m bench ring` says of equality and of the traffic."""
    plan = ring.Plan(length=53, heads=4, key_heads=2, head_dim=8, dtype="float64")
    for case in ring.CASES:
        row = ring.measure(plan, case._replace(window=case.window and 9), "cpu")
        assert row["equal"], row
        assert row["traffic_as_formula"], row["processes"]
        assert row["balance"] > 0.9 or case.order == "contiguous"


def check_layout(rank: int) -> None:
    for order in layout.ORDERS:
        for length in (0, 3, 37, 40):
            whole = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(0))
            here = shard(whole, 1, order=order)
            assert torch.equal(here, whole[:, positions(length, order=order)])
            assert torch.equal(gather(here, 1, length, order=order), whole)
    assert gather(torch.full((2, 3), float(rank)), 0, order="contiguous")[:, 0].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    assert positions(8, mesh["context"]).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]][rank % 2]


def check_equal_parts(rank: int) -> None:
    """length may be left out; a parcel's second tensor begins where kernels can read it."""
    run = Run(Case("tisa", length=12))
    out = context_parallel_attention(*(shard(t, 2) for t in run.streams), run.bias, is_causal=True)
    torch.testing.assert_close(out, shard(posattn.attention(*run.streams, run.bias, is_causal=True), 2))


def check_second_derivative(rank: int) -> None:
    run = Run(Case("tisa", length=12))
    out = context_parallel_attention(*(shard(t, 2) for t in run.streams), run.bias)
    (grad,) = torch.autograd.grad(out.sum(), run.streams[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


CHECKS = (check_quietly, check_frozen, check_layout, check_equal_parts, check_second_derivative, check_bench)


@gloo
def test_four_processes_give_what_one_gives(tmp_path):
    on_cpu = not torch.cuda.is_available() and why_no_triton() is None  # then Triton is interpreted
    names = [name for name in CASES if on_cpu or name not in INTERPRETED]
    checks = [*((check, (name,)) for name in names), *((other, ()) for other in CHECKS)]
    pass_in_processes(checks, WORLD, tmp_path, seconds=120)


# --------------------------------------------------------------------------------------------- without processes


@pytest.mark.parametrize("order", layout.ORDERS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_pieces(world, order):
    """Each position is held once, each process holds nearly as many; equal parts stay equal."""
    for length in (*range(3 * world), 100, 20 * world):
        own = [layout.pieces(length, world, rank, order) for rank in range(world)]
        assert sorted(i for pieces in own for piece in pieces for i in piece) == list(range(length))
        sizes = [sum(map(len, pieces)) for pieces in own]
        assert max(sizes) - min(sizes) <= (2 if order == "zigzag" else 1)
        if length % world == 0:
            assert set(sizes) == {length // world}
        for pieces in own:
            assert all(piece.stop > piece.start for piece in pieces)
            assert all(a.stop < b.start for a, b in itertools.pairwise(pieces))


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (3, 0), (2, 4), (0, 0), (-1, 2)])
def test_pairs(left, right):
    """The pairs of pieces hold every pair of positions that see each other, and no pair of pieces without one."""
    for order in layout.ORDERS:
        for world, length in ((1, 5), (3, 17), (4, 5), (4, 40)):
            reach = layout.hops(length, world, order, left, right)
            seen = set()
            for rank in range(world):
                for source in range(world):
                    for pair in layout.pairs(length, world, order, left, right, rank, source):
                        assert (rank - source) % world <= reach
                        inside = {
                            (i, j) for i in pair.queries for j in pair.keys if visible(j - i, left, right)
                        }
                        assert inside
                        assert len(pair.queries) == pair.rows.stop - pair.rows.start
                        assert not inside & seen
                        seen |= inside
            everything = {(i, j) for i in range(length) for j in range(length) if visible(j - i, left, right)}
            assert seen == everything


def visible(offset: int, left: int, right: int) -> bool:
    return (left < 0 or offset >= -left) and (right < 0 or offset <= right)


def test_zigzag_shares_the_work():
    """Under a causal mask: visible pairs per process."""
    for order, worst in (("zigzag", 1.01), ("contiguous", 1.8)):
        work = []
        for rank in range(4):
            found = [p for source in range(4) for p in layout.pairs(64, 4, order, -1, 0, rank, source)]
            work.append(sum(j <= i for p in found for i in p.queries for j in p.keys))
        assert sum(work) == 64 * 65 // 2
        assert (max(work) * 4 / sum(work) < worst) is (order == "zigzag") or order == "contiguous"


def test_a_window_shortens_the_way():
    assert layout.hops(64, 8, "contiguous", 8, 0) == 1
    assert layout.hops(64, 8, "contiguous", 0, 0) == 0
    assert layout.hops(64, 8, "zigzag", -1, 0) == 7


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    if dist.is_initialized():
        pytest.skip("torch.distributed is in use")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def streams(length: int = 6) -> list[Tensor]:
    return list(torch.randn(3, 1, HEADS, length, 8).unbind())


@gloo
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, 'order must be "zigzag" or "contiguous", got \'ring\'', dict(order="ring")),
        (ValueError, 'bias_gradient must be "sum" or "local"', dict(bias_gradient="mean")),
        (ValueError, "process 0 of 1 holds 7 of 7 positions in zigzag order, got 6", dict(length=7)),
        (ValueError, "length must be at least 0", dict(length=-1)),
        (TypeError, "length must be an int, got str", dict(length="7")),
        (TypeError, "group must be a ProcessGroup, a DeviceMesh or None, got int", dict(group=1)),
        (ValueError, "kernel_size=1, got 3", dict(bias=posattn.DAPE(HEADS, kernel_size=3))),
        (ValueError, r"table of shape \(heads, Lq \+ Lk - 1\) = \(4, 11\)", dict(bias=torch.zeros(HEADS, 6))),
        (ValueError, "must have query's 4 heads", dict(bias=posattn.TISA(3))),
        (
            ValueError,
            r"\(batch, key_length\) = \(1, 6\)",
            dict(key_padding_mask=torch.ones(1, 7, dtype=torch.bool)),
        ),
    ],
)
def test_errors(alone, error, message, change):
    with pytest.raises(error, match=message):
        context_parallel_attention(*streams(), **change)


@gloo
def test_queries_and_keys_are_the_same_rows(alone):
    query, key, value = streams()
    with pytest.raises(ValueError, match="same rows of one sequence, got 5 and 6 rows"):
        context_parallel_attention(query[:, :, :5], key, value)


@gloo
def test_a_mesh_of_two_dimensions(alone):
    with pytest.raises(ValueError, match="one dimension, got 2"):
        context_parallel_attention(*streams(), group=dist.init_device_mesh("cpu", (1, 1)))


def test_without_torch_distributed():
    if dist.is_initialized():
        pytest.skip("torch.distributed is in use")
    with pytest.raises(RuntimeError, match="init_process_group"):
        context_parallel_attention(*streams())


@gloo
def test_bench_of_one_process(alone, tmp_path, capsys):
    """What `python -m bench ring` prints and writes; the four processes above hold its numbers to the formula."""
    plan = ring.Plan(length=21, heads=4, key_heads=2, head_dim=8, dtype="float32")
    assert ring.work(plan, tmp_path, True, "cpu") == 0
    printed = capsys.readouterr().out
    assert "| tisa, contiguous, window 100 |" in printed
    written = json.loads((tmp_path / "quick-ring-cpu.json").read_text("utf-8"))
    assert written["passed"]
    assert written["plan"] == plan._asdict()
    assert [row["visible_pairs"] for row in written["rows"]] == [[21 * 22 // 2]] * len(ring.CASES)
