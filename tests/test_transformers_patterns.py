"""What masks say beyond padding: that they are causal, have a window, or are not masks at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers_cases import GROUPED, SIZES, build, inputs  # noqa: E402

import posattn.integrations.transformers as integration  # noqa: E402

OLD = transformers.__version__ < "5"
LOWEST = torch.finfo(torch.float32).min
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def made(name, given):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**given, attn_implementation="eager")
    kind = getattr(transformers, f"{name}ForConditionalGeneration", None)
    model = (kind or getattr(transformers, f"{name}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


@pytest.mark.skipif(OLD, reason="their decoders say nothing in transformers 5")
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("PegasusX", {"block_size": 4, "num_global_tokens": 2}),
        ("NllbMoe", {"num_experts": 2, "expert_capacity": 64}),
    ],
)
def test_decoders_that_do_not_say_so_are_causal(name, extra):
    model = made(name, {**BART, **extra})
    ids = inputs("gpt2")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    for given in ({"attention_mask": mask}, {"attention_mask": mask, "decoder_attention_mask": mask}, {}):
        given = {"input_ids": ids, "decoder_input_ids": ids, **given}
        model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = model(**given).logits
            model.set_attn_implementation("posattn")
            ours = model(**given).logits
        real = given.get("decoder_attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(ours[real], expected[real], rtol=0, atol=3e-4)


def test_a_window_that_does_not_arrive_is_refused():
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

    layer = build("llama", "posattn").model.layers[0].self_attn
    states = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    function = and_masks(causal_mask_function, sliding_window_overlay(5))
    given = {"q_length": 7, "cache_position": torch.arange(7)} if OLD else {"q_length": 7}
    if OLD:
        del given["q_length"]
    mask = integration.key_mask(1, kv_length=7, mask_function=function, **given)
    with pytest.raises(ValueError, match="does not hand to attention"):
        integration.attention_forward(layer, *states, mask)
    out, _ = integration.attention_forward(layer, *states, mask, sliding_window=5)
    full, _ = integration.attention_forward(layer, *states, None)
    assert torch.allclose(out[:, :5], full[:, :5]) and not torch.allclose(out[:, 5:], full[:, 5:])
    wide = and_masks(causal_mask_function, sliding_window_overlay(7))
    mask = integration.key_mask(1, kv_length=7, mask_function=wide, **given)
    assert torch.equal(integration.attention_forward(layer, *states, mask)[0], full)


@pytest.mark.skipif(OLD, reason="PhiMoE's own masks there")
def test_phimoe_is_refused_beyond_its_window():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 5}
    model = made("Phimoe", {**GROUPED, **experts})
    model.set_attn_implementation("posattn")
    ids = inputs("gpt2")["input_ids"]
    with pytest.raises(ValueError, match="does not hand to attention"):
        model(ids)
    model(ids[:, :5])


def test_a_causal_mask_makes_a_silent_layer_causal():
    class Silent(nn.Module):
        pass

    states = [torch.randn(2, 2, 5, 4) for _ in range(3)]
    given = {"cache_position": torch.arange(5)} if OLD else {"q_length": 5}
    padding = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    for attention_mask in (None, padding):
        mask = integration.key_mask(2, kv_length=5, attention_mask=attention_mask, **given)
        for marked in (mask, mask.clone(), mask[:]):
            module = Silent()
            out, _ = integration.attention_forward(module, *states, marked)
            module.is_causal = True
            expected, _ = integration.attention_forward(
                module, *states, None if attention_mask is None else padding.bool()
            )
            assert torch.equal(out, expected)
        with pytest.raises(ValueError, match="has no is_causal"):
            integration.attention_forward(Silent(), *states, mask.bool())


def test_float_masks_that_are_no_masks_are_refused():
    model = build("llama", "posattn", torch.float32)
    ids = inputs("llama")["input_ids"]
    hidden = torch.arange(11) >= 6
    expected = model(ids, attention_mask=(~hidden).long().expand(2, -1)).logits[:, :6]
    causal = torch.ones(11, 11).triu(1).bool()
    for low in (-1e4, -1e9, LOWEST, -torch.inf):
        dense = torch.zeros(11, 11).masked_fill(hidden | causal, low).expand(2, 1, -1, -1)
        torch.testing.assert_close(model(ids, attention_mask=dense).logits[:, :6], expected)
    least = torch.zeros(2, 1, 11, 11).masked_fill(causal, LOWEST)
    for wrong in (torch.randn(11, 11), torch.tensor(-5.0), torch.tensor(1.0), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match="other values"):
            model(ids, attention_mask=least.where(causal, wrong))
    layer = build("llama", "posattn").model.layers[0].self_attn
    states = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"must be bool, or of floats.*int64"):
        integration.attention_forward(layer, *states, torch.ones(1, 1, 5, 5, dtype=torch.long))


def test_rotations_of_queries_and_keys_are_not_dropped():
    given = {**SIZES, "position_embedding_type": "rotary", "mask_token_id": 5}
    model = transformers.EsmModel(transformers.EsmConfig(**given))
    if OLD:
        with pytest.raises(ValueError, match="rotates queries and keys itself"):
            integration.attach(model, lambda layer, heads: None, positions="drop")
        assert not any(module._forward_hooks for module in model.modules())
    else:
        integration.attach(model, lambda layer, heads: None, positions="drop")
