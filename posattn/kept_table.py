"""A bias's table kept from token to token: made once for a length, doubled when it is outgrown, sliced by each call.

Kept beside the bias, not in it: copies and pickles of a module know nothing of it, and it goes when the bias goes.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .biases.bias import Bias
from .strips import INVISIBLE

AHEAD = 15  # offsets after the query's own that a table holds: calls have up to 16 queries
LEAST = 256  # keys that a table is made for, at least

_KINDS = (Tensor, nn.Parameter)
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class _Kept(NamedTuple):
    facts: list[Any]
    addresses: tuple[Tensor, ...]  # keeps what `facts` names from being taken by something else
    table: Tensor
    length: int
    version: int


_kept: weakref.WeakKeyDictionary[Bias, dict[torch.dtype, _Kept]] = weakref.WeakKeyDictionary()
# What a CUDA graph reads must stay where it is, also when a longer table has taken its place.
_captured: weakref.WeakKeyDictionary[Bias, list[Tensor]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kept_table(bias: Bias, length: int, dtype: torch.dtype) -> tuple[Tensor, int] | None:
    """(table, zero): (H, T) in dtype, at least -1e30, the offset o at ``zero + o`` for ``-length < o <= 15``.

    The same memory from call to call while the parameters and buffers of the bias are the same tensors, unchanged in
    place (a write through ``.data`` shows after the next `forget`), and it stays in training or in evaluation; whoever
    gets it only reads it. None where nothing can be kept: under grad mode, torch.compile, torch.func and (possibly)
    FSDP, for tensors without a count of changes (made in inference mode), and for a bias of another package in
    training, which may draw random numbers.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _under_fsdp():
        return None
    facts: list[Any] = [bias.training]
    if not _collect(bias, facts) or (bias.training and not type(bias).__module__.startswith("posattn.")):
        return None
    found = _kept.get(bias)
    kept = None if found is None else found.get(dtype)
    if kept is None or kept.length < length or kept.table._version != kept.version or kept.facts != facts:
        if _capturing(bias):  # what a graph computes exists only once it runs
            return None
        kept = _make(bias, length, dtype, facts)
        if kept is None:
            return None
        with _lock:
            entry = _kept.setdefault(bias, {})
            if any(other.facts != facts for other in entry.values()):
                entry.clear()
            entry[dtype] = kept
    elif kept.table.is_cuda and torch.cuda.is_current_stream_capturing():
        with _lock:
            tables = _captured.setdefault(bias, [])
            if not any(table is kept.table for table in tables):
                tables.append(kept.table)
    return kept.table, kept.length - 1


def forget(bias: Bias) -> None:
    """The table is made again at the next call. Said where a sequence begins, so that no change is missed for long."""
    if bias in _kept:
        with _lock:
            _kept.pop(bias, None)


def _make(bias: Bias, length: int, dtype: torch.dtype, facts: list[Any]) -> _Kept | None:
    room = max(LEAST, 1 << (length - 1).bit_length())
    with torch.inference_mode(False), torch.no_grad():
        # From the offset 1 - room of the last query to that of the first of 16.
        table = bias.table(AHEAD + 1, room).to(dtype).clamp(min=INVISIBLE).contiguous()
        if type(table) is not Tensor or table.shape != (bias.num_heads, room + AHEAD):
            return None
        aliases = tuple(t.detach() for t in (*bias.parameters(), *bias.buffers()))
    return _Kept(facts, aliases, table, room, table._version)


def _under_fsdp() -> bool:
    """FSDP gathers parameters into the same tensors again and again, without a count of it as a change."""
    return "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()


def _capturing(bias: Bias) -> bool:
    return torch.cuda.is_available() and bias._anchor().is_cuda and torch.cuda.is_current_stream_capturing()


def _collect(module: nn.Module, facts: list[Any]) -> bool:
    """Appends what the table depends on; False if that cannot be told. Some microseconds for a few tensors."""
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is None:
                continue
            if type(tensor) not in _KINDS or tensor.is_inference() or is_wrapped(tensor):
                return False
            facts += (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device, tensor._version)
    for child in module._modules.values():
        if child is not None:
            facts.append(type(child))
            if not _collect(child, facts):
                return False
    return True
