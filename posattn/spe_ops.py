"""The operators that put positional codes on queries and keys, and their autograd.Functions.

As in ops.py they are opaque and know no autograd: called by themselves they give no gradient, `Sine` and `Conv`
do. The same four functions exist in spe_blockwise.py and in kernels/spe_launch.py; these docstrings hold for all
three. Every result has one fixed order of summation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attend import RefuseSecond
from .ops import CHECKPOINT_OPS, no_autocast

_SINE = (
    "Tensor q, Tensor k, Tensor turns, Tensor phases, Tensor gains, Tensor noise, Tensor? gate_gains,"
    " Tensor? gate_noise, SymInt query_start, SymInt key_start"
)
_CONV = (
    "Tensor q, Tensor k, Tensor filter_q, Tensor filter_k, Tensor noise, SymInt realizations,"
    " Tensor? gate_gains, Tensor? gate_noise, SymInt query_start, SymInt key_start"
)
_SINE_NAMES = (
    "turns", "phases", "gains", "noise", "gate_gains", "gate_noise", "query_start", "key_start",
)  # fmt: skip
_CONV_NAMES = (
    "filter_q", "filter_k", "noise", "realizations", "gate_gains", "gate_noise", "query_start", "key_start",
)  # fmt: skip
_NEED = ("need_inputs", "need_codes")
_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define(
    "posattn::sine_forward", f"({_SINE}, str backend) -> (Tensor qhat, Tensor khat)", tags=_TAGS
)
torch.library.define(
    "posattn::sine_backward",
    f"(Tensor grad_q, Tensor grad_k, {_SINE}, bool need_inputs, bool need_codes, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dturns, Tensor dphases, Tensor dgains, Tensor dgate_gains)",
    tags=_TAGS,
)
torch.library.define(
    "posattn::conv_forward", f"({_CONV}, str backend) -> (Tensor qhat, Tensor khat)", tags=_TAGS
)
torch.library.define(
    "posattn::conv_backward",
    f"(Tensor grad_q, Tensor grad_k, {_CONV}, bool need_inputs, bool need_codes, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dfilter_q, Tensor dfilter_k, Tensor dgate_gains)",
    tags=_TAGS,
)

Gradients = tuple[Tensor, ...]


@torch.library.impl("posattn::sine_forward", "default")
def _sine_forward(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """qhat (B, H, Lq, R) and khat (B, H, Lk, R), contiguous and of q's dtype.

    With the position m of a query, query_start + i, and of a key, key_start + j::

        qhat[m] = sum_d q[m, d] (sum_k gains (cos(2 pi turns m + phases) z[2k] + sin(the same) z[2k + 1]) + gate e)

    and khat[m] likewise, of k and without phases. q (B, H, Lq, D), k (B, H, Lk, D); turns, phases, gains (H, D, K)
    and gate_gains (H, D) are float64 for every dtype of q; noise z (H, D, 2 K, R) and gate_noise e (H, D, R) are
    float32 (float64 with float64 q). The gate's two are given or not together. Positions are at least 0.
    """
    with no_autocast(q.device.type):
        made: tuple[Tensor, Tensor] = _module(args[-1], q, k).sine_forward(
            q, k, **dict(zip(_SINE_NAMES, args))
        )
    return made


@torch.library.impl("posattn::sine_backward", "default")
def _sine_backward(grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, *args: Any) -> Gradients:
    """Gradients of q, k, turns, phases, gains, gate_gains, each like its tensor; (0,) for what is not needed."""
    named = dict(zip(_SINE_NAMES + _NEED, args))
    with no_autocast(q.device.type):
        made: Gradients = _module(args[-1], q, k).sine_backward(grad_q, grad_k, q, k, **named)
    return _each_own(made, (q, k, *args[:3], args[4]), *args[-3:-1])


@torch.library.impl("posattn::conv_forward", "default")
def _conv_forward(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """qhat (B, H, Lq, R) and khat (B, H, Lk, R), contiguous and of q's dtype, R = realizations.

    With positions as in sine_forward, ``qhat[m] = sum_d q[m, d] (sum_a filter_q[d, a] z[d, m + a] + gate e[d])``
    and khat[m] likewise, of k and filter_k. The filters (H, D, P), gate_gains (H, D) and gate_noise e (H, D, R)
    are float32 (float64 with float64 q); noise z is (H, D, T, R) of that dtype with T at least P - 1 beyond the
    last position, or int64 (1,): the seed that `posattn.noise.normal` makes it of.
    """
    with no_autocast(q.device.type):
        made: tuple[Tensor, Tensor] = _module(args[-1], q, k).conv_forward(
            q, k, **dict(zip(_CONV_NAMES, args))
        )
    return made


@torch.library.impl("posattn::conv_backward", "default")
def _conv_backward(grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, *args: Any) -> Gradients:
    """Gradients of q, k, filter_q, filter_k, gate_gains, each like its tensor; (0,) for what is not needed."""
    named = dict(zip(_CONV_NAMES + _NEED, args))
    with no_autocast(q.device.type):
        made: Gradients = _module(args[-1], q, k).conv_backward(grad_q, grad_k, q, k, **named)
    return _each_own(made, (q, k, *args[:2], args[4]), *args[-3:-1])


@torch.library.register_fake("posattn::sine_forward")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, turns: Tensor, phases: Tensor, gains: Tensor, noise: Tensor, *_: Any
) -> Gradients:
    return tuple(x.new_empty((*x.shape[:3], noise.shape[-1])) for x in (q, k))


@torch.library.register_fake("posattn::conv_forward")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, filter_q: Tensor, filter_k: Tensor, noise: Tensor, realizations: int, *_: Any
) -> Gradients:
    return tuple(x.new_empty((*x.shape[:3], realizations)) for x in (q, k))


@torch.library.register_fake("posattn::sine_backward")  # type: ignore[untyped-decorator]
def _(grad_q: Tensor, grad_k: Tensor, *args: Any) -> Gradients:
    return _empty((*args[:5], args[6]), *args[-3:-1])


@torch.library.register_fake("posattn::conv_backward")  # type: ignore[untyped-decorator]
def _(grad_q: Tensor, grad_k: Tensor, *args: Any) -> Gradients:
    return _empty((*args[:4], args[6]), *args[-3:-1])


def _wanted(
    like: tuple[Tensor | None, ...], need_inputs: bool, need_codes: bool
) -> list[tuple[Tensor | None, bool]]:
    need = [need_inputs] * 2 + [need_codes] * (len(like) - 2)
    return [(t, needed and t is not None) for t, needed in zip(like, need)]


def _nothing(like: tuple[Tensor | None, ...], t: Tensor | None) -> Tensor:
    other = like[2] if t is None else t  # a gate that is not there: of the dtype of the other codes
    assert other is not None
    return other.new_empty(0)


def _empty(like: tuple[Tensor | None, ...], need_inputs: bool, need_codes: bool) -> Gradients:
    return tuple(
        torch.empty_like(t) if needed and t is not None else _nothing(like, t)
        for t, needed in _wanted(like, need_inputs, need_codes)
    )


def _each_own(
    gradients: Gradients, like: tuple[Tensor | None, ...], need_inputs: bool, need_codes: bool
) -> Gradients:
    """Outputs of an operator may not alias, and a backend may give one empty tensor for all that is not needed."""
    wanted = _wanted(like, need_inputs, need_codes)
    return tuple(grad if needed else _nothing(like, t) for grad, (t, needed) in zip(gradients, wanted))


def _module(backend: str, q: Tensor, k: Tensor) -> Any:
    # No kernel knows of grids without programs.
    if backend == "blockwise" or q.numel() == 0 or k.numel() == 0:
        from . import spe_blockwise

        return spe_blockwise
    from .kernels import spe_launch  # only here is Triton needed

    return spe_launch


sine_forward = torch.ops.posattn.sine_forward.default
sine_backward = torch.ops.posattn.sine_backward.default
conv_forward = torch.ops.posattn.conv_forward.default
conv_backward = torch.ops.posattn.conv_backward.default
CHECKPOINT_OPS.extend([sine_forward, conv_forward])


class Sine(torch.autograd.Function):
    """sine_forward with gradients for q, k, turns, phases, gains and gate_gains; once differentiable."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """The arguments of sine_forward."""
        *tensors, ctx.query_start, ctx.key_start, ctx.backend = args
        ctx.save_for_backward(*tensors)
        outputs: tuple[Tensor, Tensor] = sine_forward(*args)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        made = _differentiate(sine_backward, ctx, grad_q, grad_k, ctx.saved_tensors, [0, 1, 2, 3, 4, 6])
        return *made[:5], None, made[5], *(None,) * 4


class Conv(torch.autograd.Function):
    """conv_forward with gradients for q, k, the filters and gate_gains; once differentiable."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """The arguments of conv_forward."""
        *tensors, ctx.query_start, ctx.key_start, ctx.backend = args
        ctx.realizations = tensors.pop(5)
        ctx.save_for_backward(*tensors)
        outputs: tuple[Tensor, Tensor] = conv_forward(*args)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        args = *ctx.saved_tensors[:5], ctx.realizations, *ctx.saved_tensors[5:]
        made = _differentiate(conv_backward, ctx, grad_q, grad_k, args, [0, 1, 2, 3, 6])
        return *made[:4], None, None, made[4], *(None,) * 4


def _differentiate(
    operator: Any, ctx: Any, grad_q: Tensor, grad_k: Tensor, args: tuple[Any, ...], places: list[int]
) -> list[Tensor | None]:
    """The operator's gradients, which belong to the arguments at these places; None for what is not wanted."""
    wanted = [ctx.needs_input_grad[place] for place in places]
    settings = (ctx.query_start, ctx.key_start, any(wanted[:2]), any(wanted[2:]), ctx.backend)
    # Grad mode is on only under create_graph=True. AOTAutograd, which traces this, has its own refusal.
    recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    backward = partial(_RefuseSecondOfCodes.apply, operator) if recorded else operator
    gradients = backward(grad_q, grad_k, *args, *settings)
    return [grad if want else None for grad, want in zip(gradients, wanted)]


class _RefuseSecondOfCodes(RefuseSecond):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the codes of posattn.SineSPE and posattn.ConvSPE have no second derivative, so a gradient of their "
            "gradient (gradient penalty, Hessian-vector product) cannot be had"
        )
