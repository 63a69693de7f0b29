"""Calls of torch's scaled_dot_product_attention, taken over by attention with a bias while a context is open."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .biases.bias import Bias
from .biases.dape import DAPE
from .masked import attend_masked, split_mask

Chooser = Callable[[Tensor, Tensor], "Bias | DAPE | None"]
SDPA = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
# Functions of torch that call it in turn; the last three where checkpoints make a forward again.
INSIDE = (F.multi_head_attention_forward, torch.autograd.grad, torch.autograd.backward, Tensor.backward)


def replace_sdpa(
    bias: Bias | DAPE | Iterable[Bias | DAPE | None] | Chooser, *, query_start: int | None = None
) -> ReplacedSDPA:
    """A context in which `torch.nn.functional.scaled_dot_product_attention` is attention with a bias.

    It reaches every call that this thread makes inside it: of models that imported the function by name, of
    `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoderLayer` (whose fast path is not taken meanwhile), of
    Hugging Face's models with attn_implementation="sdpa" (`posattn.integrations.transformers` does more for these).
    Nothing is patched: other threads and the code after it are not touched. torch.compile sees it, too, if the compiled
    function is called inside.

    How arguments are served: attn_mask None, or one that only hides keys (one row for all queries and heads), by
    `posattn.attention`, in O(L) memory; any other by the formula, the bias and the mask added, in O(Lq * Lk), as the
    mask itself is. dropout_p draws other bits than torch. A query that sees no key gives 0. The heads of a query
    (..., H, L, D) are its third dimension from behind.

    Where queries stand: the last query on the last key (a decoder's cache, one token at a time), but with is_causal
    the first query on the first key, as torch's causal mask has it. For lengths that differ in other ways, a cache
    longer than what is in it first of all, say so: query_start.

    Args:
        bias: what calls get. A `posattn.Bias` or `posattn.DAPE`: every call the same. A list or ModuleList of n of
            these: in turn, the k-th call the one at ``k % n``, as a model of n layers makes calls.
            A function of query and key that gives a bias. None in their place leaves a call to torch.
        query_start: position of the first query, for calls without is_causal; the attribute of the same name of the
            object returned can be set between calls.

    Returns:
        The context. Its attributes count the calls since it was entered: ``calls`` that got a bias, ``dense``, those of
        them that took the formula, ``left`` to torch. Calls of compiled code are not counted: ``compiled`` is True.

    Leaving it warns when no call got a bias, and when a list of biases was left in the middle: is it as many as layers?

    Raises:
        TypeError: bias or query_start is of another type.
        ValueError: at a call, a bias with another number of heads than query, and what `posattn.attention` refuses.
        RuntimeError: at a call in backward, made again by activation checkpointing, when there is a list of biases:
            which of them it got before is not known. Otherwise have backward inside the context. And where
            torch.compile with fullgraph=True meets a torch.nn.MultiheadAttention; without, that is run uncompiled.

    `torch.nn.MultiheadAttention` with need_weights=True, its default, does not call the function; that is warned of.

        >>> import torch, posattn
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> with posattn.replace_sdpa(posattn.TISA(4)) as replaced:
        ...     out = layer(torch.randn(2, 10, 32))
        >>> replaced.calls
        1
    """
    return ReplacedSDPA(bias, query_start)


class ReplacedSDPA(TorchFunctionMode):
    """What `replace_sdpa` returns."""

    def __init__(
        self, bias: Bias | DAPE | Iterable[Bias | DAPE | None] | Chooser, query_start: int | None
    ) -> None:
        super().__init__()
        self.biases: Sequence[Bias | DAPE | None] = ()
        self.chooser: Chooser | None = None
        if isinstance(bias, (Bias, DAPE)):
            self.biases = (bias,)
        elif isinstance(bias, Iterable) and not isinstance(bias, Tensor):
            self.biases = tuple(bias)
        elif callable(bias):
            self.chooser = bias
        for one in self.biases:
            if one is not None:
                _check_kind(one)
        if not self.biases and self.chooser is None:
            raise TypeError(
                "bias must be a posattn.Bias, a posattn.DAPE, a list of them with at least one, or a function, "
                f"got {type(bias).__name__}"
            )
        if query_start is not None and type(query_start) is not int:
            raise TypeError(f"query_start must be an int or None, got {type(query_start).__name__}")
        self.query_start = query_start
        self._start()

    def _start(self) -> None:
        self.calls = self.dense = self.left = 0
        self.compiled = self.reached = False
        self.turn = 0  # the one of the biases that is next

    def __enter__(self) -> ReplacedSDPA:
        self._start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is not None:
            return
        if self.calls == 0 and not self.compiled:
            warnings.warn(
                "replace_sdpa: no call of scaled_dot_product_attention got a bias "
                f"({self.left} were left to torch); does the model use another attention?",
                stacklevel=2,
            )
        elif self.turn:
            warnings.warn(
                f"replace_sdpa: the last turn took {self.turn} of {len(self.biases)} biases: is it as many as layers?",
                stacklevel=2,
            )

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SDPA:
            return self.attend(*args, **kwargs)
        if func in INSIDE:
            return self._inside(func, args, kwargs)
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """One call, arguments as in `torch.nn.functional.scaled_dot_product_attention`."""
        self.reached = True
        bias = self._next(query, key)
        if bias is None:
            self._count(left=1)
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and is_causal:
            raise ValueError("attn_mask must be None with is_causal=True, as in torch")
        variant: Any = getattr(attn_mask, "variant", None)  # of torch.nn.attention.bias.CausalBias
        to_the_right = variant is not None and variant.name == "LOWER_RIGHT"
        if variant is not None:
            attn_mask, is_causal = None, True
        lead, query, key, value = _four_dimensions(query, key, value, enable_gqa)
        if bias.num_heads != query.shape[1]:
            raise ValueError(
                f"bias must have the heads of query, (..., heads, length, head_dim), got "
                f"{type(bias).__name__} with {bias.num_heads} and query {(*lead, *query.shape[1:])}"
            )
        lengths = query.shape[2], key.shape[2]
        query_start = lengths[1] - lengths[0] if self.query_start is None else self.query_start
        if is_causal:
            query_start = lengths[1] - lengths[0] if to_the_right else 0
        key_mask = mask = None
        if attn_mask is not None:
            key_mask, mask = split_mask(attn_mask, lead, query.shape[1], *lengths)
        out, weights = attend_masked(
            query,
            key,
            value,
            bias,
            key_mask=key_mask,
            mask=mask,
            is_causal=is_causal,
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            dropout_p=dropout_p,
            query_start=query_start,
        )
        self._count(calls=1, dense=int(weights is not None))
        return out.reshape(*lead, *out.shape[1:])

    def _next(self, query: Tensor, key: Tensor) -> Bias | DAPE | None:
        """The bias of the next call."""
        if self.chooser is not None:
            bias = self.chooser(query, key)
            if bias is not None:
                _check_kind(bias)
            return bias
        if len(self.biases) == 1:
            return self.biases[0]
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "replace_sdpa with a list of biases does not know which a call gets that is made again in backward: "
                "use one bias, a function, or no activation checkpointing"
            )
        turn, self.turn = self.turn, (self.turn + 1) % len(self.biases)
        return self.biases[turn]

    def _count(self, calls: int = 0, dense: int = 0, left: int = 0) -> None:
        if torch.compiler.is_compiling():  # which would compile again for each number
            self.compiled = True
            return
        self.calls += calls
        self.dense += dense
        self.left += left

    def _inside(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of torch whose inner calls this mode is to see, which otherwise no mode sees that took it."""
        multihead = function is F.multi_head_attention_forward
        if multihead and torch.compiler.is_compiling():  # without fullgraph=True it then runs uncompiled
            raise RuntimeError(
                "replace_sdpa cannot reach into torch.nn.MultiheadAttention under torch.compile"
            )
        self.reached = False
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            outputs = _not_taken(function)(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if multihead and not self.reached:
            warnings.warn(
                "replace_sdpa: torch.nn.MultiheadAttention with need_weights=True does not call "
                "scaled_dot_product_attention and gets no bias; posattn.MultiheadAttention has one",
                stacklevel=2,
            )
        return outputs


def _not_taken(function: Any) -> Any:
    """A function of torch as it is, except that it does not ask modes whether they take it."""
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = function.__globals__ | dict.fromkeys(asks, lambda *tensors: False)
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _check_kind(bias: Any) -> None:
    if not isinstance(bias, (Bias, DAPE)):
        raise TypeError(
            f"bias must be or give a posattn.Bias, a posattn.DAPE or None, got {type(bias).__name__}"
        )


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The three as (batch, heads, length, dim), broadcast as torch does, and what comes before query's heads."""
    tensors = [query, key, value]
    for name, tensor in zip(("query", "key", "value"), tensors):
        if tensor.dim() < 3:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} must be (..., heads, length, head_dim), got shape {shape}")
    lead = tuple(torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors)))
    heads = [tensor.shape[-3] for tensor in tensors]
    if not enable_gqa:
        heads = [*torch.broadcast_shapes(*((number,) for number in heads))] * 3
    batch = math.prod(lead)
    query, key, value = (
        tensor.expand(*lead, number, *tensor.shape[-2:]).reshape(batch, number, *tensor.shape[-2:])
        for tensor, number in zip(tensors, heads)
    )
    return lead, query, key, value
