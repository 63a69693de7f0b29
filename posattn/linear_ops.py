"""The operators of linear attention; opaque, and without autograd by themselves, as those of ops.py.

The same two functions, `forward` and `backward`, exist in linear_blockwise.py and in kernels/linear_launch.py; these
docstrings hold for all.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .attend import RefuseSecond
from .feature_maps import draw_projection
from .ops import CHECKPOINT_OPS, no_autocast

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

torch.library.define(
    "posattn::linear_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? state, Tensor? sums,"
    " str feature_map, float eps, bool causal, bool want_state, str backend)"
    " -> (Tensor out, Tensor den, Tensor kv, Tensor ksum)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "posattn::linear_backward",
    "(Tensor? grad_out, Tensor? grad_state, Tensor? grad_sums, Tensor q, Tensor k, Tensor v,"
    " Tensor out, Tensor den, Tensor? key_mask, Tensor? state, Tensor? sums,"
    " str feature_map, bool causal, bool need_q, bool need_kv, bool need_state, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dstate, Tensor dsums)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "posattn::favor_projection",
    "(Tensor like, SymInt dim, SymInt num_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("posattn::linear_forward", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    state: Tensor | None,
    sums: Tensor | None,
    feature_map: str,
    eps: float,
    causal: bool,
    want_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear attention, its denominators, and the state after the last key.

    q (B, H, Lq, R), k (B, H, Lk, R), v (B, H, Lk, Dv) of one dtype; causal needs Lq = Lk. feature_map is "identity",
    "elu" or "relu". key_mask (B, Lk) bool; state (B, H, R, Dv) and sums (B, H, R), both or none, count as keys that
    every query sees. out (B, H, Lq, Dv) of v's dtype, den (B, H, Lq) with eps in it, kv and ksum, which are like state
    and sums, or of shape (0,) without want_state: all contiguous, and all but out in fp32 (fp64 with fp64 q).
    """
    made = _empty(q, v, want_state)
    if made[0].numel() == 0 and made[2].numel() == 0:
        return made
    with no_autocast(q.device.type):
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _module(backend, q, k).forward(
            q,
            k,
            v,
            key_mask=key_mask,
            state=state,
            sums=sums,
            feature_map=feature_map,
            eps=eps,
            causal=causal,
            want_state=want_state,
        )
    return outputs


@torch.library.impl("posattn::linear_backward", "default")
def _backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    grad_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    key_mask: Tensor | None,
    state: Tensor | None,
    sums: Tensor | None,
    feature_map: str,
    causal: bool,
    need_q: bool,
    need_kv: bool,
    need_state: bool,
    backend: str,
) -> Gradients:
    """Gradients of q, k, v, state and sums, each like its tensor; shape (0,) for what is not needed.

    grad_state and grad_sums are those of kv and ksum; None is a gradient of 0. Sums have a fixed order: equal
    arguments give bitwise equal gradients.
    """
    like = (q, k, v, state, sums)
    need = (need_q, need_kv, need_kv, need_state, need_state)
    if q.shape[0] * q.shape[1] == 0:
        return _empty_gradients(like, need)
    with no_autocast(q.device.type):
        gradients: Gradients = _module(backend, q, k).backward(
            grad_out,
            grad_state,
            grad_sums,
            q,
            k,
            v,
            out,
            den,
            key_mask=key_mask,
            state=state,
            sums=sums,
            feature_map=feature_map,
            causal=causal,
            need_q=need_q,
            need_kv=need_kv,
            need_state=need_state,
        )
    # Outputs of an operator may not alias, and a backend may give one empty tensor for all that is not needed.
    fake = _empty_gradients(like, tuple(False for _ in like))
    dq, dk, dv, dstate, dsums = (g if want else e for g, e, want in zip(gradients, fake, need))
    return dq, dk, dv, dstate, dsums


@torch.library.register_fake("posattn::linear_forward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(q, v, others[-2])


@torch.library.register_fake("posattn::linear_backward")  # type: ignore[untyped-decorator]
def _(grad_out: Any, grad_state: Any, grad_sums: Any, *args: Any) -> Gradients:
    q, k, v, _, _, _, state, sums, _, _, need_q, need_kv, need_state, _ = args
    return _empty_gradients((q, k, v, state, sums), (need_q, need_kv, need_kv, need_state, need_state))


@torch.library.impl("posattn::favor_projection", "default")
def _projection(like: Tensor, dim: int, num_features: int) -> Tensor:
    """The projection of ``Favor(dim, num_features)`` on like's device: one operator, for torch.compile's sake."""
    return _kept_projection(like.device, dim, num_features).clone()


@lru_cache(maxsize=16)
def _kept_projection(device: torch.device, dim: int, num_features: int) -> Tensor:
    return draw_projection(dim, num_features).to(device)


@torch.library.register_fake("posattn::favor_projection")  # type: ignore[untyped-decorator]
def _(like: Tensor, dim: int, num_features: int) -> Tensor:
    return like.new_empty((num_features, dim), dtype=torch.float32)


def _empty(q: Tensor, v: Tensor, want_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, features = q.shape
    rows, dtype = (batch, heads, length), torch.float64 if q.dtype == torch.float64 else torch.float32
    value_dim = v.shape[-1]
    return (
        v.new_empty((*rows, value_dim)),
        q.new_empty(rows, dtype=dtype),
        q.new_empty((batch, heads, features, value_dim) if want_state else 0, dtype=dtype),
        q.new_empty((batch, heads, features) if want_state else 0, dtype=dtype),
    )


def _empty_gradients(like: tuple[Tensor | None, ...], need: tuple[bool, ...]) -> Gradients:
    """Those of q, k, v are in their own dtype, those of the state in fp32 or fp64, needed or not."""
    q = like[0]
    assert q is not None
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtypes = (q.dtype, q.dtype, q.dtype, wide, wide)
    dq, dk, dv, dstate, dsums = (
        torch.empty_like(t) if want and t is not None else q.new_empty(0, dtype=dtype)
        for t, want, dtype in zip(like, need, dtypes)
    )
    return dq, dk, dv, dstate, dsums


def _module(backend: str, q: Tensor, k: Tensor) -> Any:
    if backend == "blockwise" or q.shape[2] == 0 or k.shape[2] == 0:  # no kernel needs to know of no rows
        from . import linear_blockwise

        return linear_blockwise
    from .kernels import linear_launch  # only here is Triton needed

    return linear_launch


linear_forward = torch.ops.posattn.linear_forward.default
linear_backward = torch.ops.posattn.linear_backward.default
favor_projection = torch.ops.posattn.favor_projection.default
CHECKPOINT_OPS.append(linear_forward)


class LinearAttend(torch.autograd.Function):
    """linear_forward but for den, once differentiable by q, k, v, state and sums, in out, kv and ksum."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of linear_forward."""
        out, den, kv, ksum = linear_forward(*args)
        q, k, v, key_mask, state, sums, feature_map, _, causal, _, backend = args
        ctx.save_for_backward(q, k, v, out, den, key_mask, state, sums)
        ctx.rule, ctx.backend = (feature_map, causal), backend
        ctx.set_materialize_grads(False)
        return out, kv, ksum

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_kv: Tensor | None, grad_ksum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        nothing = (None,) * 5  # for the arguments after sums
        grads = (grad_out, grad_kv, grad_ksum)
        if all(grad is None for grad in grads):
            return *(None,) * 6, *nothing
        need = (wanted[0], wanted[1] or wanted[2], wanted[4] or wanted[5])
        # Grad mode is on only under create_graph=True. AOTAutograd, which traces this, has its own refusal.
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = partial(_RefuseSecondOfLinear.apply, linear_backward) if recorded else linear_backward
        made = backward(*grads, *ctx.saved_tensors, *ctx.rule, *need, ctx.backend)  # type: ignore[no-untyped-call]
        dq, dk, dv, dstate, dsums = made
        gradients = (dq, dk, dv, None, dstate, dsums)
        return *(grad if want else None for grad, want in zip(gradients, wanted)), *nothing


class _RefuseSecondOfLinear(RefuseSecond):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "posattn.linear_attention has no second derivative: for a gradient of its gradient (gradient penalty, "
            "Hessian-vector product), write its formula with torch operations there"
        )
