"""Models that do not call transformers' attention interface, or hand dense tables of positions to it.

Classes of transformers get another method, which does what it did unless the model's implementation is "posattn":

- T5, mT5: `compute_bias` makes the table (1, H, 1, Lq + Lk - 1) in place of (1, H, Lq, Lk), and cross-attention
  no zeros of that size.
- BLOOM, MPT: the attention layers' `forward`. ALiBi goes to the kernel as one slope a head.
- with transformers 4: BERT, ALBERT and the forward of T5 (`version4`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ...biases.bias import Bias
from .interface import NAME, attention_forward
from .masks import as_key_mask, check_no_holes

VERSION = int(transformers.__version__.split(".")[0])
# Attention layers whose forward is replaced, by module and class.
BUCKETS = (("t5", "T5Attention"), ("mt5", "MT5Attention"))
ALIBI = (("bloom", "BloomAttention"), ("mpt", "MptAttention"))
# Their models, which transformers believes to have one implementation.
SWITCHABLE = [("bloom", "BloomPreTrainedModel"), ("mpt", "MptPreTrainedModel")]


def install() -> None:
    """Replace the methods named above, once."""
    for kind, name in BUCKETS:
        attention = _class(kind, name)
        _replace(attention, "compute_bias", compute_bias)
        if VERSION >= 5:
            _replace(attention, "forward", t5_forward)
    _replace(_class(*ALIBI[0]), "forward", bloom_forward)
    _replace(_class(*ALIBI[1]), "forward", mpt_forward)
    if VERSION < 5:
        from . import version4

        version4.install()
    for kind, name in SWITCHABLE:
        _class(kind, name)._can_set_attn_implementation = classmethod(lambda cls: True)


def check_calls_us(model: Any) -> None:
    """ValueError for a model whose layers would not ask for an implementation: they would leave ours out silently."""
    try:
        calls = model._can_set_attn_implementation()
    except (OSError, AttributeError):  # no source
        return
    if not calls:
        raise ValueError(
            f"{type(model).__name__} does not call transformers' attention interface, and posattn has no adapter for "
            'it; use attn_implementation="eager"'
        )


def served(module: nn.Module, mask: Any = None) -> bool:
    """Whether this layer runs on posattn: its model says so, or its mask is one that only "posattn" makes."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return True
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def adapted() -> tuple[type[nn.Module], ...]:
    """The attention layers whose forward is ours."""
    found = [_class(*pair) for pair in (*BUCKETS, *ALIBI)]
    if VERSION < 5:
        from . import version4

        found += [_class(*pair) for pair in version4.LAYERS]
    return tuple(found)


def buckets() -> tuple[type[nn.Module], ...]:
    """T5's attention layers."""
    return tuple(_class(*pair) for pair in BUCKETS)


def _class(kind: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)


def _replace(owner: Any, method: str, ours: Callable[..., Any]) -> None:
    """Put ours(original, module, ...) in the place of a method."""
    original = vars(owner).get(method) or getattr(owner, method)
    if hasattr(original, "_posattn_original"):
        return

    @functools.wraps(original)
    def method_of_ours(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ours(original, self, *args, **kwargs)

    method_of_ours._posattn_original = original  # type: ignore[attr-defined]
    setattr(owner, method, method_of_ours)


def no_positions(module: nn.Module) -> bool:
    """Whether `positions.drop` has switched off the positions that this layer makes."""
    return bool(getattr(module, "posattn_dropped", False))


def compute_bias(
    original: Callable[..., Tensor],
    module: Any,
    query_length: int,
    key_length: int,
    device: torch.device | None = None,
    past_seen_tokens: Any = 0,
    cache_position: Tensor | None = None,
) -> Tensor:
    """T5's bias as the table of its offsets, (1, H, 1, Lq + Lk - 1): at w that of ``w - (past + Lq - 1)``."""
    if not served(module):
        past = {"cache_position": cache_position} if cache_position is not None else {}
        if VERSION >= 5:
            past = {"past_seen_tokens": past_seen_tokens}
        return original(module, query_length, key_length, device=device, **past)
    weight = module.relative_attention_bias.weight
    if no_positions(module):
        return weight.new_zeros((1, module.n_heads, 1, 1))  # type: ignore[no-any-return]
    offsets = torch.arange(query_length + key_length - 1, device=device or weight.device)
    offsets = offsets - (past_seen_tokens + query_length - 1)
    bucket = module._relative_position_bucket(
        offsets,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    return module.relative_attention_bias(bucket).T[None, :, None]  # type: ignore[no-any-return]


def t5_forward(
    original: Callable[..., Any], module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """T5 adds zeros (1, H, Lq, Lk) in cross-attention: here they are (1, H, 1, 1)."""
    crosses = kwargs.get("key_value_states") is not None
    if served(module) and crosses and not args and kwargs.get("position_bias") is None:
        kwargs["position_bias"] = hidden_states.new_zeros((1, module.n_heads, 1, 1))
    return original(module, hidden_states, *args, **kwargs)


class Slopes(Bias):
    """ALiBi with given slopes: ``slope[h] * o``, which is BLOOM's and MPT's for every key that a query sees."""

    symmetric = False

    def __init__(self, slopes: Tensor) -> None:
        super().__init__(len(slopes))
        self.register_buffer("slope", slopes, persistent=False)

    def values(self, offsets: Tensor) -> Tensor:
        slope = self.slope
        assert isinstance(slope, Tensor)
        return slope[:, None] * offsets

    def slopes(self) -> Tensor:
        slope = self.slope
        assert isinstance(slope, Tensor)
        return slope


_ALIBI: dict[tuple[str, int, torch.device], Slopes] = {}


def alibi(kind: str, num_heads: int, device: torch.device) -> Slopes:
    """BLOOM's and MPT's slopes, as their own code makes them, from its tensor for two positions; made once."""
    known = _ALIBI.get((kind, num_heads, device))
    if known is not None:
        return known
    model = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    with torch.inference_mode(False), torch.no_grad():
        if kind == "bloom":
            made = model.build_alibi_tensor(torch.ones(1, 2, device="cpu"), num_heads, torch.float32)[:, 0]
        else:
            made = model.build_mpt_alibi_tensor(num_heads, 2, device="cpu")[:, 0]
        known = _ALIBI[kind, num_heads, device] = Slopes((made[:, 1] - made[:, 0]).float().to(device))
    return known


def bloom_forward(
    original: Callable[..., Any],
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """BloomAttention.forward: query, key and value as there, attention by posattn, then its dense layer."""
    if not served(module, attention_mask):
        return original(module, hidden_states, residual, alibi=alibi, attention_mask=attention_mask, **kwargs)
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    key, value, used = update(kwargs.get("layer_past"), key, value, module.layer_idx, kwargs)
    out = _attend(
        module,
        (query, key, value),
        attention_mask,
        used,
        kwargs,
        kind="bloom",
        dropout=module.attention_dropout.p if module.training else 0.0,
        scaling=module.inv_norm_factor,
    )
    if module.pretraining_tp > 1 and module.slow_but_exact:
        raise ValueError(f"BLOOM's slow_but_exact with pretraining_tp > 1 is not served by {NAME}")
    out = F.dropout(module.dense(out), p=module.hidden_dropout, training=module.training)
    return residual + out, None


def mpt_forward(
    original: Callable[..., Any],
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """MptAttention.forward, likewise. Its own dense mask is True where it hides."""
    if not served(module, attention_mask):
        return original(
            module,
            hidden_states,
            position_bias=position_bias,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    tokens = mixed.unflatten(-1, (3, module.n_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    query, key, value = tokens.unbind()
    key, value, used = update(past_key_values, key, value, module.layer_idx, kwargs)
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = ~attention_mask
    out = _attend(
        module,
        (query, key, value),
        attention_mask,
        used,
        kwargs,
        kind="mpt",
        dropout=module.attn_dropout_p if module.training else 0.0,
        scaling=module.softmax_scale,
    )
    return module.out_proj(out), None


def _attend(
    module: Any,
    tokens: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    used: int | None,
    kwargs: dict[str, Any],
    *,
    kind: str,
    **options: Any,
) -> Tensor:
    """(B, L, H * D): causal attention with the model's slopes, unless they are dropped."""
    own = None if no_positions(module) else alibi(kind, tokens[0].shape[1], tokens[0].device)
    given: dict[str, Any] = {name: kwargs.get(name) for name in ("head_mask", "output_attentions")}
    mask = narrowed(mask, True, tokens[0].shape[2], tokens[1].shape[2], used)
    if kind == "bloom" and mask is not None and VERSION < 5:
        check_no_holes(mask)
    given |= options
    out, _ = attention_forward(module, *tokens, mask, is_causal=True, position_bias=own, **given)
    return out.flatten(2)


def narrowed(
    mask: Tensor | None, causal: bool, query_length: int, key_length: int, used: int | None
) -> Tensor | None:
    """A mask that the model itself made dense as the keys that count; one that is not stays what it is."""
    if mask is None or mask.dim() == 2:
        return mask
    return as_key_mask(mask, causal, query_length, key_length, used)


def update(
    cache: Any, key: Tensor, value: Tensor, layer: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, int | None]:
    """Keys and values with those of the cache, and how many of them are filled where transformers 4 tells."""
    if cache is None:
        return key, value, None
    position = kwargs.get("cache_position")
    extra = () if position is None else ({"cache_position": position},)
    key, value = cache.update(key, value, layer, *extra)
    used = None if position is None else min(int(position[-1]) + 1, key.shape[2])
    return key, value, used
