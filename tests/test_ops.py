"""The operators in PyTorch's machinery: registration, unneeded gradients, checkpointing, copies."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from bias_cases import CASES, make
from calls import HEADS, Layer, gradients, qkv
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import posattn
from posattn import attention, attention_reference, ops

# --------------------------------------------------------------------------------------- torch.library


SCALED = (None,) * 4  # line, rows, knots, pieces: test_fire.py has them


def operator_arguments(kind: str, backend: str) -> tuple:
    """What attend_forward gets, with or without the optional tensors."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    rand = functools.partial(torch.randn, device=device)
    query, key = rand(2, 4, 5, 8), rand(2, 2, 7, 8)
    value = rand(2, 2, 7, 8 if kind == "plain" else 6)
    table = support = slopes = mask = None
    if kind == "table":
        query = rand(2, 5, 4, 8).transpose(1, 2)
        table, mask = rand(4, 11), rand(2, 7) > -1
        support = torch.tensor([[-2] * 4, [3] * 4], dtype=torch.int32, device=device)
    if kind == "slopes":
        slopes = torch.rand(4, device=device)
    numbers = (0.3, 20.0 if kind == "table" else 0.0, -2, 4, 0, True)
    return (query, key, value, table, support, slopes, *SCALED, mask, *numbers, backend)


EVERYTHING, ONLY_Q, ONLY_KV = (True, True, True), (True, False, False), (False, True, False)
OPCHECKS = [
    ("blockwise", kind, need)
    for kind in ("plain", "table", "slopes")
    for need in (EVERYTHING, ONLY_Q, ONLY_KV)
]
OPCHECKS += [
    pytest.param("triton", kind, need, marks=pytest.mark.triton)
    for kind, need in (("table", EVERYTHING), ("slopes", ONLY_Q))
]


@pytest.mark.parametrize(("backend", "kind", "need"), OPCHECKS)
def test_opcheck(backend, kind, need):
    arguments = operator_arguments(kind, backend)
    if need == EVERYTHING:
        torch.library.opcheck(ops.attend_forward, arguments)
    query, key, value, table, *others = arguments[:11]
    out, lse = ops.attend_forward(*arguments)
    need = (*need[:2], need[2] and table is not None)
    grads = (torch.randn_like(out), torch.randn_like(lse) if kind == "table" else None)
    saved = (query, key, value, out, lse, table, *others)
    arguments = (*grads, *saved, *arguments[11:17], False, *need, True, backend)
    torch.library.opcheck(ops.attend_backward, arguments)
    wanted = (query, need[0]), (key, need[1]), (value, need[1]), (table, need[2])
    *grads, dline, drows, dpieces, drelative, dsinks = ops.attend_backward(*arguments)
    for grad, (like, needed) in zip(grads, wanted):
        assert grad.shape == (like.shape if needed else (0,))
    assert dline.shape == drows.shape == dpieces.shape == drelative.shape == dsinks.shape == (0,)


def test_checkpoint_ops_names_the_forward_operators():
    names = "attend", "mix", "linear", "sine", "conv"
    forward = {getattr(torch.ops.posattn, f"{name}_forward").default for name in names}
    assert set(posattn.CHECKPOINT_OPS) == forward
    assert len(posattn.CHECKPOINT_OPS) == len(forward)


# ------------------------------------------------------------------------------------ no work unneeded


@pytest.fixture
def operator_calls(monkeypatch):
    """The arguments of every attend_backward, by name."""
    names = [argument.name for argument in ops.attend_backward._schema.arguments]
    calls, backward = [], ops.attend_backward

    def spy(*args, **options):
        calls.append(dict(zip(names, args)))
        return backward(*args, **options)

    monkeypatch.setattr(ops, "attend_backward", spy)
    return calls


@pytest.mark.parametrize("wanted", ["query", "key", "value", "bias"])
def test_only_wanted_gradients_are_computed(operator_calls, wanted):
    tensors = dict(zip(("query", "key", "value"), (t.detach() for t in qkv())))
    tensors["bias"] = torch.randn(HEADS, 17)
    tensors[wanted].requires_grad_()
    attention(**tensors).sum().backward()
    (call,) = operator_calls
    assert call["need_q"] == (wanted == "query")
    assert call["need_kv"] == (wanted in ("key", "value"))
    assert call["need_table"] == (wanted == "bias")
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [wanted]


def test_nothing_is_kept_without_gradients():
    query, key, value = (t.detach() for t in qkv())
    bias = posattn.TISA(HEADS)
    with torch.no_grad():
        assert attention(query, key, value, bias).grad_fn is None
    bias.requires_grad_(False)
    assert attention(query, key, value, bias).grad_fn is None


def test_frozen_slopes_take_no_table(operator_calls):
    tensors = qkv()
    attention(*tensors, posattn.ALiBi(HEADS)).sum().backward()
    attention(*tensors, posattn.ALiBi(HEADS, learnable=True)).sum().backward()
    frozen, learnable = operator_calls
    assert frozen["table"] is None
    assert frozen["slopes"] is not None
    assert not frozen["need_table"]
    assert learnable["table"] is not None
    assert learnable["slopes"] is None
    assert learnable["need_table"]


def test_determinism_is_that_of_the_forward_call(operator_calls):
    tensors = qkv()
    try:
        torch.use_deterministic_algorithms(True)
        out = attention(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    attention(*tensors).sum().backward()
    assert [call["deterministic"] for call in operator_calls] == [True, False]


# ------------------------------------------------------------------------------------- double backward


def test_create_graph_works_and_a_second_derivative_is_refused():
    tensors = qkv()
    expected = gradients(attention(*tensors), tensors)
    first = torch.autograd.grad(attention(*tensors).sin().sum(), tensors, create_graph=True)
    torch.testing.assert_close(first, expected)
    with pytest.raises(
        RuntimeError, match=r"posattn\.attention has no second derivative.*attention_reference"
    ):
        first[0].sum().backward()


def test_the_reference_has_a_second_derivative():
    tensors = [torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    table = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        functools.partial(attention_reference, is_causal=True), (*tensors, table)
    )


# --------------------------------------------------------------------------------------- checkpointing


def run(layer, x, wrap):
    layer.zero_grad()
    wrap(layer, x).sin().sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    layer, x = Layer(posattn.TISA(HEADS)), torch.randn(2, 10, 8, requires_grad=True)
    plain = run(layer, x, lambda layer, x: layer(x))
    again = run(layer, x, functools.partial(checkpoint, use_reentrant=use_reentrant))
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


@pytest.mark.parametrize(("keep", "times"), [(False, 2), (True, 1)])
def test_selective_checkpointing_runs_the_forward_once(monkeypatch, keep, times):
    module, calls = pytest.importorskip("posattn.blockwise"), []
    forward = module.forward
    monkeypatch.setattr(
        module, "forward", lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    )
    layer, x = Layer(posattn.TISA(HEADS)), torch.randn(2, 10, 8)
    plain = run(layer, x, lambda layer, x: layer(x))
    calls.clear()
    saved = posattn.CHECKPOINT_OPS if keep else []
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    again = run(layer, x, functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))
    assert len(calls) == times
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


# ---------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", CASES)
def test_layers_are_copied_and_pickled(name):
    layer, x = Layer(make(name)), torch.randn(2, 10, 8)
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = Layer(make(name))
    fresh.load_state_dict(torch.load(file))
    torch.testing.assert_close(fresh(x), expected)


def test_vmap_is_refused_by_torch():
    tensors = [t.detach()[None] for t in qkv()]
    with pytest.raises(RuntimeError, match="functorch"):
        torch.vmap(attention)(*tensors)
