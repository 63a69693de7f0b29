"""Models whose config says that biases are attached get them when they are made, so that from_pretrained fills them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...biases.bias import Bias
from ...biases.dape import DAPE
from . import adapters, positions
from .attachment import FIELD, give_configs, place
from .interface import NAME
from .specification import build


def install() -> None:
    """Wrap two methods of PreTrainedModel, once. They do what they did, and then look at config.posattn."""
    if hasattr(PreTrainedModel.post_init, "_posattn_original"):
        return
    post_init, initialize = PreTrainedModel.post_init, PreTrainedModel._initialize_weights

    @functools.wraps(post_init)
    def post_init_of_ours(self: Any) -> None:
        post_init(self)
        rebuild(self)

    @functools.wraps(initialize)
    def initialize_of_ours(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, (Bias, DAPE)):
            complete(module)
        elif not getattr(module, "_posattn_inside", False):
            initialize(self, module, *args, **kwargs)

    post_init_of_ours._posattn_original = post_init  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init_of_ours
    PreTrainedModel._initialize_weights = initialize_of_ours
    if adapters.VERSION < 5:
        from . import version4

        version4.install_loading(rebuild)


def rebuild(model: PreTrainedModel) -> None:
    """Attach what the model's config says, as far as the model, or the part of one, has these layers."""
    if any(isinstance(module, adapters.adapted()) for module in model.modules()):
        give_configs(model)
    if model.config._attn_implementation == NAME:
        adapters.check_calls_us(model)
    field = getattr(model.config, FIELD, None)
    if field is None:
        return
    modules = dict(model.named_modules())
    start = ""
    if "part" in field:  # of several, that may have layers of the same names
        found = [path for path, module in modules.items() if type(module).__name__ == field["part"]]
        if not found:
            return
        start = f"{found[0]}." if found[0] else ""
    made: dict[str, Bias | DAPE] = {}
    biases: dict[int, Any] = {}
    for path, number in field["layers"].items():
        places = (f"{start}{path}", f"{model.base_model_prefix}.{path}")[: 1 if "part" in field else 2]
        path = next((place for place in places if place in modules), None)
        if path is None:
            continue
        there = modules[path]._modules.get("position_bias")
        if isinstance(there, (Bias, DAPE)):  # by a model inside this one
            biases[number] = there
        elif number not in biases:
            biases[number] = build(field["biases"][number])
            for module in biases[number].modules():
                module._posattn_inside = True
        made[path] = biases[number]
    if not made and field["layers"]:
        return
    if not positions.changed(model):
        positions.change(model, field["positions"], fresh=False)
    place(model, made)


@torch.no_grad()
def complete(bias: Any) -> None:
    """A bias after loading: what no file had gets the values of a new one, and constants theirs."""
    if isinstance(bias, Bias):
        bias._apply(lambda tensor: tensor)
    if getattr(bias, "_is_hf_initialized", False):
        return
    inner = [child for child in bias.modules() if child is not bias and isinstance(child, Bias)]
    nested = {id(p) for child in inner for p in child.parameters()}
    own = [p for p in bias.parameters() if id(p) not in nested]
    loaded = [p for p in own if getattr(p, "_is_hf_initialized", False)]
    bias._is_hf_initialized = True
    if len(loaded) == len(own) or any(p.is_meta for p in own):
        bias._is_hf_initialized = len(loaded) == len(own)
        return
    if not hasattr(bias, "reset_parameters"):
        raise ValueError(
            f"the file has no values for a {type(bias).__name__}, which has no reset_parameters() to make new ones"
        )
    values = [p.clone() for p in loaded]
    bias.reset_parameters()
    for parameter, value in zip(loaded, values):
        parameter.copy_(value)
