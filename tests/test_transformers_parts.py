"""Parts of models, configs that models share, biases with common parts, and biases that others hold."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from test_transformers_patterns import BART  # noqa: E402
from transformers_cases import GPT2, GROUPED, SIZES, build, inputs, strong  # noqa: E402

import posattn  # noqa: E402
import posattn.integrations.transformers as integration  # noqa: E402
from posattn.integrations.transformers.attachment import biases_of  # noqa: E402

tisa = lambda layer, heads: strong(posattn.TISA(heads))


def saved_and_loaded(model, path, **given):
    model.save_pretrained(path)
    return type(model).from_pretrained(path, **given).eval()


@pytest.mark.parametrize("part", ["model.encoder", "model.decoder", "model", ""])
@pytest.mark.parametrize("name", ["Bart", "PLBart"])
def test_a_part_is_saved_with_the_whole(name, part, tmp_path):
    config = getattr(transformers, f"{name}Config")(**BART)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    ids = inputs("gpt2")["input_ids"]
    shared = strong(posattn.TISA(4))
    for factory in (tisa, lambda layer, heads: shared):
        integration.attach(model.get_submodule(part), factory)
        loaded = saved_and_loaded(model, tmp_path)
        assert biases_of(loaded).keys() == biases_of(model).keys()
        with torch.no_grad():
            ours, theirs = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, loaded))
        assert torch.equal(ours, theirs)
        integration.detach(model.get_submodule(part))
        assert not biases_of(model)


def test_a_part_with_a_config_of_its_own_is_refused():
    model = build("t5", dtype=torch.float32)
    for part in (model.encoder, model.decoder):
        with pytest.raises(ValueError, match=r"attach to the T5ForConditionalGeneration"):
            integration.attach(part, tisa)
    assert not biases_of(model)


@pytest.mark.parametrize("part", ["", "encoder", "decoder"])
def test_a_model_of_two_models_comes_back(part, tmp_path):
    parts = transformers.BertConfig(**SIZES), transformers.GPT2Config(**GPT2)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = transformers.EncoderDecoderModel(config=config).eval()
    integration.attach(model.get_submodule(part), tisa)
    ids = inputs("bert")["input_ids"]
    loaded = saved_and_loaded(model, tmp_path)
    assert biases_of(loaded).keys() == biases_of(model).keys()
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, loaded))
    assert torch.equal(ours, theirs)
    half = saved_and_loaded(model, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for b in biases_of(half).values() for p in b.parameters()} == {torch.float32}


def test_models_made_from_one_config_do_not_share_biases():
    config = transformers.LlamaConfig(**GROUPED, attn_implementation="sdpa")
    policy, reference = (transformers.LlamaForCausalLM(config) for _ in range(2))
    integration.attach(policy, tisa)
    for other in (config, reference.config):
        assert other._attn_implementation == "sdpa"
        assert not hasattr(other, "posattn")
    assert policy.config is policy.model.config is policy.model.layers[0].self_attn.config
    with pytest.raises(ValueError, match="nothing is attached"):
        integration.detach(reference)
    copied = transformers.LlamaForCausalLM(config)
    assert not biases_of(copied)
    integration.attach(reference.model, tisa)  # the config of the whole stays that of its part
    assert reference.config is reference.model.config
    assert reference.config is not policy.config
    integration.detach(policy)
    assert len(biases_of(reference)) == 2
    reference(inputs("llama")["input_ids"])
    unfilled = copy.deepcopy(policy)
    unfilled.config.posattn = reference.config.posattn
    with pytest.raises(ValueError, match="nothing is attached"):
        integration.detach(unfilled)


def test_biases_with_a_part_in_common_are_refused():
    base = posattn.KERPLE(4)
    model = build("llama")
    for factory in (
        lambda layer, heads: posattn.DAPE(heads, base=base),
        lambda layer, heads: posattn.DAPE(heads, base=base) if layer else base,
    ):
        with pytest.raises(ValueError, match="part in common"):
            integration.attach(model, factory, positions="drop")
    assert not biases_of(model)
    whole = posattn.DAPE(4, base=base)
    integration.attach(model, lambda layer, heads: whole, positions="drop")


def test_layers_that_are_no_attention_of_ours_are_refused():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8}
    kinds = ["linear_attention", "full_attention"]
    config = transformers.MiniMaxConfig(**GROUPED, **experts, layer_types=kinds)
    model = transformers.MiniMaxForCausalLM(config)
    with pytest.raises(ValueError, match=r"layer 0, .*MiniMaxLightningAttention.*pass layers="):
        integration.attach(model, tisa)
    integration.attach(model, tisa, layers=[1])


def test_a_dape_warns_of_dropout():
    dape = lambda layer, heads: posattn.DAPE(heads)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "attn_pdrop": 0.1}))
    with pytest.warns(UserWarning, match=r"config\.attn_pdrop is not 0"):
        integration.attach(model, dape, positions="drop")
    with pytest.raises(ValueError, match="dropout_p must be 0 with a DAPE"):
        model.train()(inputs("gpt2")["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration.attach(build("gpt2"), dape, positions="drop")
        integration.attach(integration.detach(model), tisa)


@pytest.mark.parametrize(
    "factory", [tisa, lambda layer, heads: strong(posattn.DAPE(heads, base=posattn.FIRE(heads, hidden=4)))]
)
def test_offloaded_biases_are_loaded(factory):
    accelerate = pytest.importorskip("accelerate")
    model = integration.attach(build("llama"), factory, positions="drop")
    given = inputs("llama")
    with torch.no_grad():
        expected = model(**given).logits
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        for _ in range(2):
            assert torch.equal(model(**given).logits, expected)
            assert all(p.is_meta for b in biases_of(model).values() for p in b.parameters())


class Wrapper(nn.Module):
    """What PEFT makes of a module in modules_to_save."""

    def __init__(self, inside):
        super().__init__()
        self.original_module = inside
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(inside)})
        self.active_adapter, self.disable_adapters = "default", False


def test_the_copy_of_peft_is_the_one_that_counts():
    model, given = integration.attach(build("llama"), tisa, positions="drop"), inputs("llama")
    expected = model(**given).logits
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.position_bias = Wrapper(layer.position_bias)
    assert torch.equal(model(**given).logits, expected)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.position_bias.modules_to_save.parameters():
                parameter.add_(1)
    assert not torch.allclose(model(**given).logits, expected)
    for layer in layers:
        layer.position_bias.disable_adapters = True
    assert torch.equal(model(**given).logits, expected)
    layers[0].position_bias = nn.Identity()
    with pytest.raises(TypeError, match="must be a bias of posattn, got Identity"):
        model(**given)


def test_a_model_of_peft_is_refused_with_advice():
    class Outer(nn.Module):
        def get_base_model(self):
            return build("llama")

    with pytest.raises(TypeError, match=r"pass model\.get_base_model\(\)"):
        integration.attach(Outer(), tisa)


def test_all_of_t5_switches():
    model = build("t5")
    for name in ("posattn", "eager"):
        model.set_attn_implementation(name)
        assert {p.config._attn_implementation for p in (model, model.encoder, model.decoder)} == {name}
