"""Tensor parallel: a bias of which every process of a mesh holds some heads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..biases import FIRE, KERPLE, TISA, ALiBi, Bias, RelativeTable, Sandwich, Scaled, T5Bias
from ..biases.dape import DAPE
from .ring import SumGradients

# Which dimension of which parameter or buffer counts heads. The others belong to all heads.
HEAD_DIMS: dict[type[Bias], dict[str, int]] = {
    ALiBi: {"slope": 0},
    FIRE: {"last_layer.weight": 0, "last_layer.bias": 0},
    KERPLE: {"p": 0, "a": 0},
    RelativeTable: {"weight": 0, "edges": 1},
    Sandwich: {"head": 0},
    T5Bias: {"weight": 1, "edges": 1},
    TISA: {"amplitudes": 0, "sharpness": 0, "offsets": 0},
}


def shard_heads(bias: Bias, mesh: DeviceMesh, head_dims: Mapping[str, int] | None = None) -> Bias:
    """Leave to each process of a mesh its own heads of a bias, in place; returns the bias.

    Process r of P has the heads r H / P to (r + 1) H / P - 1, as `ColwiseParallel` leaves them to it of the
    projections of queries, keys and values. Parameters with a dimension of heads become DTensors sharded there, all
    others replicated ones, whose gradients are summed over the mesh in backward; names in state_dict stay.
    `num_heads`, `table` and whatever else attention asks for are then those of the heads here: call
    `posattn.attention` (`context_parallel_attention`, ...) with the local heads of query, key and value, or
    `posattn.attention` with DTensors that are sharded on dimension 1 over the same mesh. Before `fully_shard`, if both.

    Args:
        bias: a `posattn.Bias` whose heads divide evenly; a `posattn.DAPE` is refused, for each of its heads sees all.
        mesh: of one dimension.
        head_dims: for a bias of your own: which dimension counts heads, by the names of parameters and buffers, as in
            ``{"strength": 0}``. What is not named stays whole; then `values` may give all heads, and is cut.

    Raises TypeError and ValueError for other arguments.
    """
    if isinstance(bias, DAPE):
        raise ValueError(
            "the heads of a DAPE cannot be split over devices: its network mixes the scores of all heads"
        )
    if not isinstance(bias, Bias):
        raise TypeError(f"bias must be a posattn.Bias, got {type(bias).__name__}")
    if isinstance(bias, HeadShard):
        raise ValueError("bias is sharded by heads already")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: take mesh[name]")
    if bias.num_heads % mesh.size():
        raise ValueError(f"bias must have a multiple of {mesh.size()} heads, got {bias.num_heads}")
    dims = _head_dims(bias, head_dims)
    for name, parameter in list(bias.named_parameters()):
        path, _, last = name.rpartition(".")
        placement = Shard(dims[name]) if name in dims else Replicate()
        spread = nn.Parameter(
            distribute_tensor(parameter.detach(), mesh, [placement]), parameter.requires_grad
        )
        setattr(bias.get_submodule(path), last, spread)
    bias.__dict__["_shard"] = (type(bias), mesh, dims)
    kind: Any = type(bias)
    bias.__class__ = _sharded_class(kind)  # as fully_shard does
    return bias


class ShardHeads(ParallelStyle):
    """`shard_heads` in a plan of `torch.distributed.tensor.parallel.parallelize_module`.

    ``parallelize_module(block, mesh, {"query": ColwiseParallel(), ..., "bias": ShardHeads()})``
    """

    def __init__(self, head_dims: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.head_dims = head_dims

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return shard_heads(module, device_mesh, self.head_dims)  # type: ignore[arg-type]


class HeadShard(Bias):
    """What `shard_heads` makes of a bias: the same formula on the heads that are here.

    A formula reads whole tensors of its own class, so it is called on a copy that has plain tensors, the local
    ones, in place of the parameters.
    """

    _shard: tuple[type[Bias], DeviceMesh, dict[str, int]]

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        """Of the heads here."""
        return int(self.__dict__["num_heads"]) // self._shard[1].size()

    def values(self, offsets: Tensor) -> Any:
        return self._here("values", 0, offsets)

    def table(self, *args: Any, **kwargs: Any) -> Any:
        return self._here("table", 0, *args, **kwargs)

    def dense(self, *args: Any, **kwargs: Any) -> Any:
        return self._here("dense", 0, *args, **kwargs)

    def support(self) -> Any:
        return self._here("support", 1)

    def slopes(self) -> Any:
        return self._here("slopes", 0)

    def scaled(self, *args: Any, **kwargs: Any) -> Scaled | None:
        parts: Scaled | None = self._call("scaled", *args, **kwargs)
        return None if parts is None else parts._replace(pieces=self._cut(parts.pieces, 0))

    def _drawn(self, offsets: Tensor) -> Any:
        return self._here("_drawn", 0, offsets)

    def _here(self, method: str, dim: int, *args: Any, **kwargs: Any) -> Any:
        made = self._call(method, *args, **kwargs)
        return None if made is None else self._cut(made, dim)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The method of the bias's own class, on the tensors here."""
        formula: Any = self._shard[0]
        if method in ("scaled", "slopes", "support") and getattr(formula, method) is getattr(Bias, method):
            return None
        return getattr(formula, method)(with_tensors(self, formula, self._local_tensors()), *args, **kwargs)

    def _local_tensors(self) -> dict[str, Tensor]:
        _, mesh, dims = self._shard
        local: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            local[name] = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        shared = {name: tensor for name, tensor in local.items() if name not in dims}
        local.update(summed(shared, [mesh.get_group()]))
        for name, buffer in self.named_buffers():
            local[name] = self._cut(buffer, dims[name]) if name in dims else buffer
        return summed(local, self.__dict__.get("_summed_over", []))

    def _cut(self, tensor: Tensor, dim: int) -> Tensor:
        """The heads here, of a tensor that may have all."""
        count, whole = self.num_heads, int(self.__dict__["num_heads"])
        if tensor.shape[dim] != whole:
            return tensor
        return tensor.narrow(dim, self._shard[1].get_local_rank() * count, count)


def formula_of(bias: Bias) -> type[Bias]:
    """The class whose formula a bias has."""
    return bias._shard[0] if isinstance(bias, HeadShard) else type(bias)


def summed(tensors: Mapping[str, Tensor], groups: list[Any]) -> dict[str, Tensor]:
    """The same tensors, the gradients of which are summed over the groups."""
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    made = dict(tensors)
    if names and torch.is_grad_enabled():
        for group in groups:
            joined = SumGradients.apply(group, *(made[name] for name in names))  # type: ignore[no-untyped-call]
            made.update(zip(names, joined))
    return made


def with_tensors(module: Any, kind: Any, tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """A copy of a module, as an object of the class `kind`, that reads these tensors as its own."""
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    for store in ("_parameters", "_buffers"):
        own = module.__dict__[store]
        made.__dict__[store] = {name: tensors.get(prefix + name, tensor) for name, tensor in own.items()}
    made.__dict__["_modules"] = {
        name: with_tensors(child, type(child), tensors, f"{prefix}{name}.")
        for name, child in module.__dict__["_modules"].items()
    }
    return made


def _head_dims(bias: Bias, head_dims: Mapping[str, int] | None) -> dict[str, int]:
    own = dict(bias.named_parameters()) | dict(bias.named_buffers())
    if head_dims is None:
        known = next((dims for kind, dims in HEAD_DIMS.items() if isinstance(bias, kind)), {})
        return {name: dim for name, dim in known.items() if name in own}
    for name, dim in head_dims.items():
        if name not in own:
            raise ValueError(f"head_dims names {name!r}, which {type(bias).__name__} has not: {sorted(own)}")
        if not 0 <= dim < own[name].dim() or own[name].shape[dim] != bias.num_heads:
            shape = tuple(own[name].shape)
            raise ValueError(
                f"head_dims says {dim} for {name!r}, which has no {bias.num_heads} heads there: {shape}"
            )
    return dict(head_dims)


@cache
def _sharded_class(kind: Any) -> type[Bias]:
    return type(kind.__name__, (HeadShard, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
