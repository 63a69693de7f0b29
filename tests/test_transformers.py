"""Models of transformers on posattn: outputs and gradients of every architecture against its own eager attention."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers_cases import (  # noqa: E402
    CALM,
    CASES,
    GPT2,
    NAMED,
    SIZES,
    build,
    difference,
    eager,
    inputs,
    kept,
    run,
    strong,
)

import posattn  # noqa: E402
import posattn.integrations.transformers as integration  # noqa: E402
from posattn.integrations.transformers.attachment import biases_of, served_by_us  # noqa: E402


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_eager_attention(name):
    model = build(name, "posattn")
    for padding in (None, "left", "right"):
        given = inputs(name, padding)
        with eager(model):
            expected = run(model, name, given)
        assert (d := difference(run(model, name, given), expected)) < CASES[name].tolerance, (padding, d)


@pytest.mark.parametrize("name", CASES)
def test_a_bias_is_the_same_matrix_added_to_the_scores(name):
    model = integration.attach(
        build(name), lambda layer, heads: strong(posattn.TISA(heads).to(CASES[name].dtype))
    )
    biases = biases_of(model)
    assert len(biases) == {"albert": 1, "t5": 4}.get(name, 2)
    for padding in (None, "left", "right"):
        given = inputs(name, padding)
        ours = run(model, name, given)
        assert all(bias.amplitudes.grad.abs().max() > 1e-6 for bias in biases.values())
        model.zero_grad(set_to_none=True)
        hooks = {path: model.get_submodule(path)._forward_pre_hooks for path in biases}
        held = {path: dict(own) for path, own in hooks.items()}
        for own in hooks.values():
            for key in [key for key, hook in own.items() if hook is served_by_us]:
                del own[key]
        with eager(model, biases):
            expected = run(model, name, given)
        for path, own in hooks.items():
            own.update(held[path])
        assert (d := difference(ours, expected)) < CASES[name].tolerance, (padding, d)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has no such switch")
def test_a_decoder_made_bidirectional():
    model = build("llama", "posattn")
    model.config.is_causal = False
    for padding in (None, "left", "right"):
        given = inputs("llama", padding)
        with eager(model):
            expected = run(model, "llama", given)
        assert difference(run(model, "llama", given), expected) < 2e-5, padding


def test_cross_attention_of_gpt2():
    config = transformers.GPT2Config(**GPT2, add_cross_attention=True, attn_implementation="posattn")
    model = transformers.GPT2LMHeadModel(config).double().eval()
    given = inputs("gpt2", "left")
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    other = {
        "encoder_hidden_states": torch.randn(2, 5, 32, dtype=torch.float64),
        "encoder_attention_mask": mask,
    }
    with eager(model):
        expected = run(model, "gpt2", {**given, **other})
    assert difference(run(model, "gpt2", {**given, **other}), expected) < 1e-10


def test_bert_as_a_decoder():
    config = transformers.BertConfig(**{**SIZES, **CALM}, is_decoder=True, attn_implementation="posattn")
    model = transformers.BertLMHeadModel(config).double().eval()
    for padding in (None, "left", "right"):
        given = inputs("bert", padding)
        with eager(model):
            expected = run(model, "bert", given)
        assert difference(run(model, "bert", given), expected) < 1e-10, padding


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bloom", "mpt"])
def test_half_precision(name):
    """bfloat16: as near to the model in float32 as eager attention in bfloat16 is, twice over."""
    given = inputs(name, "right")
    model = build(name, "posattn", torch.bfloat16)
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        ours = model(**given).logits.float()
        with eager(model), eager(exact):
            theirs, expected = model(**given).logits.float(), exact(**given).logits
    real = kept(name, given)
    error, budget = ((x - expected)[real].abs().max() for x in (ours, theirs))
    assert error <= 2 * budget + 1e-3


class Largest(TorchDispatchMode):
    """The most numbers that any operation has returned in one tensor."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="models of transformers 4 make dense masks themselves"
)
@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_as_large_as_the_matrix_of_scores(name):
    model = build(name, "posattn", torch.float32)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.max_position_embeddings = 1024
    integration.attach(
        model, lambda layer, heads: posattn.TISA(heads), positions="keep" if name == "t5" else "drop"
    )
    length = 768
    ids = torch.randint(3, 60, (1, length))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        given["decoder_input_ids"] = ids
    if name in ("bert", "albert"):
        given |= {"position_ids": torch.arange(length)[None] % 64, "token_type_ids": torch.zeros_like(ids)}
    with Largest() as largest:
        run(model, name, given)
    assert largest.numel < length**2
