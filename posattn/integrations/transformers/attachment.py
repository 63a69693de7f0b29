"""Biases for the layers of a model: attached, saved and loaded with it, and detached."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ...biases.bias import Bias
from ...biases.dape import DAPE
from . import adapters
from .family import around, own_config, part_of
from .interface import NAME
from .layers import attention_dropout, calls_attention, find_layers
from .positions import CHOICES, change, changed, restore
from .specification import specify

FIELD = "posattn"  # of config.json
BEFORE = "_posattn_before"  # of a model: its configs, and the implementations they had
Model = TypeVar("Model", bound=nn.Module)
Factory = Callable[[int, int], "Bias | DAPE | None"]


def attach(
    model: Model,
    factory: Factory,
    *,
    positions: str = "keep",
    layers: Iterable[int] | None = None,
) -> Model:
    """Give the self-attention layers of a model of transformers their biases, and make it run on posattn.

    A layer's bias is its submodule `position_bias`: it trains, moves and is saved with the model. save_pretrained
    writes how to make it into config.json, and from_pretrained, once this module is imported, makes and loads it.
    Parameters keep the dtype they were made in (float32), on the layer's device; from_pretrained keeps them in float32
    beside a half-precision model, ``model.to(dtype)`` and ``model.half()`` convert them. Values are computed in float32
    in any case.

    Args:
        model: a `transformers.PreTrainedModel`.
        factory: called as ``factory(layer, heads)`` with the layer's number, 0, 1, ... in the model's order (of T5 the
            encoder's, then the decoder's; once for layers that are one module, as ALBERT's are), and its number of
            query heads. Returns a `posattn.Bias`, a `posattn.DAPE` or None. Layers are given the same object to share
            it. A class of your own is told to `register_bias` first.
        positions: what becomes of the model's own: "keep" them; "drop" learned absolute embeddings, RoPE, T5's buckets
            and ALiBi, which then count as zero and get no gradient; or set learned ones to "zero", to be trained on.
            Without learned positions GPT-2 takes sequences of any length; models that cut or look up positions
            elsewhere, too (BERT, RoBERTa, OPT), still stop at their max_position_embeddings.
        layers: the numbers of the layers that get one; all by default.

    Cross-attention gets none. Biases see where tokens stand in the sequence, and no position_ids: with padding on the
    left, positions are those in the padded sequence. That is the same for every bias but `posattn.FIRE`, which depends
    on the query's absolute position.

    The model gets a copy of its config: other models that were made from the same one do not change. A part of a
    larger model may be attached if its config is that of the larger model, or inside it, so that it is saved with it.

    Returns model, changed in place. TypeError and ValueError for arguments that are none of these, if no layer gets a
    bias and positions are kept, if the model is attached already, for layers that compute no attention of ours, and
    for biases that have parts in common. A DAPE warns of attention dropout, with which it cannot be trained.
    """
    if not isinstance(model, PreTrainedModel):
        advice = ": pass model.get_base_model()" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}{advice}")
    if positions not in CHOICES:
        raise ValueError(f"positions must be one of {', '.join(CHOICES)}, got {positions!r}")
    if getattr(model.config, FIELD, None) is not None or biases_of(model) or changed(model):
        raise ValueError("model is attached already, or a part of it; detach(model) first")
    found = find_layers(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            adapters.check_calls_us(part)
    wanted = set(range(len(found))) if layers is None else set(layers)
    if not wanted <= set(range(len(found))):
        raise ValueError(f"layers must be numbers from 0 to {len(found) - 1}, got {sorted(wanted)}")

    made: dict[str, Bias | DAPE] = {}
    for number, layer in enumerate(found):
        bias = factory(number, layer.heads) if number in wanted else None
        if bias is None:
            continue
        if not isinstance(bias, (Bias, DAPE)):
            raise TypeError(
                f"factory must return a posattn.Bias, a posattn.DAPE or None, got {type(bias).__name__}"
            )
        if bias.num_heads != layer.heads:
            raise ValueError(
                f"factory must return {layer.heads} heads for layer {number}, got {bias.num_heads}"
            )
        if not calls_attention(layer.module):
            raise ValueError(
                f"layer {number}, {layer.path}, a {type(layer.module).__name__}, does not call transformers' attention "
                "interface: a bias would have no effect; pass layers=, or return None for it"
            )
        if hasattr(layer.module, "position_bias"):
            raise ValueError(
                f"{layer.path} has an attribute position_bias already, which attach would replace"
            )
        made[layer.path] = bias
    if not made and positions == "keep":
        raise ValueError(
            "factory returned None for every layer, and positions are kept: there is nothing to attach"
        )

    distinct = list({id(bias): bias for bias in made.values()}.values())
    numbers = {id(bias): number for number, bias in enumerate(distinct)}
    specified = [specify(bias) for bias in distinct]
    check_nothing_in_common(distinct)
    containers = around(model)
    part = part_of(model, containers)
    for layer in found:
        if isinstance(made.get(layer.path), DAPE) and (
            field := attention_dropout(layer.module, model.config)
        ):
            warnings.warn(
                f"config.{field} is not 0, and a DAPE cannot be trained with dropout of attention: set it to 0.0",
                stacklevel=2,
            )
            break
    change(model, positions)
    own_config(model, containers)
    place(model, made)
    for container in containers:
        remember(container)
    setattr(
        model.config,
        FIELD,
        {
            "positions": positions,
            "biases": specified,
            "layers": {inside(model, path): numbers[id(bias)] for path, bias in made.items()},
            **({} if part is None else {"part": part}),
        },
    )
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: biases gone, positions with the values they had, and the attention implementation of before.

    Of a model that was loaded, or made from its config, with positions="zero", values of before are not known: they
    stay. Returns model; ValueError if nothing is attached.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    if getattr(model.config, FIELD, None) is None or not (biases_of(model) or changed(model)):
        raise ValueError("nothing is attached to model")
    for container in around(model):
        forget(container)
    configs: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        if isinstance(module._modules.get("position_bias"), (Bias, DAPE)):
            del module.position_bias
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is served_by_us]:
            del module._forward_pre_hooks[key]
        for config, implementation in module.__dict__.pop(BEFORE, ()):
            configs.setdefault(id(config), (config, implementation))
        if isinstance(module, PreTrainedModel):
            forget(module)
    for config, implementation in configs.values():
        config._attn_implementation_internal = implementation
        if hasattr(config, FIELD):
            delattr(config, FIELD)
    restore(model)
    return model


def check_nothing_in_common(biases: list[Bias | DAPE]) -> None:
    """ValueError for biases that are not the same and share a part, which would be two parts once loaded."""
    seen: set[int] = set()
    for bias in biases:
        parts = {id(part) for part in (*bias.modules(), *bias.parameters())}
        if seen & parts:
            raise ValueError(
                f"factory returned different biases, a {type(bias).__name__} among them, that have a part in common, "
                "such as the base of two DAPEs: return the same object to share all of it, or make the part anew"
            )
        seen |= parts


def biases_of(model: nn.Module) -> dict[str, Bias | DAPE]:
    """The biases that are attached, by the path of their layer."""
    return {
        path: module.position_bias
        for path, module in model.named_modules()
        if isinstance(module._modules.get("position_bias"), (Bias, DAPE))
    }


def place(model: PreTrainedModel, made: dict[str, Bias | DAPE]) -> None:
    """Register biases in their layers, and make everything in the model call posattn."""
    for path, bias in made.items():
        layer = model.get_submodule(path)
        weight = next((p for p in layer.parameters() if not p.is_meta), None)
        if weight is not None and not any(p.is_meta for p in bias.parameters()):
            bias.to(weight.device)
            for module in bias.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        layer.position_bias = bias
    give_configs(model)
    for path in made:
        layer = model.get_submodule(path)
        if served_by_us not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(served_by_us)
    remember(model)
    switch(model)


def give_configs(model: PreTrainedModel) -> None:
    """Layers whose forward is ours ask their config who serves them."""
    kinds = adapters.adapted()
    for part in reversed([part for part in model.modules() if isinstance(part, PreTrainedModel)]):
        for module in part.modules():
            if isinstance(module, kinds) and getattr(module, "config", None) is None:
                module.config = part.config  # type: ignore[assignment]


def switch(model: PreTrainedModel) -> None:
    """Set the implementation of all configs in a model to ours, and keep what they had."""
    before: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        for config, implementation in module.__dict__.get(BEFORE, ()):
            before.setdefault(id(config), (config, implementation))
    for module in model.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation_internal"):
            assert config is not None
            before.setdefault(id(config), (config, config._attn_implementation_internal))
    for config, _ in before.values():
        config._attn_implementation_internal = NAME
    model.__dict__[BEFORE] = list(before.values())


def remember(model: PreTrainedModel) -> None:
    """Tell transformers which parameters are shared, and that they stay in float32 when it loads half precision."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        first: dict[int, str] = {}
        shared: dict[str, str] = {}
        for name, parameter in part.named_parameters(remove_duplicate=False):
            if ".position_bias." in f".{name}" and first.setdefault(id(parameter), name) != name:
                shared[name] = first[id(parameter)]
        if shared and adapters.VERSION >= 5:  # it loads by the first of these, and saves by the second
            part.all_tied_weights_keys.update(shared)
            part._tied_weights_keys = {**(part._tied_weights_keys or {}), **shared}
        elif shared:
            part._dynamic_tied_weights_keys = [
                *(getattr(part, "_dynamic_tied_weights_keys", None) or ()),
                *shared,
            ]
        if adapters.VERSION >= 5:
            part._keep_in_fp32_modules_strict = {*(part._keep_in_fp32_modules_strict or ()), "position_bias"}
        else:
            part._keep_in_fp32_modules_strict = [*(part._keep_in_fp32_modules_strict or ()), "position_bias"]


def forget(model: PreTrainedModel) -> None:
    """Undo `remember`."""
    if adapters.VERSION >= 5:
        for tied in (model.all_tied_weights_keys, model.__dict__.get("_tied_weights_keys") or {}):
            for name in [name for name in tied if ".position_bias." in f".{name}"]:
                del tied[name]
    dynamic = getattr(model, "_dynamic_tied_weights_keys", None)
    if dynamic:
        model._dynamic_tied_weights_keys = [
            name for name in dynamic if ".position_bias." not in f".{name}"
        ] or None
    strict = model._keep_in_fp32_modules_strict
    if strict:
        model._keep_in_fp32_modules_strict = type(strict)(name for name in strict if name != "position_bias")


def inside(model: PreTrainedModel, path: str) -> str:
    """A path as it is in the base model, which is the same with another head or none."""
    prefix = f"{model.base_model_prefix}."
    has_base = isinstance(getattr(model, model.base_model_prefix or " ", None), nn.Module)
    return path[len(prefix) :] if has_base and path.startswith(prefix) else path


def served_by_us(module: nn.Module, args: Any) -> None:
    """A hook on layers with a bias: another implementation would leave it out."""
    if not adapters.served(module):
        config = getattr(module, "config", None)
        raise RuntimeError(
            f"a layer has a {type(module.position_bias).__name__}, which "
            f"attn_implementation={getattr(config, '_attn_implementation', None)!r} would leave out; "
            f'model.set_attn_implementation("{NAME}") puts it back, detach(model) takes it away'
        )
