"""The operators of linear attention and SPE in PyTorch's machinery."""

from __future__ import annotations

import functools

import pytest
import torch
from spe_cases import Case
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import posattn
from posattn import linear_attention, linear_blockwise, linear_ops, spe_ops

# --------------------------------------------------------------------------------------- torch.library

H, D, R, L = 2, 4, 8, 7


def place(backend, *tensors):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return [t if t is None else t.to(device) for t in tensors]


def check(operator, arguments, backward, needs, likes, saved=lambda results: ()):
    """opcheck of both; and that each gradient has its tensor's shape, or (0,) where it is not needed."""
    torch.library.opcheck(operator, arguments)
    results = operator(*arguments)
    grads = backward(results)
    torch.library.opcheck(grads[0], grads[1])
    for grad, like, needed in zip(grads[0](*grads[1]), likes, needs):
        assert grad.shape == (like.shape if needed and like is not None else (0,))


LINEAR = [
    ("blockwise", "elu", True, True, (True, True, True)),
    ("blockwise", "relu", False, False, (True, False, False)),
    ("blockwise", "identity", False, True, (False, True, True)),
    pytest.param("triton", "elu", True, True, (True, True, True), marks=pytest.mark.triton),
]


@pytest.mark.parametrize(("backend", "feature_map", "causal", "states", "need"), LINEAR)
def test_opcheck_of_attention(backend, feature_map, causal, states, need):
    B = 1 if backend == "triton" else 2  # the interpreter is slow
    q, k = torch.rand(2, B, H, L, R).unbind()
    v, mask = torch.randn(B, H, L, 5), torch.rand(B, L) < 0.7
    state, sums = (torch.rand(B, H, R, 5), torch.rand(B, H, R)) if states else (None, None)
    q, k, v, mask, state, sums = place(backend, q, k, v, mask, state, sums)
    given = (mask if states else None, state, sums)
    arguments = (q, k, v, *given, feature_map, 1e-6, causal, states, backend)

    def backward(results):
        out, den, kv, ksum = results
        grads = (torch.randn_like(out), *((torch.randn_like(kv), torch.randn_like(ksum)) if states else (None, None)))
        return linear_ops.linear_backward, (*grads, q, k, v, out, den, *given, feature_map, causal, *need, backend)

    needs = (need[0], need[1], need[1], need[2], need[2])
    check(linear_ops.linear_forward, arguments, backward, needs, (q, k, v, state, sums))


SPE = [
    ("blockwise", True, (True, True)),
    ("blockwise", False, (True, False)),
    ("blockwise", True, (False, True)),
    pytest.param("triton", True, (True, True), marks=pytest.mark.triton),
]


@pytest.mark.parametrize(("backend", "has_gate", "need"), SPE)
@pytest.mark.parametrize("kind", ["sine", "conv", "seed"])
def test_opcheck_of_codes(kind, backend, has_gate, need):
    B, H, D = (1, 1, 2) if backend == "triton" else (2, 2, 4)  # the interpreter is slow
    q, k = torch.randn(2, B, H, L, D).unbind()
    wide = torch.float64 if kind == "sine" else torch.float32
    if kind == "sine":
        parts = [torch.rand(H, D, 3, dtype=wide) for _ in range(3)]
        noise = torch.randn(H, D, 6, R)
    else:
        parts = [torch.rand(H, D, 3) for _ in range(2)]
        noise = torch.randn(H, D, L + 5, R) if kind == "conv" else torch.tensor([2**40 + 1])
    gate = (torch.rand(H, D, dtype=wide), torch.randn(H, D, R)) if has_gate else (None, None)
    q, k, noise, *gate = place(backend, q, k, noise, *gate)
    parts = place(backend, *parts)
    given = (q, k, *parts, noise, *(() if kind == "sine" else (R,)), *gate, 2, 1)
    forward, gradients = spe_ops.sine_forward, spe_ops.sine_backward
    if kind != "sine":
        forward, gradients = spe_ops.conv_forward, spe_ops.conv_backward

    def backward(results):
        return gradients, (*map(torch.randn_like, results), *given, *need, backend)

    likes = (q, k, *parts, gate[0])
    needs = (need[0], need[0], *[need[1]] * (len(likes) - 2))
    check(forward, (*given, backend), backward, needs, likes)


# ------------------------------------------------------------------------------------------- autograd


def names(backward):
    return [argument.name for argument in backward._schema.arguments]


@pytest.fixture
def operator_calls(monkeypatch):
    """The arguments of every backward operator, by name."""
    calls = []
    for place, name in ((linear_ops, "linear_backward"), (spe_ops, "sine_backward"), (spe_ops, "conv_backward")):
        backward = getattr(place, name)

        def spy(*args, backward=backward):
            calls.append(dict(zip(names(backward), args)))
            return backward(*args)

        monkeypatch.setattr(place, name, spy)
    return calls


@pytest.mark.parametrize("wanted", ["query", "key", "value", "offsets", "gate"])
def test_only_wanted_gradients_are_computed(operator_calls, wanted):
    tensors, module, keywords = Case().make(torch.float32)
    tensors = dict(zip(("query", "key", "value"), (t.detach() for t in tensors)))
    module.requires_grad_(False)
    if wanted in tensors:
        tensors[wanted].requires_grad_()
    else:
        getattr(module, wanted).requires_grad_()
    linear_attention(**tensors, spe=module, **keywords).sum().backward()
    attend = operator_calls.pop(0)
    assert attend["need_q"] == (wanted != "value")  # both features come of one operator
    assert attend["need_state"] is False
    assert len(operator_calls) == (wanted != "value")
    for codes in operator_calls:
        assert codes["need_inputs"] == (wanted in ("query", "key"))
        assert codes["need_codes"] == (wanted in ("offsets", "gate"))
    everything = {**tensors, **dict(module.named_parameters())}
    assert [name for name, tensor in everything.items() if tensor.grad is not None] == [wanted]


@pytest.mark.parametrize("spe", ["none", "sine", "conv", "exact"])
def test_nothing_is_kept_without_gradients(spe):
    tensors, module, keywords = Case(spe).make(torch.float32)
    tensors = [t.detach() for t in tensors]
    with torch.no_grad():
        assert linear_attention(*tensors, spe=module, **keywords).grad_fn is None
    module = None if module is None else module.requires_grad_(False)
    assert linear_attention(*tensors, spe=module, **keywords).grad_fn is None


@pytest.mark.parametrize("spe", ["none", "sine", "conv"])
def test_a_second_derivative_is_refused(spe):
    tensors, module, keywords = Case(spe).make(torch.float64)
    out = linear_attention(*tensors, spe=module, **keywords)
    first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as error:
        first[0].sum().backward()
    assert "attention_reference" not in str(error.value)


@pytest.mark.parametrize("spe", ["sine", "conv"])
def test_a_second_derivative_of_codes_is_refused(spe):
    tensors, module, _ = Case(spe).make(torch.float64)
    hats = module().features(*tensors[:2], 0, 0, "blockwise")
    first = torch.autograd.grad(hats[0].sin().sum(), [tensors[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first[0].sum().backward()


@pytest.mark.parametrize("keep", [False, True])
def test_selective_checkpointing_runs_the_forward_once(monkeypatch, keep):
    calls, forward = [], linear_blockwise.forward
    monkeypatch.setattr(linear_blockwise, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    tensors, module, keywords = Case().make(torch.float32)
    codes = module()

    def run(*tensors):
        return linear_attention(*tensors, spe=codes, **keywords)

    plain = torch.autograd.grad(run(*tensors).sin().sum(), [*tensors, *module.parameters()])
    calls.clear()
    contexts = functools.partial(create_selective_checkpoint_contexts, posattn.CHECKPOINT_OPS if keep else [])
    out = checkpoint(run, *tensors, use_reentrant=False, context_fn=contexts)
    again = torch.autograd.grad(out.sin().sum(), [*tensors, *module.parameters()])
    assert len(calls) == (1 if keep else 2)
    torch.testing.assert_close(again, plain, atol=0, rtol=0)
