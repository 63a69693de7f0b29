"""torch.nn.MultiheadAttention with vectors added to its projections.

Its forward projects inside a function that no hook reaches, so that `attach` gives an instance this class in place of
its own. What it computes is otherwise that of torch, by the same operators.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .frames import Frame, Place, Stack


class Vectors:
    """What an instance adds: a place of its stack for query, key and value each, or None."""

    def __init__(self, stack: Stack, places: list[Place | None]) -> None:
        self.stack, self.places = stack, places

    def added(self, outs: list[Tensor], sizes: list[int], length_dim: int) -> list[Tensor | None]:
        """For projections of one or several streams each, side by side: (length, streams x dim), or None."""
        frame, places, added = self._frame(), iter(self.places), []
        for out, size in zip(outs, sizes):
            length = out.shape[length_dim]
            rows = [self._row(next(places), frame, out, length) for _ in range(size)]
            some = next((row for row in rows if row is not None), None)
            parts = [] if some is None else [torch.zeros_like(some) if row is None else row for row in rows]
            added.append(torch.cat(parts, dim=-1) if parts else None)
        return added

    def _frame(self) -> Frame:
        """The forward under way. Alone, or when a part of a model is made again in backward, one of its own.

        Positions are counted from 0 whatever happens, so that there is nothing to be known. Made again by a checkpoint
        that is not re-entrant, the forward gives values only: those that the encoder keeps.
        """
        frame = self.stack.current()
        if frame is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not _for_values()):
                frame = Frame()
        return frame

    def _row(self, place: Place | None, frame: Frame, like: Tensor, length: int) -> Tensor | None:
        return None if place is None else self.stack.vectors(frame, [place], like, length, counted=True)[0]


def _for_values() -> bool:
    """Whether a checkpoint that is not re-entrant makes a forward again: no gradient goes the way of this one.

    Known by what such a checkpoint does with saved tensors. Were that not to be recognized, vectors would be solved for
    with autograd in vain.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(False)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


class PositionedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose projections have vectors added, those of positions 0, 1, ... of query and of key.

    kept_bias (3 x embed_dim) holds the biases of streams that get no vectors; in_proj_bias is None.
    """

    vectors: Vectors
    kept_bias: nn.Parameter | None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: the same arguments, masks, shapes and results."""
        batched = check_inputs(query, key, value, key_padding_mask, attn_mask, self)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint, as torch.nn.MultiheadAttention does"
            )
        q, k, v = self._project(query, key, value, batched)  # (batch, heads, length, head_dim)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the hint says what the mask is
        else:
            mask, is_causal = _joined(attn_mask, key_padding_mask, q, k), False
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        out = out.permute(0, 2, 1, 3) if self.batch_first or not batched else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of the three, (batch, heads, length, head_dim), of inputs in the module's own layout."""
        length_first = batched and not self.batch_first
        sizes, inputs = [1, 1, 1], [query, key, value]
        if self.in_proj_weight is not None:  # one product for inputs that are the same
            weights = [self.in_proj_weight]
            if query is key and key is value:
                sizes, inputs = [3], [query]
            elif key is value:
                sizes, inputs = [1, 2], [query, key]
            weights = list(self.in_proj_weight.split([n * self.embed_dim for n in sizes]))
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        bias = None if self.kept_bias is None else self.kept_bias.split([n * self.embed_dim for n in sizes])
        outs = [
            F.linear(x if batched else x[None], weight, None if bias is None else bias[i])
            for i, (x, weight) in enumerate(zip(inputs, weights))
        ]
        added = self._added(outs, sizes, 0 if length_first else 1)
        order = (2, 1, 3, 0, 4) if length_first else (2, 0, 3, 1, 4)
        heads: list[Tensor] = []
        for out, vectors, size in zip(outs, added, sizes):
            if vectors is not None:
                out = out.add_(vectors[:, None] if length_first else vectors)
            heads.extend(out.unflatten(-1, (size, self.num_heads, self.head_dim)).permute(order).unbind(0))
        return heads[0], heads[1], heads[2]

    def _added(self, outs: list[Tensor], sizes: list[int], length_dim: int) -> list[Tensor | None]:
        if torch.compiler.is_compiling():
            added: list[Tensor | None] = _disable_dynamo(Vectors.added)(self.vectors, outs, sizes, length_dim)
            return added
        return self.vectors.added(outs, sizes, length_dim)


def check_served(path: str, module: nn.MultiheadAttention) -> None:
    """TypeError or ValueError for an nn.MultiheadAttention that vectors cannot be added to."""
    name = path or "the model"
    if type(module) is not nn.MultiheadAttention:
        raise TypeError(
            f"{name} is a {type(module).__name__}; of its kind only torch.nn.MultiheadAttention is served"
        )
    for option, there in (
        ("add_bias_kv", module.bias_k is not None),
        ("add_zero_attn", module.add_zero_attn),
    ):
        if there:
            raise ValueError(
                f"{name} has {option}=True: a key and value that no token has stand at no position"
            )


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    module: nn.MultiheadAttention,
) -> bool:
    """Whether inputs are batched; RuntimeError for what does not fit, which broadcasting would let pass."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise RuntimeError("nested tensors are not served where position vectors are added")
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise RuntimeError(f"query, key and value must all be 3-D, or all 2-D (no batch), got {shapes}")
    batched = query.dim() == 3
    length = 1 if batched and module.batch_first else 0
    if key.shape[:-1] != value.shape[:-1]:
        raise RuntimeError(
            f"key and value differ in length or batch: {tuple(key.shape)}, {tuple(value.shape)}"
        )
    batch = query.shape[1 - length] if batched else 1
    lengths = (query.shape[length], key.shape[length])
    if batched and key.shape[1 - length] != batch:
        raise RuntimeError(f"query and key differ in batch: {tuple(query.shape)}, {tuple(key.shape)}")
    if key_padding_mask is not None:
        expected = (batch, lengths[1]) if batched else (lengths[1],)
        if tuple(key_padding_mask.shape) != expected:
            raise RuntimeError(f"key_padding_mask must be {expected}, got {tuple(key_padding_mask.shape)}")
    if attn_mask is not None and tuple(attn_mask.shape) not in (
        lengths,
        (batch * module.num_heads, *lengths),
    ):
        accepted = f"{lengths} or {(batch * module.num_heads, *lengths)}"
        raise RuntimeError(f"attn_mask must be {accepted}, got {tuple(attn_mask.shape)}")
    return batched


def _joined(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """One floating-point mask, to be added to scores (batch, heads, queries, keys), or None."""
    parts = []
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        parts.append(mask.view(*q.shape[:2], *mask.shape[1:]) if mask.dim() == 3 else mask)
    if key_padding_mask is not None:
        parts.append(_additive(key_padding_mask, q.dtype).view(-1, 1, 1, k.shape[2]))
    return sum(parts[1:], start=parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise RuntimeError(f"masks must be of bool or floating point, got {mask.dtype}")
    return mask.to(dtype)
