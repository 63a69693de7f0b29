"""The autograd.Function that joins attend_forward and attend_backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops


class Attend(torch.autograd.Function):
    """attend_forward, differentiable once by q, k, v and every part of a bias, in out and in lse.

    Its arguments are those of attend_forward, in an order of its own, and tails_need_grad.
    """

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
        relative: Tensor | None,
        sinks: Tensor | None,
        key_mask: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        seed: Tensor | None,
        skip_from: int,
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
        numbers = dict(max_q=max_q, max_k=max_k, dropout_p=dropout_p, skip_from=skip_from)
        tensors = dict(relative=relative, sinks=sinks, cu_q=cu_q, cu_k=cu_k, seed=seed)
        out, lse = ops.attend_forward(q, k, v, *bias, key_mask, *rule, backend, **tensors, **numbers)
        ctx.save_for_backward(q, k, v, out, lse, *bias, key_mask, relative, sinks, cu_q, cu_k, seed)
        ctx.rule = (*rule, tails_need_grad)
        ctx.numbers, ctx.backend = numbers, backend
        # Determinism is decided where the user sees it; backward may run in another thread, much later.
        ctx.deterministic = torch.are_deterministic_algorithms_enabled()
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(wanted)
        *saved, relative, sinks, cu_q, cu_k, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        need_q, need_k, need_v, need_table, _, _, *need_scaled, need_relative, need_sinks = wanted[:12]
        need = (need_q, need_k or need_v, need_table or any(need_scaled) or need_relative)
        # Grad mode is on only under create_graph=True. AOTAutograd, which traces this, has its own refusal.
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        tensors = dict(relative=relative, sinks=sinks, cu_q=cu_q, cu_k=cu_k, seed=seed)
        backward = partial(ops.attend_backward, **tensors, **ctx.numbers, need_sinks=need_sinks)
        if recorded:
            backward = partial(RefuseSecond.apply, backward)
        settings = (*ctx.rule, *need, ctx.deterministic, ctx.backend)
        made = backward(grad_out, grad_lse, *saved, *settings)
        dq, dk, dv, dtable, dline, drows, dpieces, drelative, dsinks = made
        gradients = [dq, dk, dv, dtable, None, None, dline, drows, None, dpieces, drelative, dsinks]
        gradients += [None] * (len(wanted) - len(gradients))
        return tuple(grad if want else None for grad, want in zip(gradients, wanted))


class RefuseSecond(torch.autograd.Function):
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
