"""Which modules of a model are self-attention, and how many heads they have."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn

from . import adapters

# A child of an attention layer by one of these names projects its queries.
PROJECTIONS = {"q_proj", "q_lin", "q", "query", "q_a_proj", "q_b_proj"}
PROJECTIONS |= {"c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv"}
# Parts of names, in lower case, by which cross-attention goes.
CROSS = ("cross", "encoder_attn", "encdec")
# Words in the source of layers that call transformers' attention interface.
INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "attention_interface", "AttentionInterface")
# Fields of configs for the dropout of attention's probabilities.
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_config.attn_pdrop")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


class Layer(NamedTuple):
    """A self-attention layer: its path in the model, itself, its query heads."""

    path: str
    module: nn.Module
    heads: int


def find_layers(model: nn.Module) -> list[Layer]:
    """All self-attention of a model of transformers in its order, each module once; ValueError for none."""
    found = []
    for path, module in model.named_modules():
        children = {name for name, _ in module.named_children()}
        if "attention" not in type(module).__name__.lower() or not children & PROJECTIONS:
            continue
        names = f"{path.rpartition('layers.')[2]} {type(module).__name__}".lower()
        if getattr(module, "is_cross_attention", False) is True or any(part in names for part in CROSS):
            continue
        found.append(Layer(path, module, _heads(path, module, model)))
    if not found:
        raise ValueError(
            f"no self-attention found in {type(model).__name__}: looked for modules named *Attention* with a child "
            f"named {', '.join(sorted(PROJECTIONS))}"
        )
    return found


def _heads(path: str, module: nn.Module, model: nn.Module) -> int:
    places: list[Any] = [module, getattr(module, "config", None), getattr(model, "config", None)]
    for place in places:
        for name in HEADS:
            heads = getattr(place, name, None)
            if isinstance(heads, int):
                return heads
    raise ValueError(f"{path}, a {type(module).__name__}, does not say how many heads it has")


def calls_attention(module: nn.Module) -> bool:
    """Whether a layer runs on posattn, as far as its source tells: some are linear attention, or another kind."""
    if isinstance(module, adapters.adapted()):
        return True
    try:
        sources = [inspect.getsource(kind) for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    except (OSError, TypeError):
        return True
    return any(word in source for source in sources for word in INTERFACE)


def attention_dropout(module: nn.Module, config: Any) -> str | None:
    """The field of the config that says that attention has dropout, if it does."""
    place = getattr(module, "config", None) or config
    fields = ("dropout_rate",) if isinstance(module, adapters.buckets()) else DROPOUTS
    for field in fields:
        value = place
        for name in field.split("."):
            value = getattr(value, name, None)
        if isinstance(value, (int, float)) and value > 0:
            return field
    return None
