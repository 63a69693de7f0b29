"""save_pretrained and from_pretrained: biases come back with their values, wherever their config is known."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers_cases import CASES, NAMED, build, inputs, strong  # noqa: E402

import posattn  # noqa: E402
import posattn.integrations.transformers as integration  # noqa: E402
from posattn.integrations.transformers.attachment import biases_of  # noqa: E402

BIASES = {
    "TISA": lambda heads: posattn.TISA(heads, num_kernels=3),
    "ALiBi": lambda heads: posattn.ALiBi(heads, learnable=True, symmetric=False),
    "fixed ALiBi": lambda heads: posattn.ALiBi(heads),
    "KERPLE": lambda heads: posattn.KERPLE(heads, kind="power"),
    "T5Bias": lambda heads: posattn.T5Bias(heads, 8, 20, bidirectional=False),
    "Sandwich": lambda heads: posattn.Sandwich(heads, embedding_dim=8),
    "RelativeTable": lambda heads: posattn.RelativeTable(heads, max_distance=4),
    "FIRE": lambda heads: posattn.FIRE(heads, hidden=4, init_length=8),
    "DAPE": lambda heads: posattn.DAPE(heads, base=posattn.FIRE(heads, hidden=4), hidden=5, kernel_size=3),
}


def same(model, other):
    assert not [name for name, p in other.named_parameters() if p.is_meta]
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert other.config._attn_implementation == "posattn"


@pytest.mark.parametrize("name", NAMED)
def test_a_model_comes_back_as_it_was(name, tmp_path):
    positions = CASES[name].positions[-1]
    model = integration.attach(
        build(name, dtype=torch.float32),
        lambda layer, heads: strong(posattn.TISA(heads)),
        positions=positions,
    )
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    same(model, loaded)
    given = inputs(name, "left")
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)
    integration.detach(loaded)
    assert not biases_of(loaded)


@pytest.mark.parametrize("kind", BIASES)
def test_every_bias_is_made_again(kind, tmp_path):
    model = integration.attach(
        build("gpt2", dtype=torch.float32), lambda layer, heads: strong(BIASES[kind](heads)), positions="drop"
    )
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    same(model, loaded)
    assert repr(biases_of(loaded)) == repr(biases_of(model))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("gpt2")).logits, model(**inputs("gpt2")).logits)


def test_shared_biases_stay_shared(tmp_path):
    bias = strong(posattn.TISA(4))
    model = integration.attach(build("llama"), lambda layer, heads: bias)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    same(model, loaded)
    first, second = biases_of(loaded).values()
    assert first is second
    assert sum("position_bias" in name for name, _ in loaded.named_parameters()) == 3


def test_other_heads_and_parts_of_the_model(tmp_path):
    model = integration.attach(
        build("gpt2", dtype=torch.float32), lambda layer, heads: strong(posattn.TISA(heads))
    )
    model.save_pretrained(tmp_path / "gpt2")
    for kind in (
        transformers.AutoModel,
        transformers.AutoModelForCausalLM,
        transformers.GPT2ForSequenceClassification,
    ):
        loaded = kind.from_pretrained(tmp_path / "gpt2")
        for ours, theirs in zip(biases_of(model).values(), biases_of(loaded).values(), strict=True):
            assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    t5 = integration.attach(
        build("t5", dtype=torch.float32), lambda layer, heads: strong(posattn.TISA(heads))
    )
    t5.save_pretrained(tmp_path / "t5")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5")
    assert len(biases_of(encoder)) == 2


def test_some_layers_only(tmp_path):
    model = integration.attach(
        build("gpt2", dtype=torch.float32), lambda layer, heads: posattn.TISA(heads), layers=[1]
    )
    assert list(biases_of(model)) == ["transformer.h.1.attn"]
    model.save_pretrained(tmp_path)
    assert list(biases_of(type(model).from_pretrained(tmp_path))) == ["transformer.h.1.attn"]


def test_half_precision_leaves_biases_in_float32(tmp_path):
    model = integration.attach(
        build("llama", dtype=torch.bfloat16), lambda layer, heads: strong(posattn.TISA(heads))
    )
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **{dtype_argument(): torch.bfloat16})
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    for ours, theirs in zip(biases_of(model).values(), biases_of(loaded).values(), strict=True):
        assert theirs.amplitudes.dtype == torch.float32
        assert torch.equal(ours.amplitudes, theirs.amplitudes)
    assert torch.isfinite(loaded(**inputs("llama")).logits).all()


def dtype_argument():
    return "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"


def test_from_config_makes_new_biases():
    model = integration.attach(build("gpt2"), lambda layer, heads: posattn.FIRE(heads), positions="zero")
    fresh = type(model)(model.config)
    for bias in biases_of(fresh).values():
        assert float(bias.multiplier) == 1.0
        assert bias.first_layer.bias.ne(0).all()  # not as GPT-2 starts its own layers
    assert fresh.transformer.wpe.weight.eq(0).all()
    assert fresh.transformer.wpe.weight.requires_grad


def test_a_file_without_the_biases_gives_new_ones(tmp_path):
    plain = build("gpt2", dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    config = integration.attach(
        build("gpt2"), lambda layer, heads: posattn.DAPE(heads, base=posattn.FIRE(heads), hidden=4)
    ).config
    loaded = type(plain).from_pretrained(tmp_path, config=config)
    assert torch.equal(loaded.transformer.wpe.weight, plain.transformer.wpe.weight)
    for dape in biases_of(loaded).values():
        assert float(dape.base.multiplier) == 1.0
        assert float(dape.base.c) == pytest.approx(0.1)
        assert dape.first_weight.abs().max() < 1
        assert dape.base.first_layer.bias.ne(0).any()


class Closest(posattn.Bias):
    def __init__(self, num_heads, reach=2):
        super().__init__(num_heads)
        self.reach = reach
        self.strength = torch.nn.Parameter(torch.zeros(num_heads))

    def values(self, offsets):
        return self.strength[:, None] * (offsets.abs() < self.reach)


def test_a_bias_of_the_user(tmp_path):
    with pytest.raises(ValueError, match=r"register_bias\(Closest\)"):
        integration.attach(build("llama"), lambda layer, heads: Closest(heads, 3))
    assert integration.register_bias(Closest) is Closest
    model = integration.attach(build("llama"), lambda layer, heads: strong(Closest(heads, 3)))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    same(model, loaded)
    assert [bias.reach for bias in biases_of(loaded).values()] == [3, 3]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["posattn"] == {
        "positions": "keep",
        "biases": [{"class": "Closest", "arguments": {"num_heads": 4, "reach": 3}}] * 2,
        "layers": {"layers.0.self_attn": 0, "layers.1.self_attn": 1},
    }
    config["posattn"]["biases"][0]["class"] = "Unheard"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"register_bias\(Unheard\)"):
        type(model).from_pretrained(tmp_path)


def test_register_bias_says_what_it_needs():
    with pytest.raises(TypeError, match="subclass of"):
        integration.register_bias(torch.nn.Linear)

    class TISA(posattn.TISA):
        pass

    with pytest.raises(ValueError, match="another class"):
        integration.register_bias(TISA)

    class Forgetful(posattn.Bias):
        def __init__(self, num_heads, reach):
            super().__init__(num_heads)

    integration.register_bias(Forgetful)
    with pytest.raises(ValueError, match="does not keep reach"):
        integration.attach(build("gpt2"), lambda layer, heads: Forgetful(heads, 2))
    integration.register_bias(Forgetful, lambda bias: {"num_heads": bias.num_heads, "reach": torch.ones(1)})
    with pytest.raises(ValueError, match="plain numbers"):
        integration.attach(build("gpt2"), lambda layer, heads: Forgetful(heads, 2))


@pytest.mark.slow
def test_without_posattn_the_plain_model_is_loaded(tmp_path):
    model = integration.attach(build("gpt2", dtype=torch.float32), lambda layer, heads: posattn.TISA(heads))
    model.save_pretrained(tmp_path)
    code = (
        "import sys, transformers\n"
        f"model = transformers.GPT2LMHeadModel.from_pretrained({str(tmp_path)!r})\n"
        "assert 'posattn' not in sys.modules\n"
        "assert not [k for k in model.state_dict() if 'position_bias' in k]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_a_file_without_one_parameter_of_a_bias(tmp_path):
    from safetensors.torch import load_file, save_file

    model = integration.attach(
        build("gpt2", dtype=torch.float32), lambda layer, heads: strong(posattn.TISA(heads))
    )
    name = "transformer.h.0.attn.position_bias"
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"{name}.offsets"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path).get_submodule(name)
    ours = model.get_submodule(name)
    assert torch.equal(loaded.amplitudes, ours.amplitudes)
    assert torch.equal(loaded.sharpness, ours.sharpness)
    assert loaded.offsets.isfinite().all()
    assert not torch.equal(loaded.offsets, ours.offsets)
