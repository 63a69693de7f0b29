"""attach on torch.nn.MultiheadAttention, alone and in nn.Transformer and its layers."""

from __future__ import annotations

import copy
import io
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from floater_attach_cases import gradients, set_going
from torch import nn
from torch.utils.checkpoint import checkpoint

from posattn.floater import attach

DIM, HEADS, BATCH, QUERIES, KEYS = 16, 4, 3, 7, 5


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def masks(kind, length, other):
    """(key_padding_mask, attn_mask, is_causal) for (BATCH, queries, keys)."""
    hidden = torch.rand(length, other) < 0.3
    hidden[:, 0] = False  # a query that sees nothing is NaN
    padding = torch.zeros(BATCH, other, dtype=torch.bool)
    padding[1, -2:] = True
    per_head = (torch.rand(BATCH * HEADS, length, other) < 0.3).index_fill(2, torch.tensor([0]), False)
    causal = torch.ones(length, other).triu(1).bool()
    return {
        "none": (None, None, False),
        "bool": (None, hidden, False),
        "float": (None, torch.randn(length, other).double(), False),
        "per head": (None, per_head, False),
        "padding": (padding, None, False),
        "both": (padding, hidden, False),
        "float padding": (torch.randn(BATCH, other).double(), None, False),
        "causal": (None, causal, True),
        "causal, padding": (padding, causal, True),
    }[kind]


def layout(module, *tensors):
    return [x if module.batch_first else x.transpose(0, 1) for x in tensors]


def call(module, query, key, value, mask, **options):
    """Of (batch, length, dim) inputs, whatever the module's layout."""
    padding, attn_mask, is_causal = mask
    same = {id(x): layout(module, x)[0] for x in (query, key, value)}  # the same object stays the same object
    given = (same[id(x)] for x in (query, key, value))
    out, weights = module(
        *given, key_padding_mask=padding, attn_mask=attn_mask, is_causal=is_causal, **options
    )
    return layout(module, out)[0], weights


KINDS = ["none", "bool", "float", "per head", "padding", "both", "float padding", "causal", "causal, padding"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", ["self", "cross", "three", "kdim"])
def test_the_warm_start_is_torch_itself(kind, batch_first, inputs):
    sizes = {"kdim": 6, "vdim": 10} if inputs == "kdim" else {}
    module = randomized(nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, **sizes)).double()
    query = torch.randn(BATCH, QUERIES, DIM).double()
    key = {
        "self": query,
        "cross": torch.randn(BATCH, KEYS, DIM).double(),
        "three": torch.randn(BATCH, KEYS, DIM).double(),
        "kdim": torch.randn(BATCH, KEYS, 6).double(),
    }[inputs]
    value = {"three": torch.randn_like(key), "kdim": torch.randn(BATCH, KEYS, 10).double()}.get(inputs, key)
    mask = masks(kind, QUERIES, key.shape[1])
    before = copy.deepcopy(module)
    attach(module)
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        found, expected = (call(m, query, key, value, mask, **options) for m in (module, before))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_inputs_without_a_batch_and_dropout(need_weights):
    module = randomized(nn.MultiheadAttention(DIM, HEADS, dropout=0.5, batch_first=True))
    before = copy.deepcopy(module)
    attach(module)
    x, memory = torch.randn(QUERIES, DIM), torch.randn(KEYS, DIM)
    for inputs in ((x, x, x), (x, memory, memory), (x[None], memory[None], memory[None])):
        results = []
        for each in (module, before):
            torch.manual_seed(3)  # the same draws
            results.append(each(*inputs, need_weights=need_weights))
        # fp32: a few roundings of numbers of order 10
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def dense(module, encoder, query, key, value, streams=("query", "key", "value")):
    """Attention of (batch, length, dim) from its definition, no masks."""
    weights = module.in_proj_weight.chunk(3)
    parts = []
    for i, (stream, x) in enumerate(zip(("query", "key", "value"), (query, key, value))):
        part = F.linear(x, weights[i])
        if stream in streams:
            part = part + encoder(x.shape[1])[streams.index(stream), 0]
        parts.append(part.unflatten(-1, (HEADS, -1)).transpose(1, 2))
    q, k, v = parts
    weights = (q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5).softmax(-1)
    return module.out_proj((weights @ v).transpose(1, 2).flatten(-2)), weights.mean(1)


@pytest.mark.parametrize("streams", [("query", "key", "value"), ("value",), ("key", "query")])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", ["self", "cross"])
def test_outputs_and_gradients_are_those_of_the_definition(streams, batch_first, inputs):
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first).double()  # biases zero
    encoder = set_going(attach(module, streams=streams)).encoders["layers"]
    query = torch.randn(BATCH, QUERIES, DIM).double()
    key = query if inputs == "self" else torch.randn(BATCH, KEYS, DIM).double()
    expected = dense(module, encoder, query, key, key, streams)
    for need_weights in (True, False):
        found = call(module, query, key, key, (None, None, False), need_weights=need_weights)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call(module, query, key, key, (None, None, False))[1], expected[1])
    probe = torch.randn_like(expected[0])
    grads = [
        torch.autograd.grad((out * probe).sum(), list(encoder.parameters()))
        for out in (found[0], expected[0])
    ]
    for one, other in zip(*grads):
        # The gradient of key vectors sums to zero over keys up to their differences: absolute, for what cancels.
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def transformer(**options):
    sizes = {"d_model": DIM, "nhead": HEADS, "dim_feedforward": 24, "batch_first": True, "dropout": 0.0}
    model = nn.Transformer(**sizes, num_encoder_layers=2, num_decoder_layers=3, **options)
    return randomized(model)


def test_a_transformer_has_three_encoders():
    model = transformer().double().eval()
    source, target = torch.randn(BATCH, KEYS, DIM).double(), torch.randn(BATCH, QUERIES, DIM).double()
    before = model(source, target)
    attachment = attach(model)
    torch.testing.assert_close(model(source, target), before, rtol=1e-12, atol=1e-12)
    shapes = {name: (e.streams, e.num_layers) for name, e in attachment.encoders.items()}
    assert shapes == {
        "encoder": (("query", "key", "value"), 2),
        "decoder": (("cross_query", "query", "key", "value"), 3),
        "cross": (("cross_key", "cross_value"), 3),
    }
    lengths = {name: [] for name in shapes}
    for name, encoder in set_going(attachment).encoders.items():
        encoder.register_forward_hook(lambda _, args, out, name=name: lengths[name].append(args[0]))
    out = model(source, target)
    assert (out - before).abs().max() > 1e-2
    assert lengths == {"encoder": [KEYS], "decoder": [QUERIES], "cross": [KEYS]}  # one solve each
    out.sin().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in attachment.parameters())
    with pytest.warns(UserWarning, match="flow is not zero"):
        attachment.detach()
    assert type(model.decoder.layers[0].multihead_attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(source, target), before, rtol=1e-12, atol=1e-12)
    assert {key for key in model.state_dict() if "in_proj_bias" in key or "kept" in key} == {
        key for key in transformer().state_dict() if "in_proj_bias" in key
    }


def test_vectors_arrive_where_torch_would_take_its_fast_path():
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, dropout=0.0, batch_first=True)
    model = randomized(nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randn(BATCH, QUERIES, DIM)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1, -3:] = True  # a nested tensor, in the fast path
    attachment = attach(model)
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
    set_going(attachment)
    slow = model(x, src_key_padding_mask=padding).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            fast = model(x, src_key_padding_mask=padding)
        # The same operators, except that vectors come from the cache: fp32 roundings of numbers of order 1.
        torch.testing.assert_close(fast[~padding], slow[~padding], rtol=1e-5, atol=1e-5)
        assert (fast - before)[~padding].abs().max() > 1e-2
    with pytest.warns(UserWarning, match="flow is not zero"):
        attachment.detach()
    assert model.use_nested_tensor


def test_biases_that_stay():
    model = randomized(nn.MultiheadAttention(DIM, HEADS)).double()
    x = torch.randn(QUERIES, BATCH, DIM).double()
    before, state = model(x, x, x), copy.deepcopy(model.state_dict())
    attachment = attach(model, streams=("key",))
    assert model.kept_bias.requires_grad
    assert model.kept_bias.view(3, DIM).ne(0).any(1).tolist() == [True, False, True]
    torch.testing.assert_close(model(x, x, x), before, rtol=1e-12, atol=1e-12)
    attachment.detach()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_copies_pickles_and_states():
    model = transformer().eval()
    set_going(attach(model))
    given = torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, QUERIES, DIM)
    expected = model(*given)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    fresh = transformer().eval()
    attach(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(*given), expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_layers(reentrant):
    plain = randomized(Checkpointed(None)).double()
    set_going(attach(plain))
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    # A re-entrant checkpoint has gradients only if one of its inputs has.
    batches = [torch.randn(BATCH, n, DIM).double().requires_grad_() for n in (QUERIES, KEYS)]
    solved = []
    model.floater["layers"].register_forward_hook(lambda _, args, out: solved.append(out.requires_grad))
    for each in (plain, model):
        sum(each(x).sin().mean() for x in batches).backward()
    assert sum(solved) == (8 if reentrant else 2)  # re-entrant: each of three layers, beside each forward
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_distributed_data_parallel(tmp_path):
    """One process: every parameter must come out of each backward exactly once."""
    plain = transformer()
    set_going(attach(plain))
    model = copy.deepcopy(plain)
    given = torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, QUERIES, DIM)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            for each in (parallel, plain):
                each(*given).sin().mean().backward()
    finally:
        dist.destroy_process_group()
    expected = gradients(plain)
    for key, grad in gradients(model).items():
        assert torch.equal(grad, expected[key]), key


def test_errors():
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match=f"{option}=True"):
            attach(nn.MultiheadAttention(DIM, HEADS, **{option: True}))
    with pytest.raises(TypeError, match=r"only torch\.nn\.MultiheadAttention is served"):
        attach(type("Other", (nn.MultiheadAttention,), {})(DIM, HEADS))
    module = nn.MultiheadAttention(DIM, HEADS)
    attach(module)
    with pytest.raises(ValueError, match="attached already"):
        attach(module)
    x = torch.randn(QUERIES, BATCH, DIM)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        module(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask must be \(7, 7\) or \(12, 7, 7\), got \(7,\)"):
        module(x, x, x, attn_mask=torch.zeros(7))
    with pytest.raises(RuntimeError, match=r"key_padding_mask must be \(3, 7\), got \(7, 3\)"):
        module(x, x, x, key_padding_mask=torch.zeros(7, 3).bool())
    with pytest.raises(RuntimeError, match="differ in length or batch"):
        module(x, x, x[:3])
    with pytest.raises(RuntimeError, match="must all be 3-D, or all 2-D"):
        module(x[0], x, x)
