"""Which positions of a sequence each process holds, and which pairs of its pieces see each other.

All of it follows from (length, number of processes, order): nothing is asked of other processes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None
ORDERS = ("zigzag", "contiguous")


class Pair(NamedTuple):
    """A piece of the queries here and a piece of some keys: positions, and places in the two shards."""

    queries: range
    keys: range
    rows: slice
    columns: slice

    @property
    def shift(self) -> int:
        """The offset of the first key from the first query."""
        return self.keys.start - self.queries.start


@lru_cache(maxsize=4096)
def pieces(length: int, world: int, rank: int, order: str) -> tuple[range, ...]:
    """The positions of one process, piece by piece: one, or two that are apart; none for an empty shard."""

    def cut(number: int, of: int) -> range:
        return range(number * length // of, (number + 1) * length // of)

    if order == "contiguous":
        own = [cut(rank, world)]
    else:
        own = [cut(rank, 2 * world), cut(2 * world - 1 - rank, 2 * world)]
    made: list[range] = []
    for piece in own:
        if made and made[-1].stop == piece.start:
            made[-1] = range(made[-1].start, piece.stop)
        elif len(piece):
            made.append(piece)
    return tuple(piece for piece in made if len(piece))


def shard_length(length: int, world: int, rank: int, order: str) -> int:
    return sum(map(len, pieces(length, world, rank, order)))


@lru_cache(maxsize=4096)
def pairs(
    length: int, world: int, order: str, left: int, right: int, rank: int, source: int
) -> tuple[Pair, ...]:
    """The pieces of rank's queries and of source's keys of which some query sees some key; -1 is an open side."""
    found = []
    first_row = 0
    for queries in pieces(length, world, rank, order):
        first_column = 0
        for keys in pieces(length, world, source, order):
            lowest, highest = keys.start - (queries.stop - 1), (keys.stop - 1) - queries.start
            if (left < 0 or highest >= -left) and (right < 0 or lowest <= right):
                rows = slice(first_row, first_row + len(queries))
                columns = slice(first_column, first_column + len(keys))
                found.append(Pair(queries, keys, rows, columns))
            first_column += len(keys)
        first_row += len(queries)
    return tuple(found)


@lru_cache(maxsize=4096)
def hops(length: int, world: int, order: str, left: int, right: int) -> int:
    """How far keys have to travel round the ring until everyone has met all that it sees."""
    for distance in range(world - 1, 0, -1):
        for rank in range(world):
            if pairs(length, world, order, left, right, rank, (rank - distance) % world):
                return distance
    return 0


def process_group(group: Group) -> dist.ProcessGroup:
    """The group itself; a mesh of one dimension stands for its group, None for all processes."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group first")
    if group is None:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, got {group.ndim}: take mesh[name]")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, got {kind}")
    if dist.get_rank(group) < 0:
        raise ValueError("this process does not belong to group")
    return group


def check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f'order must be "zigzag" or "contiguous", got {order!r}')


def check_length(length: Any, minimum: int = 0) -> int:
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int, got {type(length).__name__} {length!r}")
    if length < minimum:
        raise ValueError(f"length must be at least {minimum}, got {length}")
    return length


def positions(
    length: int, group: Group = None, order: str = "zigzag", device: torch.device | str | None = None
) -> Tensor:
    """Where the rows of this process stand in the whole sequence: int64, (local length,).

    For whatever depends on the position outside of attention: RoPE, position embeddings, targets of a loss.
    Arguments as in `context_parallel_attention`; device is where the result is made.
    """
    check_order(order)
    group = process_group(group)
    own = pieces(check_length(length), group.size(), group.rank(), order)
    parts = [torch.arange(piece.start, piece.stop, device=device) for piece in own]
    return torch.cat(parts) if parts else torch.arange(0, device=device)


def shard(tensor: Tensor, dim: int, group: Group = None, order: str = "zigzag") -> Tensor:
    """The rows of this process, of a tensor that every process has: its own pieces along dim, one after the other.

    Nothing is sent, and autograd passes. Every other dimension is kept.
    """
    check_order(order)
    group = process_group(group)
    own = pieces(tensor.shape[dim], group.size(), group.rank(), order)
    if not own:
        return tensor.narrow(dim, 0, 0)
    parts = [tensor.narrow(dim, piece.start, len(piece)) for piece in own]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@torch.no_grad()
def gather(
    tensor: Tensor, dim: int, length: int | None = None, group: Group = None, order: str = "zigzag"
) -> Tensor:
    """The whole of what is sharded along dim, in the order of positions, on every process; the reverse of `shard`.

    To look at and to store results: without a gradient. length is the whole length; by default every process
    has as many rows as this one.
    """
    check_order(order)
    group = process_group(group)
    world, dim = group.size(), dim % tensor.dim()
    length = whole_length(length, tensor.shape[dim], group, order)
    counts = [shard_length(length, world, rank, order) for rank in range(world)]
    shape = list(tensor.shape)
    shape[dim] = max(*counts, 1)
    padded = tensor.new_zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    arrived = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(arrived, padded, group=group)
    shape[dim] = length
    whole = tensor.new_empty(shape)
    for rank, rows in enumerate(arrived):
        start = 0
        for piece in pieces(length, world, rank, order):
            whole.narrow(dim, piece.start, len(piece)).copy_(rows.narrow(dim, start, len(piece)))
            start += len(piece)
    return whole


def whole_length(length: int | None, local: int, group: dist.ProcessGroup, order: str) -> int:
    """length, after a check that this process holds its part of it; by default the processes hold equal parts."""
    world, rank = group.size(), group.rank()
    if length is None:
        return local * world
    expected = shard_length(check_length(length), world, rank, order)
    if local != expected:
        raise ValueError(
            f"process {rank} of {world} holds {expected} of {length} positions in {order} order, "
            f"got {local} (posattn.distributed.shard cuts so)"
        )
    return length
