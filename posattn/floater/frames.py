"""Vectors on their way into a model: which forward is under way, where its tokens stand, what is added where.

Each forward of a stack opens a `Frame`, which holds the positions of its tokens and solves for their vectors at most
once for all layers and streams. Everything here is made of classes of the module's level, so that a model
with hooks can be copied and pickled.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import FLOATER

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")


class Place(NamedTuple):
    """Where a vector comes from: an encoder of a stack ("own", or "cross" for cross keys and values), stream, layer."""

    encoder: str
    stream: int
    layer: int


class Rows(NamedTuple):
    """Vectors of one forward: (positions, dim) each, and (batch or 1, length) which of them; None: in order."""

    by_place: tuple[Tensor, ...]
    which: Tensor | None


class Frame:
    """One forward of a stack.

    Tokens stand at ``start, start + 1, ...`` or, where a model is given them, at `positions` (batch or 1, length).
    `grad` is the grad mode in which the forward began: parts of it may run without (a checkpoint that is re-entrant),
    but vectors serve all of it.
    """

    def __init__(
        self, start: int = 0, positions: Tensor | None = None, opener: nn.Module | None = None
    ) -> None:
        self.start, self.positions, self.opener = start, positions, opener
        self.grad = torch.is_grad_enabled()
        self._rows: dict[tuple[Any, ...], Rows] = {}

    def again(self) -> Frame:
        """The same tokens, solved for anew, in the grad mode of now."""
        return Frame(self.start, self.positions)

    def rows(self, encoder: FLOATER, like: Tensor, length: int, counted: bool) -> Rows:
        """Vectors for `length` tokens, in the dtype and on the device of `like`; counted: from 0, whatever tokens."""
        if not counted and self.positions is not None:
            self._settle(length)
        scattered = not counted and self.positions is not None
        start = 0 if counted or scattered else self.start
        key = (id(encoder), like.dtype, like.device, scattered, start)
        rows = self._rows.get(key)
        if rows is None or (not scattered and rows.by_place[0].shape[0] < length):
            rows = self._rows[key] = self._solve(encoder, like, start, length, scattered)
        return rows

    def _settle(self, length: int) -> None:
        """Positions as models give them: checked, and replaced by their start where they are contiguous."""
        positions = self.positions
        assert positions is not None
        if positions.dim() not in (1, 2) or positions.shape[-1] != length:
            shape = tuple(positions.shape)
            raise RuntimeError(
                f"positions of shape {shape} are given for {length} tokens; expected (batch, {length})"
            )
        positions = positions.detach().reshape(-1, length)
        if not positions.is_floating_point() and length:
            first = int(positions[0, 0])
            if torch.equal(positions, (first + torch.arange(length).to(positions)).expand_as(positions)):
                self.start, self.positions = first, None
                return
        self.positions = positions

    def _solve(self, encoder: FLOATER, like: Tensor, start: int, length: int, scattered: bool) -> Rows:
        # The solve belongs to no checkpoint that may be recording around it: what it saves is saved as it is, and not
        # counted there.
        which = None
        with (
            torch.set_grad_enabled(self.grad),
            torch.autograd.graph.saved_tensors_hooks(_detached, _unchanged),
        ):
            if scattered:
                assert self.positions is not None
                distinct, which = torch.unique(self.positions, return_inverse=True)
                vectors = encoder.at(distinct)
                which = which.to(like.device)
            else:
                vectors = encoder(start + length)[:, :, start:]
            vectors = vectors.to(like.device, like.dtype)
            return Rows(vectors.flatten(0, 1).unbind(0), which)


class Stack:
    """What the attention layers of one stack share: encoders, and the forwards under way."""

    def __init__(self, name: str, encoders: dict[str, FLOATER], by_mask: bool) -> None:
        self.name, self.encoders, self.by_mask = name, encoders, by_mask
        self.frames: list[Frame] = []
        self.longest = 0  # position asked for

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "frames": []}

    def vectors(
        self, frame: Frame, places: list[Place], like: Tensor, length: int, counted: bool
    ) -> list[Tensor]:
        """What is to be added, (length, dim) or (batch, length, dim) for each place."""
        found = []
        for place in places:
            encoder = self.encoders[place.encoder]
            rows = frame.rows(encoder, like, length, counted)
            row = rows.by_place[place.stream * encoder.num_layers + place.layer]
            if rows.which is not None and rows.which.shape[0] not in (1, like.shape[0]):
                raise RuntimeError(
                    f"positions for {rows.which.shape[0]} sequences, but {like.shape[0]} were projected"
                )
            found.append(row[:length] if rows.which is None else F.embedding(rows.which, row))
        self.longest = max(self.longest, length + (0 if counted else frame.start))
        return found


class Opens:
    """Pre-hook of a module whose forward runs a stack, directly or not: finds out where tokens stand."""

    def __init__(self, stack: Stack, module: nn.Module) -> None:
        self.stack = stack
        self.names = list(inspect.signature(module.forward).parameters)
        # layers of transformers that may be told to make their forward again in backward
        self.layers = [layer for layer in module.modules() if hasattr(layer, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frames = self.stack.frames
        outer = frames[-1] if frames else None
        frame = Frame(outer.start, outer.positions, module) if outer else Frame(opener=module)
        frames.append(frame)
        given = {**dict(zip(self.names, args)), **kwargs}
        past = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if past is not None:
            frame.start = past_length(past)
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if isinstance(positions, Tensor):
            frame.positions = positions
        elif self.stack.by_mask and isinstance(mask, Tensor) and mask.dim() == 2 and frame.positions is None:
            counted = (mask.long().cumsum(1) * mask.long() - 1).clamp(min=0)
            frame.positions = counted[:, frame.start :]
        for layer in self.layers:
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, Remade):
                checkpoint.add(self.stack)
            elif checkpoint is not None:
                layer._gradient_checkpointing_func = Remade(checkpoint, self.stack)  # type: ignore[assignment]


class Closes:
    """Hook of the same module, called whether its forward returns or raises."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack.frames and self.stack.frames[-1].opener is module:
            self.stack.frames.pop()


class Remade:
    """In place of a layer's checkpoint function: the forward that is made again in backward has its frames again."""

    def __init__(self, checkpoint: Callable[..., Any], stack: Stack) -> None:
        self.checkpoint, self.stacks = checkpoint, [stack]

    def add(self, stack: Stack) -> None:
        if stack not in self.stacks:
            self.stacks.append(stack)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        under_way = [(stack, stack.frames[-1]) for stack in self.stacks if stack.frames]
        return self.checkpoint(InFrames(function, under_way), *args, **kwargs)


class InFrames:
    """A function that runs in frames of its own choice.

    A checkpoint that is not re-entrant makes the forward again for values only, and gradients go the way of the first
    time: the same vectors serve. A re-entrant one runs the first time without autograd and differentiates the second,
    layer by layer: there vectors are solved for anew in each layer, and gradients go through that.
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
        if not self.stack.frames:
            raise RuntimeError(
                f'a projection of the attention stack "{self.stack.name}" was called outside of a forward of the model '
                "(or of the module that runs the stack), so that positions are not known. Call the model; for "
                "checkpoints use the model's own activation_checkpointing_enable()"
            )
        if output.dim() != 3:
            shape = tuple(output.shape)
            raise RuntimeError(
                f"a projection gave {shape}; positions are known for (batch, length, width) only"
            )
        wanted = [place for place in self.places if place is not None]
        found = iter(self.stack.vectors(self.stack.frames[-1], wanted, output, output.shape[1], self.counted))
        parts = [None if place is None else next(found) for place in self.places]
        vectors = arranged(parts, self.layout, self.head_dim)
        known = type(module) is nn.Linear or type(module).__name__ == "Conv1D"  # its output is nobody else's
        in_place = known and not (output.requires_grad and output._is_view())
        return output.add_(vectors) if in_place else output + vectors


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


@contextlib.contextmanager
def within(stack: Stack, frame: Frame) -> Iterator[Frame]:
    depth = len(stack.frames)
    stack.frames.append(frame)
    try:
        yield frame
    finally:
        del stack.frames[depth:]


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
