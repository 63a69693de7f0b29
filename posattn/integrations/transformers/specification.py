"""How a bias is written into config.json, and made again from it: its class and the arguments of its constructor."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ... import biases
from ...biases.bias import Bias
from ...biases.dape import DAPE

Arguments = Callable[[Any], dict[str, Any]]
T = TypeVar("T", bound=type)

PACKAGE = ("ALiBi", "DAPE", "FIRE", "KERPLE", "RelativeTable", "Sandwich", "T5Bias", "TISA")
_CLASSES: dict[str, tuple[type, Arguments | None]] = {name: (getattr(biases, name), None) for name in PACKAGE}


def register_bias(cls: T, arguments: Arguments | None = None) -> T:
    """Let biases of a class of your own be saved with a model, and made again when it is loaded.

    ``arguments(bias)`` returns the constructor's arguments by name, numbers, strings, lists and None only; by default
    they are attributes of the same names. Where the model is loaded, the class must be registered, too. Also a
    decorator. TypeError if cls is no subclass of `posattn.Bias` or `posattn.DAPE`; ValueError if another class has
    its name.

        >>> import torch, posattn
        >>> @register_bias
        ... class Nearest(posattn.Bias):
        ...     def __init__(self, num_heads, reach=2):
        ...         super().__init__(num_heads)
        ...         self.reach = reach
        ...         self.strength = torch.nn.Parameter(torch.zeros(num_heads))
        ...     def values(self, offsets):
        ...         return self.strength[:, None] * (offsets.abs() < self.reach)
        >>> specify(Nearest(4))
        {'class': 'Nearest', 'arguments': {'num_heads': 4, 'reach': 2}}
    """
    if not (isinstance(cls, type) and issubclass(cls, (Bias, DAPE))):
        raise TypeError(f"cls must be a subclass of posattn.Bias or posattn.DAPE, got {cls!r}")
    known = _CLASSES.get(cls.__name__, (cls, None))[0]
    if known is not cls and (cls.__name__ in PACKAGE or known.__module__ != cls.__module__):
        raise ValueError(f"another class is registered as {cls.__name__!r}: {known!r}")
    _CLASSES[cls.__name__] = cls, arguments
    return cls


def specify(bias: nn.Module) -> dict[str, Any]:
    """{"class": ..., "arguments": ...} of a bias. ValueError for a class that is not registered."""
    kind = type(bias)
    known, arguments = _CLASSES.get(kind.__name__, (None, None))
    if known is not kind:
        raise ValueError(
            f"{kind.__name__} could not be saved with the model: call register_bias({kind.__name__}) before attach"
        )
    if arguments is not None:
        given = dict(arguments(bias))
    else:
        names = [name for name in inspect.signature(kind).parameters if name != "self"]
        missing = [name for name in names if not hasattr(bias, name)]
        if missing:
            raise ValueError(
                f"{kind.__name__} does not keep {', '.join(missing)} as attributes: pass arguments= to register_bias"
            )
        given = {name: getattr(bias, name) for name in names}
    given = {name: specify(a) if isinstance(a, (Bias, DAPE)) else a for name, a in given.items()}
    try:
        json.dumps(given)
    except TypeError as error:
        raise ValueError(
            f"the arguments of {kind.__name__} must be plain numbers and strings: {error}"
        ) from error
    return {"class": kind.__name__, "arguments": given}


def build(specification: dict[str, Any]) -> nn.Module:
    """A new bias from what `specify` returned. ValueError for a class that is not registered."""
    name = specification["class"]
    if name not in _CLASSES:
        raise ValueError(
            f"the model was saved with a bias of class {name}: call register_bias({name}) before loading"
        )
    arguments = {
        key: build(value) if isinstance(value, dict) and "class" in value else value
        for key, value in specification["arguments"].items()
    }
    made = _CLASSES[name][0](**arguments)
    assert isinstance(made, nn.Module)
    return made
