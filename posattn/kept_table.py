"""A bias's table kept from token to token: made once for a length, doubled when it is outgrown, sliced by each call.

Kept beside the bias, not in it: copies and pickles of a module know nothing of it, and it goes when the bias goes. Only
in evaluation, and only of biases of this package, of which all that their values depend on is known and compared at
each call. What no comparison can see, a write through ``parameter.data`` or into its memory, shows after a switch of
`train` and `eval`, at the next sequence that begins, or after ``posattn.kept_table.forget(bias)``.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .biases.bias import Bias
from .changes import last_step
from .strips import INVISIBLE

AHEAD = 15  # offsets after the query's own that a table holds: calls have up to 16 queries
LEAST = 256  # keys that a table is made for, at least

_TENSORS = (Tensor, nn.Parameter)
_SCALARS = (bool, int, float, str, type(None))
_OURS = ("posattn.biases.", "torch.nn.modules.")
# What a module's __dict__ has beside its settings; tensors and children are compared one by one.
_STORES = frozenset(Bias(1).__dict__) - {"training", "num_heads"}
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class _Kept(NamedTuple):
    facts: list[Any]
    addresses: tuple[Tensor, ...]  # keeps what `facts` names from being taken by something else
    table: Tensor
    length: int
    version: int
    made: tuple[int, Any]  # the CUDA stream that has written it, and the event after that


_kept: weakref.WeakKeyDictionary[Bias, dict[torch.dtype, _Kept]] = weakref.WeakKeyDictionary()
# What a CUDA graph reads must stay where it is, also when a longer table has taken its place.
_captured: weakref.WeakKeyDictionary[Bias, list[Tensor]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kept_table(bias: Bias, length: int, dtype: torch.dtype) -> tuple[Tensor, int] | None:
    """(table, zero): (H, T) in dtype, at least -1e30, the offset o at ``zero + o`` for ``-length < o <= 15``.

    The same memory from call to call while the parameters, buffers and settings of the bias are the same, unchanged in
    place, and no optimizer makes a step (a write through ``.data`` shows after `forget`, or a switch of mode); whoever
    gets it only reads it. None where nothing is kept: in training, under grad mode, torch.compile, torch.func and
    (possibly) FSDP, and where `facts_of` the bias cannot be told.
    """
    if bias.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or _under_fsdp():
        return None
    facts = facts_of(bias)
    if facts is None:
        return None
    facts.append(last_step())
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
    elif kept.table.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            with _lock:
                tables = _captured.setdefault(bias, [])
                if not any(table is kept.table for table in tables):
                    tables.append(kept.table)
        else:
            _wait(kept)
    return kept.table, kept.length - 1


def forget(bias: Bias) -> None:
    """The table is made again at the next call.

    For those who write into a parameter's memory past its count of changes (``parameter.data``, a collective, a CUDA
    graph of training). Attention says it where a sequence begins and in training, `Bias.train` at a switch of mode.
    """
    if bias in _kept:
        with _lock:
            _kept.pop(bias, None)


def facts_of(module: nn.Module) -> list[Any] | None:
    """What a module's values depend on: the identity and count of changes of its tensors, and its settings.

    None where that cannot be told: a class that is not of this package (or of torch.nn, as a part), parametrizations,
    settings that are no plain numbers or words, tensors that count no changes (made in inference mode). Some
    microseconds for a few tensors.
    """
    facts: list[Any] = []
    return facts if _collect(module, facts) else None


def _collect(module: nn.Module, facts: list[Any]) -> bool:
    kind = type(module)
    if not kind.__module__.startswith(_OURS):
        return False
    facts.append(kind)
    for name, value in module.__dict__.items():
        if name not in _STORES:
            if type(value) not in _SCALARS:
                return False
            facts += (name, value)
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is None:
                continue
            if type(tensor) not in _TENSORS or tensor.is_inference() or is_wrapped(tensor):
                return False
            facts += (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device, tensor._version)
    return all(child is None or _collect(child, facts) for child in module._modules.values())


def _make(bias: Bias, length: int, dtype: torch.dtype, facts: list[Any]) -> _Kept | None:
    room = max(LEAST, 1 << (length - 1).bit_length())
    with torch.inference_mode(False), torch.no_grad():
        # From the offset 1 - room of the last query to that of the first of 16.
        table = bias.table(AHEAD + 1, room).to(dtype).clamp(min=INVISIBLE).contiguous()
        if type(table) is not Tensor or table.shape != (bias.num_heads, room + AHEAD):
            return None
        aliases = tuple(t.detach() for t in (*bias.parameters(), *bias.buffers()))
    made: tuple[int, Any] = (0, None)
    if table.is_cuda:
        stream = torch.cuda.current_stream(table.device)
        made = stream.cuda_stream, stream.record_event()
    return _Kept(facts, aliases, table, room, table._version, made)


def _wait(kept: _Kept) -> None:
    """Before another stream than the one that made a table reads it."""
    stream = torch.cuda.current_stream(kept.table.device)
    if stream.cuda_stream != kept.made[0]:
        stream.wait_event(kept.made[1])
        kept.table.record_stream(stream)


def _under_fsdp() -> bool:
    """FSDP gathers parameters into the same tensors again and again, without a count of it as a change."""
    return "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()


def _capturing(bias: Bias) -> bool:
    return torch.cuda.is_available() and bias._anchor().is_cuda and torch.cuda.is_current_stream_capturing()
