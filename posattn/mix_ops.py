"""The operators of attention that mixes the scores of all heads (DAPE), and their autograd.Function.

As in ops.py they are opaque and know no autograd: called by themselves they give no gradient, `Mix` does. The
same two functions, `forward` and `backward`, exist in mix_blockwise.py and in kernels/mix_launch.py; these
docstrings hold for all three. Every result has one fixed order of summation.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attend import RefuseSecond
from .ops import CHECKPOINT_OPS, empty_outputs, no_autocast

_TENSORS = (
    "Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? table, Tensor? line, Tensor? rows, Tensor? first,"
    " Tensor? last, Tensor? last_bias, Tensor? key_mask"
)
_NUMBERS = "float scale, SymInt shift, SymInt left, SymInt right, float negative_slope, bool published"

torch.library.define(
    "posattn::mix_forward",
    f"(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_NUMBERS}, bool keep_rest, str backend)"
    " -> (Tensor out, Tensor lse, Tensor rest)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "posattn::mix_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rest,"
    f" {_TENSORS}, {_NUMBERS}, bool need_q, bool need_kv, bool need_weights, bool need_base, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2,"
    " Tensor dtable, Tensor dline, Tensor drows, Tensor dfirst, Tensor dlast, Tensor dlast_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

Gradients = tuple[Tensor, ...]  # 13, in the order of the schema


@torch.library.impl("posattn::mix_forward", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    table: Tensor | None,
    line: Tensor | None,
    rows: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    last_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    shift: int,
    left: int,
    right: int,
    negative_slope: float,
    published: bool,
    keep_rest: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with the scores S = A + base + network([A, base]), A = scale * q.k, and its natural logsumexp.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv). The network is two cross-correlations along the keys
    with a LeakyReLU of slope 0.01 between: w1 (hidden, Hq or 2 Hq, taps), b1 (hidden,), w2 (Hq, hidden, taps),
    b2 (Hq,). The base is nothing; or table (Hq, Lq + Lk - 1), read at j - i + Lq - 1; or FIRE's:
    last @ relu(first[0] x + first[1]) + last_bias with x = line[j - i + Lq - 1] * rows[i], line
    (Lq + Lk - 1,), rows (Lq,), first (2, F), last (Hq, F), last_bias (Hq,) and a ReLU that keeps
    negative_slope. All these are fp32 (fp64 with fp64 q). Key j has the offset j - i + shift from query i and
    is visible from -left to right (-1 is open) where key_mask (B, Lk) holds. What is not visible counts as 0
    in the network's input and hidden layer. Published: instead, the keys after the query count as 0 in its
    input, and the hidden layer is 0 only beyond the keys. out and lse are those of attend_forward; rest, for
    backward, is what rounding took from a 16-bit out where Triton made it, if keep_rest, or empty.
    """
    if q.numel() == 0 or k.numel() == 0:
        out, lse, rest = _empty(q, v, keep_rest, backend)
        return out.zero_(), lse.fill_(-math.inf), rest.zero_()
    with no_autocast(q.device.type):
        outputs: tuple[Tensor, Tensor, Tensor | None] = _module(backend).forward(
            q,
            k,
            v,
            w1,
            b1,
            w2,
            b2,
            table=table,
            line=line,
            rows=rows,
            first=first,
            last=last,
            last_bias=last_bias,
            key_mask=key_mask,
            scale=scale,
            shift=shift,
            left=left,
            right=right,
            negative_slope=negative_slope,
            published=published,
            keep_rest=_has_rest(q, keep_rest, backend),
        )
    out, lse, found = outputs
    return out, lse, q.new_empty(0) if found is None else found


@torch.library.impl("posattn::mix_backward", "default")
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    table: Tensor | None,
    line: Tensor | None,
    rows: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    last_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    shift: int,
    left: int,
    right: int,
    negative_slope: float,
    published: bool,
    need_q: bool,
    need_kv: bool,
    need_weights: bool,
    need_base: bool,
    backend: str,
) -> Gradients:
    """Gradients of q, k, v, w1, b1, w2, b2 and the base's six, each like its tensor; shape (0,) for the rest."""
    like = (q, k, v, w1, b1, w2, b2, table, line, rows, first, last, last_bias)
    need = (need_q, need_kv, need_weights, need_base)
    if q.numel() == 0 or k.numel() == 0:
        return tuple(gradient.zero_() for gradient in _empty_gradients(like, need))
    with no_autocast(q.device.type):
        gradients: Gradients = _module(backend).backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            rest,
            w1,
            b1,
            w2,
            b2,
            table=table,
            line=line,
            rows=rows,
            first=first,
            last=last,
            last_bias=last_bias,
            key_mask=key_mask,
            scale=scale,
            shift=shift,
            left=left,
            right=right,
            negative_slope=negative_slope,
            published=published,
            need_q=need_q,
            need_kv=need_kv,
            need_weights=need_weights,
            need_base=need_base,
        )
    # Outputs of an operator may not alias, and a backend may give one empty tensor for all that is not needed.
    wanted = zip(gradients, like, _each(need))
    return tuple(
        grad if needed and t is not None else q.new_empty(0, dtype=(q if t is None else t).dtype)
        for grad, t, needed in wanted
    )


@torch.library.register_fake("posattn::mix_forward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, v, *others[-2:])


@torch.library.register_fake("posattn::mix_backward")  # type: ignore[untyped-decorator]
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Gradients:
    return _empty_gradients((q, k, v, *rest[3:13]), rest[-5:-1])


def _has_rest(q: Tensor, keep_rest: bool, backend: str) -> bool:
    return keep_rest and backend == "triton" and q.dtype in (torch.float16, torch.bfloat16)


def _empty(q: Tensor, v: Tensor, keep_rest: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = empty_outputs(q, v)
    return out, lse, torch.empty_like(out) if _has_rest(q, keep_rest, backend) else q.new_empty(0)


def _each(need: tuple[bool, ...]) -> tuple[bool, ...]:
    """need_q, need_kv, need_weights, need_base -> one for each of the 13 gradients."""
    need_q, need_kv, need_weights, need_base = need
    return (need_q, need_kv, need_kv, *[need_weights] * 4, *[need_base] * 6)


def _empty_gradients(like: tuple[Tensor | None, ...], need: tuple[bool, ...]) -> Gradients:
    q = like[0]
    assert q is not None
    return tuple(
        torch.empty_like(t)
        if needed and t is not None
        else q.new_empty(0, dtype=(q if t is None else t).dtype)
        for t, needed in zip(like, _each(need))
    )


def _module(backend: str) -> Any:
    if backend == "blockwise":
        from . import mix_blockwise

        return mix_blockwise
    from .kernels import mix_launch  # only here is Triton needed

    return mix_launch


mix_forward = torch.ops.posattn.mix_forward.default
mix_backward = torch.ops.posattn.mix_backward.default
CHECKPOINT_OPS.append(mix_forward)


class Mix(torch.autograd.Function):
    """mix_forward with gradients for q, k, v, the network and the base, of out and of lse; once differentiable."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """The arguments of mix_forward."""
        out, lse, rest = mix_forward(*args)
        q, k, v, *others = args[:14]
        ctx.save_for_backward(q, k, v, out, lse, rest, *others)
        ctx.rule, ctx.backend = args[14:20], args[21]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:13]
        nothing = (None,) * 9  # for the arguments after last_bias
        if grad_out is None and grad_lse is None:
            return *(None,) * 13, *nothing
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        need = (wanted[0], any(wanted[1:3]), any(wanted[3:7]), any(wanted[7:]))
        # Grad mode is on only under create_graph=True. AOTAutograd, which traces this, has its own refusal.
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = partial(RefuseSecond.apply, mix_backward) if recorded else mix_backward
        gradients = backward(grad_out, grad_lse, *saved, *ctx.rule, *need, ctx.backend)  # type: ignore[no-untyped-call]
        return *(grad if want else None for grad, want in zip(gradients, wanted)), *nothing
