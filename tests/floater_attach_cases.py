"""Tiny models of transformers, built from configs, and what the tests of attach do to them."""

from __future__ import annotations

import torch
from torch import nn

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 64, "max_position_embeddings": 64}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**SIZE, **WORDS, **NO_DROPOUT, "pad_token_id": 1}
TRANSLATION = {
    **WORDS,
    **SPECIAL,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
GPT2 = {**SPECIAL, "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 64}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {**WORDS, **SPECIAL, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
OPT |= {"word_embed_proj_dim": 32, "dropout": 0.0}
DISTILBERT = {
    **WORDS,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 48,
    "vocab_size": 64,
    "dropout_rate": 0.0,
}
T5 |= {"decoder_start_token_id": 0}
BLOOM = {**SPECIAL, "vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4}
BLOOM |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
WHISPER = {**TRANSLATION, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}

# name: class, config class, its arguments, names of streams by encoder (in the order of model.floater), layers of each
SELF = ("query", "key", "value")
DECODER, CROSS = ("cross_query", *SELF), ("cross_key", "cross_value")
ONE = {"layers": (SELF, 3)}
THREE = {"encoder": (SELF, 2), "decoder": (DECODER, 3), "cross": (CROSS, 3)}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, ONE),
    "gpt2-cross": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "add_cross_attention": True},
        {"decoder": (DECODER, 3), "cross": (CROSS, 3)},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, ONE),
    "bert": ("BertForMaskedLM", "BertConfig", BERT, ONE),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT, ONE),
    "electra": ("ElectraModel", "ElectraConfig", {**BERT, "embedding_size": 16}, ONE),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTILBERT, ONE),
    "albert": ("AlbertModel", "AlbertConfig", {**BERT, "embedding_size": 16}, {"layers": (SELF, 1)}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZE, **WORDS, **SPECIAL}, ONE),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, ONE),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZE, **WORDS, **SPECIAL}, ONE),
    "bart": ("BartForConditionalGeneration", "BartConfig", TRANSLATION, THREE),
    "marian": ("MarianMTModel", "MarianConfig", TRANSLATION, THREE),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, THREE),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        {"encoder": (SELF, 2), "decoder": (DECODER, 2), "cross": (CROSS, 2)},
    ),
}


def build(name, transformers, **changes):
    """A model in evaluation, all of whose parameters are random: what attention gives then shows in the outputs."""
    model_class, config_class, config, _ = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**config, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2 if parameter.dim() > 1 else 0.5)
    return model.eval()


def inputs(model, length=9, batch=2):
    """Keyword arguments of a forward."""
    tokens = torch.randint(3, 64, (batch, length))
    dtype = next(model.parameters()).dtype
    if model.config.model_type == "whisper":
        return {"input_features": torch.randn(batch, 8, 32, dtype=dtype), "decoder_input_ids": tokens}
    given = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 64, (batch, length - 2))
    if getattr(model.config, "add_cross_attention", False):
        given["encoder_hidden_states"] = torch.randn(batch, length - 3, 32, dtype=dtype)
    return given


def set_going(attachment, scale=0.3):
    """A flow that is not zero: vectors change by about one in ten positions."""
    with torch.no_grad():
        for encoder in attachment.encoders.values():
            nn.init.normal_(encoder.dynamics.linear2.weight, std=scale)
            nn.init.normal_(encoder.dynamics.linear2.bias, std=scale)
    return attachment


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
