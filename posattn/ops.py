"""The operators: every torch.library line of attention with a bias that is added.

The operators are opaque (torch.compile cannot look into a kernel whose arguments are functions, and need not)
and know no autograd: called by themselves they give no gradient, `attend.Attend` does. The same two functions,
`forward` and `backward`, exist in blockwise.py and in kernels/launch.py; these docstrings hold for all three.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .biases.bias import Scaled
from .dropout import Dropout


class Sequences(NamedTuple):
    """How the rows and keys of all batch entries are cut into sequences: see `attend_forward`."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


# What few calls have: both operators take these by name.
_OPTIONS = (
    "*, Tensor? relative=None, Tensor? sinks=None, Tensor? cu_q=None, Tensor? cu_k=None, SymInt max_q=0,"
    " SymInt max_k=0, float dropout_p=0.0, Tensor? seed=None, int skip_from=-1"
)

torch.library.define(
    "posattn::attend_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? support, Tensor? slopes,"
    " Tensor? line, Tensor? rows, Tensor? knots, Tensor? pieces, Tensor? key_mask,"
    " float scale, float softcap, SymInt shift, SymInt left, SymInt right, bool symmetric, str backend,"
    f" {_OPTIONS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "posattn::attend_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? table, Tensor? support, Tensor? slopes,"
    " Tensor? line, Tensor? rows, Tensor? knots, Tensor? pieces, Tensor? key_mask,"
    " float scale, float softcap, SymInt shift, SymInt left, SymInt right, bool symmetric,"
    " bool tails_need_grad, bool need_q, bool need_kv, bool need_table, bool deterministic, str backend,"
    f" {_OPTIONS}, bool need_sinks=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable, Tensor dline,"
    " Tensor drows, Tensor dpieces, Tensor drelative, Tensor dsinks)",
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
    *,
    relative: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    skip_from: int = -1,
) -> tuple[Tensor, Tensor]:
    """Attention and its natural logsumexp.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), Hq a multiple of Hk; table (Hq, Lq + Lk - 1), fp32
    (fp64 with fp64 q); support (2, Hq) int32; slopes (Hq,) fp32; line, rows, knots, pieces all or none, those of
    `Scaled`, in the table's dtype; key_mask (B, Lk) bool. At most one of table, slopes and line is given. Key j has
    the offset j - i + shift from query i; left, right = -1 are open; softcap = 0.0 is none. out has the strides of
    empty_like(q) when Dv = D and is contiguous otherwise; lse (B, Hq, Lq) is contiguous and of the
    table's dtype.

    relative (B, Hq, Lq, W) adds relative[b, h, i, -o] at the offsets -W < o <= 0. sinks (Hq,), of the table's dtype,
    are one more logit of each row, without a value. cu_q and cu_k, int32 (S + 1,), cut the rows and the keys of all
    batch entries, one entry after the other, into sequences that see nothing of each other; cu_k is None where it is
    cu_q. Query i of a sequence then stands at i + its number of keys - its number of queries, key j at j; shift is
    0, table and line (max_q + max_k - 1) begin at the offset 1 - max_k, and rows (max_q + max_k) at the position
    -max_q. With dropout_p, each pair's probability is dropped or divided by 1 - dropout_p, by seed, int64 (4,)
    (see dropout.py). With skip_from keys or more, unless it is -1, pairs that a table or slopes make negligible are
    left out (near.py); with a softcap, relative, scaled parts or sequences none are.
    """
    if q.numel() == 0 or k.numel() == 0:  # no kernel needs to know of grids without programs
        out, lse = empty_outputs(q, v)
        return out.zero_(), _lse_of_nothing(lse, sinks)
    with no_autocast(q.device.type):
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
            **_options(relative, sinks, cu_q, cu_k, max_q, max_k, dropout_p, seed, 0 <= skip_from <= k.shape[2]),
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
    *,
    relative: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    skip_from: int = -1,
    need_sinks: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, table, line, rows, pieces, relative and sinks, each like its tensor, or of shape (0,).

    need_table asks for those of the bias, whichever form it has. A backend gives those of line, rows and pieces with
    `scaled` only, that of relative after all others with `relative` only, and never that of sinks.
    """
    bias = (table, line, rows, pieces, relative)
    if q.numel() == 0 or k.numel() == 0:
        empty = _empty_gradients(q, k, v, bias, sinks, need_q, need_kv, need_table, need_sinks)
        grads = [grad.zero_() for grad in empty]
        if need_sinks and sinks is not None:
            grads[-1] = _sinks_gradient(grad_out, grad_lse, out, lse, sinks)
        return tuple(grads)
    with no_autocast(q.device.type):
        gradients: Any = _module(backend).backward(
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
            **_options(relative, sinks, cu_q, cu_k, max_q, max_k, dropout_p, seed, 0 <= skip_from <= k.shape[2]),
        )
    if relative is not None:
        *gradients, drelative = gradients
    else:
        drelative = None
    # Outputs of an operator may not alias, and a backend may give one empty tensor for all that is not needed.
    needed = (need_q, need_kv, need_kv, *(need_table and part is not None for part in bias))
    made = [*gradients, *(q,) * (len(needed) - 1 - len(gradients)), drelative]
    dsinks = q.new_empty(0)
    if need_sinks and sinks is not None:
        dsinks = _sinks_gradient(grad_out, grad_lse, out, lse, sinks)
    kept = [grad if need and grad is not None else q.new_empty(0) for grad, need in zip(made, needed)]
    return *kept, dsinks


@torch.library.register_fake("posattn::attend_forward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


@torch.library.register_fake("posattn::attend_backward")  # type: ignore[untyped-decorator]
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    table, _, _, line, rows, _, pieces = rest[2:9]
    bias = (table, line, rows, pieces, options.get("relative"))
    need_q, need_kv, need_table = rest[17:20]
    needs = need_q, need_kv, need_table, options.get("need_sinks", False)
    return _empty_gradients(q, k, v, bias, options.get("sinks"), *needs)


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    *rows, head_dim = q.shape
    value_dim = v.shape[-1]
    out = torch.empty_like(q) if value_dim == head_dim else q.new_empty((*rows, value_dim))
    return out, q.new_empty(rows, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _empty_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: tuple[Tensor | None, ...],
    sinks: Tensor | None,
    need_q: bool,
    need_kv: bool,
    need_bias: bool,
    need_sinks: bool,
) -> tuple[Tensor, ...]:
    parts = *((part, need_bias) for part in bias), (sinks, need_sinks)
    wanted = (q, need_q), (k, need_kv), (v, need_kv), *parts
    return tuple(torch.empty_like(t) if t is not None and need else q.new_empty(0) for t, need in wanted)


def _lse_of_nothing(lse: Tensor, sinks: Tensor | None) -> Tensor:
    lse.fill_(-math.inf)
    return lse if sinks is None else lse.copy_(sinks[:, None].expand_as(lse))


def _sinks_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor
) -> Tensor:
    """A sink is a key of value 0: its probability is exp(sink - lse), and what flows to it -delta of the row."""
    flow = -torch.linalg.vecdot(grad_out.to(lse.dtype), out.to(lse.dtype))
    if grad_lse is not None:
        flow = flow + grad_lse
    weight = torch.exp(sinks[:, None] - lse).nan_to_num(0.0)  # lse is at least the sink; NaN where both are -inf
    dsinks: Tensor = (flow * weight).sum((0, 2))
    return dsinks


def _options(
    relative: Tensor | None,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    seed: Tensor | None,
    skip: bool,
) -> dict[str, Any]:
    """Those that are there, as a backend takes them."""
    options: dict[str, Any] = {}
    if relative is not None:
        options["relative"] = relative
    if sinks is not None:
        options["sinks"] = sinks
    if cu_q is not None:
        options["sequences"] = Sequences(cu_q, cu_q if cu_k is None else cu_k, max_q, max_k)
    if seed is not None:
        options["dropout"] = Dropout(dropout_p, seed)
    if skip:
        options["skip"] = True
    return options


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


def no_autocast(device_type: str) -> Any:
    """Autocast has done its work when q, k, v arrive: inside, fp32 accumulators must stay fp32."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


attend_forward = torch.ops.posattn.attend_forward.default
attend_backward = torch.ops.posattn.attend_backward.default

# For torch.utils.checkpoint.create_selective_checkpoint_contexts: what to keep instead of computing it again.
CHECKPOINT_OPS = [attend_forward]
