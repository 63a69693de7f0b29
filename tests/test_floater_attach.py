"""attach on models of transformers: the warm start, what is added where, copies, states, the way back, errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from floater_attach_cases import MODELS, build, gradients, inputs, set_going
from torch import nn

from posattn.floater import attach

transformers = pytest.importorskip("transformers")
BIASES = (
    "query.bias",
    "q_proj.bias",
    "v_proj.bias",
    "k_lin.bias",
    "c_attn.bias",
    "q_attn.bias",
    "query_key_value.bias",
)


@pytest.mark.parametrize("name", MODELS)
def test_the_warm_start_is_exact(name):
    # Adding a bias after a product instead of within it costs one rounding a projection; three layers with weights as
    # large as these may enlarge it a hundredfold. Outputs are of order 1 to 10.
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        model = build(name, transformers).to(dtype)
        given = inputs(model)
        before = model(**given)[0]
        attachment = attach(model)
        torch.testing.assert_close(model(**given)[0], before, rtol=tolerance, atol=tolerance)
        expected = MODELS[name][3]
        assert {key: (e.streams, e.num_layers) for key, e in attachment.encoders.items()} == expected
        assert not any(key.endswith(BIASES) for key in model.state_dict())
        assert model.floater is attachment
        assert all(e.initial.dtype == dtype for e in attachment.encoders.values())
        if name not in ("t5", "llama"):  # which have no biases
            assert all(e.initial.ne(0).any() for e in attachment.encoders.values())


def dense(model, encoder, x, layer, positions):
    """Self-attention of one layer from its definition: outputs of the heads side by side."""
    tables = encoder.at(positions)[:, layer]  # (stream, batch or 1, length, dim)
    heads = model.config.num_attention_heads
    kind = model.config.model_type
    if kind == "bert":
        part = model.bert.encoder.layer[layer].attention.self
        projected = [F.linear(x, p.weight) for p in (part.query, part.key, part.value)]
    elif kind == "gpt2":
        projected = (x @ model.transformer.h[layer].attn.c_attn.weight).chunk(3, dim=-1)
    else:  # GPT-NeoX: one head after the other, its query, key and value
        rows = model.gpt_neox.layers[layer].attention.query_key_value.weight.view(heads, 3, -1, x.shape[-1])
        projected = [F.linear(x, rows[:, i].reshape(-1, x.shape[-1])) for i in range(3)]
    q, k, v = ((p + t).unflatten(-1, (heads, -1)).transpose(1, 2) for p, t in zip(projected, tables))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if kind != "bert":
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("positions", ["none", "apart", "fractions"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt-neox"])
def test_outputs_and_gradients_are_those_of_the_definition(name, positions):
    # Rotary angles would have to be in the reference, too: none of GPT-NeoX's dimensions is rotated.
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.0}}
    model = build(name, transformers, **(changes if name == "gpt-neox" else {})).double()
    if name == "gpt-neox":
        model.gpt_neox.rotary_emb.inv_freq = model.gpt_neox.rotary_emb.inv_freq[:0]
    encoder = set_going(attach(model)).encoders["layers"]
    attention, last = {
        "bert": lambda: (model.bert.encoder.layer[0].attention.self, None),
        "gpt2": lambda: (model.transformer.h[0].attn, model.transformer.h[0].attn.c_proj),
        "gpt-neox": lambda: (model.gpt_neox.layers[0].attention, model.gpt_neox.layers[0].attention.dense),
    }[name]()
    seen = {}
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(x=args[0]), with_kwargs=True)
    (last or attention).register_forward_hook(
        lambda _, args, out: seen.update(out=args[0] if last else out[0])
    )
    given, at = inputs(model), torch.arange(9)[None]
    if positions == "apart":
        at = torch.stack([torch.randperm(20)[:9] for _ in range(2)])
        # Without a mask transformers takes positions that are not in order for several texts in one sequence.
        given |= {"position_ids": at, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    if positions == "fractions":
        if name != "gpt-neox":
            pytest.skip("an embedding takes whole positions only")
        at = given["position_ids"] = torch.rand(2, 9, dtype=torch.float64) * 20
    model(**given)
    expected = dense(model, encoder, seen["x"].detach(), 0, at)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((seen["out"] * weights).sum(), list(encoder.parameters()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(encoder.parameters()))
    for one, other in zip(found, wanted):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def by_plain_hooks(model, plain, tables):
    """The projections of `plain` (no biases left) with tables added, for BART."""

    def adds(table):
        return lambda _, args, out: out + table[: out.shape[1]]

    def watch(module, encoder, stream, layer):
        module.bias = None
        module.register_forward_hook(
            adds(tables[encoder][model.floater[encoder].streams.index(stream), layer])
        )

    for side, part in (("encoder", plain.model.encoder), ("decoder", plain.model.decoder)):
        for i, layer in enumerate(part.layers):
            for stream, module in zip(("query", "key", "value"), projections(layer.self_attn)):
                watch(module, side, stream, i)
            if side == "decoder":
                cross = zip(("cross_query", "cross_key", "cross_value"), projections(layer.encoder_attn))
                for stream, module in cross:
                    watch(module, "decoder" if stream == "cross_query" else "cross", stream, i)
    return plain


def projections(attention):
    return attention.q_proj, attention.k_proj, attention.v_proj


def test_three_encoders_of_a_translation_model():
    model = build("bart", transformers).double()
    plain = copy.deepcopy(model)
    set_going(attach(model))
    tables = {name: encoder(16) for name, encoder in model.floater.encoders.items()}
    by_plain_hooks(model, plain, tables)
    given = inputs(model)
    found, expected = model(**given).logits, plain(**given).logits
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    found.pow(2).sum().backward()
    grads = gradients(model.floater)
    model.zero_grad()
    expected.pow(2).sum().backward()
    wanted = gradients(model.floater)
    assert len(grads) == len(list(model.floater.parameters()))
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, wanted[name], rtol=1e-9, atol=1e-9 * grad.abs().max().item(), msg=name
        )


def test_one_solve_a_forward():
    model = build("gpt2", transformers)
    encoder = set_going(attach(model)).encoders["layers"]
    lengths = []
    encoder.register_forward_hook(lambda _, args, out: lengths.append(args[0]))
    given = inputs(model)
    (model(**given)[0].sum() + model(**inputs(model, 5))[0].sum()).backward()
    assert lengths == [9, 5]


@pytest.mark.parametrize("name", ["gpt2", "bart", "albert"])
def test_copies_pickles_and_states(name):
    model = build(name, transformers)
    set_going(attach(model))
    given = inputs(model)
    expected = model(**given)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    fresh = build(name, transformers)
    attach(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    others = copy.deepcopy(model), torch.load(file, weights_only=False), fresh
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        assert torch.equal(other(**given)[0], expected)
        assert other.floater is not model.floater
        with pytest.warns(UserWarning, match="flow is not zero"):
            other.floater.detach()
        assert not hasattr(other, "floater")
    assert torch.equal(others[0](**given)[0], others[1](**given)[0])


@pytest.mark.parametrize("name", ["gpt2", "gpt2-cross", "opt", "gpt-neox", "llama", "bart"])
@pytest.mark.parametrize("streams", [("query", "key", "value"), ("value", "query"), ("key",)])
def test_detach_gives_the_model_back(name, streams, recwarn):
    model = build(name, transformers).double()
    given = inputs(model)
    before = model(**given)[0]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attachment = attach(model, streams=streams)
    torch.testing.assert_close(model(**given)[0], before, rtol=1e-12, atol=1e-12)
    attachment.detach()
    assert not [w for w in recwarn if "flow" in str(w.message)]
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(model(**given)[0], before)
    with pytest.raises(RuntimeError, match="detached already"):
        attachment.detach()
    attach(model)  # and again
    assert not any(module._forward_hooks for module in attachment.modules())


def test_biases_that_came_by_training_stay():
    model = build("llama", transformers).double()
    attachment = attach(model)
    with torch.no_grad():
        attachment.encoders["layers"].initial.normal_()
    given = inputs(model)
    expected = model(**given)[0]
    attachment.detach()
    assert model.model.layers[0].self_attn.k_proj.bias is not None
    torch.testing.assert_close(model(**given)[0], expected, rtol=1e-12, atol=1e-12)


def test_errors():
    with pytest.raises(
        ValueError, match=r"no attention found in Linear.*q_proj, k_proj, v_proj.*query_key_value"
    ):
        attach(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        attach("gpt2")
    model = build("llama", transformers, num_key_value_heads=2)
    with pytest.raises(
        ValueError, match=r"query 32, key 16, value 16.*grouped queries.*streams=\(\"query\",\)"
    ):
        attach(model)
    given = inputs(model)
    before = model(**given)[0]
    assert attach(model, streams=("query",)).encoders["layers"].streams == ("query",)
    torch.testing.assert_close(model(**given)[0], before, rtol=2e-5, atol=2e-5)
    model = build("gpt2", transformers)
    for streams, error in (("query", TypeError), (("q",), ValueError), ((), ValueError)):
        with pytest.raises(error, match="streams must be"):
            attach(model, streams=streams)
    attach(model.transformer)
    with pytest.raises(ValueError, match="attached already"):
        attach(model)
    with pytest.raises(RuntimeError, match="called outside of a forward"):
        model.transformer.h[0].attn(torch.randn(1, 4, 32))
    model.transformer.h[0].register_forward_pre_hook(lambda *_: (torch.randn(1, 9, 32),))
    given = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "position_ids": torch.tensor([[3, 1, 2, 0]])}
    with pytest.raises(RuntimeError, match=r"positions of shape \(1, 4\) are given for 9 tokens"):
        model(**given)
