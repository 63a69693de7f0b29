"""DDP and FSDP2 over two gloo processes give the gradients of one process."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from processes import gloo, pass_in_processes

import posattn

WORLD, DIM, HEADS = 2, 16, 4
BIASES = {
    "tisa": posattn.TISA,
    "alibi": posattn.ALiBi,
    "alibi-learnable": functools.partial(posattn.ALiBi, learnable=True),
    "t5": posattn.T5Bias,
}

pytestmark = gloo


class Block(torch.nn.Module):
    def __init__(self, bias: posattn.Bias) -> None:
        super().__init__()
        self.project = torch.nn.Linear(DIM, 3 * DIM)
        self.bias = bias
        self.mix = torch.nn.Linear(DIM, DIM)

    def forward(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = posattn.attention(query, key, value, self.bias, is_causal=True)
        return x + self.mix(out.transpose(1, 2).flatten(2))


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(*(Block(BIASES[name](HEADS)) for _ in range(2)))


def batch() -> torch.Tensor:
    return torch.randn(4, 12, DIM, generator=torch.Generator().manual_seed(2))


def step(model: torch.nn.Module, x: torch.Tensor) -> None:
    model(x).sin().mean().backward()


def single_process(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients of one step on the whole batch, and the parameters after it."""
    model = build(name)
    step(model, batch())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return gradients, dict(model.state_dict())


def ddp(name: str, rank: int) -> None:
    model = torch.nn.parallel.DistributedDataParallel(build(name))
    step(model, batch()[2 * rank : 2 * rank + 2])
    expected, _ = single_process(name)
    for n, p in model.module.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])


def fsdp(name: str, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = build(name)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, batch()[2 * rank : 2 * rank + 2])
    gradients, after = single_process(name)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), gradients[n])
    optimizer.step()
    for n, p in model.state_dict().items():
        torch.testing.assert_close(p.full_tensor(), after[n])


def test_two_processes_give_what_one_gives(tmp_path):
    checks = [(check, (name,)) for check in (ddp, fsdp) for name in BIASES]
    pass_in_processes(checks, WORLD, tmp_path, seconds=60)
