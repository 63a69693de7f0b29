"""The bias of a layer as it is held there: wrapped by PEFT, or offloaded by accelerate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

from ...biases.bias import Bias
from ...biases.dape import DAPE

F = TypeVar("F", bound=Callable[..., Any])


def bias_of(module: nn.Module) -> Bias | DAPE | None:
    """The bias that `attach` gave a layer, or PEFT's copy of it (modules_to_save). TypeError for other wrappers."""
    own: Any = module._modules.get("position_bias")
    copies = getattr(own, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):  # PEFT
        wrapper: Any = own
        active = wrapper.active_adapter
        names = [active] if isinstance(active, str) else list(active)
        name = next((name for name in names if name in copies), None)
        own = wrapper.original_module if wrapper.disable_adapters or name is None else copies[name]
    if own is None or isinstance(own, (Bias, DAPE)):
        return own
    raise TypeError(
        f"position_bias of {type(module).__name__} must be a bias of posattn, got {type(own).__name__}"
    )


def with_bias_here(function: F) -> F:
    """Load the bias of the layer, the first argument, while the function runs, if accelerate has offloaded it: a
    bias is read and not called, which is where accelerate would do so itself."""

    @functools.wraps(function)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = bias_of(module)
        hooked = [] if own is None else [part for part in own.modules() if hasattr(part, "_hf_hook")]
        if not hooked:
            return function(module, *args, **kwargs)
        loaded: list[Any] = []
        try:
            for part in hooked:
                hook: Any = part._hf_hook
                hook.pre_forward(part)
                loaded.append((part, hook))
            return function(module, *args, **kwargs)
        finally:
            for part, hook in reversed(loaded):
                hook.post_forward(part, None)

    return cast(F, run)
