"""generate() on posattn gives eager attention's tokens: greedy and beams, padding on the left, every kind of cache."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers_cases import CASES, build, eager, inputs, strong  # noqa: E402

import posattn  # noqa: E402
import posattn.integrations.transformers as integration  # noqa: E402
from posattn.integrations.transformers.attachment import biases_of, served_by_us  # noqa: E402

GENERATES = [name for name in CASES if name not in ("bert", "albert")]
STATIC = [name for name in GENERATES if name not in ("bloom", "mpt")]
NEW = 9


def generate(model, given, **options):
    given = {name: value for name, value in given.items() if name != "decoder_input_ids"}
    return model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", GENERATES)
def test_tokens_are_those_of_eager_attention(name, beams):
    model = build(name, "posattn")
    for padding in (None, "left"):
        given = inputs(name, padding)
        with eager(model):
            expected = generate(model, given, num_beams=beams)
        assert torch.equal(generate(model, given, num_beams=beams), expected), padding


@pytest.mark.parametrize("name", STATIC)
def test_static_caches(name):
    model = build(name, "posattn")
    if name == "opt" and transformers.__version__ < "5":  # makes a dense mask, from which that is not known
        with pytest.raises(ValueError, match="where the query stands"):
            generate(model, inputs(name), cache_implementation="static", disable_compile=True)
        return
    for padding in (None, "left"):
        given = inputs(name, padding)
        with eager(model):
            expected = generate(model, given)
        assert torch.equal(
            generate(model, given, cache_implementation="static", disable_compile=True), expected
        ), padding


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "t5", "bloom", "mpt"])
def test_a_bias_in_every_cache_is_that_of_a_forward_without(name):
    model = integration.attach(
        build(name), lambda layer, heads: strong(posattn.TISA(heads).to(CASES[name].dtype))
    )
    for padding in (None, "left"):
        given = inputs(name, padding)
        expected = generate(model, given, use_cache=False)
        assert torch.equal(generate(model, given), expected), padding
        if name in STATIC:
            static = generate(model, given, cache_implementation="static", disable_compile=True)
            assert torch.equal(static, expected), padding


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "bloom", "mpt"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_logits_through_a_cache_are_those_of_one_forward(name, kind):
    """Prefill, then pieces of 1, 3 and 1 tokens, which make a sliding cache drop keys on the way."""
    if kind == "static" and name not in STATIC:
        pytest.skip("its eager code takes no static cache")
    model = integration.attach(
        build(name), lambda layer, heads: strong(posattn.TISA(heads).to(CASES[name].dtype))
    )
    ids = inputs(name, length=14)["input_ids"]
    expected = model(ids, use_cache=False).logits
    if kind == "dynamic":
        cache = transformers.DynamicCache(config=model.config)
    else:
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    done, pieces = 0, []
    with torch.no_grad():
        for length in (4, 1, 3, 1, 5):
            given = {"input_ids": ids[:, done : done + length], "past_key_values": cache, "use_cache": True}
            if transformers.__version__ < "5" and name != "mpt":
                given["cache_position"] = torch.arange(done, done + length)
            pieces.append(model(**given).logits)
            done += length
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_padding_mask_as_long_as_a_static_cache():
    model = build("llama", "posattn")
    ids = inputs("llama")["input_ids"]
    mask = torch.zeros(2, 20, dtype=torch.long)
    mask[:, :11] = 1
    mask[1, :3] = 0
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    given = {"cache_position": torch.arange(11)} if transformers.__version__ < "5" else {}
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given).logits
        with eager(model):
            expected = model(ids, attention_mask=mask[:, :11], use_cache=False).logits
    torch.testing.assert_close(ours[mask[:, :11].bool()], expected[mask[:, :11].bool()], rtol=1e-4, atol=1e-4)


def test_biases_of_the_offset_take_padding_on_the_left_as_no_padding():
    model = integration.attach(
        build("llama"), lambda layer, heads: strong(posattn.TISA(heads)), positions="drop"
    )
    given = inputs("llama", "left")
    alone = given["input_ids"][1:, 4:]
    assert torch.equal(generate(model, given)[1:, 11:], generate(model, {"input_ids": alone})[:, 7:])


def test_fire_and_a_sliding_cache_that_forgets():
    model = integration.attach(build("mistral"), lambda layer, heads: posattn.FIRE(heads), positions="drop")
    given = inputs("mistral")
    generate(model, given, use_cache=False)
    with pytest.raises(ValueError, match="use_cache=False"):
        generate(model, given)
    integration.detach(model)
    integration.attach(build("llama"), lambda layer, heads: posattn.FIRE(heads), positions="drop")


def test_dape_generates():
    def make(layer, heads):
        torch.manual_seed(layer)
        return strong(posattn.DAPE(heads, base=posattn.KERPLE(heads), hidden=4))

    model = integration.attach(build("llama"), make, positions="drop")
    for padding in (None, "left"):
        given = inputs("llama", padding)
        assert torch.equal(generate(model, given), generate(model, given, use_cache=False)), padding
    assert biases_of(model)
    assert all(
        served_by_us in m._forward_pre_hooks.values() for m in map(model.get_submodule, biases_of(model))
    )
