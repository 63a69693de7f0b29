"""attach and detach: positions of the model, training, DAPE and packed batches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from oracle_dape import dape_oracle  # noqa: E402
from transformers_cases import CASES, GPT2, NAMED, build, difference, inputs, run, strong  # noqa: E402

import posattn  # noqa: E402
import posattn.integrations.transformers as integration  # noqa: E402
from posattn.integrations.transformers.attachment import biases_of  # noqa: E402

OLD = transformers.__version__ < "5"
tisa = lambda layer, heads: strong(posattn.TISA(heads))


@pytest.mark.parametrize("positions", ["keep", "drop", "zero"])
@pytest.mark.parametrize("name", NAMED)
def test_detach_gives_the_model_back(name, positions):
    model = build(name, "eager", torch.float32)
    before = copy.deepcopy(model)
    given, learned = inputs(name, "left"), []
    if positions not in CASES[name].positions:
        with pytest.raises(ValueError, match='use positions="drop"'):
            integration.attach(model, tisa, positions=positions)
    else:
        assert integration.attach(model, tisa, positions=positions) is model
        assert model.config._attn_implementation == "posattn"
        _, gradients = run(model, name, given)
        learned = [k for k in gradients if k.endswith(("wpe.weight", "position_embeddings.weight"))]
        learned += [k for k in gradients if "relative_attention_bias" in k]
        number = {"t5": 2}.get(name, 1) if "zero" in CASES[name].positions else 0
        assert len(learned) == (0 if positions == "drop" else number)
        with torch.no_grad():
            for key in learned:
                model.get_parameter(key).mul_(1.5).add_(0.1)
        integration.detach(model)
    assert model.config._attn_implementation == "eager"
    assert not hasattr(model.config, "posattn")
    assert {k: (m._forward_hooks, m._forward_pre_hooks) for k, m in model.named_modules()} == {
        k: (m._forward_hooks, m._forward_pre_hooks) for k, m in before.named_modules()
    }
    for (key, ours), (same, theirs) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert key == same
        assert ours.requires_grad == theirs.requires_grad
        if positions == "keep" and key in learned:
            with torch.no_grad():
                ours.copy_(theirs)
        assert torch.equal(ours, theirs), key
    with torch.no_grad():
        assert torch.equal(model(**given).logits, before(**given).logits)
    integration.attach(model, tisa)


@pytest.mark.parametrize("name", NAMED)
def test_dropped_positions_leave_none(name):
    """Without positions, and without a bias, moving the tokens before the last moves nothing but them."""
    model = integration.attach(build(name), lambda layer, heads: None, positions="drop")
    given = inputs(name)
    moved = dict(given)
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    width = given[key].shape[1]
    order = torch.cat([torch.arange(width - 1).flip(0), torch.tensor([width - 1])])
    if name in ("mistral", "gemma2"):
        order = torch.cat(
            [torch.arange(width - 4), torch.tensor([width - 2, width - 3, width - 4, width - 1])]
        )
        model.config.num_hidden_layers = 1
        del model.model.layers[1:]
    elif name not in ("bert", "albert"):  # of causal layers the first alone cannot tell
        part = {
            "t5": "decoder.block",
            "gpt2": "transformer.h",
            "bloom": "transformer.h",
            "mpt": "transformer.blocks",
        }
        del model.get_submodule(part.get(name, "model.layers"))[1:]
        stack = model.decoder if name == "t5" else model
        for config in {id(m.config): m.config for m in stack.modules() if hasattr(m, "config")}.values():
            config.num_hidden_layers = 1
    moved[key] = given[key][:, order]
    extra = {} if name in ("bert", "albert") else {"use_cache": False}
    with torch.no_grad():
        first, second = model(**given, **extra).logits, model(**moved, **extra).logits
    torch.testing.assert_close(first[:, -1], second[:, -1], rtol=1e-4, atol=1e-4)
    assert model.config.posattn["layers"] == {}


def test_dropped_positions_allow_longer_sequences():
    model = integration.attach(build("gpt2"), tisa, positions="drop")
    assert torch.isfinite(model(inputs("gpt2", length=100)["input_ids"]).logits).all()


def test_zeroed_positions_are_trained():
    model = build("gpt2", dtype=torch.float32)
    integration.attach(model, tisa, positions="zero")
    assert model.transformer.wpe.weight.eq(0).all()
    _, gradients = run(model, "gpt2", inputs("gpt2"))
    assert gradients["transformer.wpe.weight"].ne(0).any()


def test_albert_has_one_layer_and_bert_its_own():
    calls = []
    integration.attach(
        build("albert"), lambda layer, heads: calls.append((layer, heads)) or posattn.TISA(heads)
    )
    assert calls == [(0, 4)]
    calls.clear()
    integration.attach(build("t5"), lambda layer, heads: calls.append((layer, heads)) or posattn.TISA(heads))
    assert calls == [(layer, 4) for layer in range(4)]


def test_copies_and_pickles_have_their_own_biases():
    model = integration.attach(build("bloom"), tisa, positions="drop")
    given = inputs("bloom")
    expected = model(**given).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**given).logits, expected)
        for bias in biases_of(other).values():
            nn.init.zeros_(bias.amplitudes)
        assert not torch.equal(other(**given).logits, expected)
        integration.detach(other)
    assert torch.equal(model(**given).logits, expected)


def test_another_implementation_does_not_leave_the_bias_out():
    model = integration.attach(build("llama"), tisa)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="would leave out"):
        model(**inputs("llama"))
    model.set_attn_implementation("posattn")
    model(**inputs("llama"))


@pytest.mark.parametrize("name", NAMED)
def test_the_implementation_can_be_switched(name):
    model = build(name)
    given = inputs(name, "right")
    expected = run(model, name, given)
    model.set_attn_implementation("posattn")
    assert model.config._attn_implementation == "posattn"
    assert difference(run(model, name, given), expected) < CASES[name].tolerance
    model.set_attn_implementation("eager")
    assert difference(run(model, name, given), expected) == 0


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_dape_on_llama(kernel_size):
    """Against the float64 oracle of DAPE in the place of the model's attention."""

    def make(layer, heads):
        dape = posattn.DAPE(heads, base=posattn.KERPLE(heads), hidden=4, kernel_size=kernel_size)
        return dape.double()

    model = integration.attach(build("llama", dtype=torch.float64), make, positions="drop")
    given = inputs("llama")
    ours = run(model, "llama", given)

    def oracle(module, query, key, value, attention_mask, scaling=None, **kwargs):
        dape = module.position_bias
        length = query.shape[2]
        weights = dape.first_weight, dape.first_bias, dape.second_weight, dape.second_bias
        out, _ = dape_oracle(
            query, key, value, *weights, dape.base.dense(length, length), scale=scaling, right=0
        )
        return out.transpose(1, 2).contiguous(), None

    name, function = integration.NAME, integration.attention_forward
    transformers.AttentionInterface.register(name, oracle)
    try:
        expected = run(model, "llama", given)
    finally:
        transformers.AttentionInterface.register(name, function)
    assert difference(ours, expected) < 1e-9


def test_gradient_checkpointing_changes_nothing():
    for name in ("gpt2", "t5", "bloom", "bert"):
        model = integration.attach(build(name, dtype=torch.float32), tisa)
        given = inputs(name, "left")
        model.train()
        expected = run(model, name, given)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert difference(run(model, name, given), expected) < 2e-5, (name, reentrant)


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = integration.attach(build("llama", dtype=torch.float32), tisa, positions="drop").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = inputs("llama")["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        learning_rate=0.01,
        report_to=[],
        save_steps=2,
        use_cpu=True,
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {name for name in before if "position_bias" in name} <= set(changed)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_packed_sequences(name):
    """By position_ids that start anew, and by cu_seq_lens as DataCollatorWithFlattening makes them."""
    model = integration.attach(
        build(name), lambda layer, heads: strong(posattn.TISA(heads).to(CASES[name].dtype))
    )
    ids = inputs(name, length=9)["input_ids"][:1]
    pieces = ids[:, :3], ids[:, 3:]
    expected = torch.cat([model(piece, use_cache=False).logits for piece in pieces], 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    ends = torch.tensor([0, 3, 9], dtype=torch.int32)
    flat = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    for extra in ({}, flat):
        if OLD and name == "gpt2" and extra:
            continue  # its attention does not get them
        logits = model(ids, position_ids=positions, use_cache=False, **extra).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_applied_in_training_only():
    config = transformers.GPT2Config(**{**GPT2, "attn_pdrop": 0.5}, attn_implementation="posattn")
    model = transformers.GPT2LMHeadModel(config)
    ids = inputs("gpt2")["input_ids"]
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(0)
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)
    torch.manual_seed(0)
    assert torch.equal(first, model(ids).logits)
