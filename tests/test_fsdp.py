"""FSDP2 over two gloo processes gives what one process gives, with biases in full precision or as all the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from processes import gloo, pass_in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import posattn
from posattn.distributed import context_parallel_attention, fully_shard_bias, gather, shard

WORLD, HEADS, DIM = 2, 4, 8
SEEN: list[Tensor] = []


class Watched(posattn.TISA):
    """Notes the parameters that its formula is given."""

    def values(self, offsets: Tensor) -> Tensor:
        SEEN.append(self.amplitudes.detach().clone())
        return super().values(offsets)


BIASES = {
    "tisa": Watched,
    "kerple": posattn.KERPLE,
    "alibi": partial(posattn.ALiBi, learnable=True),
    "fire": lambda heads: posattn.FIRE(heads, hidden=6),
    "dape": lambda heads: posattn.DAPE(heads, posattn.KERPLE(heads), hidden=6),
}


class Block(nn.Module):
    def __init__(self, bias: nn.Module, attention=posattn.attention) -> None:
        super().__init__()
        width = HEADS * DIM
        self.project, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias, self.attention = bias, attention

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = self.attention(*heads, self.bias, is_causal=True)
        return x + self.mix(out.transpose(1, 2).flatten(2))


def build(attention=posattn.attention, dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(Block(BIASES[name](HEADS), attention) for name in BIASES)).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 12, HEADS * DIM, generator=torch.Generator().manual_seed(2)).to(dtype)


def train(model: nn.Module, x: Tensor) -> Tensor:
    """The output of the first of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    outs = []
    for _ in range(2):
        optimizer.zero_grad()
        outs.append(model(x))
        (outs[-1].float() if outs[-1].dtype == torch.bfloat16 else outs[-1]).sin().mean().backward()
        optimizer.step()
    return outs[0].detach()


def same_parameters(
    ours: nn.Module, theirs: nn.Module, start: nn.Module, tolerance: float, least: float
) -> None:
    """The way that two steps have gone, of every parameter, beside its longest or `least`."""
    before = start.state_dict()
    for name, value in ours.state_dict().items():
        assert isinstance(value, DTensor)
        way, expected = value.full_tensor() - before[name], theirs.state_dict()[name] - before[name]
        limit = expected.abs().max().clamp(min=least)
        torch.testing.assert_close(
            way / limit, expected / limit, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_evaluation(ours: nn.Module, theirs: nn.Module) -> None:
    """Without gradients, where few queries take the path of decoding, which keeps what it can from call to call."""
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ours(batch()), theirs(batch()))


def sharded(own_group: bool, rank: int) -> None:
    start, whole, own = build(), build(), build()
    for block in own:
        if own_group:
            assert fully_shard_bias(block.bias) is block.bias
        fully_shard(block)
    fully_shard(own)
    rows = slice(2 * rank, 2 * rank + 2)
    same_evaluation(own, whole)
    torch.testing.assert_close(train(own, batch()[rows]), train(whole, batch())[rows])
    same_parameters(own, whole, start, 1e-7, 1e-6)
    same_evaluation(own, whole)


def in_bfloat16(rank: int) -> None:
    """Weights and activations in bfloat16, the biases' formulas with float32 parameters."""
    start, whole, own = (build(dtype=torch.float32) for _ in range(3))
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in own:
        fully_shard_bias(block.bias)
        fully_shard(block, mp_policy=bfloat16)
    fully_shard(own, mp_policy=bfloat16)
    SEEN.clear()
    rows = slice(2 * rank, 2 * rank + 2)
    out = train(own, batch(torch.float32)[rows])
    assert out.dtype == torch.bfloat16
    assert len(SEEN) == 2
    assert torch.equal(SEEN[0], start[0].bias.amplitudes)  # bit by bit, and float32
    torch.testing.assert_close(out.float(), train(whole, batch(torch.float32))[rows], rtol=5e-2, atol=5e-2)
    same_parameters(own, whole, start, 0.1, 1e-3)
    for block in own:
        assert all(
            p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in block.bias.parameters()
        )


def with_context(own_group: bool, rank: int) -> None:
    """One mesh for parameters and positions: FSDP takes the mean of the bias's "local" gradients as of all others."""
    attend = partial(context_parallel_attention, bias_gradient="local")
    start, whole, own = build(), build(), build(attend)
    for block in own:
        if own_group:
            fully_shard_bias(block.bias)
        fully_shard(block)
    fully_shard(own)
    out = train(own, shard(batch(), 1))
    torch.testing.assert_close(gather(out, 1), train(whole, batch()))
    same_parameters(own, whole, start, 1e-7, 1e-6)


@gloo
def test_two_processes_give_what_one_gives(tmp_path):
    checks = [(check, (own,)) for check in (sharded, with_context) for own in (True, False)]
    pass_in_processes([*checks, (in_bfloat16, ())], WORLD, tmp_path, seconds=120)


def test_other_modules():
    with pytest.raises(TypeError, match=r"bias must be a posattn\.Bias or a posattn\.DAPE, got Linear"):
        fully_shard_bias(nn.Linear(2, 2))
