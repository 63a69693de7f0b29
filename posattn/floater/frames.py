"""Which forward is under way, where its tokens stand, and the vectors of these positions.

Each forward of a stack opens a `Frame`, which holds the positions of its tokens and solves for their vectors at most
once for all layers and streams. What opens and closes frames, and adds vectors, is in hooks.py. Everything is made of
classes of the module's level, so that a model with hooks can be copied and pickled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import FLOATER


class Place(NamedTuple):
    """Where a vector comes from: an encoder of a stack ("own", or "cross" for cross keys and values), stream, layer."""

    encoder: str
    stream: int
    layer: int


class Rows(NamedTuple):
    """Vectors of one forward: (positions, dim) each, and (batch or 1, length) which of them; None: in order."""

    by_place: tuple[Tensor, ...]
    which: Tensor | None


class Where(NamedTuple):
    """Positions, looked at. `start` and those that follow it; or `which` of the `distinct`, or of all from 0 on."""

    start: int
    distinct: Tensor | None = None
    which: Tensor | None = None


class Frame:
    """One forward of a stack, or of a module around it.

    Tokens stand at ``start, start + 1, ...``; or at `positions` (batch or 1, length), where a model is given them; or
    where `mask` (batch, start + length) says. Each is taken over from `outer`, the forward around this one. `size` is
    (batch, length) of what the stack was given, if known. `opener` is the module, `caller` the Python frame of its
    call. `grad` is the grad mode in which the forward began: parts of it may run without (a checkpoint that is
    re-entrant), but vectors serve all of it.
    """

    def __init__(
        self, outer: Frame | None = None, opener: nn.Module | None = None, caller: FrameType | None = None
    ) -> None:
        self.start: int = 0 if outer is None else outer.start
        self.positions: Tensor | None = None if outer is None else outer.positions
        self.mask: Tensor | None = None if outer is None else outer.mask
        self.size: tuple[int, int] | None = None
        self.opener, self.caller = opener, caller
        self.grad = torch.is_grad_enabled()
        self._where: dict[tuple[int, int], Where] = {}
        self._rows: dict[tuple[Any, ...], Rows] = {}

    def again(self) -> Frame:
        """The same tokens, solved for anew, in the grad mode of now."""
        frame = Frame(self)
        frame.size = self.size
        return frame

    def over(self) -> bool:
        """Whether the call has ended without closing this frame: no hook of torch follows a KeyboardInterrupt.

        Python tells by refusing to clear the locals of a frame that is being executed; those of one that has ended are
        of no use to anyone.
        """
        if self.caller is None:
            return False
        try:
            self.caller.clear()
        except RuntimeError:  # it is being executed
            return False
        return True

    def rows(self, encoder: FLOATER, like: Tensor, length: int, counted: bool) -> Rows:
        """Vectors for `length` tokens, in the dtype and on the device of `like`; counted: from 0, whatever tokens."""
        where = Where(0) if counted else self.settled(like.shape[0], length)
        key = (id(encoder), like.dtype, like.device, where.start, id(where.distinct), id(where.which))
        rows = self._rows.get(key)
        if rows is None or (where.which is None and rows.by_place[0].shape[0] < length):
            if where.which is not None and where.distinct is None:
                length += self.start
            rows = self._rows[key] = self._solve(encoder, like, where, length)
        return rows

    def settled(self, batch: int, length: int) -> Where:
        where = self._where.get((batch, length))
        if where is None:
            if self.positions is not None:
                where = self._given(self.positions, length)
            elif self.mask is not None and tuple(self.mask.shape) == (batch, self.start + length):
                where = self._by_mask(self.mask)
            else:
                where = Where(self.start)
            self._where[batch, length] = where
        return where

    def _given(self, positions: Tensor, length: int) -> Where:
        """Positions as models give them, checked. Those that are contiguous need no gather."""
        if positions.dim() not in (1, 2) or positions.shape[-1] != length:
            shape = tuple(positions.shape)
            raise RuntimeError(
                f"positions of shape {shape} are given for {length} tokens; expected (batch, {length})"
            )
        positions = positions.detach().reshape(-1, length)
        if not positions.is_floating_point() and length:
            first = int(positions[0, 0])
            if torch.equal(positions, (first + torch.arange(length).to(positions)).expand_as(positions)):
                return Where(first)
        distinct, which = torch.unique(positions, return_inverse=True)
        return Where(0, distinct, which)

    def _by_mask(self, mask: Tensor) -> Where:
        """Positions that leave out what is hidden. Where that is nothing, or on the right only: as without a mask.

        That comparison waits for a GPU, once a forward; under capture in a CUDA graph it is left out.
        """
        mask = mask.detach()
        if mask.is_floating_point() and bool((mask < 0).any()):  # to be added to scores: no padding mask
            return Where(self.start)
        seen = mask != 0
        which = (seen.cumsum(1) - 1).clamp(min=0)[:, self.start :]
        if not (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            in_order = torch.arange(self.start, mask.shape[1], device=mask.device)
            if bool(((which == in_order) | ~seen[:, self.start :]).all()):
                return Where(self.start)
        return Where(0, None, which)

    def _solve(self, encoder: FLOATER, like: Tensor, where: Where, length: int) -> Rows:
        # The solve belongs to no checkpoint that may be recording around it: what it saves is saved as it is, and not
        # counted there.
        with (
            torch.set_grad_enabled(self.grad),
            torch.autograd.graph.saved_tensors_hooks(_detached, _unchanged),
        ):
            if where.distinct is not None:
                vectors = encoder.at(where.distinct)
            else:
                vectors = encoder(where.start + length)[:, :, where.start :]
            vectors = vectors.to(like.device, like.dtype)
            which = None if where.which is None else where.which.to(like.device)
            return Rows(vectors.flatten(0, 1).unbind(0), which)


class Stack:
    """What the attention layers of one stack share: encoders, and the forwards under way, of each thread its own."""

    def __init__(self, name: str, encoders: dict[str, FLOATER]) -> None:
        self.name, self.encoders = name, encoders
        self.longest = 0  # position asked for
        self._here, self._lock = threading.local(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "encoders": self.encoders, "longest": self.longest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here, self._lock = threading.local(), threading.Lock()

    @property
    def frames(self) -> list[Frame]:
        """Forwards under way in this thread, the innermost last."""
        found: list[Frame] | None = getattr(self._here, "frames", None)
        if found is None:
            found = self._here.frames = []
        return found

    def current(self) -> Frame | None:
        """The innermost forward under way; those that were interrupted are dropped."""
        frames = self.frames
        while frames and frames[-1].over():
            frames.pop()
        return frames[-1] if frames else None

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
        reached = length + (0 if counted else frame.settled(like.shape[0], length).start)
        if reached > self.longest:
            with self._lock:
                self.longest = max(self.longest, reached)
        return found


@contextlib.contextmanager
def within(stack: Stack, frame: Frame) -> Iterator[Frame]:
    frames = stack.frames
    depth = len(frames)
    frames.append(frame)
    try:
        yield frame
    finally:
        del frames[depth:]


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
