"""Attention whose keys travel round a ring of processes, forward and backward, as one autograd.Function.

Forward: while the pieces of keys that are here are attended, the next ones arrive; partial results are merged by
their logsumexp in fp32 (fp64). Backward: keys and values travel once more, and their gradients follow one hop behind,
growing on the way, until the last process sends them home. With the final out and lse, P = exp(S - lse) and delta are
those of the whole sequence, so the pairs' gradients add up to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attend import RefuseSecond
from .layout import Pair, hops, pairs, shard_length
from .pair_scores import FAMILIES, Needs, Numbers, Parts, cut, of_last_bias
from .ring import Exchange, Parcel, Ring


class Call(NamedTuple):
    ring: Ring
    order: str
    family: str
    numbers: Numbers

    def hops(self) -> int:
        n = self.numbers
        return hops(n.length, self.ring.world, self.order, n.left, n.right)

    def source(self, step: int) -> int:
        """Whose keys are here after so many hops."""
        return (self.ring.rank - step) % self.ring.world

    def pairs(self, source: int) -> tuple[Pair, ...]:
        n = self.numbers
        return pairs(n.length, self.ring.world, self.order, n.left, n.right, self.ring.rank, source)

    def shapes(self, k: Tensor, v: Tensor, source: int) -> list[tuple[int, ...]]:
        """Of that process's keys and values."""
        rows = shard_length(self.numbers.length, self.ring.world, source, self.order)
        return [(*t.shape[:2], rows, t.shape[3]) for t in (k, v)]


class RingAttention(torch.autograd.Function):
    """out and lse (before sinks) of the local rows, differentiable by q, k, v and the parts of the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        names: tuple[str, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        seed: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """parts are the tensors of the whole bias, by name."""
        n, family = call.numbers, FAMILIES[call.family]
        named: Parts = dict(zip(names, parts))
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        exact = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        for source, keys, values, mask in _travel(call, k, v, key_mask):
            for pair in call.pairs(source):
                columns = pair.columns
                own = q[:, :, pair.rows], keys[:, :, columns], values[:, :, columns]
                seen = None if mask is None else mask[:, columns]
                out, total = family.forward(*own, seen, named, seed, pair, n)
                _merge(exact[:, :, pair.rows], lse[:, :, pair.rows], out.to(dtype), total)
        out = exact.to(q.dtype)
        if n.keep:
            ctx.save_for_backward(
                q, k, v, key_mask, seed, lse, exact if call.family == "mix" else out, *parts
            )
            ctx.call, ctx.names = call, names
            ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        backward = partial(_backward, ctx.call, ctx.names, ctx.needs_input_grad)
        if torch.is_grad_enabled():  # only under create_graph=True
            backward = partial(RefuseSecond.apply, backward)
        made = backward(grad_out, grad_lse, *ctx.saved_tensors)
        return None, None, *made[:3], None, None, *made[3:]


def _backward(
    call: Call,
    names: tuple[str, ...],
    needed: tuple[bool, ...],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    exact: Tensor,
    *parts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the parts."""
    n, family = call.numbers, FAMILIES[call.family]
    _, _, need_q, need_k, need_v, _, _, *need_parts = needed
    needs = Needs(
        need_q, need_k or need_v, {name: False for name in family.places} | dict(zip(names, need_parts))
    )
    named: Parts = dict(zip(names, parts))
    gradients = {name: torch.zeros_like(part) for name, part in zip(names, parts) if needs.parts[name]}
    if grad_out is None:
        grad_out = exact.new_zeros(exact.shape, dtype=q.dtype)
    outputs = family.outputs(exact, q, n)
    dq = q.new_zeros(q.shape, dtype=lse.dtype) if need_q else None

    last, ring = call.hops(), call.ring
    mine: Parcel | None = None
    follows: Exchange | None = None  # the gradients of the keys that are here, from the process before
    for step, (source, keys, values, mask) in enumerate(_travel(call, k, v, key_mask)):
        total = _gradients(call, k, v, source, lse.dtype, zero=True) if needs.kv else None
        for pair in call.pairs(source):
            rows, columns = pair.rows, pair.columns
            made = family.backward(
                grad_out[:, :, rows],
                None if grad_lse is None else grad_lse[:, :, rows].contiguous(),
                q[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                tuple(t[:, :, rows] if t.dim() == 4 else t for t in outputs),
                lse[:, :, rows].contiguous(),  # as forward would have made it
                None if mask is None else mask[:, columns],
                named,
                seed,
                pair,
                n,
                needs,
            )
            if dq is not None:
                dq[:, :, rows] += made[0]
            if total is not None:
                for into, gradient in zip(total.tensors, made[1:3]):
                    into[:, :, columns] += gradient
            for name, gradient in made[3].items():
                if name in gradients:
                    cut(gradients[name], family.places[name], pair, n.length).add_(gradient)
        if total is None:
            continue
        if follows is not None:
            _add(total, follows.finish())
        if step == 0:
            mine = total
        elif step < last:
            follows = ring.exchange(total, _gradients(call, k, v, call.source(step + 1), lse.dtype))
        else:
            follows = ring.exchange(total, _gradients(call, k, v, ring.rank, lse.dtype), -last)
    dk = dv = None
    if mine is not None:
        if follows is not None:
            _add(mine, follows.finish())
        dk, dv = mine.tensors
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
    if "b2" in gradients and grad_lse is not None:
        gradients["b2"] += of_last_bias(grad_lse, lse)
    dq = None if dq is None else dq.to(q.dtype)
    return dq, dk, dv, *(gradients.get(name) for name in names)


def _travel(call: Call, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Any:
    """(source, keys, values, mask) of every process whose keys come here; the next arrive while these are used."""
    present = _keys(call, k, v, key_mask, call.ring.rank)
    for into, tensor in zip(present.tensors, (k, v, key_mask)):
        into.copy_(tensor)  # type: ignore[arg-type]
    last = call.hops()
    for step in range(last + 1):
        source, coming = call.source(step), None
        if step < last:
            coming = call.ring.exchange(present, _keys(call, k, v, key_mask, call.source(step + 1)))
        keys, values, *mask = present.tensors
        yield source, keys, values, mask[0] if mask else None
        if coming is not None:
            present = coming.finish()


def _keys(call: Call, k: Tensor, v: Tensor, key_mask: Tensor | None, source: int) -> Parcel:
    shapes, dtypes = call.shapes(k, v, source), [k.dtype, v.dtype]
    if key_mask is not None:
        shapes, dtypes = [*shapes, (k.shape[0], shapes[0][2])], [*dtypes, torch.bool]
    return Parcel(shapes, dtypes, k.device)


def _gradients(
    call: Call, k: Tensor, v: Tensor, source: int, dtype: torch.dtype, zero: bool = False
) -> Parcel:
    made = Parcel(call.shapes(k, v, source), [dtype, dtype], k.device)
    if zero:
        made.bytes.zero_()
    return made


def _add(into: Parcel, other: Parcel) -> None:
    for tensor, part in zip(into.tensors, other.tensors):
        tensor += part


def _merge(out: Tensor, lse: Tensor, other: Tensor, total: Tensor) -> None:
    """Adds to (out, lse), in place, what the same queries got from other keys."""
    gap = torch.where(total == -torch.inf, total, total - lse)  # without the NaN of two rows that saw nothing
    out.lerp_(other, torch.sigmoid(gap)[..., None])
    torch.logaddexp(lse, total, out=lse)
