"""transformers 4: BERT, ALBERT and T5 compute attention in their layers, as BLOOM and MPT do in every version."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import adapters
from .attachment import BEFORE, FIELD
from .interface import NAME, attention_forward

LAYERS = (
    ("bert", "BertSelfAttention"),
    ("bert", "BertSdpaSelfAttention"),
    ("albert", "AlbertAttention"),
    ("albert", "AlbertSdpaAttention"),
)


def install() -> None:
    for kind, name in LAYERS:
        forward: Callable[..., Any] = bert_forward if kind == "bert" else albert_forward
        adapters._replace(adapters._class(kind, name), "forward", forward)
    for kind, name in adapters.BUCKETS:
        adapters._replace(adapters._class(kind, name), "forward", t5_forward)
    for kind, table in (("bert", "BERT_SELF_ATTENTION_CLASSES"), ("albert", "ALBERT_ATTENTION_CLASSES")):
        classes = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), table)
        classes[NAME] = classes["eager"]
    adapters.SWITCHABLE += [
        ("bert", "BertPreTrainedModel"),
        ("albert", "AlbertPreTrainedModel"),
        ("t5", "T5PreTrainedModel"),
        ("mt5", "MT5PreTrainedModel"),
    ]


def install_loading(rebuild: Callable[[PreTrainedModel], None]) -> None:
    """Models that never call post_init get their biases when they are loaded, or made from a config; and T5's stacks,
    whose configs are copies, the implementation of their model."""
    load: Any = PreTrainedModel._load_pretrained_model
    make: Any = PreTrainedModel._from_config
    choose: Any = PreTrainedModel.set_attn_implementation

    stacked = adapters._class("t5", "T5PreTrainedModel"), adapters._class("mt5", "MT5PreTrainedModel")

    def missing(model: Any) -> bool:
        field = getattr(model.config, FIELD, None)
        return field is not None and BEFORE not in model.__dict__

    @functools.wraps(load.__func__)
    def load_of_ours(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if missing(model):
            with torch.device("meta"):
                rebuild(model)
        if "keep_in_fp32_regex" in kwargs and any("position_bias" in m._modules for m in model.modules()):
            known, ours = kwargs["keep_in_fp32_regex"], r"((^|\.)position_bias($|\.))"
            kwargs["keep_in_fp32_regex"] = re.compile(f"{known.pattern}|{ours}" if known else ours)
        return load.__func__(cls, model, *args, **kwargs)

    @functools.wraps(make.__func__)
    def make_of_ours(cls: Any, config: Any, **kwargs: Any) -> Any:
        model = make.__func__(cls, config, **kwargs)
        if missing(model):
            rebuild(model)
        return model

    @functools.wraps(choose)
    def choose_of_ours(self: Any, attn_implementation: Any) -> None:
        choose(self, attn_implementation)
        if isinstance(self, stacked):
            for part in self.modules():
                if isinstance(part, PreTrainedModel):
                    part.config._attn_implementation_internal = self.config._attn_implementation_internal

    PreTrainedModel._load_pretrained_model = classmethod(load_of_ours)
    PreTrainedModel._from_config = classmethod(make_of_ours)  # type: ignore[arg-type]
    PreTrainedModel.set_attn_implementation = choose_of_ours


def _check_absolute(module: Any) -> None:
    kind = getattr(module, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(
            f'position_embedding_type must be "absolute", got {kind!r}: use attn_implementation="eager"'
        )


def _keys(
    module: Any,
    states: Tensor,
    cache: Any,
    crosses: bool,
    project: Callable[[Tensor], tuple[Tensor, Tensor]],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, int | None]:
    """Keys and values of a layer with those of its cache, which may be one of an encoder and a decoder."""
    layer = getattr(module, "layer_idx", None)
    current, done = cache, False
    if hasattr(cache, "is_updated"):
        done = crosses and bool(cache.is_updated.get(layer))
        current = cache.cross_attention_cache if crosses else cache.self_attention_cache
    if done:
        return current.layers[layer].keys, current.layers[layer].values, None
    key, value = project(states)
    if current is None:
        return key, value, None
    assert isinstance(layer, int)
    key, value, used = adapters.update(current, key, value, layer, {} if crosses else kwargs)
    if crosses and hasattr(cache, "is_updated"):
        cache.is_updated[layer] = True
    return key, value, used


def bert_forward(
    original: Callable[..., Any],
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    output_attentions: bool = False,
    cache_position: Tensor | None = None,
) -> Any:
    if not adapters.served(module):
        given = (
            attention_mask,
            head_mask,
            encoder_hidden_states,
            past_key_values,
            output_attentions,
            cache_position,
        )
        return original(module, hidden_states, *given)
    _check_absolute(module)
    crosses = encoder_hidden_states is not None

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (int(module.num_attention_heads), -1)).transpose(1, 2)  # type: ignore[no-any-return]

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        return heads(module.key(x)), heads(module.value(x))

    states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    key, value, used = _keys(
        module, states, past_key_values, crosses, project, {"cache_position": cache_position}
    )
    causal = bool(module.is_decoder) and not crosses
    query = heads(module.query(hidden_states))
    mask = adapters.narrowed(attention_mask, causal, query.shape[2], key.shape[2], used)
    out, _ = attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=module.dropout.p if module.training else 0.0,
        is_causal=causal,
        head_mask=head_mask,
        output_attentions=output_attentions,
    )
    return out.flatten(2), None


def albert_forward(
    original: Callable[..., Any],
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> Any:
    if not adapters.served(module):
        given = {"head_mask": head_mask, "output_attentions": output_attentions}
        return original(module, hidden_states, attention_mask, **given)
    _check_absolute(module)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (int(module.num_attention_heads), -1)).transpose(1, 2)  # type: ignore[no-any-return]

    query, key, value = (heads(p(hidden_states)) for p in (module.query, module.key, module.value))
    out, _ = attention_forward(
        module,
        query,
        key,
        value,
        adapters.narrowed(attention_mask, False, query.shape[2], key.shape[2], None),
        dropout=module.attention_dropout.p if module.training else 0.0,
        is_causal=False,
        head_mask=head_mask,
        output_attentions=output_attentions,
    )
    out = module.output_dropout(module.dense(out.flatten(2)))
    return (module.LayerNorm(hidden_states + out),)


def t5_forward(
    original: Callable[..., Any],
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    layer_head_mask: Tensor | None = None,
    query_length: int | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if not adapters.served(module):
        return original(
            module,
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=position_bias,
            past_key_values=past_key_values,
            layer_head_mask=layer_head_mask,
            query_length=query_length,
            use_cache=use_cache,
            output_attentions=output_attentions,
            cache_position=cache_position,
            **kwargs,
        )
    crosses = key_value_states is not None

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (int(module.n_heads), -1)).transpose(1, 2)  # type: ignore[no-any-return]

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        return heads(module.k(x)), heads(module.v(x))

    states = hidden_states if key_value_states is None else key_value_states
    key, value, used = _keys(
        module, states, past_key_values, crosses, project, {"cache_position": cache_position}
    )
    query = heads(module.q(hidden_states))
    length = query.shape[2]
    if position_bias is None:
        if module.has_relative_attention_bias:
            past = 0 if cache_position is None else int(cache_position[0])
            position_bias = module.compute_bias(length, key.shape[2], query.device, past)
        else:
            position_bias = query.new_zeros((1, module.n_heads, 1, 1))
    causal = bool(module.is_decoder) and not crosses
    mask = adapters.narrowed(mask, causal, length, key.shape[2], used)
    out, _ = attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=module.dropout if module.training else 0.0,
        scaling=1.0,
        is_causal=causal,
        position_bias=position_bias,
        layer_head_mask=layer_head_mask,
        output_attentions=output_attentions,
    )
    return module.o(out.flatten(2)), position_bias
