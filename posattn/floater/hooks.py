"""Hooks on a model: those that open and close the frames of its forwards, and those that add vectors."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .frames import Frame, Place, Stack, within

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
# Names of what is (batch, length) or (batch, length, width), and the number of its dimensions.
INPUTS = {"input_ids": 2, "inputs_embeds": 3, "hidden_states": 3}
_installing = threading.Lock()


class Opens:
    """Pre-hook of a module whose forward runs a stack, directly (its owner) or not: finds out where tokens stand."""

    def __init__(self, stack: Stack, module: nn.Module, owner: bool) -> None:
        self.stack, self.owner = stack, owner
        self.names = list(inspect.signature(module.forward).parameters)
        # layers of transformers that may be told to make their forward again in backward
        self.layers = [layer for layer in module.modules() if hasattr(layer, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            _disable_dynamo(Opens._open)(self, module, args, kwargs)
        else:
            self._open(module, args, kwargs)

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer, frames = self.stack.current(), self.stack.frames
        if any(frame.opener is module for frame in frames):
            outer = None  # called within its own forward: another text
        frame = Frame(outer, module, _caller())
        frames.append(frame)
        given = {**dict(zip(self.names, args)), **kwargs}
        past = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if past is not None:
            frame.start = past_length(past)
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if isinstance(positions, Tensor):
            frame.positions = positions
        if isinstance(mask, Tensor) and mask.dim() == 2:
            frame.mask = mask
        if self.owner:
            for name, dims in INPUTS.items():
                tokens = given.get(name)
                if isinstance(tokens, Tensor) and tokens.dim() == dims:
                    frame.size = (tokens.shape[0], tokens.shape[1])
                    break
        for layer in self.layers:
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not (
                isinstance(checkpoint, Remade) and self.stack in checkpoint.stacks
            ):
                _remake(layer, self.stack)


def _caller() -> FrameType | None:
    """Of a hook: the Python frame of the module's call. torch.compile puts others in between."""
    frame: FrameType | None = sys._getframe()
    passed = (_caller.__code__.co_filename, _disable_dynamo.__code__.co_filename)
    while frame is not None and (frame.f_code.co_filename in passed or "_dynamo" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame


class Closes:
    """Hook of the same module, called whether its forward returns or raises an Exception."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            _disable_dynamo(Closes._close)(self, module, None)
        else:
            self._close(module, sys._getframe(1))

    def _close(self, module: nn.Module, caller: FrameType | None) -> None:
        # After an Exception the frame's own caller has ended already, and a frame that is left may be an outer one's.
        # Between compiled graphs the rest of a caller is a function of its own.
        frame = self.stack.current()
        if frame is not None and frame.opener is module and caller in (None, frame.caller):
            self.stack.frames.pop().caller = None  # what it holds may live on in a graph


class Remade:
    """In place of a layer's checkpoint function: the forward that is made again in backward has its frames again."""

    def __init__(self, checkpoint: Callable[..., Any], stack: Stack) -> None:
        self.checkpoint, self.stacks = checkpoint, [stack]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = [(stack, stack.current()) for stack in self.stacks]
        under_way = [(stack, frame) for stack, frame in current if frame is not None]
        return self.checkpoint(InFrames(function, under_way), *args, **kwargs)


def _remake(layer: nn.Module, stack: Stack) -> None:
    with _installing:
        checkpoint: Any = layer._gradient_checkpointing_func
        if not isinstance(checkpoint, Remade):
            layer._gradient_checkpointing_func = Remade(checkpoint, stack)  # type: ignore[assignment]
        elif stack not in checkpoint.stacks:
            checkpoint.stacks.append(stack)


class InFrames:
    """A function that runs in frames of its own choice.

    A checkpoint that is not re-entrant makes the forward again for values only, and gradients go the way of the first
    time: the same vectors serve. A re-entrant one runs the first time without autograd and differentiates the second,
    layer by layer: there vectors are solved for anew in each layer, and gradients go through that. Each call of a
    checkpoint has its own, whose second run may be in another thread, that of a GPU's backward.
    """

    def __init__(self, function: Callable[..., Any], frames: list[tuple[Stack, Frame]]) -> None:
        self.function, self.frames = function, frames
        self.reentrant = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(frame.grad for _, frame in self.frames) and not torch.is_grad_enabled():
            self.reentrant = True
        with contextlib.ExitStack() as opened:
            for stack, frame in self.frames:
                opened.enter_context(within(stack, frame.again() if self.reentrant else frame))
            return self.function(*args, **kwargs)


class Adds:
    """Hook of a projection: its output (batch, length, width) with the vectors of its streams and layer added.

    In place where autograd permits. The alternative is to have the projection's matrix product start from the vectors
    (addmm with them as its third operand). Measured on 2 CPU cores with length and width 512, in ms:
                                     linear, add_   addmm     (1 thread; 2 threads are alike within the noise of 5 %)
        batch 1, forward                2.88         2.74
        batch 1, forward and backward   9.63         9.41
        batch 8, forward               26.2         24.0
        batch 8, forward and backward  72.3         73.4
    At most 8 % of a projection's forward, nothing in training: not worth replacing what the model's author put there.
    """

    def __init__(
        self, stack: Stack, places: list[Place | None], layout: str, head_dim: int, counted: bool
    ) -> None:
        self.stack, self.places, self.counted = stack, places, counted
        self.layout, self.head_dim = layout, head_dim

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            added: Tensor = _disable_dynamo(Adds._added)(self, module, output)
            return added
        return self._added(module, output)

    def _added(self, module: nn.Module, output: Tensor) -> Tensor:
        frame = self.stack.current()
        if frame is None:
            raise RuntimeError(
                f'a projection of the attention stack "{self.stack.name}" was called outside of a forward of the model '
                "(or of the module that runs the stack), so that positions are not known. Call the model; for "
                "checkpoints use the model's own activation_checkpointing_enable()"
            )
        self._check(output, frame)
        wanted = [place for place in self.places if place is not None]
        found = iter(self.stack.vectors(frame, wanted, output, output.shape[1], self.counted))
        parts = [None if place is None else next(found) for place in self.places]
        vectors = arranged(parts, self.layout, self.head_dim)
        known = type(module) is nn.Linear or type(module).__name__ == "Conv1D"  # its output is nobody else's
        in_place = known and not (output.requires_grad and output._is_view())
        return output.add_(vectors) if in_place else output + vectors

    def _check(self, output: Tensor, frame: Frame) -> None:
        shape = tuple(output.shape)
        if len(shape) != 3:
            raise RuntimeError(
                f"a projection gave {shape}; positions are known for (batch, length, width) only"
            )
        if frame.size is None or self.counted:
            return
        batch, length = frame.size
        # Some lengthen what they are given to a multiple of their window: at least the length.
        if shape[0] != batch and shape[1] == batch and shape[0] >= length:
            raise RuntimeError(
                f'the attention stack "{self.stack.name}" was given {batch} sequences of length {length}, (batch, '
                f"length) = {frame.size}, but a projection gave {shape}, its length first: projections of (batch, "
                "length, width) are served. detach() gives the model back as it was"
            )


def arranged(parts: list[Tensor | None], layout: str, head_dim: int) -> Tensor:
    """One vector (..., dim) a stream, None for zeros, as they lie in a projection's output: (..., streams x dim)."""
    some = next(part for part in parts if part is not None)
    tensors = [torch.zeros_like(some) if part is None else part for part in parts]
    if layout == "whole":
        return tensors[0]
    if layout == "chunks":
        return torch.cat(tensors, dim=-1)
    return torch.stack([part.unflatten(-1, (-1, head_dim)) for part in tensors], dim=-2).flatten(-3)


def taken_apart(row: Tensor, streams: int, layout: str, head_dim: int) -> list[Tensor]:
    """The inverse of `arranged`: the parts (dim,) of a bias (streams x dim,)."""
    if layout != "heads":
        return list(row.chunk(streams))
    return [part.flatten() for part in row.view(-1, streams, head_dim).unbind(1)]


def past_length(past: Any) -> int:
    """How many tokens a cache holds: any object with get_seq_length, or nested tuples of keys and values."""
    if hasattr(past, "get_seq_length"):
        return int(past.get_seq_length())
    while isinstance(past, (tuple, list)) and past:
        past = past[0]
    return past.shape[-2] if isinstance(past, Tensor) else 0
