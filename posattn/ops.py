"""The operators: every torch.library line, and the autograd.Function that joins forward and backward.

The operators are opaque (torch.compile cannot look into a kernel whose arguments are functions, and need not)
and know no autograd: called by themselves they give no gradient, `Attend` does. The same two functions,
`forward` and `backward`, exist in blockwise.py and in kernels/launch.py; these docstrings hold for all three.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .biases.bias import Scaled

torch.library.define(
    "posattn::attend_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? support, Tensor? slopes,"
    " Tensor? line, Tensor? rows, Tensor? knots, Tensor? pieces, Tensor? key_mask,"
    " float scale, float softcap, SymInt shift, SymInt left, SymInt right, bool symmetric, str backend)"
    " -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "posattn::attend_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? table, Tensor? support, Tensor? slopes,"
    " Tensor? line, Tensor? rows, Tensor? knots, Tensor? pieces, Tensor? key_mask,"
    " float scale, float softcap, SymInt shift, SymInt left, SymInt right, bool symmetric,"
    " bool tails_need_grad, bool need_q, bool need_kv, bool need_table, bool deterministic, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable, Tensor dline, Tensor drows, Tensor dpieces)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("posattn::attend_forward", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    support: Tensor | None,
    slopes: Tensor | None,
    line: Tensor | None,
    rows: Tensor | None,
    knots: Tensor | None,
    pieces: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    shift: int,
    left: int,
    right: int,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention and its natural logsumexp.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), Hq a multiple of Hk; table (Hq, Lq + Lk - 1), fp32
    (fp64 with fp64 q); support (2, Hq) int32; slopes (Hq,) fp32; line, rows, knots, pieces all or none, those of
    `Scaled`, in the table's dtype; key_mask (B, Lk) bool. At most one of table, slopes and line is given. Key j has
    the offset j - i + shift from query i; left, right = -1 are open; softcap = 0.0 is none. out has the strides of
    empty_like(q) when Dv = D and is contiguous otherwise; lse (B, Hq, Lq) is contiguous and of the
    table's dtype.
    """
    if q.numel() == 0 or k.numel() == 0:  # no kernel needs to know of grids without programs
        out, lse = _empty_outputs(q, v)
        return out.zero_(), lse.fill_(-math.inf)
    with _no_autocast(q.device.type):
        outputs: tuple[Tensor, Tensor] = _module(backend).forward(
            q,
            k,
            v,
            table=table,
            support=support,
            slopes=slopes,
            scaled=_scaled(line, rows, knots, pieces),
            key_mask=key_mask,
            scale=scale,
            softcap=softcap,
            shift=shift,
            left=left,
            right=right,
            symmetric=symmetric,
        )
    return outputs


@torch.library.impl("posattn::attend_backward", "default")
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor | None,
    support: Tensor | None,
    slopes: Tensor | None,
    line: Tensor | None,
    rows: Tensor | None,
    knots: Tensor | None,
    pieces: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    shift: int,
    left: int,
    right: int,
    symmetric: bool,
    tails_need_grad: bool,
    need_q: bool,
    need_kv: bool,
    need_table: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, table, line, rows and pieces, each like its tensor; shape (0,) for what is not needed.

    need_table asks for those of the bias, whichever form it has. A backend gives the last three with `scaled` only.
    """
    bias = (table, line, rows, pieces)
    if q.numel() == 0 or k.numel() == 0:
        return tuple(grad.zero_() for grad in _empty_gradients(q, k, v, bias, need_q, need_kv, need_table))
    with _no_autocast(q.device.type):
        gradients: tuple[Tensor, ...] = _module(backend).backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            table=table,
            support=support,
            slopes=slopes,
            scaled=_scaled(line, rows, knots, pieces),
            key_mask=key_mask,
            scale=scale,
            softcap=softcap,
            shift=shift,
            left=left,
            right=right,
            symmetric=symmetric,
            tails_need_grad=tails_need_grad,
            need_q=need_q,
            need_kv=need_kv,
            need_table=need_table,
            deterministic=deterministic,
        )
    # Outputs of an operator may not alias, and a backend may give one empty tensor for all that is not needed.
    needed = (need_q, need_kv, need_kv, *(need_table and part is not None for part in bias))
    gradients += (q,) * (len(needed) - len(gradients))
    return tuple(grad if need else q.new_empty(0) for grad, need in zip(gradients, needed))


@torch.library.register_fake("posattn::attend_forward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


@torch.library.register_fake("posattn::attend_backward")  # type: ignore[untyped-decorator]
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    table, _, _, line, rows, _, pieces = rest[2:9]
    need_q, need_kv, need_table = rest[17:20]
    return _empty_gradients(q, k, v, (table, line, rows, pieces), need_q, need_kv, need_table)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    *rows, head_dim = q.shape
    value_dim = v.shape[-1]
    out = torch.empty_like(q) if value_dim == head_dim else q.new_empty((*rows, value_dim))
    return out, q.new_empty(rows, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _empty_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: tuple[Tensor | None, ...],
    need_q: bool,
    need_kv: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    wanted = (q, need_q), (k, need_kv), (v, need_kv), *((part, need_bias) for part in bias)
    return tuple(torch.empty_like(t) if t is not None and need else q.new_empty(0) for t, need in wanted)


def _scaled(
    line: Tensor | None, rows: Tensor | None, knots: Tensor | None, pieces: Tensor | None
) -> Scaled | None:
    if line is None or rows is None or knots is None or pieces is None:
        return None
    return Scaled(line, rows, knots, pieces)


def _module(backend: str) -> Any:
    if backend == "blockwise":
        from . import blockwise

        return blockwise
    from .kernels import launch  # only here is Triton needed

    return launch


def _no_autocast(device_type: str) -> Any:
    """Autocast has done its work when q, k, v arrive: inside, fp32 accumulators must stay fp32."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


attend_forward = torch.ops.posattn.attend_forward.default
attend_backward = torch.ops.posattn.attend_backward.default

# For torch.utils.checkpoint.create_selective_checkpoint_contexts: what to keep instead of computing it again.
CHECKPOINT_OPS = [attend_forward]


class Attend(torch.autograd.Function):
    """attend_forward, differentiable once by q, k, v, table, line, rows and pieces, in out and in lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor | None,
        support: Tensor | None,
        slopes: Tensor | None,
        line: Tensor | None,
        rows: Tensor | None,
        knots: Tensor | None,
        pieces: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        softcap: float,
        shift: int,
        left: int,
        right: int,
        symmetric: bool,
        tails_need_grad: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        rule = (scale, softcap, shift, left, right, symmetric)
        bias = (table, support, slopes, line, rows, knots, pieces)
        out, lse = attend_forward(q, k, v, *bias, key_mask, *rule, backend)
        ctx.save_for_backward(q, k, v, out, lse, *bias, key_mask)
        ctx.rule = (*rule, tails_need_grad)
        ctx.backend = backend
        # Determinism is decided where the user sees it; backward may run in another thread, much later.
        ctx.deterministic = torch.are_deterministic_algorithms_enabled()
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(wanted)
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        need_q, need_k, need_v, need_table, _, _, *need_scaled = wanted[:10]
        need = (need_q, need_k or need_v, need_table or any(need_scaled))
        # Grad mode is on only under create_graph=True. AOTAutograd, which traces this, has its own refusal.
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = partial(_RefuseSecond.apply, attend_backward) if recorded else attend_backward
        settings = (*ctx.rule, *need, ctx.deterministic, ctx.backend)
        made = backward(grad_out, grad_lse, *saved, *settings)  # type: ignore[no-untyped-call]
        dq, dk, dv, dtable, dline, drows, dpieces = made
        gradients = [dq, dk, dv, dtable, None, None, dline, drows, None, dpieces]
        gradients += [None] * (len(wanted) - len(gradients))
        return tuple(grad if want else None for grad, want in zip(gradients, wanted))


class _RefuseSecond(torch.autograd.Function):
    """An operator's backward, with an error of our own where its derivative is asked for."""

    @staticmethod
    def forward(ctx: Any, backward: Any, *args: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = backward(*args)
        return gradients

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "posattn.attention has no second derivative: for a gradient of its gradient (gradient penalty, "
            "Hessian-vector product), call posattn.attention_reference there, which takes the same arguments"
        )
