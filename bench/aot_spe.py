"""The kernels of linear attention and of SPE ahead of time: what each compiles to, and what a call should take.

As in aot.py the launches are written down on meta tensors instead of made. A row's "width" is the larger of features
(realizations) and values; its rule says how many of what.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .aot import DTYPES, compiled, count, counted, written_down

# kernel -> the config row it runs with, and whether backward launches it
KERNELS = {
    "chunk_states": ("states", True), "read_by_feature": ("features", True), "read_by_value": ("values", True),
    "sine_forward": ("sine forward", False), "sine_backward": ("sine backward", True),
    "filter_forward": ("filter forward", False), "filter_backward": ("filter backward", True),
    "filter_gradient": ("filter gradient", True),
}  # fmt: skip
LINEAR = ("chunk_states", "read_by_feature", "read_by_value")
LENGTH, TAPS = 8192, 128


def launches(
    chip: str, bits: int, name: str, backward: bool, heads: int = 16, dim: int = 64, features: int = 64, sines: int = 10
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(kernel, its arguments by name) of each launch of one causal call with a batch of 1; nothing runs."""
    from posattn.kernels import linear_launch, spe_launch

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
    with written_down(chip) as made:
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
    yield from made


def sizes_of(name: str, limit: int) -> dict[str, int]:
    """The largest call that a row serves."""
    if name in LINEAR:
        return dict(dim=limit, features=limit)
    return dict(sines=limit - 1) if name == "sine_forward" else dict(features=limit)


def rule_of(name: str, limit: int) -> str:
    return f"{limit} slots" if name == "sine_forward" else f"R {limit}, D {limit if name in LINEAR else 64}"


def compile_and_count(chip: str, name: str, bits: int, width: int, rule: str) -> dict[str, Any]:
    """One row of the report; a compiler's failure is in its "error", not raised."""
    direction, backward = KERNELS[name]
    found = launches(chip, bits, name, backward, **sizes_of(name, width))
    kernel, arguments = next((k, a) for k, a in found if k.__name__ == name)
    block_m = arguments.get("BLOCK_M", arguments.get("ROWS", 1))
    block_n = arguments.get("BLOCK_N", arguments.get("BLOCK_R", arguments.get("DIMS", block_m)))
    row = dict(chip=chip, direction=name, bits=bits, width=width, rule=rule, row=direction)
    row.update(block_m=block_m, block_n=block_n, num_warps=arguments["num_warps"])
    row.update(num_stages=arguments["num_stages"], precision=arguments["PRECISION"])
    return counted(row, kernel, arguments, block_m * block_n)


def jobs(chips: list[str] | None, everything: bool) -> list[tuple[Any, ...]]:
    """(chip, kernel, bits, width, rule): every row of sm_90 in 16 bits; elsewhere the largest of each kernel."""
    from posattn.kernels.linear_configs import TILES

    made: list[tuple[Any, ...]] = []
    for name, (direction, _) in KERNELS.items():
        for (chip, row, bits), rows in TILES.items():
            if row != direction or not (chips is None or chip in chips):
                continue
            chosen = rows if everything or (chip, bits) == ("sm_90", 16) else [max(rows)]
            made += [(chip, name, bits, limit, rule_of(name, limit)) for limit in chosen]
    return made


# ----------------------------------------------------------------------------------------------- the prediction


def predict(features: int = 64, heads: int = 16, dim: int = 64, sines: int = 10) -> list[dict[str, Any]]:
    """Per kernel of a causal call with SineSPE at N = 8192, B = 1, in bf16: microseconds, by instructions issued.

    A program's instructions are those of its loop times its turns; what is before and behind counts as one turn more.
    """
    chip, rows = "sm_90", []
    for name, backward in (
        ("sine_forward", False), ("chunk_states", False), ("read_by_feature", False),
        ("sine_backward", True), ("chunk_states", True), ("read_by_feature", True), ("read_by_value", True),
        ("filter_forward", None),
    ):  # fmt: skip
        sizes = dict(heads=heads, dim=dim, features=features, sines=sines)
        made = [(k, a) for k, a in launches(chip, 16, name, bool(backward), **sizes) if k.__name__ == name]
        for kernel, a in made:
            found = count(chip, compiled(chip, kernel, a), 1)
            if name == "sine_forward":
                turns = dim
            elif name == "sine_backward":
                turns = a["RUN"] * -(-dim // a["DIMS"])
            elif name == "filter_forward":
                turns = dim * -(-(a["ROWS"] + TAPS - 1) // a["BLOCK_N"])
            else:
                # A row block reads half of its chunk, on average, and its own block.
                full = a["CHUNK"] / a["BLOCK_N"]
                turns = full if name == "chunk_states" else (full + 1) / 2
            # Four schedulers issue one instruction a clock each, at 1.755 GHz, on 132 multiprocessors.
            clocks = a["grid"][0] * (turns + 1) * found["path"] * found["warps"] / 4
            rows.append(dict(kernel=name, backward=backward, us=clocks / 132 / 1755, path=found["path"]))
    return rows


def prediction() -> str:
    lines = [
        "SPE, predicted for an H200, not measured: SineSPE, causal, N 8192, B 1, H 16, D 64, K 10, bf16. The floor:",
        "products alone at 790 TFLOP/s. Instructions alone: no memory, no launches, no wait of a product.",
        "   R  direction  kernel             path      us    sum us  floor us",
    ]
    for features in (64, 128):
        rows = predict(features)
        floor = 8192 * 16 * 2 * 2 * 64 * 20 * features / 790e6
        for backward in (False, True):
            mine = [row for row in rows if row["backward"] is backward]
            for n, row in enumerate(mine):
                way = "backward" if backward else "forward"
                line = f"{features:4}  {way:9}  {row['kernel']:16} {row['path']:6} {row['us']:7.1f}"
                total = sum(row["us"] for row in mine)
                lines.append(line + (f"  {total:8.1f}  {floor * 59 / 54:8.1f}" if n == len(mine) - 1 else ""))
        filters = sum(row["us"] for row in rows if row["backward"] is None)
        lines.append(f"{features:4}  ConvSPE's features instead, {TAPS} taps, forward: {filters:.0f} us")
    return "\n".join(lines)
