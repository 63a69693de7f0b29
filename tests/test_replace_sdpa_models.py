"""replace_sdpa around models: torch's modules, transformers, checkpoints and compiled code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from posattn import TISA, ALiBi, replace_sdpa

HEADS, DIM = 4, 8
CLOSE = dict(rtol=1e-9, atol=1e-10)


def qkv():
    return [torch.randn(2, HEADS, 6, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def bias_of():
    bias = TISA(HEADS).double()
    nn.init.normal_(bias.amplitudes)
    return bias


@pytest.mark.parametrize("outer", [None, torch.device("cpu")])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_modules(outer, training):
    """With and without gradients: in evaluation torch would take its fast path."""
    layer = nn.TransformerEncoderLayer(32, HEADS, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    x, biases = torch.randn(2, 6, 32), [TISA(HEADS), ALiBi(HEADS)]
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, -2:] = True
    masks = [bias.dense(6, 6).repeat(2, 1, 1) for bias in biases]
    hidden = torch.zeros(2, 6).masked_fill(padding, float("-inf"))
    expected = x
    for each, mask in zip(encoder.layers, masks):
        expected = each(expected, mask, hidden)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), replace_sdpa(biases) as replaced:
            if outer is not None:
                with outer:
                    found = encoder(x, src_key_padding_mask=padding)
            else:
                found = encoder(x, src_key_padding_mask=padding)
        assert (replaced.calls, replaced.dense) == (2, 0)
        torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-5)


def test_a_module_that_returns_weights_is_warned_of():
    module, x = nn.MultiheadAttention(32, HEADS), torch.randn(6, 2, 32)
    expected = module(x, x, x)[0]
    with replace_sdpa(TISA(HEADS)) as replaced:
        with pytest.warns(UserWarning, match="need_weights=True"):
            found = module(x, x, x)[0]
        module(x, x, x, need_weights=False)
    assert torch.equal(found, expected)
    assert replaced.calls == 1


def layers(count, tensors):
    query, key, value = tensors
    for _ in range(count):
        query = F.scaled_dot_product_attention(query, key, value)
    return query


def test_checkpoints():
    bias, tensors = bias_of(), qkv()

    def loss(*tensors):
        return layers(2, tensors).sin().sum()

    with replace_sdpa(bias):
        expected = torch.autograd.grad(loss(*tensors), [*tensors, *bias.parameters()])
        found = torch.autograd.grad(
            checkpoint(loss, *tensors, use_reentrant=False), [*tensors, *bias.parameters()]
        )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **CLOSE)
    with replace_sdpa([bias, bias]):
        out = checkpoint(loss, *tensors, use_reentrant=False)
        with pytest.raises(RuntimeError, match="list of biases"):
            out.backward()


def test_compiled():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    tensors, biases = qkv(), [bias_of(), bias_of()]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *tensors: layers(2, tensors), backend=counter, fullgraph=True)
    plain = layers(2, tensors)
    torch.testing.assert_close(compiled(*tensors), plain, **CLOSE)
    with replace_sdpa(biases) as replaced:
        expected = layers(2, tensors)
        for _ in range(4):
            found = compiled(*tensors)
            torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 2  # outside and inside
    assert replaced.compiled
    assert replaced.calls == 2
    leaves = [*tensors, *biases[0].parameters()]
    for one, other in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, expected))):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(compiled(*tensors), plain, **CLOSE)


def test_compiled_modules_of_torch():
    module, x = nn.MultiheadAttention(32, HEADS), torch.randn(6, 2, 32)
    bias = TISA(HEADS)

    def call(x):
        return module(x, x, x, need_weights=False)[0]

    torch.compiler.reset()
    with replace_sdpa(bias):
        expected = call(x)
        torch.testing.assert_close(torch.compile(call, backend="aot_eager")(x), expected)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="cannot reach into"), replace_sdpa(bias):
        torch.compile(call, backend="aot_eager", fullgraph=True)(x)


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(50, (2, 7))
    biases = [TISA(4), ALiBi(4)]
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    masks = [bias.dense(7, 7) + torch.full((7, 7), float("-inf")).triu(1) for bias in biases]
    for layer, mask in zip(dense.model.layers, masks):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask[None]}),
            with_kwargs=True,
        )
    with torch.no_grad():
        expected = dense(tokens).logits
        with replace_sdpa(biases) as replaced:
            found = model(tokens).logits
            cache = model(tokens[:, :5], use_cache=True).past_key_values
            later = [model(tokens[:, n : n + 1], past_key_values=cache).logits for n in (5, 6)]
        plain = model(tokens).logits
    assert replaced.calls == 8
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(later, dim=1), expected[:, 5:], rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
