"""FSDP2: a bias in a group of its own, in its own precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..biases.bias import Bias
from ..biases.dape import DAPE
from .heads import formula_of


def fully_shard_bias(bias: Bias | DAPE, **keywords: Any) -> Bias | DAPE:
    """`torch.distributed.fsdp.fully_shard` for a bias of its own, in place; returns the bias.

    A bias inside of a module that is given to `fully_shard` needs nothing: its parameters are gathered with the
    module's. But ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` there rounds them, too, to 8 bits before
    its table is made in float32. Called on the biases first, this keeps them as they are and lets FSDP know of the
    methods that attention calls in place of forward::

        for layer in model.layers:
            fully_shard_bias(layer.bias)
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        fully_shard(model)

    With `shard_heads`, that comes first.

    Args:
        bias: a `posattn.Bias` or a `posattn.DAPE`.
        keywords: those of `fully_shard`; mp_policy by default casts nothing.

    Raises TypeError for another module.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not isinstance(bias, (Bias, DAPE)):
        raise TypeError(f"bias must be a posattn.Bias or a posattn.DAPE, got {type(bias).__name__}")
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    methods = _methods(bias)
    fully_shard(bias, **{"mp_policy": own, **keywords})
    for method in methods:
        setattr(bias, method, _copying(getattr(bias, method)))
        register_fsdp_forward_method(bias, method)
    return bias


def _copying(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with results of its own: a parameter among them would be freed as soon as it is returned."""

    @functools.wraps(method)
    def call(*args: Any, **keywords: Any) -> Any:
        made = method(*args, **keywords)
        if isinstance(made, Tensor):
            return made.clone()
        if isinstance(made, tuple):
            return type(made)(*(part.clone() if isinstance(part, Tensor) else part for part in made))
        return made

    return call


def _methods(bias: Bias | DAPE) -> list[str]:
    """What attention asks of this bias and what reads parameters, which must be whole there as in a forward."""
    if isinstance(bias, DAPE):
        return ["network"]
    kind: Any = formula_of(bias)
    own = [name for name in ("scaled", "slopes", "support") if getattr(kind, name) is not getattr(Bias, name)]
    return own if "scaled" in own else ["table", *own]
