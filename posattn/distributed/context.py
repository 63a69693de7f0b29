"""Context parallel: the call for a sequence whose positions are spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import checks, option_checks
from ..biases.bias import Bias
from ..biases.dape import DAPE
from ..dispatch import autocast, in_precision, made_of, with_sinks
from ..dropout import draw
from .layout import Group, check_order, process_group, whole_length
from .pair_scores import Numbers
from .ring import Ring, SumGradients
from .ring_attention import Call, RingAttention

PARTS = ("table", "support", "slopes", "line", "rows", "knots", "pieces")  # of `Made.tensors`, as operators call them


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | DAPE | Tensor | None = None,
    *,
    group: Group = None,
    order: str = "zigzag",
    length: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    relative_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    bias_gradient: str = "sum",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`posattn.attention` of a sequence whose positions are spread over the processes of a group.

    Every process calls it with its own rows of query, key and value, and gets those rows of the result. Keys and
    values travel round a ring of the processes while they are attended; nothing is gathered. A bias is made once on
    every process, for all offsets of the sequence. Backward is called on every process, too: with the loss being the
    sum of the processes' losses, it gives each the gradients of its own rows.

    With P processes and N positions, process r holds in "contiguous" order the r-th of P nearly equal pieces, and in
    "zigzag" order the r-th and the (2 P - 1 - r)-th of 2 P, one after the other, so that under a causal mask all have
    nearly the same work; piece number p of n is ``range(p * N // n, (p + 1) * N // n)``. `shard` cuts so, `positions`
    says where the rows stand (for RoPE and losses), `gather` puts results together. N may be any number; a process
    may hold no row and still has to call.

    Each process sends its keys and values P - 1 times forward (a window may need fewer); backward sends them once
    more, and their gradients as often, in float32. The parts of a bias, float32, are summed once, in backward.

    Args:
        query: (B, Hq, N_r, D), the rows here. Dtypes and devices as in `posattn.attention`.
        key: (B, Hk, N_r, D); with enable_gqa the Hk heads travel, not Hq.
        value: (B, Hk, N_r, Dv).
        bias: a `posattn.Bias`, the same on every process; a table (Hq, 2 N - 1) of the whole sequence; or a
            `posattn.DAPE` with kernel_size=1.
        group: a ProcessGroup or a DeviceMesh of one dimension; None for all processes.
        order: "zigzag" or "contiguous".
        length: N. By default N_r times the number of processes, which is right only if all hold the same number.
        key_padding_mask: (B, N_r) bool, of the keys here.
        sinks: (Hq,), the same on every process.
        dropout_p: as in `posattn.attention`. Generators of equal state give the pairs that one process would drop,
            others are as good: a query's pairs are all computed where the query is.
        relative_logits: (B, Hq, N_r, W), of the rows here.
        bias_gradient: "sum" gives every process the whole gradient of the bias (of its parameters or its table, and
            of sinks), as if one process had done everything; right where nobody else sums gradients over this group.
            "local" gives each the part from its own rows, as every other parameter gets: right where DDP, FSDP or
            code of yours reduces the gradients of all parameters over a mesh that includes this group (they take the
            mean or the sum; "sum" would come out P times too large beside the other parameters).
        is_causal, scale, enable_gqa, window, softcap, return_lse, backend: as in `posattn.attention`.

    Returns:
        out (B, Hq, N_r, Dv), of query's dtype; with return_lse the pair (out, lse), lse (B, Hq, N_r) in float32
        (float64 for float64 tensors), both differentiable once.

    Raises:
        TypeError, ValueError: as `posattn.attention`; and for a local length that does not belong to `length`, an
            unknown order or bias_gradient, a DAPE with a kernel_size over 1 (its neighbours may be elsewhere).
        RuntimeError: torch.distributed is not initialised.

    Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", ICLR 2024 (arXiv 2310.01889);
    the order of pieces as in Llama 3 (Meta, 2024, arXiv 2407.21783, sec. 3.3.2).

        >>> import torch, posattn
        >>> import torch.distributed as dist
        >>> from posattn.distributed import context_parallel_attention, shard
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16).unbind()
        >>> bias = posattn.TISA(num_heads=4)
        >>> here = [shard(tensor, dim=2) for tensor in (query, key, value)]
        >>> out = context_parallel_attention(*here, bias, is_causal=True)
        >>> torch.allclose(out, posattn.attention(query, key, value, bias, is_causal=True), atol=1e-5)
        True
        >>> dist.destroy_process_group()
    """
    check_order(order)
    if bias_gradient not in ("sum", "local"):
        raise ValueError(f'bias_gradient must be "sum" or "local", got {bias_gradient!r}')
    processes = process_group(group)
    checks.check_tensor("query", query)
    checks.check_tensor("key", key)
    checks.check_tensor("value", value)
    query, key, value = autocast(query, key, value)
    checks.check_together(query, key, value, enable_gqa)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"query and key must be the same rows of one sequence, got {query.shape[2]} and {key.shape[2]} rows"
        )
    length = whole_length(length, query.shape[2], processes, order)
    checks.check_bias(bias, query, length, length)
    checks.check_key_padding_mask(key_padding_mask, query, key)
    option_checks.check_relative_logits(relative_logits, bias, tuple(query.shape[:3]), query)
    option_checks.check_sinks(sinks, query, query.shape[1])
    option_checks.check_dropout(dropout_p, bias)
    checks.check_return_lse(return_lse)
    rule = checks.check_rule(
        query,
        key,
        is_causal=is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
        query_start=0,
        key_start=0,
    )
    if isinstance(bias, DAPE):
        checks.check_dape(bias, query, rule, is_causal)
        if bias.kernel_size > 1:
            raise ValueError(
                f"context_parallel_attention takes a DAPE with kernel_size=1, got {bias.kernel_size}: its network "
                "mixes neighbouring keys, which other processes hold"
            )
    backend = checks.choose_backend(backend, query, value, bias)

    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    whole = _whole_bias(bias, query, length, dtype)
    if relative_logits is not None:
        whole.tensors["relative"] = in_precision(relative_logits, dtype)
    sinks = None if sinks is None else sinks.to(dtype)
    if bias_gradient == "sum":
        sinks = _summed(whole, sinks, processes)
    dropout = draw(dropout_p, 0, 0, query.device)
    numbers = Numbers(
        length=length,
        scale=rule.scale,
        softcap=rule.softcap,
        left=rule.left,
        right=rule.right,
        symmetric=whole.symmetric,
        tails_need_grad=whole.tails_need_grad,
        negative_slope=whole.negative_slope,
        published=isinstance(bias, DAPE) and not bias.prefix_consistent,
        dropout_p=dropout_p,
        keep=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        backend=backend,
    )
    call = Call(Ring(processes), order, "mix" if isinstance(bias, DAPE) else "attend", numbers)
    out, lse = RingAttention.apply(  # type: ignore[no-untyped-call]
        call,
        tuple(whole.tensors),
        query,
        key,
        value,
        key_padding_mask,
        None if dropout is None else dropout.seed,
        *whole.tensors.values(),
    )
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


@dataclass
class _Whole:
    """The tensors of a bias, for all offsets of the sequence, by the operators' names; and how to read them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    symmetric: bool = True
    tails_need_grad: bool = True
    negative_slope: float = 0.0


def _whole_bias(bias: Bias | DAPE | Tensor | None, query: Tensor, length: int, dtype: torch.dtype) -> _Whole:
    whole = _Whole()
    if isinstance(bias, DAPE):
        network = bias.network(length, length, 0, 0, double=dtype == torch.float64)._asdict()
        whole.negative_slope = network.pop("negative_slope")
        whole.tensors.update((name, part) for name, part in network.items() if part is not None)
        if bias.base is not None and "table" in whole.tensors:
            shape = query.shape[1], max(2 * length - 1, 0)
            checks.check_made(bias.base, "a table", whole.tensors["table"], shape, query)
    elif isinstance(bias, Tensor) or length > 0:
        made = made_of(bias, query, (length, length), (0, 0))
        whole.symmetric, whole.tails_need_grad = made.symmetric, made.tails_need_grad
        whole.tensors.update((name, part) for name, part in zip(PARTS, made.tensors) if part is not None)
    return whole


def _summed(whole: _Whole, sinks: Tensor | None, group: torch.distributed.ProcessGroup) -> Tensor | None:
    """Joins what the processes share, so that its gradients are summed in one message; returns the sinks."""
    shared = {name: part for name, part in whole.tensors.items() if part.requires_grad and name != "relative"}
    if sinks is not None and sinks.requires_grad:
        shared["sinks"] = sinks
    if group.size() > 1 and shared and torch.is_grad_enabled():
        joined = SumGradients.apply(group, *shared.values())  # type: ignore[no-untyped-call]
        for name, part in zip(shared, joined):
            if name == "sinks":
                sinks = part
            else:
                whole.tensors[name] = part
    return sinks
