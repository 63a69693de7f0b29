"""The kernels of linear attention and of SPE ahead of time: what each compiles to, and what a call should take.

As in aot.py the launches are written down on meta tensors instead of made. A row's "width" is the larger of features
(realizations) and values; its rule says how many of what.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .aot import CHIPS, DTYPES, count, source

# kernel -> the config row it runs with, and whether backward launches it
KERNELS = {
    "chunk_states": ("states", True), "read_by_feature": ("features", True), "read_by_value": ("values", True),
    "sine_forward": ("sine forward", False), "sine_backward": ("sine backward", True),
    "conv_forward": ("conv forward", False), "conv_backward": ("conv backward", True),
    "filter_gradient": ("filter gradient", True),
}  # fmt: skip
LINEAR = ("chunk_states", "read_by_feature", "read_by_value")
LENGTH, TAPS = 8192, 128


def launches(
    chip: str, bits: int, name: str, backward: bool, heads: int = 16, dim: int = 64, features: int = 64, sines: int = 10
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(kernel, its arguments by name) of each launch of one causal call with a batch of 1; nothing runs."""
    from posattn.kernels import configs, linear_launch, spe_launch

    made: list[tuple[Any, dict[str, Any]]] = []

    def write_down(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.append((kernel, {**dict(zip(kernel.arg_names, args)), **kwargs, "grid": grid}))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    double = torch.float64
    q, k, v = (empty(1, heads, LENGTH, dim, dtype=DTYPES[bits]) for _ in range(3))
    qhat, khat = (empty(1, heads, LENGTH, features, dtype=DTYPES[bits]) for _ in range(2))
    gate = dict(gate_gains=empty(heads, dim, dtype=double), gate_noise=empty(heads, dim, features))
    place = dict(**gate, query_start=0, key_start=0)
    codes = (empty(heads, dim, sines, dtype=double) for _ in range(3))
    sine = dict(zip(("turns", "phases", "gains"), codes), noise=empty(heads, dim, 2 * sines, features), **place)
    seed = empty(1, dtype=torch.int64)
    filters = dict(filter_q=empty(heads, dim, TAPS), filter_k=empty(heads, dim, TAPS))
    conv = dict(**filters, noise=seed, realizations=features, **place)
    linear = dict(key_mask=None, state=None, sums=None, feature_map="elu", causal=True)
    need = dict(need_inputs=True, need_codes=True)
    kept = configs.arch, triton.runtime.JITFunction.run
    configs.arch = lambda device: chip
    triton.runtime.JITFunction.run = write_down
    try:
        if name in LINEAR and backward:
            wanted = dict(need_q=True, need_kv=True, need_state=False)
            linear_launch.backward(v, None, None, qhat, khat, v, v, empty(1, heads, LENGTH), **linear, **wanted)
        elif name in LINEAR:
            linear_launch.forward(qhat, khat, v, **linear, eps=1e-6, want_state=False)
        elif name.startswith("sine") and backward:
            spe_launch.sine_backward(qhat, khat, q, k, **sine, **need)
        elif name.startswith("sine"):
            spe_launch.sine_forward(q, k, **sine)
        elif backward:
            spe_launch.conv_backward(qhat, khat, q, k, **conv, **need)
        else:
            spe_launch.conv_forward(q, k, **conv)
    finally:
        configs.arch, triton.runtime.JITFunction.run = kept
    yield from made


def compiled(chip: str, kernel: Any, arguments: dict[str, Any]) -> Any:
    options = {name: arguments[name] for name in ("num_warps", "num_stages")}
    return triton.compile(
        source(kernel, arguments, CHIPS[chip].target.backend == "hip"), target=CHIPS[chip].target, options=options
    )
