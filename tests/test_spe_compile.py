"""torch.compile takes linear attention and SPE whole, once for every length."""

from __future__ import annotations

import pytest
import torch
from spe_cases import Case
from torch._dynamo.testing import CompileCounterWithBackend

from posattn import SineSPE, linear_attention

COMPILED = {
    "none, elu": Case("none"),
    "sine, favor, gaps": Case(feature_map="favor", mask="gaps"),
    "seed, relu, full": Case("seed", feature_map="relu", causal=False),
    "exact, favor": Case("exact", feature_map="favor"),
    "sine, state": Case(state=True),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole_with_any_length(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    case = COMPILED[name]
    module = case.module()
    noise = case._replace(queries=40).noise()

    def call(*tensors, **keywords):
        return case.call(linear_attention, tensors, module, noise, keywords)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (12, 17, 30):
        tensors, _, keywords = case._replace(queries=length).make(torch.float32)
        inputs = [*tensors, *([] if module is None else module.parameters())]
        got, expected = compiled(*tensors, **keywords), call(*tensors, **keywords)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs) for outs in (got, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("spe", ["sine", "conv"])
def test_compiled_with_noise_drawn_inside(spe):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    case = Case("seed" if spe == "conv" else spe)
    module = case.module()
    compiled = torch.compile(linear_attention, fullgraph=True, backend=counter)
    for length in (12, 17, 30):
        tensors, _, keywords = case._replace(queries=length).make(torch.float32)
        outs = []
        for call in (compiled, linear_attention):
            torch.manual_seed(3)
            outs.append(call(*tensors, spe=module, **keywords))
        torch.testing.assert_close(*outs)
    assert counter.frame_count <= 2
    other = compiled(*tensors, spe=module, **keywords)
    assert not torch.allclose(other, outs[0], atol=1e-4)


def test_compiled_decoding():
    """A step for every token, traced for the first and for all others; the noise is the state's."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module, tensors = SineSPE(2, 4, 3, 8), [t.detach() for t in Case(dim=4, queries=9).make(torch.float32)[0]]
    codes = module()

    def step(query, key, value, state):
        return linear_attention(query, key, value, spe=module, initial_state=state, return_state=True)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    whole = linear_attention(*tensors, spe=codes, is_causal=True)
    first = (t[:, :, :4] for t in tensors)
    out, state = linear_attention(*first, spe=codes, is_causal=True, return_state=True)
    outs = [out]
    for i in range(4, 9):
        out, state = compiled(*(t[:, :, i : i + 1] for t in tensors), state)
        outs.append(out)
        assert state.position == i + 1
    torch.testing.assert_close(torch.cat(outs, 2), whole)
    assert counter.frame_count <= 2
