"""From checked arguments to the operators: what a bias becomes, packed sequences, sinks of a DAPE."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .attend import Attend
from .biases.bias import Bias
from .biases.dape import DAPE
from .dropout import draw
from .mix_ops import Mix
from .ops import Sequences
from .strips import INVISIBLE

SKIP_FROM = 2048  # keys; with fewer, looking for negligible pairs costs more than they do


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None,
    rule: checks.Rule,
    backend: str,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    relative: Tensor | None,
    dropout_p: float,
    sequences: Sequences | None,
    skip: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of arguments that are checked; with sequences, those of `ops.attend_forward`, rule has no starts."""
    if torch.compiler.is_compiling():  # which takes no tensor twice
        key = key.view_as(key) if key is query else key
        value = value.view_as(value) if value is query or value is key else value
    query, key, value = (readable(t) for t in (query, key, value))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sinks = None if sinks is None else sinks.to(dtype).contiguous()
    if isinstance(bias, DAPE):
        if sequences is None:
            out, lse = _mix(query, key, value, bias, key_mask, rule, backend)
        else:
            out, lse = _mix_sequences(query, key, value, bias, key_mask, rule, backend, sequences)
        return (out, lse) if sinks is None else with_sinks(out, lse, sinks)

    if sequences is None:
        lengths, starts = (query.shape[2], key.shape[2]), (rule.query_start, rule.key_start)
    else:
        lengths = (max(1, sequences.max_q), max(1, sequences.max_k))
        starts = lengths[1] - lengths[0], 0
    if not isinstance(bias, Tensor) and 0 in (query.shape[2], key.shape[2]):
        bias = None  # a bias makes no table of no offsets
    made = made_of(bias, query, lengths, starts, packed=sequences is not None)
    relative = None if relative is None else in_precision(relative, dtype)
    cu_q, cu_k, max_q, max_k = (None, None, 0, 0) if sequences is None else sequences
    dropout = draw(dropout_p, rule.query_start, rule.key_start, query.device)

    out, lse = Attend.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        *made.tensors,
        relative,
        sinks,
        key_mask,
        cu_q,
        None if cu_k is cu_q else cu_k,
        max_q,
        max_k,
        dropout_p,
        None if dropout is None else dropout.seed,
        skip_from(skip, bias),
        rule.scale,
        rule.softcap,
        rule.key_start - rule.query_start,
        rule.left,
        rule.right,
        made.symmetric,
        made.tails_need_grad,
        backend,
    )
    return out, lse


def skip_from(asked: bool | None, bias: Bias | Tensor | None) -> int:
    """From how many keys on negligible pairs are looked for, -1: never. The operator compares: it is not compiled."""
    if asked is None:
        return SKIP_FROM if isinstance(bias, Bias) and bias.decays else -1
    return 0 if asked and bias is not None else -1


class Made(NamedTuple):
    """What a bias becomes: table, support, slopes, line, rows, knots and pieces of `ops.attend_forward`; two facts."""

    tensors: tuple[Tensor | None, ...]
    symmetric: bool = True
    tails_need_grad: bool = True


def made_of(
    bias: Bias | Tensor | None,
    query: Tensor,
    lengths: tuple[int, int],
    starts: tuple[int, int],
    packed: bool = False,
) -> Made:
    """The parts of a bias for query and key positions from `starts` on, checked, in the precision of scores.

    packed: `lengths` are those of the longest of several sequences, and rows are of every position in one of them.
    """
    table = support = slopes = scaled = None
    symmetric = tails_need_grad = True
    if isinstance(bias, Tensor):
        table = bias
    elif bias is not None:
        symmetric, tails_need_grad = bias.symmetric, bias.tails_need_grad
        width = lengths[0] + lengths[1] - 1
        scaled = bias.scaled(*lengths, *starts)
        slopes = bias.slopes() if scaled is None else None
        if scaled is not None:
            if packed:
                every = bias.scaled(sum(lengths), 1, -lengths[0], 0)
                assert every is not None
                scaled = scaled._replace(rows=every.rows)
            checks.check_scaled(bias, scaled, query, width, sum(lengths) if packed else lengths[0])
        elif slopes is None:
            table = bias.table(*lengths, *starts)
            checks.check_made(bias, "a table", table, (query.shape[1], width), query)
            support = bias.support()
        else:
            checks.check_made(bias, "slopes", slopes, (query.shape[1],), query)
    # Not query's dtype: in half precision a bias would be off by 2^-9 of itself, which scores would show.
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if table is not None:
        table = table.to(dtype).contiguous()
    parts = (None,) * 4 if scaled is None else tuple(part.to(dtype).contiguous() for part in scaled)
    return Made((table, support, slopes, *parts), symmetric, tails_need_grad)


def in_precision(relative: Tensor, dtype: torch.dtype) -> Tensor:
    """Relative logits as operators take them: float64 beside float64 and nowhere else."""
    return relative if (relative.dtype == torch.float64) == (dtype == torch.float64) else relative.to(dtype)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What one more logit a head, without a value, makes of attention without it."""
    sinks = sinks.clamp(min=INVISIBLE)[:, None]  # so that -inf beside no key at all is not NaN
    share = torch.sigmoid(lse - sinks)
    return (out * share[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)


def _mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: DAPE,
    key_padding_mask: Tensor | None,
    rule: checks.Rule,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lengths = query.shape[2], key.shape[2]
    network = bias.network(*lengths, rule.query_start, rule.key_start, double=query.dtype == torch.float64)
    if bias.base is not None and network.table is not None:
        shape = (query.shape[1], query.shape[2] + key.shape[2] - 1)
        checks.check_made(bias.base, "a table", network.table, shape, query)
    out, lse = Mix.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        *network[:-1],
        key_padding_mask,
        rule.scale,
        rule.key_start - rule.query_start,
        rule.left,
        rule.right,
        network.negative_slope,
        not bias.prefix_consistent,
        torch.is_grad_enabled(),
        backend,
    )
    return out, lse


def _mix_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: DAPE,
    key_mask: Tensor | None,
    rule: checks.Rule,
    backend: str,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: a DAPE's scratch is that of one problem. Waits for the device."""
    ends = list(zip(sequences.cu_q.tolist(), sequences.cu_k.tolist()))
    query_length, key_length = query.shape[2], key.shape[2]
    if query.shape[0] * query_length > ends[-1][0]:  # rows of nobody, behind the last sequence
        ends.append((query.shape[0] * query_length, ends[-1][1]))
    if query.numel() == 0:
        return _mix(query, key, value, bias, key_mask, rule, backend)
    outs: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    lses: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for (q0, k0), (q1, k1) in pairwise(ends):
        if q1 == q0:
            continue
        b = q0 // query_length
        rows, keys = (
            slice(q0 - b * query_length, q1 - b * query_length),
            slice(k0 - b * key_length, k1 - b * key_length),
        )
        own = rule._replace(query_start=(k1 - k0) - (q1 - q0), key_start=0)
        mask = None if key_mask is None else key_mask[b : b + 1, keys]
        parts = query[b : b + 1, :, rows], key[b : b + 1, :, keys], value[b : b + 1, :, keys]
        out, lse = _mix(*parts, bias, mask, own, backend)
        outs[b].append(out)
        lses[b].append(lse)
    return torch.cat([torch.cat(o, 2) for o in outs]), torch.cat([torch.cat(o, 2) for o in lses])


def documents(document_ids: Tensor) -> Sequences:
    """A sequence for each run of equal numbers in a row of document_ids (B, L). Waits for the device."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = starts.flatten().nonzero().flatten().int()
    cu = torch.cat([first, first.new_full((1,), document_ids.numel())])
    return Sequences(cu, cu, document_ids.shape[1], document_ids.shape[1])


def readable(tensor: Tensor) -> Tensor:
    """Rows of unit stride that do not overlap, as kernels read them; every other stride is free."""
    rows = tensor.stride(-1) == 1 and tensor.stride(-2) >= tensor.shape[-1]
    return tensor if rows else tensor.contiguous()


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.autocast does to the arguments of scaled_dot_product_attention, which spares float64 too."""
    device_type = query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)
    query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    return query, key, value
