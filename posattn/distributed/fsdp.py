"""FSDP2: a bias in a group of its own, in its own precision."""

from __future__ import annotations

from typing import Any

from ..biases.bias import Bias
from ..biases.dape import DAPE

# What attention asks of a bias: there, as in the forward of other modules, the parameters must be whole.
METHODS = ("table", "scaled", "slopes", "support", "network")


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

    The parameters, gathered once, stay so until backward (reshard_after_forward=False): they are few. With
    `shard_heads`, that comes first.

    Args:
        bias: a `posattn.Bias` or a `posattn.DAPE`.
        keywords: those of `fully_shard`; mp_policy by default casts nothing.

    Raises TypeError for another module.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not isinstance(bias, (Bias, DAPE)):
        raise TypeError(f"bias must be a posattn.Bias or a posattn.DAPE, got {type(bias).__name__}")
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(bias, **{"mp_policy": own, "reshard_after_forward": False, **keywords})
    for method in METHODS:
        if hasattr(bias, method):
            register_fsdp_forward_method(bias, method)
    return bias
