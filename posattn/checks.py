"""Every check of what a caller passes, and its message: which argument, what came, what is accepted.

TypeError: not the Python type that the argument has. ValueError: of that type, but a shape, dtype, device or
number that attention does not serve. Nothing here waits for a device, and torch.compile traces all of it.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .biases.bias import Bias, Scaled
from .biases.dape import DAPE
from .biases.fire import FIRE

MAX_HEAD_DIM = 256
MAX_FLOAT32_HEAD_DIM = 128  # on Triton: kernels/configs.py has no wider row, the registers do not do
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Offsets are int32 in kernels: this bounds |key_start - query_start|, and a window this wide is open.
FAR = 2**29
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class Rule(NamedTuple):
    """The arguments that are no tensors, with every default filled in."""

    scale: float
    softcap: float  # 0.0: none
    left: int  # -1: open
    right: int
    query_start: int
    key_start: int


def check_tensor(name: str, tensor: Tensor) -> None:
    """One of query, key, value by itself."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {_kind(tensor)}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{name} must be a dense (strided) Tensor, got {kind}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be 4-D, (batch, heads, length, head_dim), got {_shape(tensor)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_alike(query: Tensor, key: Tensor, value: Tensor) -> None:
    """One dtype and one device (after autocast, which may make their dtypes agree)."""
    if not query.dtype == key.dtype == value.dtype:
        dtypes = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise ValueError(f"query, key and value must have one dtype, got {dtypes}")
    if not query.device == key.device == value.device:
        devices = f"{query.device}, {key.device} and {value.device}"
        raise ValueError(f"query, key and value must be on one device, got {devices}")


def check_together(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """query, key, value beside each other."""
    check_alike(query, key, value)
    batch, heads, _, head_dim = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    if key.shape[0] != batch:
        raise ValueError(f"key must have query's batch size, got {_shape(key)}, query {_shape(query)}")
    if key.shape[3] != head_dim:
        raise ValueError(f"key must have query's head_dim, got {_shape(key)}, query {_shape(query)}")
    if value.shape[0] != batch:
        raise ValueError(f"value must have query's batch size, got {_shape(value)}, query {_shape(query)}")
    if value.shape[1] != key_heads or value.shape[2] != key_length:
        raise ValueError(f"value must have key's heads and length, got {_shape(value)}, key {_shape(key)}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query and key must have a head_dim of 1 to {MAX_HEAD_DIM}, got {_shape(query)}")
    if not 1 <= value_dim <= MAX_HEAD_DIM:
        raise ValueError(f"value must have a head_dim of 1 to {MAX_HEAD_DIM}, got {_shape(value)}")
    if heads < 1 or key_heads < 1:
        raise ValueError(f"query and key must have at least one head, got {_shape(query)} and {_shape(key)}")
    _check_flag("enable_gqa", enable_gqa)
    if heads != key_heads and not enable_gqa:
        raise ValueError(
            f"query and key must have the same number of heads, got {heads} and {key_heads}; "
            "pass enable_gqa=True to let several query heads share a key head"
        )
    if heads % key_heads != 0:
        raise ValueError(
            f"enable_gqa needs query's heads to be a multiple of key's, got {heads} and {key_heads}"
        )


def check_bias(bias: Bias | DAPE | Tensor | None, query: Tensor, query_length: int, key_length: int) -> None:
    """The bias before its table is made, for the (longest) lengths of queries and keys."""
    if bias is None:
        return
    heads, width = query.shape[1], max(query_length + key_length - 1, 0)
    if isinstance(bias, (Bias, DAPE)):
        if bias.num_heads != heads:
            came = f"{type(bias).__name__} with {bias.num_heads}"
            raise ValueError(f"bias must have query's {heads} heads, got {came}")
    elif not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a posattn.Bias, a posattn.DAPE, a Tensor or None, got {_kind(bias)}")
    elif bias.dtype == torch.bool or bias.dim() > 2:
        raise ValueError(
            f"bias must be a table of shape (heads, Lq + Lk - 1) = {(heads, width)}, one value an offset, "
            f"got {_shape(bias)} of {bias.dtype}; in place of a dense attn_mask there are is_causal, "
            "window and key_padding_mask"
        )
    elif bias.dim() != 2 or bias.shape[0] != heads or bias.shape[1] != width:
        raise ValueError(
            f"bias must be a table of shape (heads, Lq + Lk - 1) = {(heads, width)}, "
            f"table[h, j - i + Lq - 1] for query i and key j, got {_shape(bias)}"
        )
    elif bias.dtype not in DTYPES or bias.layout != torch.strided:
        raise ValueError(f"bias must be a dense floating-point table, got {bias.dtype}, layout {bias.layout}")
    elif bias.device != query.device:
        raise ValueError(f"bias must be on query's device {query.device}, got a table on {bias.device}")


def check_made(bias: Bias, method: str, made: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """What a method of a Bias returned."""
    if made.device != query.device:
        raise ValueError(
            f"bias must be on query's device {query.device}, got {type(bias).__name__} on {made.device}; "
            "move it there with bias.to(query.device)"
        )
    if tuple(made.shape) != shape:
        came = f"{_shape(made)} from {type(bias).__name__}"
        raise ValueError(f"bias must make {method} of shape {shape}, got {came}")


def check_dape(bias: DAPE, query: Tensor, rule: Rule, is_causal: bool) -> None:
    """What a DAPE asks for beyond what every bias does."""
    if rule.softcap:
        raise ValueError(f"softcap must be None with a DAPE, got {rule.softcap!r}")
    if not bias.prefix_consistent and not (is_causal and rule.left < 0):
        raise ValueError(
            "a DAPE with prefix_consistent=False is defined for is_causal=True and window=None only; "
            "prefix_consistent=True takes every window"
        )
    for tensor in (*bias.parameters(), *bias.buffers()):
        if tensor.device != query.device:
            raise ValueError(
                f"bias must be on query's device {query.device}, got a DAPE with a part on {tensor.device}; "
                "move it there with bias.to(query.device)"
            )


def check_scaled(bias: Bias, scaled: Scaled, query: Tensor, width: int, rows: int) -> None:
    """What `Bias.scaled` returned, for so many offsets and rows."""
    units = scaled.knots.shape[-1]
    shapes = (width,), (rows,), (units,), (query.shape[1], units + 1, 2)
    for name, made, shape in zip(Scaled._fields, scaled, shapes):
        check_made(bias, name, made, shape, query)


def check_rule(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    query_start: int | None,
    key_start: int | None,
) -> Rule:
    """The scalar arguments, checked, with their defaults filled in."""
    _check_flag("is_causal", is_causal)
    if scale is None:
        scale = query.shape[3] ** -0.5
    _check_number("scale", scale)
    if softcap is not None:
        _check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be a positive number, or None for none, got {softcap!r}")
    left, right = _check_window(window)
    if is_causal:
        right = 0

    if key_start is not None:
        _check_int("key_start", key_start)
    if query_start is not None:
        _check_int("query_start", query_start)
    key_start = 0 if key_start is None else key_start
    if query_start is None:
        query_start = key_start + key.shape[2] - query.shape[2]
    elif abs(key_start - query_start) > FAR:
        raise ValueError(
            f"query_start and key_start must be within {FAR} of each other, got {query_start} and {key_start}"
        )
    return Rule(float(scale), 0.0 if softcap is None else float(softcap), left, right, query_start, key_start)


def check_key_padding_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a Tensor or None, got {_kind(mask)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask must be bool, True for a key that counts, got {mask.dtype}")
    if mask.dim() != 2 or mask.shape[0] != key.shape[0] or mask.shape[1] != key.shape[2]:
        shape = (key.shape[0], key.shape[2])
        raise ValueError(
            f"key_padding_mask must have the shape (batch, key_length) = {shape}, got {_shape(mask)}"
        )
    if mask.device != query.device:
        raise ValueError(f"key_padding_mask must be on query's device {query.device}, got {mask.device}")


def check_return_lse(return_lse: bool) -> None:
    _check_flag("return_lse", return_lse)


def choose_backend(backend: str | None, query: Tensor, value: Tensor, bias: Any = None) -> str:
    """ "triton" or "blockwise"."""
    return resolve_backend(backend, query, lambda: _why_not_triton(query, value, bias))


def resolve_backend(backend: str | None, query: Tensor, why_not_triton: Callable[[], str | None]) -> str:
    """An explicit "triton" that cannot be had is an error, never something else."""
    if backend not in (None, "triton", "blockwise"):
        raise ValueError(f'backend must be "triton", "blockwise" or None, got {backend!r}')
    if backend == "blockwise" or (backend is None and query.device.type != "cuda"):
        return "blockwise"
    refusal = why_not_triton()
    if refusal is None:
        return "triton"
    if backend is None:
        return "blockwise"
    raise ValueError(f'backend="triton" {refusal}; backend="blockwise" serves it, backend=None chooses')


def _why_not_triton(query: Tensor, value: Tensor, bias: Any) -> str | None:
    widest = max(query.shape[3], value.shape[3])
    if query.dtype == torch.float32 and widest > MAX_FLOAT32_HEAD_DIM:
        return f"takes head dims to {MAX_FLOAT32_HEAD_DIM} in float32, got {widest}"
    return why_not_here(query) or _why_not_mixed(query, bias)


def why_not_here(query: Tensor) -> str | None:
    """Why no Triton kernel takes query's dtype on query's device."""
    if query.dtype == torch.float64:
        return "takes float16, bfloat16 and float32, got torch.float64"
    if not TRITON_INSTALLED:
        return "needs the package triton, which is not installed"
    if query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: for tests
    if query.device.type != "cuda":
        return f"needs tensors on a GPU, got device {query.device}"
    if torch.version.hip is None:
        properties = torch.cuda.get_device_properties(query.device)
        if properties.major < 8:
            return f"needs compute capability 8.0 or newer, got {properties.major}.{properties.minor}"
    return None


def _why_not_mixed(query: Tensor, bias: Any) -> str | None:
    """What a pair of positions keeps in registers for a DAPE may be too much for this GPU."""
    if not isinstance(bias, DAPE):
        return None
    from .kernels.mix_configs import channels, largest

    sizes = [bias.num_heads, bias.hidden, *([bias.base.hidden] if isinstance(bias.base, FIRE) else [])]
    came, most = channels(sizes), largest(query.device, query.element_size() * 8)
    if came <= most:
        return None
    return (
        f"takes a DAPE on this GPU whose heads, hidden units and hidden units of a FIRE base, each rounded up to a "
        f"power of two and to 16 at least, sum to at most {most}, got {came}"
    )


def _check_window(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window must be a pair (left, right) or None, got {_kind(window)}")
    if len(window) != 2:
        raise ValueError(f"window must be a pair (left, right), got {len(window)} values: {window!r}")
    return _check_side(window[0], window), _check_side(window[1], window)


def _check_side(side: int | None, window: Any) -> int:
    if side is None:
        return -1
    if not _is_int(side):
        raise TypeError(f"window must hold integers, or None for an open side, got {window!r}")
    if side < 0:
        raise ValueError(f"window must hold integers of at least 0, or None for an open side, got {window!r}")
    return side if side < FAR else -1


def _check_number(name: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or None, got {_kind(number)}")
    if not abs(number) < math.inf:  # not math.isfinite: torch.compile traces this
        raise ValueError(f"{name} must be finite, got {number!r}")


def _check_int(name: str, number: int) -> None:
    if not _is_int(number):
        raise TypeError(f"{name} must be an int or None, got {_kind(number)}")


def _is_int(number: Any) -> bool:
    return isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)


def _check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {_kind(flag)}")


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _kind(value: Any) -> str:
    """A value by its type, and by itself where that is short."""
    if isinstance(value, type):
        return f"the class {value.__name__} (make an object of it)"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return f"{type(value).__name__} {value!r}"
    return type(value).__name__
