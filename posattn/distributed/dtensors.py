"""Attention of DTensors: each process attends its own batch entries and heads, and nothing is sent forward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..attention import attention
from ..biases.bias import Bias
from ..biases.dape import DAPE
from .heads import HeadShard, summed, with_tensors


def attention_of_dtensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_logits: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_lse: bool = False,
    **keywords: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`posattn.attention`, which calls this for DTensors; the results are sharded as query is.

    query, key and value, alike, are sharded by batch (dimension 0) or heads (1) or replicated over each dimension of
    their mesh. A table, sinks, masks and relative_logits are DTensors of any placement, or plain tensors where
    nothing that they have is sharded. Over a dimension of heads, a `Bias` must have been given to `shard_heads`.
    The gradients of what every process has are summed over the dimensions that shard the batch.
    """
    mesh, placements = _check(query, key, value)
    by_batch = [i for i, p in enumerate(placements) if p == Shard(0)]
    by_head = [i for i, p in enumerate(placements) if p == Shard(1)]

    def local(name: str, tensor: Tensor | None, batch: int | None, heads: int | None) -> Tensor | None:
        """The part here of a tensor whose dimensions `batch` and `heads` are query's 0 and 1."""
        if tensor is None:
            return None
        parts = {Shard(0): batch, Shard(1): heads}
        wanted = [Replicate() if parts.get(p) is None else Shard(parts[p]) for p in placements]  # type: ignore
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != mesh:
                raise ValueError(f"{name} must be on query's mesh {mesh}, got {tensor.device_mesh}")
            here = tensor.redistribute(mesh, wanted).to_local()
        elif any(isinstance(p, Shard) for p in wanted):
            raise TypeError(f"{name} must be a DTensor where query is sharded as {placements}, got a Tensor")
        else:
            here = tensor
        alike = [i for i in by_batch if not isinstance(wanted[i], Shard)]
        alike += [i for i in by_head if not isinstance(wanted[i], Shard)]
        return summed({name: here}, [mesh.get_group(i) for i in alike])[name]

    if isinstance(bias, Tensor):
        bias = local("bias", bias, None, 0)
    elif bias is not None:
        bias = _module(bias, [mesh.get_group(i) for i in by_batch], bool(by_head))
    here = [tensor.to_local() for tensor in (query, key, value)]  # type: ignore[attr-defined]
    results = attention(
        here[0],
        here[1],
        here[2],
        bias,
        key_padding_mask=local("key_padding_mask", key_padding_mask, 0, None),
        sinks=local("sinks", sinks, None, 0),
        relative_logits=local("relative_logits", relative_logits, 0, 1),
        document_ids=local("document_ids", document_ids, 0, None),
        return_lse=True,
        **keywords,
    )
    whole = []
    for result, shape in zip(results, ((*query.shape[:3], value.shape[3]), query.shape[:3])):
        stride = torch.empty(shape, device="meta").stride()
        whole.append(
            DTensor.from_local(
                result.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
        )
    return (whole[0], whole[1]) if return_lse else whole[0]


def _check(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, tuple[Placement, ...]]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor like the others, got {type(tensor).__name__}")
    assert isinstance(query, DTensor)
    mesh, placements = query.device_mesh, query.placements
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device_mesh != mesh or tensor.placements != placements:  # type: ignore[attr-defined]
            raise ValueError(f"{name} must be placed like query, {placements}, got {tensor.placements}")  # type: ignore
    allowed = (Replicate(), Shard(0), Shard(1))
    if any(p not in allowed for p in placements) or placements.count(Shard(1)) > 1:
        raise ValueError(
            "query must be replicated, sharded by batch (Shard(0)) or, over one dimension of the mesh, by heads "
            f"(Shard(1)), got {placements}; posattn.distributed.context_parallel_attention takes a sharded sequence"
        )
    for i, placement in enumerate(placements):
        if placement == Shard(1) and (query.shape[1] % mesh.size(i) or key.shape[1] % mesh.size(i)):
            heads = f"{query.shape[1]} and {key.shape[1]}"
            raise ValueError(
                f"query and key must have a multiple of {mesh.size(i)} heads to shard, got {heads}"
            )
    return mesh, placements


def _module(bias: Any, groups: list[Any], by_head: bool) -> Any:
    if isinstance(bias, HeadShard):
        if not by_head:
            raise ValueError("bias is sharded by heads, but query is not")
        made = copy.copy(bias)
        made.__dict__["_summed_over"] = groups
        return made
    if by_head and isinstance(bias, DAPE):
        raise ValueError(
            "the heads of a DAPE cannot be split over devices: its network mixes the scores of all heads"
        )
    if by_head and isinstance(bias, nn.Module):
        raise ValueError("query is sharded by heads: call posattn.distributed.shard_heads(bias, mesh) before")
    if not groups or not isinstance(bias, nn.Module):
        return bias
    own = dict(bias.named_parameters())
    return with_tensors(bias, type(bias), summed(own, groups))
