"""The positions that a model has of its own: dropped, set to zero, and put back."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters

CHOICES = ("keep", "drop", "zero")
# Names of the embeddings that are learned by absolute position.
LEARNED = ("wpe", "position_embeddings", "embed_positions", "position_embedding")
KEPT = "_posattn_kept"  # what a module had before: (requires_grad, weight or None)


def change(model: nn.Module, positions: str, fresh: bool = True) -> None:
    """Drop or zero all positions in a model. Without `fresh`, weights that are not learned yet are not kept.

    ValueError where there is nothing to change, and for zero with positions that have no weights.
    """
    if positions == "keep":
        return
    learned, weightless = _sites(model)
    if not learned and not weightless:
        raise ValueError(
            f"positions={positions!r} found no positions in {type(model).__name__}: looked for embeddings named "
            f'{", ".join(LEARNED)}, *RotaryEmbedding*, T5\'s buckets and ALiBi; positions="keep" leaves it as it is'
        )
    if positions == "zero" and weightless:
        kinds = ", ".join(sorted({type(module).__name__ for module in weightless}))
        raise ValueError(f'positions="zero" needs weights, which {kinds} has not; use positions="drop"')
    for module in weightless:
        taken = set(inspect.signature(type(module).forward).parameters)
        if "RotaryEmbedding" in type(module).__name__ and taken & {"q", "k", "query", "key"}:
            raise ValueError(
                f"positions={positions!r} knows rotations as (cos, sin); {type(module).__name__} of "
                f"{type(model).__name__} rotates queries and keys itself"
            )
    for module in learned:
        weight = _weight(module)
        kept = weight.detach().clone() if positions == "zero" and fresh and not weight.is_meta else None
        setattr(module, KEPT, (weight.requires_grad, kept))
        if positions == "zero":
            with torch.no_grad():
                weight.zero_()
        else:
            weight.requires_grad_(False)
            _silence(module)
    for module in weightless:
        setattr(module, KEPT, (False, None))
        _silence(module)


def restore(model: nn.Module) -> None:
    """Undo `change`: hooks and marks away, values and requires_grad as they were."""
    for module in model.modules():
        kept = module.__dict__.pop(KEPT, None)
        if kept is None:
            continue
        module.__dict__.pop("posattn_dropped", None)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_nothing, _no_rotation, _first_row)]:
                del hooks[key]  # type: ignore[attr-defined]
                module._forward_hooks_with_kwargs.pop(key, None)
        requires_grad, values = kept
        if getattr(module, "weight", None) is not None or hasattr(module, "relative_attention_bias"):
            weight = _weight(module)
            weight.requires_grad_(requires_grad)
            if values is not None:
                with torch.no_grad():
                    weight.copy_(values)


def changed(model: nn.Module) -> bool:
    return any(KEPT in module.__dict__ for module in model.modules())


def _sites(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules whose positions are weights, and those that compute them."""
    learned: list[nn.Module] = []
    weightless: list[nn.Module] = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if (isinstance(module, nn.Embedding) and name in LEARNED) or _has_buckets(module):
            learned.append(module)
        elif "RotaryEmbedding" in type(module).__name__ or isinstance(module, _alibi()):
            weightless.append(module)
    return learned, weightless


def _has_buckets(module: nn.Module) -> bool:
    return isinstance(getattr(module, "relative_attention_bias", None), nn.Embedding)


def _alibi() -> tuple[Any, ...]:
    return tuple(adapters._class(*pair) for pair in adapters.ALIBI)


def _weight(module: Any) -> nn.Parameter:
    weight = module.relative_attention_bias.weight if _has_buckets(module) else module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _silence(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        if type(module) is nn.Embedding:
            module.register_forward_pre_hook(_first_row)
        module.register_forward_hook(_nothing)
    elif "RotaryEmbedding" in type(module).__name__:
        module.register_forward_hook(_no_rotation)
    else:
        module.posattn_dropped = True  # type: ignore[assignment]


def _first_row(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Sequences may be longer than the embedding that is not used."""
    return (torch.zeros_like(args[0]), *args[1:]) if args else None


def _nothing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _no_rotation(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor) and output.is_complex():
        return torch.ones_like(output)
    if isinstance(output, tuple) and len(output) == 2:
        return torch.ones_like(output[0]), torch.zeros_like(output[1])
    raise ValueError(
        f'positions="drop" knows rotations as (cos, sin); {type(module).__name__} returns something else'
    )
