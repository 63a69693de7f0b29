"""The attention function that models of transformers call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attention
from ...biases.bias import Bias
from ...biases.dape import DAPE
from ...varlen import attention_varlen
from .held import bias_of, with_bias_here
from .masks import DOCUMENT_TYPES, all_count, as_key_mask, key_mask, mark

NAME = "posattn"
# What a caller may hand over that changes the result and is not served, by its meaning.
REFUSED = {
    "output_attentions": "returns attention weights, which are never made",
    "head_mask": "masks heads",
    "layer_head_mask": "masks heads",
    "cross_attn_head_mask": "masks heads",
    "cache": "reads a paged cache",
    "block_table": "reads a paged cache",
    "indices": "attends to chosen keys only",
    "block_indices": "attends to chosen keys only",
    "sinks": "has another meaning in each model",
}


def register() -> None:
    """Make "posattn" an attention implementation of transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_mask)


@with_bias_here
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | Bias | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`posattn.attention` with the signature of transformers' attention functions, and `module.position_bias`.

    query (B, Hq, Lq, D), key and value (B, Hk, Lk, D) -> (out (B, Lq, Hq, Dv), None). The last query stands on the last
    key, or the last that attention_mask knows. attention_mask: None, (B, n) or, of models that make their own, 4-D
    masks that hide padding and the future. Self-attention is causal if its mask was made causal, whatever the module
    says; otherwise by is_causal, or by module.is_causal without it.
    sliding_window W: the query and W - 1 keys to its left, and as many to its right if attention is not causal.
    position_bias: the table (1, H, 1, Lq + Lk - 1) that `adapters` makes T5 hand down, or zeros (1, H, 1, 1). Packed
    batches come as cu_seq_lens_q and so on, B = 1, or as position_ids that start anew, which transformers looks at only
    with use_cache=False or in training (see `key_mask`). position_ids have no other effect on biases.

    ValueError for whatever is not served; nothing is left out silently.
    """
    for name, meaning in REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f'attn_implementation="{NAME}" cannot serve {name}, which {meaning}; use attn_implementation="eager"'
            )
    causal = _causal(module, is_causal, attention_mask)
    own = bias_of(module)
    packed = cu_seq_lens_q is not None
    padding = documents = None
    if not packed:
        key, value, padding, documents = _masked(attention_mask, query, key, value, causal)
    window = _window(module, sliding_window, causal, key.shape[2], mark(attention_mask).windowed)
    if own is not None:
        check_positions(own, query.shape[2], key.shape[2], sliding_window)
    bias = combined(own, position_bias, query, key)
    options: dict[str, Any] = {
        "is_causal": causal,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
        "window": window,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": float(dropout),
    }
    if packed:
        if query.shape[0] != 1 or isinstance(bias, Tensor):
            what = (
                "its own table of positions" if isinstance(bias, Tensor) else f"a batch of {query.shape[0]}"
            )
            raise ValueError(f"cu_seq_lens_q needs a batch of 1 and no table of positions, got {what}")
        assert cu_seq_lens_q is not None and cu_seq_lens_k is not None and max_length_q is not None
        assert max_length_k is not None
        same = cu_seq_lens_k is cu_seq_lens_q or torch.equal(cu_seq_lens_k, cu_seq_lens_q)
        out = attention_varlen(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q if same else cu_seq_lens_k,  # the same tensor: backward does less
            int(max_length_q),
            int(max_length_k),
            bias,
            **options,
        )
        assert isinstance(out, Tensor)
        return out[None], None
    out = attention(query, key, value, bias, key_padding_mask=padding, document_ids=documents, **options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _causal(module: nn.Module, given: bool | None, mask: Any) -> bool:
    """Some models hand over False whenever there is a mask, as those of other implementations hide the future."""
    own = getattr(module, "is_causal", None)
    if mark(mask).causal and getattr(module, "is_cross_attention", False) is not True:
        return True
    if given is None and own is None:
        raise ValueError(f"{type(module).__name__} does not say whether it is causal: it has no is_causal")
    if given is None or (given is False and own and mask is not None):
        config = getattr(module, "config", None)
        crosses = getattr(module, "is_cross_attention", False) is True
        return (
            bool(own) and not crosses and (given is None or getattr(config, "is_causal", True) is not False)
        )
    return bool(given)


def _masked(
    mask: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """key and value without what is not filled yet, the keys that count and the documents."""
    if mask is None:
        return key, value, None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a Tensor or None, got {type(mask).__name__}")
    length = key.shape[2]
    if mask.dim() == 4:
        made = as_key_mask(mask, causal, query.shape[2], length)
        if made is None:
            return key, value, None, None
        mask = made
    if mask.dim() != 2 or mask.shape[0] != key.shape[0] or mask.shape[1] > length or mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be (batch, key_length) = {(key.shape[0], length)}, bool or of integers, got shape "
            f"{tuple(mask.shape)}, {mask.dtype}"
        )
    if mask.dtype in DOCUMENT_TYPES and mask.shape[1] == length == query.shape[2]:
        return key, value, None, mask.to(torch.int32)
    if mask.shape[1] < length:  # a static cache
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    return key, value, None if all_count(mask) else mask.bool(), None


def _window(
    module: nn.Module, width: int | None, causal: bool, key_length: int, needed: bool
) -> tuple[int | None, int | None] | None:
    if width is None or width <= 0:
        if needed:
            raise ValueError(
                f"the model's mask has a sliding window, which {type(module).__name__} does not hand to attention: "
                'use attn_implementation="eager"'
            )
        config = getattr(module, "config", None)
        kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
        if kinds and isinstance(layer, int) and layer < len(kinds) and kinds[layer] == "sliding_attention":
            width = getattr(config, "sliding_window", None)
            if width is not None and key_length > width:
                raise ValueError(
                    f"layer {layer} slides over {width} keys, which {type(module).__name__} does not hand to attention"
                )
        return None
    return width - 1, None if causal else width - 1


def check_positions(bias: Bias | DAPE, query_length: int, key_length: int, width: int | None) -> None:
    """A FIRE asks where a query stands, which a cache that has dropped keys does not tell."""
    from ...biases.fire import FIRE

    inside = bias.base if isinstance(bias, DAPE) else bias
    if isinstance(inside, FIRE) and width is not None and query_length < key_length and key_length >= width:
        raise ValueError(
            "a FIRE needs the position of the query, which a cache of a sliding window does not keep; "
            "generate with use_cache=False, or take a bias of the offset only"
        )


def combined(
    own: Bias | DAPE | None, models: Tensor | Bias | None, query: Tensor, key: Tensor
) -> Bias | DAPE | Tensor | None:
    """The bias that was attached and that of the model, of which either may be None."""
    lengths = query.shape[2], key.shape[2]
    width = sum(lengths) - 1
    if isinstance(models, Tensor):
        models = _table(models, query, key)
    if own is None or models is None:
        return own if models is None else models
    if isinstance(own, DAPE):
        raise ValueError(
            'a DAPE cannot be added to the positions of the model: attach it with positions="drop", and give it '
            "what the model had as its base"
        )
    if width < 1:
        return None
    if own.scaled(*lengths) is not None:
        raise ValueError(
            f'a {type(own).__name__} cannot be added to the positions of the model: use positions="drop"'
        )
    return own.table(*lengths) + (models.table(*lengths) if isinstance(models, Bias) else models)


def _table(handed: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """(1, H, 1, at least Lq + Lk - 1) -> (H, Lq + Lk - 1); None for the zeros (1, H, 1, 1)."""
    heads, width = query.shape[1], query.shape[2] + key.shape[2] - 1
    if handed.dim() == 4 and handed.shape[:3] == (1, heads, 1):
        if handed.shape[3] >= width:
            return handed[0, :, 0, :width]
        if handed.shape[3] == 1:
            return None
    raise ValueError(
        f"position_bias must be a table of offsets, (1, {heads}, 1, {width}), got shape {tuple(handed.shape)}; "
        "posattn knows how to make it for T5 and mT5. For a bias of queries by keys use "
        'attn_implementation="eager"'
    )
