"""The models around a model, and its config, which may be shared with them and with others."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def around(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that are alive and have this one inside, the largest first."""
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel)]
    alive = [other for other in alive if other is not model and "_modules" in other.__dict__]
    found = [other for other in alive if any(part is model for part in other.modules())]
    return sorted(found, key=lambda other: -sum(1 for _ in other.modules()))


def part_of(model: PreTrainedModel, containers: list[PreTrainedModel]) -> str | None:
    """The name of model's class, if it is a part of a larger model that only this name tells from its other parts.

    ValueError if its config is not written where a larger model is saved, or another part could be taken for it.
    """
    name = type(model).__name__
    part = None
    for container in containers:
        if not any(config is model.config for config in configs(container.config)):
            raise ValueError(
                f"model is a part of a {type(container).__name__} and has a config of its own, which is not saved with "
                f"that: attach to the {type(container).__name__}, with layers= or a factory that returns None for some"
            )
        if container.config is not model.config or base_of(container) is model:
            continue
        part = name
        same = [other for other in container.modules() if type(other).__name__ == name]
        if len(same) > 1:
            raise ValueError(
                f"model is one of {len(same)} parts of class {name} in a {type(container).__name__}: attach to that, "
                "with layers= or a factory that returns None for some"
            )
    return part


def base_of(model: PreTrainedModel) -> Any:
    return getattr(model, model.base_model_prefix or " ", None)


def configs(config: Any) -> Iterator[Any]:
    """A config and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from configs(value)


def own_config(model: PreTrainedModel, containers: list[PreTrainedModel]) -> None:
    """Copy the config of a model, so that other models, made or to be made from it, do not change with it.

    All modules of the model, and of the models around it, that had the config or one inside it get its copy.
    """
    largest = containers[0] if containers else model
    memo: dict[int, Any] = {}
    copy.deepcopy(largest.config, memo)
    if id(model.config) not in memo:  # held by no model around
        copy.deepcopy(model.config, memo)
    for module in largest.modules():
        _repoint(module, memo)


def _repoint(module: nn.Module, copies: dict[int, Any]) -> None:
    for name, value in list(module.__dict__.items()):
        if isinstance(value, PretrainedConfig) and id(value) in copies:
            module.__dict__[name] = copies[id(value)]
