"""Linear attention in plain PyTorch, a few chunks of positions at a time: any dtype, any device.

With a column of ones beside the values, ``V_j = [v_j, 1]``, one product makes numerator and denominator::

    [num_i, d_i] = phi(q_i) S_i        S_i = [state, sums] + sum of phi(k_j)^T V_j over the keys that query i sees

and with ``G_i = [do_i, -do_i . out_i] / den_i`` the gradients are products of the same kind::

    dphi(q_i) = G_i S_i^T    [dv_j, .] = phi(k_j) T_j    dphi(k_j) = V_j T_j^T    T_j = dS + sum of phi(q_i)^T G_i

over the queries that see key j. Causal sums are cut into chunks: a state goes from one to the next, and within one
there is a masked CHUNK x CHUNK product. Backward keeps no state: a scan forward makes S again for dq, a scan back
makes T for dk and dv. Beyond copies of the size of the tensors there are buffers of about SCRATCH numbers. Sums are
in fp32 (fp64 for fp64) and a fixed order. Arguments and results are those of linear_ops.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .feature_maps import mapped_, times_slope_

SCRATCH = 1 << 18  # numbers of a block's widest matrix: what a cache keeps from one product to the next
CHUNK, WIDE_CHUNK = 64, 128  # positions; the second where features and values are wider than WIDE
WIDE = 128
GPU_SCRATCH = 64  # times as much where no cache, but the number of launches counts


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None,
    state: Tensor | None,
    sums: Tensor | None,
    feature_map: str,
    eps: float,
    causal: bool,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, its denominators, and the state after the last key."""
    call = Call(q, k, v, key_mask, feature_map)
    value_dim = v.shape[-1]
    out = v.new_empty((*q.shape[:-1], value_dim))
    den = q.new_empty(q.shape[:-1], dtype=call.dtype)
    total = call.beside(state, sums)
    for batch in call.batches():
        carried = total[batch].flatten(0, 1)
        if not causal:
            call.add_keys(carried, batch)
        for block in call.blocks(batch, q.shape[2], causal):
            rows = call.queries(block)
            if causal:
                keys, values = call.keys(block), call.values(block)
                before = _states(block, keys, values, carried)
                both = torch.bmm(torch.bmm(rows, keys.mT).tril_(), values).baddbmm_(rows, before)
            else:
                both = torch.bmm(rows, carried)
            divisor = both[..., value_dim:]
            divisor.copy_(torch.where(divisor >= 0, divisor + eps, divisor - eps))
            block.write(den[..., None], divisor)
            block.write(out, both[..., :value_dim].div_(divisor))
    if not want_state:
        return out, den, total.new_empty(0), total.new_empty(0)
    return out, den, total[..., :value_dim].contiguous(), total[..., value_dim].contiguous()


@torch.no_grad()
def backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    grad_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    *,
    key_mask: Tensor | None,
    state: Tensor | None,
    sums: Tensor | None,
    feature_map: str,
    causal: bool,
    need_q: bool,
    need_kv: bool,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, state and sums."""
    call = Call(q, k, v, key_mask, feature_map)
    value_dim = v.shape[-1]
    dq = torch.empty_like(q) if need_q else q.new_empty(0)
    dk, dv = (torch.empty_like(t) if need_kv else t.new_empty(0) for t in (k, v))
    total = call.beside(state, sums) if need_q else q.new_empty((q.shape[0], 0))
    dtotal = call.beside(grad_state, grad_sums)
    if grad_out is None:  # what goes into the keys comes from the state alone
        dq.zero_()
        causal = need_q = False
    for batch in call.batches():
        carried, dcarried = total[batch].flatten(0, 1), dtotal[batch].flatten(0, 1)
        if need_q and not causal:
            call.add_keys(carried, batch)
        if grad_out is not None and (need_q or not causal):
            for block in call.blocks(batch, q.shape[2], causal):
                rows, grads = call.queries(block), call.gradients(block, grad_out, out, den)
                if not causal:
                    dcarried.baddbmm_(rows.mT, grads)
                if not need_q:
                    continue
                if causal:
                    keys, values = call.keys(block), call.values(block)
                    before = _states(block, keys, values, carried)
                    drows = torch.bmm(torch.bmm(grads, values.mT).tril_(), keys)
                    drows.baddbmm_(grads, before.mT)
                else:
                    drows = torch.bmm(grads, carried.mT)
                block.write(dq, times_slope_(drows, rows, feature_map))
        if not (need_kv or (causal and need_state)):
            continue
        for block in reversed(list(call.blocks(batch, k.shape[2], causal))):
            keys, values = call.keys(block), call.values(block)
            if grad_out is not None and causal:
                rows, grads = call.queries(block), call.gradients(block, grad_out, out, den)
                after = _states(block, rows, grads, dcarried, back=True)
                dvalues = torch.bmm(torch.bmm(keys, rows.mT).triu_(), grads).baddbmm_(keys, after)
                dkeys = torch.bmm(torch.bmm(values, grads.mT).triu_(), rows)
                dkeys.baddbmm_(values, after.mT)
            else:
                dvalues, dkeys = torch.bmm(keys, dcarried), torch.bmm(values, dcarried.mT)
            if need_kv:
                block.write(dv, dvalues[..., :value_dim])
                block.write(dk, call.hide_(times_slope_(dkeys, keys, feature_map), block))
    if not need_state:
        return dq, dk, dv, dtotal.new_empty(0), dtotal.new_empty(0)
    return dq, dk, dv, dtotal[..., :value_dim].contiguous(), dtotal[..., value_dim].contiguous()


class Block(NamedTuple):
    """Some batch entries, and of all their heads consecutive chunks of positions."""

    batch: slice
    start: int
    chunks: int
    rows: int  # of a chunk

    def view(self, tensor: Tensor) -> Tensor:
        """(B, H, N, X) -> (chunks, batch, H, rows, X)"""
        part = tensor[self.batch, :, self.start : self.start + self.chunks * self.rows]
        chunks: Tensor = part.unflatten(2, (self.chunks, self.rows))
        return chunks.permute(2, 0, 1, 3, 4)

    def write(self, tensor: Tensor, made: Tensor) -> None:
        view = self.view(tensor)
        view.copy_(made.view(*view.shape[:3], *made.shape[1:]))


class Call(NamedTuple):
    """One call's tensors, and what the products take of them: (chunks * lines, rows, X), a line a head of a batch."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    feature_map: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def beside(self, state: Tensor | None, sums: Tensor | None) -> Tensor:
        """(B, H, R, Dv + 1), new: zeros for None."""
        batch, heads, _, features = self.q.shape
        total = self.q.new_zeros((batch, heads, features, self.v.shape[-1] + 1), dtype=self.dtype)
        if state is not None:
            total[..., :-1] = state
        if sums is not None:
            total[..., -1] = sums
        return total

    def batches(self) -> Iterator[slice]:
        _, most = self._sizes()
        for start in range(0, self.q.shape[0], most):
            yield slice(start, min(start + most, self.q.shape[0]))

    def blocks(self, batch: slice, length: int, chunked: bool) -> Iterator[Block]:
        """All positions; a block is one chunk where chunked is False."""
        chunk, most = self._sizes()
        chunks = max(1, most // (batch.stop - batch.start))
        start = 0
        while start < length:
            left = length - start
            block = Block(batch, start, 1, min(left, chunks * chunk))
            if chunked:
                block = Block(batch, start, max(1, min(chunks, left // chunk)), min(left, chunk))
            yield block
            start += block.chunks * block.rows

    def _sizes(self) -> tuple[int, int]:
        """Positions of a chunk, and the chunks (with all heads of a batch entry) of a block."""
        features, values = self.q.shape[-1], self.v.shape[-1] + 1
        chunk = WIDE_CHUNK if min(features, values) > WIDE else CHUNK
        widest = max(chunk * max(features, values, chunk), features * values)
        scratch = SCRATCH if self.q.device.type == "cpu" else SCRATCH * GPU_SCRATCH
        return chunk, max(1, scratch // (self.q.shape[1] * widest))

    def queries(self, block: Block) -> Tensor:
        return mapped_(self._rows(self.q, block), self.feature_map)

    def keys(self, block: Block) -> Tensor:
        return self.hide_(mapped_(self._rows(self.k, block), self.feature_map), block)

    def values(self, block: Block) -> Tensor:
        view = block.view(self.v)
        values = view.new_empty((*view.shape[:-1], view.shape[-1] + 1), dtype=self.dtype)
        values[..., :-1] = view
        values[..., -1] = 1
        return self.hide_(values.flatten(0, 2), block)

    def gradients(self, block: Block, grad_out: Tensor, out: Tensor, den: Tensor) -> Tensor:
        """G"""
        view = block.view(grad_out)
        gradients = view.new_empty((*view.shape[:-1], view.shape[-1] + 1), dtype=self.dtype)
        inner = gradients[..., :-1]
        torch.div(view, block.view(den[..., None]), out=inner)
        torch.sum(inner * block.view(out), -1, out=gradients[..., -1]).neg_()
        return gradients.flatten(0, 2)

    def hide_(self, made: Tensor, block: Block) -> Tensor:
        """0 for keys that the mask hides, whatever is in them."""
        if self.key_mask is not None:
            seen = block.view(self.key_mask[:, None, :, None])
            made.view(*seen.shape[:2], -1, *made.shape[1:]).masked_fill_(~seen, 0)
        return made

    def add_keys(self, carried: Tensor, batch: slice) -> None:
        for block in self.blocks(batch, self.k.shape[2], chunked=False):
            carried.baddbmm_(self.keys(block).mT, self.values(block))

    def _rows(self, tensor: Tensor, block: Block) -> Tensor:
        view = block.view(tensor)
        rows = torch.empty(view.shape, dtype=self.dtype, device=view.device)
        return rows.copy_(view).flatten(0, 2)


def _states(block: Block, left: Tensor, right: Tensor, carried: Tensor, back: bool = False) -> Tensor:
    """carried plus the products left^T right of the chunks before each (after, if back); carried: of them all."""
    states = carried.new_empty((block.chunks + 1, *carried.shape))
    order = list(range(block.chunks + 1))
    if back:
        order.reverse()
    states[order[0]] = carried
    torch.bmm(left.mT, right, out=(states[:-1] if back else states[1:]).flatten(0, 1))
    for one, other in pairwise(order):
        states[other] += states[one]
    carried.copy_(states[order[-1]])
    return (states[1:] if back else states[:-1]).flatten(0, 1)
