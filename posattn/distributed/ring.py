"""Passing tensors round a ring of processes, and sums over all of them.

Only torch.distributed's batch_isend_irecv and all_reduce are used, so that every backend with them will do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 16  # bytes, which kernels read at a time


class Parcel:
    """Tensors in one buffer, that one message carries. Their shapes are known on both sides."""

    def __init__(
        self, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], device: torch.device
    ) -> None:
        self.places: list[tuple[int, int]] = []
        end = 0
        for shape, dtype in zip(shapes, dtypes):
            size = torch.Size(shape).numel() * dtype.itemsize
            self.places.append((end, end + size))
            end += -(-size // ALIGNMENT) * ALIGNMENT
        # The last one needs no padding; and no message is empty, which not every backend sends.
        self.bytes = torch.empty(max(self.places[-1][1], 1), dtype=torch.uint8, device=device)
        views = zip(self.places, dtypes, shapes)
        self.tensors = [
            self.bytes[start:stop].view(dtype).view(shape) for (start, stop), dtype, shape in views
        ]


class Exchange(NamedTuple):
    """Two messages on their way, and what they carry, which must not be freed before."""

    works: list[Any]
    sent: Parcel
    received: Parcel

    def finish(self) -> Parcel:
        """Waits (a GPU's stream does, not the caller), and returns what arrived."""
        for work in self.works:
            work.wait()
        return self.received


class Ring:
    """The processes of a group, each with a next and a previous one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.world = group, group.rank(), group.size()

    def neighbour(self, distance: int) -> int:
        """The global rank of the process that stands so far on."""
        return dist.get_global_rank(self.group, (self.rank + distance) % self.world)

    def exchange(self, sent: Parcel, received: Parcel, distance: int = 1) -> Exchange:
        """Starts to send so far on, and to receive from as far back. All processes call it alike."""
        messages = [
            dist.P2POp(dist.isend, sent.bytes, self.neighbour(distance), self.group),
            dist.P2POp(dist.irecv, received.bytes, self.neighbour(-distance), self.group),
        ]
        return Exchange(dist.batch_isend_irecv(messages), sent, received)


class SumGradients(torch.autograd.Function):
    """Tensors as they are, whose gradients are summed over the group, all in one message."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=ctx.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient).to(gradient.dtype) for part, gradient in zip(parts, gradients))
