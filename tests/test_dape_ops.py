"""DAPE in PyTorch's machinery, and its memory."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys

import pytest
import torch
from calls import HEADS, Layer, gradients, qkv
from dape_cases import Case
from test_blockwise import ROOT
from test_spe_memory import Largest
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import posattn
from posattn import DAPE, FIRE, attention, attention_reference, mix_blockwise, mix_ops

# --------------------------------------------------------------------------------------- torch.library


def operator_arguments(case: Case, backend: str) -> tuple:
    """What mix_forward gets."""
    (query, key, value), module, keywords = case.make(torch.float32)
    network = module.network(case.queries, case.keys, case.query_start, 0, double=False)
    tensors = (query, key, value, *network[:-1], keywords.get("key_padding_mask"))
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = [t if t is None else t.detach().to(device) for t in tensors]
    rule = (0.3, -case.query_start, -1, 0 if case.causal else -1, network.negative_slope, case.published)
    return (*tensors, *rule, True, backend)


EVERYTHING = (True,) * 4
OPCHECKS = [
    ("blockwise", Case("none"), EVERYTHING),
    ("blockwise", Case("kerple", 4, key_heads=2, mask="gaps", value_dim=4), (True, False, False, True)),
    ("blockwise", Case("fire", kernel_size=3, queries=5), EVERYTHING),
    ("blockwise", Case("fire", kernel_size=3, published=True), (False, True, True, False)),
    pytest.param("triton", Case("kerple", queries=9, keys=9), EVERYTHING, marks=pytest.mark.triton),
]


@pytest.mark.parametrize(("backend", "case", "need"), OPCHECKS)
def test_opcheck(backend, case, need):
    arguments = operator_arguments(case, backend)
    torch.library.opcheck(mix_ops.mix_forward, arguments)
    out, lse, rest = mix_ops.mix_forward(*arguments)
    grads = (torch.randn_like(out), torch.randn_like(lse) if case.causal else None)
    arguments = (*grads, *arguments[:3], out, lse, rest, *arguments[3:20], *need, backend)
    torch.library.opcheck(mix_ops.mix_backward, arguments)
    groups = (*need[:1], need[1], need[1], *[need[2]] * 4, *[need[3]] * 6)
    likes = (*arguments[2:5], *arguments[8:18])
    for grad, like, needed in zip(mix_ops.mix_backward(*arguments), likes, groups):
        assert grad.shape == (like.shape if needed and like is not None else (0,))


@pytest.fixture
def operator_calls(monkeypatch):
    """The arguments of every mix_backward, by name."""
    names = [argument.name for argument in mix_ops.mix_backward._schema.arguments]
    calls, backward = [], mix_ops.mix_backward

    def spy(*args):
        calls.append(dict(zip(names, args)))
        return backward(*args)

    monkeypatch.setattr(mix_ops, "mix_backward", spy)
    return calls


@pytest.mark.parametrize("base", ["kerple", "fire"])
@pytest.mark.parametrize("wanted", ["query", "key", "value", "first_weight", "second_bias", "base"])
def test_only_wanted_gradients_are_computed(operator_calls, wanted, base):
    tensors, module, keywords = Case(base).make(torch.float32)
    tensors = dict(zip(("query", "key", "value"), (t.detach() for t in tensors)))
    module.requires_grad_(False)
    if wanted in tensors:
        tensors[wanted].requires_grad_()
    else:
        getattr(module, wanted).requires_grad_()
    attention(**tensors, bias=module, **keywords).sum().backward()
    (call,) = operator_calls
    assert call["need_q"] == (wanted == "query")
    assert call["need_kv"] == (wanted in ("key", "value"))
    assert call["need_weights"] == (wanted in ("first_weight", "second_bias"))
    assert call["need_base"] == (wanted == "base")
    everything = {**tensors, **{name.split(".")[0]: p for name, p in module.named_parameters()}}
    assert [name for name, tensor in everything.items() if tensor.grad is not None] == [wanted]


def test_nothing_is_kept_without_gradients():
    tensors, module, _ = Case().make(torch.float32)
    tensors = [t.detach() for t in tensors]
    with torch.no_grad():
        assert attention(*tensors, module).grad_fn is None
    assert attention(*tensors, module.requires_grad_(False)).grad_fn is None


def test_lse_alone_has_a_gradient():
    tensors, module, keywords = Case("fire", kernel_size=3).make(torch.float64)
    lses = [f(*tensors, module, return_lse=True, **keywords)[1] for f in (attention, attention_reference)]
    inputs = [*tensors, *module.parameters()]
    grads = (torch.autograd.grad(lse.sin().sum(), inputs, materialize_grads=True) for lse in lses)
    torch.testing.assert_close(*grads)


def test_a_second_derivative_is_refused():
    tensors, module, keywords = Case("kerple").make(torch.float64)
    out = attention(*tensors, module, **keywords)
    first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*attention_reference"):
        first[0].sum().backward()


def test_the_reference_has_a_second_derivative():
    case = Case("kerple", 2, queries=3, keys=3, dim=2, value_dim=2, hidden=2, kernel_size=3, batch=1)
    tensors, module, keywords = case.make(torch.float64)
    reference = functools.partial(attention_reference, bias=module, **keywords)
    assert torch.autograd.gradgradcheck(reference, tensors)


# -------------------------------------------------------------------------- compile, checkpoint, copies


def call(query, key, value, bias, kwargs):
    return attention(query, key, value, bias, return_lse=True, **kwargs)


@pytest.mark.parametrize("case", [Case("none"), Case("kerple", kernel_size=3), Case("fire", published=True)])
def test_compiled_whole_with_any_length(case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    module = case.module(torch.float32)
    for length in (12, 17, 30):
        tensors = [*qkv(queries=length), *module.parameters()]
        keywords = dict(is_causal=True)
        got, expected = compiled(*tensors[:3], module, keywords), call(*tensors[:3], module, keywords)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, tensors), gradients(expected, tensors))
    assert counter.frame_count <= 2


def run(layer, x, wrap):
    layer.zero_grad()
    wrap(layer, x).sin().sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("keep", [False, True])
def test_selective_checkpointing_runs_the_forward_once(monkeypatch, keep):
    calls, forward = [], mix_blockwise.forward
    monkeypatch.setattr(
        mix_blockwise, "forward", lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    )
    layer, x = Layer(DAPE(HEADS, FIRE(HEADS), kernel_size=3)), torch.randn(2, 10, 8)
    plain = run(layer, x, lambda layer, x: layer(x))
    calls.clear()
    contexts = functools.partial(create_selective_checkpoint_contexts, posattn.CHECKPOINT_OPS if keep else [])
    again = run(layer, x, functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))
    assert len(calls) == (1 if keep else 2)
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


@pytest.mark.parametrize("base", ["none", "alibi", "kerple", "tisa", "fire"])
def test_state_dict_and_copies(base):
    case = Case(base, HEADS, kernel_size=3)
    layer, x = Layer(case.module(torch.float32)), torch.randn(2, 10, 8)
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = Layer(case.module(torch.float32))
    fresh.load_state_dict(torch.load(file))
    torch.testing.assert_close(fresh(x), expected)


def test_parameters_in_half_precision_and_the_published_start():
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 32), torch.nn.Linear(32, 8)
    torch.manual_seed(0)
    module = DAPE(8, posattn.ALiBi(8))
    assert torch.equal(module.first_weight[:, :, 0], linear[0].weight)
    assert torch.equal(module.second_bias, linear[1].bias)
    tensors = [t.detach().bfloat16() for t in qkv(heads=8)]
    module.bfloat16()
    out = attention(*tensors, module)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attention(*tensors, module.float()))


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "module",
    [DAPE(2, posattn.TISA(2), hidden=4), DAPE(2, FIRE(2, hidden=4), hidden=4, kernel_size=3)],
    ids=["table", "FIRE, V2"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_no_tensor_is_of_the_size_of_the_scores(module, causal, monkeypatch):
    """Forward and backward."""
    largest = []
    for length in (1024, 2048):
        tensors = [torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3)]
        mode = Largest()
        with monkeypatch.context() as patch, mode:
            mode.see(patch, mix_blockwise)
            attention(*tensors, module, is_causal=causal).sum().backward()
        assert mode.seen == 2
        largest.append(mode.numbers)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 2048**2 / 5


@pytest.mark.slow
def test_peak_memory_of_a_process_at_8192_and_16384():
    """Forward and backward; the scores of one head would be 256 MB and 1 GB."""
    code = """
import resource, torch, posattn
torch.set_num_threads(1)
module = posattn.DAPE(2, posattn.KERPLE(2), hidden=4)
def peak(n):
    tensors = [torch.randn(1, 2, n, 8, requires_grad=True) for _ in range(3)]
    posattn.attention(*tensors, module, is_causal=True).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = peak(64)
print(peak(8192) - start, peak(16384) - start)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once, twice = map(float, done.stdout.split())
    assert once < 60
    assert twice < 2.2 * once + 20
