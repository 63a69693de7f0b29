"""Small models of transformers with random weights, and their eager attention with a bias added to its dense mask."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CALM = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


class Case(NamedTuple):
    """config and model: names in transformers; given: of the config; positions: what attach takes for it.

    double: its eager attention stays in float64. That of the others makes the softmax in float32.
    """

    config: str
    model: str
    given: dict
    positions: tuple = ("keep", "drop")
    double: bool = False

    @property
    def stays_double(self):
        import transformers

        return self.double and not (self.config == "T5Config" and transformers.__version__ < "5")

    @property
    def dtype(self):
        return torch.float64 if self.double else torch.float32

    @property
    def tolerance(self):
        return 1e-10 if self.stays_double else 2e-5


GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
BLOOM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MPT = {"vocab_size": 64, "d_model": 48, "n_layers": 2, "n_heads": 6, "expansion_ratio": 2, "max_seq_len": 64}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
OPT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LEARNED = ("keep", "drop", "zero")
SLIDING = {"sliding_window": 5}
GEMMA2 = {**GROUPED, **SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
GPT_OSS = {**GROUPED, **SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1}

CASES = {
    "gpt2": Case("GPT2Config", "GPT2LMHeadModel", GPT2, LEARNED, double=True),
    "llama": Case("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen3": Case("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "mistral": Case("MistralConfig", "MistralForCausalLM", {**GROUPED, **SLIDING}),
    "gemma2": Case("Gemma2Config", "Gemma2ForCausalLM", GEMMA2),
    "bert": Case("BertConfig", "BertForMaskedLM", {**SIZES, **CALM}, LEARNED, double=True),
    "albert": Case(
        "AlbertConfig", "AlbertForMaskedLM", {**SIZES, **CALM, "embedding_size": 16}, LEARNED, double=True
    ),
    "t5": Case("T5Config", "T5ForConditionalGeneration", T5, LEARNED, double=True),
    "bloom": Case("BloomConfig", "BloomForCausalLM", BLOOM),
    "mpt": Case("MptConfig", "MptForCausalLM", MPT),
    "opt": Case("OPTConfig", "OPTForCausalLM", OPT, LEARNED),
    "gpt_neox": Case("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "gpt_oss": Case("GptOssConfig", "GptOssForCausalLM", GPT_OSS),
}
NAMED = ("gpt2", "llama", "qwen3", "mistral", "gemma2", "bert", "albert", "t5", "bloom", "mpt")


def build(name: str, implementation: str = "eager", dtype: torch.dtype | None = None):
    """The model, in evaluation, with weights that differ enough for attention to matter."""
    import transformers

    case = CASES[name]
    config = getattr(transformers, case.config)(**case.given, attn_implementation=implementation)
    torch.manual_seed(1)
    model = getattr(transformers, case.model)(config).to(dtype or case.dtype).eval()
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in key:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                parameter.copy_(
                    noise * (0.5 if "embed" in key or "wte" in key or "relative" in key else 0.25)
                )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def strong(bias):
    """A bias with parameters large enough to be seen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bias.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return bias


def inputs(name: str, padding: str | None = None, length: int = 11):
    """input_ids and attention_mask (None without padding), of T5 decoder_input_ids, too."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 60, (2, length), generator=generator)
    given = {"input_ids": ids}
    if padding is not None:
        mask = torch.ones_like(ids)
        mask[1, slice(0, 4) if padding == "left" else slice(length - 4, None)] = 0
        given["attention_mask"] = mask
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(3, 60, (2, 7), generator=generator)
    return given


def kept(name: str, given):
    """(B, L) bool: outputs that are not of padding."""
    if name == "t5":
        return torch.ones_like(given["decoder_input_ids"], dtype=torch.bool)
    return given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()


def run(model, name: str, given):
    """Logits of real tokens, and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    extra = {} if name in ("bert", "albert") else {"use_cache": False}
    logits = model(**given, **extra).logits[kept(name, given)]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights.sin()).sum().backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def difference(ours, theirs):
    """The largest difference, relative to the largest number, of logits and of every gradient."""
    (logits, gradients), (expected, expected_gradients) = ours, theirs
    worst = [float((logits - expected).abs().max() / expected.abs().max())]
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for key, gradient in gradients.items():
        scale = max(
            float(expected_gradients[key].abs().max()), 1e-2 * largest
        )  # those of biases of keys are 0
        worst.append(float((gradient - expected_gradients[key]).abs().max()) / scale)
    return max(worst)


@contextlib.contextmanager
def eager(model, biases=()):
    """The model on its own eager attention, with the dense matrix of a bias added to the mask of its layer.

    biases: by the path of the layer. MPT's layers take theirs with their position_bias, as their mask is boolean.
    """
    handles = []
    mpt = model.config.model_type == "mpt"

    def add(module, args, kwargs):
        bias = biases_of[module]
        args, kwargs = list(args), dict(kwargs)
        if mpt:
            mask = kwargs["attention_mask"]
            dense = bias.dense(mask.shape[2], mask.shape[3])
            kwargs["position_bias"] = kwargs["position_bias"][:, :, -mask.shape[3] :] + dense
            return tuple(args), kwargs
        handed = kwargs.get("position_bias")
        if handed is not None and not hasattr(module, "scaling") and hasattr(module, "is_decoder"):
            # T5 of transformers 4 hands down the first layer's scores, mask and all.
            dense = bias.dense(*handed.shape[2:]) - first[module.is_decoder].dense(*handed.shape[2:])
            kwargs["position_bias"] = handed + dense
            return tuple(args), kwargs
        first.setdefault(getattr(module, "is_decoder", None), bias)
        for place, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, torch.Tensor) and value.dim() == 4 and place != "position_bias":
                keys = value.shape[3]
                changed = value + bias.dense(args[0].shape[1] if args else hidden(kwargs).shape[1], keys)
                if isinstance(place, int):
                    args[place] = changed
                else:
                    kwargs[place] = changed
                return tuple(args), kwargs
        length = (args[0] if args else hidden(kwargs)).shape[1]
        if len(args) > 1 and args[1] is None:
            args[1] = bias.dense(length, length)[None]
        else:
            name = "mask" if "mask" in kwargs else "attention_mask"
            assert kwargs.get(name) is None
            kwargs[name] = bias.dense(length, length)[None]
        return tuple(args), kwargs

    first = {}
    hidden = lambda kwargs: kwargs["hidden_states"]
    biases_of = {model.get_submodule(path): bias for path, bias in dict(biases).items()}
    for module in biases_of:
        handles.append(module.register_forward_pre_hook(add, with_kwargs=True))
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield model
    finally:
        for config, implementation in zip(configs, before):
            config._attn_implementation_internal = implementation
        for handle in handles:
            handle.remove()
