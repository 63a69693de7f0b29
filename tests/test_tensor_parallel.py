"""Heads spread over processes give what one process gives: local tensors, DTensors, parallelize_module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_cases import BIASES, DIM, DIMS, HEADS, WORLD, Ramp, loss, make, mesh, model, streams
from processes import gloo, pass_in_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import posattn
from posattn.distributed import ShardHeads, context_parallel_attention, fully_shard_bias, shard, shard_heads


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert name == other
        assert isinstance(a, DTensor)
        if b.grad is None:
            assert a.grad is None
        else:
            assert a.grad.placements == a.placements, name
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, msg=lambda m, n=name: f"{n}: {m}")


def local_heads(name: str, rank: int) -> None:
    heads, whole, own = mesh()["heads"], make(name), make(name)
    assert shard_heads(own, heads, DIMS.get(name)) is own
    assert isinstance(own, type(whole))
    assert own.num_heads == HEADS // 2
    assert list(own.state_dict()) == list(whole.state_dict())
    place = slice(HEADS // 2 * heads.get_local_rank(), HEADS // 2 * (heads.get_local_rank() + 1))
    torch.testing.assert_close(own.dense(5, 7), whole.dense(5, 7)[place])
    if name != "fire":
        offsets = torch.arange(-4, 9)
        torch.testing.assert_close(own.values(offsets), whole.values(offsets)[place])
    for key_heads in (HEADS, 2):
        inputs = streams(key_heads)
        keywords = dict(is_causal=True, enable_gqa=True, return_lse=True)
        expected = posattn.attention(*inputs, whole, **keywords)
        cut = [t.chunk(2, 1)[heads.get_local_rank()].detach().requires_grad_() for t in inputs]
        got = posattn.attention(*cut, own, **keywords)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b[:, place])
        for module in (own, whole):
            module.zero_grad()
        loss(got).backward()
        loss(expected).backward()
        same_gradients(own, whole)
        for a, b in zip(cut, inputs):
            torch.testing.assert_close(a.grad, b.grad.chunk(2, 1)[heads.get_local_rank()])
    with torch.no_grad():
        torch.testing.assert_close(posattn.attention(*cut, own, **keywords)[0], got[0])


def dtensors(name: str, rank: int) -> None:
    """Sharded by batch and by head; the bias on the mesh of heads."""
    both = mesh()
    whole, own = make(name), make(name)
    shard_heads(own, both["heads"], DIMS.get(name))
    inputs = streams(2)
    torch.manual_seed(5)
    mask, sinks = torch.rand(4, 11) < 0.8, torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    keywords = dict(enable_gqa=True, return_lse=True, window=(6, 3))
    expected = posattn.attention(*inputs, whole, key_padding_mask=mask, sinks=sinks, **keywords)
    placed = [distribute_tensor(t.detach(), both, [Shard(0), Shard(1)]).requires_grad_() for t in inputs]
    spread = distribute_tensor(sinks.detach(), both, [Replicate(), Replicate()]).requires_grad_()
    got = posattn.attention(
        *placed, own, key_padding_mask=distribute_tensor(mask, both), sinks=spread, **keywords
    )
    for a, b in zip(got, expected):
        assert a.placements == (Shard(0), Shard(1))
        assert a.shape == b.shape
        torch.testing.assert_close(a.full_tensor(), b)
    loss(got).backward()
    loss(expected).backward()
    same_gradients(own, whole)
    for a, b in zip([*placed, spread], [*inputs, sinks]):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)


def dtensors_by_batch(name: str, rank: int) -> None:
    """A bias that every process has whole, a DAPE among them, and DTensors of a part of the batch."""
    torch.manual_seed(3)
    whole = posattn.DAPE(HEADS, posattn.FIRE(HEADS), hidden=5).double() if name == "dape" else make(name)
    own, data = copy.deepcopy(whole), mesh()["data"]
    inputs = streams()
    placed = [distribute_tensor(t.detach()[:3], data, [Shard(0)]).requires_grad_() for t in inputs]  # 2 and 1
    out = posattn.attention(*placed, own, is_causal=True)
    assert isinstance(out, DTensor)
    expected = posattn.attention(*(t[:3] for t in inputs), whole, is_causal=True)
    torch.testing.assert_close(out.full_tensor(), expected)
    loss(out).backward()
    loss(expected).backward()
    for a, b in zip(own.parameters(), whole.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def dtensor_tables(rank: int) -> None:
    both, inputs = mesh(), streams()
    table = torch.randn(
        HEADS, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    expected = posattn.attention(*inputs, table)
    loss(expected).backward()
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(1)], [Replicate(), Replicate()]):
        for of_table in ([Replicate(), Shard(0)], [Replicate(), Replicate()]):
            placed = [distribute_tensor(t.detach(), both, placements) for t in inputs]
            spread = distribute_tensor(table.detach(), both, of_table).requires_grad_()
            out = posattn.attention(*placed, spread)
            torch.testing.assert_close(out.full_tensor(), expected)
            loss(out).backward()
            torch.testing.assert_close(spread.grad.full_tensor(), table.grad)


def dtensor_errors(rank: int) -> None:
    both, inputs = mesh(), streams()
    placed = [distribute_tensor(t.detach(), both, [Replicate(), Shard(1)]) for t in inputs]
    sequence = [distribute_tensor(t.detach(), both, [Shard(2), Shard(1)]) for t in inputs]
    odd = [distribute_tensor(t.detach()[:, :3], both, [Replicate(), Shard(1)]) for t in inputs]
    elsewhere = [placed[0], *(t.redistribute(both, [Shard(0), Shard(1)]) for t in placed[1:])]
    cases: list[tuple[type[Exception], str, list, Any]] = [
        (ValueError, "shard_heads", placed, make("tisa")),
        (ValueError, "mixes the scores of all heads", placed, posattn.DAPE(HEADS).double()),
        (TypeError, "bias must be a DTensor", placed, torch.zeros(HEADS, 21)),
        (TypeError, "key must be a DTensor", [placed[0], *inputs[1:]], None),
        (ValueError, "takes a sharded sequence", sequence, None),
        (ValueError, "key must be placed like query", elsewhere, None),
        (ValueError, "multiple of 2 heads", odd, None),
    ]
    for error, message, tensors, bias in cases:
        with pytest.raises(error, match=message):
            posattn.attention(*tensors, bias)


def in_a_plan(name: str, rank: int) -> None:
    """parallelize_module, then steps of an optimizer that takes all parameters together."""
    whole, own = model(name), model(name)
    plan = {f: ColwiseParallel() for f in ("query", "key", "value")}
    plan |= {"mix": RowwiseParallel(), "bias": ShardHeads(DIMS.get(name))}
    parallelize_module(own, mesh()["heads"], plan)
    x = torch.randn(2, 9, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for module in (own, whole):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=True)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(own(x), whole(x))
    for key, value in own.state_dict().items():
        torch.testing.assert_close(value.full_tensor(), whole.state_dict()[key])


def in_a_plan_with_fsdp(name: str, rank: int) -> None:
    """Heads over one dimension of the mesh, the batch and all parameters over the other."""
    both, whole, own = mesh(), model(name), model(name)
    plan = {f: ColwiseParallel() for f in ("query", "key", "value")}
    plan |= {"mix": RowwiseParallel(), "bias": ShardHeads(DIMS.get(name))}
    parallelize_module(own, both["heads"], plan)
    fully_shard_bias(own.bias, mesh=both["data"])
    fully_shard(own, mesh=both["data"])
    x = torch.randn(4, 9, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    mine = x.chunk(2)[both["data"].get_local_rank()]
    for module, rows in ((own, mine), (whole, x)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            module(rows).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(own(mine), whole(mine))
    for key, value in own.state_dict().items():
        torch.testing.assert_close(value.full_tensor(), whole.state_dict()[key])


def with_context(name: str, rank: int) -> None:
    """Sequence and heads both spread: the bias's gradients are summed over the sequence, heads stay sharded."""
    both = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "heads"))
    context, heads = both["context"], both["heads"]
    whole, own, inputs = make(name), make(name), streams()
    shard_heads(own, heads, DIMS.get(name))
    cut = [shard(t.chunk(2, 1)[heads.get_local_rank()], 2, context).detach().requires_grad_() for t in inputs]
    out = context_parallel_attention(*cut, own, group=context, length=11, is_causal=True)
    expected = posattn.attention(*inputs, whole, is_causal=True)
    torch.testing.assert_close(out, shard(expected.chunk(2, 1)[heads.get_local_rank()], 2, context))
    loss(out).backward()
    loss(expected).backward()
    same_gradients(own, whole)


@gloo
def test_four_processes_give_what_one_gives(tmp_path):
    checks = [(local_heads, (name,)) for name in BIASES]
    checks += [(dtensors, (name,)) for name in ("tisa", "alibi", "t5", "fire", "own")]
    checks += [(dtensors_by_batch, (name,)) for name in ("kerple", "dape")]
    checks += [(in_a_plan, (name,)) for name in ("tisa", "t5", "fire")]
    checks += [(in_a_plan_with_fsdp, (name,)) for name in ("tisa", "alibi-learnable", "fire")]
    checks += [(with_context, (name,)) for name in ("kerple", "t5", "fire")]
    checks += [(dtensor_tables, ()), (dtensor_errors, ())]
    pass_in_processes(checks, WORLD, tmp_path, seconds=120)


@pytest.fixture
def alone(tmp_path):
    """A mesh of one process."""
    if dist.is_initialized():
        pytest.skip("torch.distributed is in use")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@gloo
def test_errors(alone):
    with pytest.raises(ValueError, match="mixes the scores of all heads"):
        shard_heads(posattn.DAPE(HEADS), alone)
    with pytest.raises(TypeError, match=r"bias must be a posattn\.Bias, got Linear"):
        shard_heads(nn.Linear(2, 2), alone)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh"):
        shard_heads(posattn.TISA(HEADS), None)
    with pytest.raises(ValueError, match="one dimension, got 2"):
        shard_heads(posattn.TISA(HEADS), dist.init_device_mesh("cpu", (1, 1)))
    with pytest.raises(ValueError, match="names 'force', which Ramp has not"):
        shard_heads(Ramp(HEADS), alone, {"force": 0})
    with pytest.raises(ValueError, match="no 4 heads there"):
        shard_heads(Ramp(HEADS), alone, {"strength": 1})
    bias = shard_heads(posattn.TISA(HEADS), alone)
    with pytest.raises(ValueError, match="sharded by heads already"):
        shard_heads(bias, alone)


@gloo
def test_a_copy_is_sharded_too(alone):
    bias = shard_heads(posattn.TISA(HEADS), alone)
    twin = copy.deepcopy(bias)
    assert torch.equal(twin.table(5, 6), bias.table(5, 6))
    assert repr(twin) == "TISA(num_heads=4, num_kernels=5)"
