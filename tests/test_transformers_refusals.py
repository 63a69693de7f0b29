"""What the integration refuses: masks, models, cached positions and arguments that it cannot serve."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers_cases import SIZES, build, eager, inputs, strong  # noqa: E402

import posattn  # noqa: E402
import posattn.integrations.transformers as integration  # noqa: E402

tisa = lambda layer, heads: strong(posattn.TISA(heads))


def test_what_is_not_served_is_refused():
    model = build("llama", "posattn")
    given = inputs("llama")
    with pytest.raises(ValueError, match=r"attention|eager"):
        model(**given, output_attentions=True)
    causal = torch.ones(11, 11).tril().bool()[None, None].expand(2, 1, -1, -1)
    torch.testing.assert_close(model(given["input_ids"], attention_mask=causal).logits, model(**given).logits)
    blocked = causal.clone()
    blocked[:, :, 6:, 2] = False
    with pytest.raises(ValueError, match="nothing else"):
        model(given["input_ids"], attention_mask=blocked)
    with pytest.raises(ValueError, match="after the 11 so far"):
        model(given["input_ids"], attention_mask=torch.ones(2, 13))
    with pytest.raises(ValueError, match="column for each"):
        model(given["input_ids"], attention_mask=torch.tensor([[1] * 7, [0] * 7]))
    layer = model.model.layers[0].self_attn
    states = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(TypeError, match="must be a Tensor or None"):
        integration.attention_forward(layer, *states, {"full": None})
    with pytest.raises(ValueError, match="table of offsets"):
        integration.attention_forward(layer, *states, None, position_bias=torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="has no is_causal"):
        integration.attention_forward(nn.Identity(), *states, None)


def test_masks_of_other_patterns_are_refused():
    from transformers.masking_utils import and_masks, causal_mask_function, or_masks

    mine = lambda batch, head, query, key: key > 3
    for function in (or_masks(causal_mask_function, mine), and_masks(causal_mask_function, mine), mine):
        with pytest.raises(ValueError, match="asks for a mask by"):
            integration.key_mask(1, 5, 5, mask_function=function)


def test_bloom_counts_over_holes():
    model = build("bloom", "posattn")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="between others"):
        model(inputs("bloom")["input_ids"], attention_mask=mask)


def test_models_that_do_not_ask_for_an_implementation_are_refused():
    given = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global"], 2]],
    }
    config = transformers.GPTNeoConfig(**given)
    model = transformers.GPTNeoForCausalLM(config)
    with pytest.raises(ValueError, match="does not call transformers' attention interface"):
        integration.attach(model, tisa)
    with pytest.raises(ValueError, match="does not call"):
        transformers.MPNetModel(transformers.MPNetConfig(**SIZES, attn_implementation="posattn"))


def test_bad_arguments():
    model = build("gpt2")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        integration.attach(nn.Linear(2, 2), tisa)
    with pytest.raises(ValueError, match="keep, drop, zero"):
        integration.attach(model, tisa, positions="none")
    with pytest.raises(ValueError, match="0 to 1"):
        integration.attach(model, tisa, layers=[2])
    with pytest.raises(TypeError, match="factory must return"):
        integration.attach(model, lambda layer, heads: nn.Linear(2, 2))
    with pytest.raises(ValueError, match="4 heads for layer 0"):
        integration.attach(model, lambda layer, heads: posattn.TISA(3))
    with pytest.raises(ValueError, match="nothing to attach"):
        integration.attach(model, lambda layer, heads: None)
    with pytest.raises(ValueError, match="nothing is attached"):
        integration.detach(model)
    integration.attach(model, tisa)
    for part in (model, model.transformer):
        with pytest.raises(ValueError, match="attached already"):
            integration.attach(part, tisa)
    for name in ("t5", "bloom"):
        model = integration.attach(build(name), lambda layer, heads: posattn.DAPE(heads).double())
        with pytest.raises(ValueError, match='positions="drop"'):
            model(**inputs(name))
    with eager(build("gpt2")) as model:
        model(**inputs("gpt2"))
