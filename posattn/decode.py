"""Few queries against many keys: from checked arguments to the operators of decode_ops.py, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .biases.bias import Bias
from .biases.dape import DAPE
from .decode_ops import decode_forward, decode_mix_forward
from .dispatch import in_precision
from .kept_table import AHEAD, LEAST, facts_of, forget, kept_table
from .strips import INVISIBLE

MAX_QUERIES = 16
# Below, the usual way is as fast: one program in place of several and their combination.
LEAST_KEYS = {"triton": 256, "blockwise": 32}
NO_GRADIENT = (
    "attention_with_kvcache gives no gradient, and an argument or a parameter of the bias requires one: call it under "
    "torch.no_grad(), or posattn.attention(), which is differentiable"
)


def serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None,
    backend: str,
    *more: Tensor | None,
) -> bool:
    """Few queries, and nobody asks for a gradient. Not in a compiled graph, which would hold for few queries only."""
    if torch.compiler.is_compiling():  # first of all: to look at a length is to compile for it
        return False
    few = 0 < query.shape[2] <= MAX_QUERIES and key.shape[2] >= LEAST_KEYS[backend] and query.shape[0] > 0
    if not few or transformed():
        return False
    if isinstance(bias, torch.nn.Module) and facts_of(bias) is None:
        if torch.is_grad_enabled():
            return False  # it may take a gradient to what is no parameter
        if any(type(p).__name__ == "DTensor" for p in bias.parameters()):
            return False  # spread over processes: only its methods give what is here
    return not wants_gradient(query, key, value, bias, *more)


def begin(query: Tensor, key: Tensor, bias: Bias | DAPE | Tensor | None) -> None:
    """A call that is not for `decode`: in training, or of a sequence from its start; tables are kept from then on."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled() or key.shape[2] <= query.shape[2]:
        base = bias.base if isinstance(bias, DAPE) else bias
        if isinstance(base, Bias):
            forget(base)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, of which these operators know nothing."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def wants_gradient(*values: Tensor | torch.nn.Module | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            return True
        if isinstance(value, torch.nn.Module) and any(p.requires_grad for p in value.parameters()):
            return True
    return False


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None,
    rule: checks.Rule,
    backend: str,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    relative: Tensor | None = None,
    block_table: Tensor | None = None,
    seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse; with seqlens positions are those of `decode_ops`, and rule's starts say nothing.

    Raises RuntimeError under grad mode when what a bias makes requires grad.
    """
    query, key, value = (
        t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (query, key, value)
    )
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    room = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[1]
    start = 0 if seqlens is not None else rule.query_start - rule.key_start
    if sinks is not None:
        sinks = sinks.to(dtype).contiguous()
    if key_mask is not None and key_mask.stride(1) != 1:
        key_mask = key_mask.contiguous()
    if query.numel() == 0 or room == 0:
        bias = relative = None
    at = _Place(query, room, rule, start, seqlens, dtype)
    if isinstance(bias, DAPE):
        table, zero, strip = (None, 0, None) if bias.base is None else at.values(bias.base)
        weights = (bias.first_weight, bias.first_bias, bias.second_weight, bias.second_bias)
        made: tuple[Tensor, Tensor] = decode_mix_forward(
            query,
            key,
            value,
            block_table,
            seqlens,
            *(_alone(weight).to(dtype).contiguous() for weight in weights),
            table,
            strip,
            sinks,
            key_mask,
            rule.scale,
            zero,
            start,
            rule.left,
            rule.right,
            not bias.prefix_consistent,
            backend,
        )
        return made

    table = slopes = strip = None
    zero, symmetric = 0, True
    if isinstance(bias, Tensor):
        table = bias.detach().to(dtype).clamp(min=INVISIBLE).contiguous()
        zero = at.zero()
    elif bias is not None:
        # Slopes cost a kernel nothing to read; of PyTorch's operations a kept table needs fewest.
        slopes = bias.slopes() if backend == "triton" else None
        symmetric = bias.symmetric
        if slopes is None:
            table, zero, strip = at.values(bias)
        else:
            checks.check_made(bias, "slopes", slopes, (query.shape[1],), query)
            slopes = _alone(slopes).to(dtype).contiguous()
    if relative is not None:
        relative = relative.detach()
        relative = relative if relative.stride(3) == 1 else relative.contiguous()
        relative = in_precision(relative, dtype)
    made = decode_forward(
        query,
        key,
        value,
        block_table,
        seqlens,
        table,
        slopes,
        strip,
        relative,
        sinks,
        key_mask,
        rule.scale,
        rule.softcap,
        zero,
        start,
        rule.left,
        rule.right,
        symmetric,
        backend,
    )
    return made


class _Place:
    """Where the queries and keys of one call stand, for the tensors of a bias that depend on it."""

    def __init__(
        self,
        query: Tensor,
        room: int,
        rule: checks.Rule,
        start: int,
        seqlens: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.query, self.queries, self.room, self.rule = query, query.shape[2], room, rule
        self.start, self.seqlens, self.dtype = start, seqlens, dtype

    def zero(self) -> int:
        """Where in a table of shape (heads, Lq + Lk - 1) the offset 0 stands."""
        return self.room - 1 if self.seqlens is not None else self.queries - 1 + self.start

    def values(self, bias: Bias) -> tuple[Tensor | None, int, Tensor | None]:
        """(table, its zero, strip): one of table and strip."""
        if type(bias).scaled is not Bias.scaled:
            strip = self.strip(bias)
            if strip is not None:
                return None, 0, strip
        ahead = self.queries - 1 if self.seqlens is not None else self.room - 1 - self.start
        behind = self.room if self.seqlens is not None else self.start + self.queries
        # Far from all keys a slice is shorter than a table from the query's own offset on.
        near = ahead <= AHEAD and behind <= 2 * (self.room + self.queries) + LEAST
        kept = kept_table(bias, max(1, behind), self.dtype) if near else None
        if kept is not None:
            checks.check_made(bias, "a table", kept[0], tuple(kept[0].shape), self.query)
            return kept[0], kept[1], None
        starts = () if self.seqlens is not None else (self.rule.query_start, self.rule.key_start)
        table = _alone(bias.table(self.queries, self.room, *starts))
        checks.check_made(
            bias, "a table", table, (self.query.shape[1], self.queries + self.room - 1), self.query
        )
        return table.to(self.dtype).clamp(min=INVISIBLE).contiguous(), self.zero(), None

    def strip(self, bias: Bias) -> Tensor | None:
        """(B or 1, H, Lq, Lk), made of the parts of a bias that depends on the query's position as well."""
        queries, room = self.queries, self.room
        width = queries + room - 1
        if self.seqlens is None:
            scaled = bias.scaled(queries, room, self.rule.query_start, self.rule.key_start)
            if scaled is None:
                return None
            checks.check_scaled(bias, scaled, self.query, width, queries)
            line, rows, knots, pieces = map(_alone, scaled)
            x = line.unfold(0, room, 1).flip(0)[None] * rows[:, None]
            return _pieces(knots, pieces, x).to(self.dtype)
        scaled = bias.scaled(queries, room, room - queries, 0)
        every = bias.scaled(room + queries, 1, -queries, 0)  # rows of every position that a query can have
        if scaled is None or every is None:
            return None
        checks.check_scaled(bias, scaled, self.query, width, queries)
        line, rows, knots, pieces = map(_alone, scaled._replace(rows=every.rows))
        device = self.query.device
        position = self.seqlens[:, None].long().clamp(0, room) + torch.arange(-queries, 0, device=device)
        offset = torch.arange(room, device=device) - position[..., None]
        x = line[(offset + room - 1).clamp(0, width - 1)] * rows[position + queries][..., None]
        return _pieces(knots, pieces, x).to(self.dtype)


def _alone(made: Tensor) -> Tensor:
    """What a bias has made, without its graph, in which there must be nothing that wants a gradient."""
    if made.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(NO_GRADIENT)
    return made.detach()


def _pieces(knots: Tensor, pieces: Tensor, x: Tensor) -> Tensor:
    """The function of `Scaled`: (B, Lq, Lk) -> (B, H, Lq, Lk)."""
    heads, units, _ = pieces.shape
    pieces = pieces.permute(1, 2, 0).reshape(units, 2 * heads)  # a segment's numbers beside each other
    segment = torch.bucketize(x.contiguous(), knots)
    slope, intercept = torch.nn.functional.embedding(segment, pieces).split(heads, -1)
    return torch.addcmul(intercept, slope, x[..., None]).movedim(-1, 1).contiguous()
