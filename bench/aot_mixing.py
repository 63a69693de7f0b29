"""DAPE's kernels ahead of time: which launches a call makes, what each compiles to, and what a call should take.

As in aot.py the launches are written down on meta tensors instead of made. A row's "width" is the head dim for kernels
that go by it, and for those that mix the number of channels a pair of positions keeps (see kernels/mix_configs.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .aot import DTYPES, compiled, count, counted, written_down

# kernel -> the config row it runs with, and whether backward launches it
KERNELS = {
    "store_scores": ("scores", False), "attend_stored": ("attend", False),
    "stored_rows": ("stored rows", True), "stored_columns": ("stored columns", True),
    "mix_forward": ("mix", False), "mix_backward": ("mix backward", True),
    "conv_hidden": ("conv", False), "conv_forward": ("conv", False),
    "conv_softmax_backward": ("conv backward", True), "conv_hidden_backward": ("conv backward", True),
    "conv_scores_backward": ("conv backward", True),
}  # fmt: skip
BY_HEAD_DIM = ("store_scores", "attend_stored", "stored_rows", "stored_columns")
# What a pair keeps -> heads, hidden units, units of FIRE (0: the bias is a table); by size those that spill first.
SIZES: dict[str, tuple[int, int, int]] = {
    "H 16, 32 units": (16, 32, 0),
    "H 32, 32 units": (32, 32, 0),
    "H 16, 32 units, FIRE": (16, 32, 32),
    "H 32, 64 units": (32, 64, 0),
    "H 64, 32 units, FIRE": (64, 32, 32),
    "H 64, 64 units, FIRE": (64, 64, 32),
    "H 64, 128 units": (64, 128, 0),
}
LENGTH = 8192


def launches(
    chip: str, bits: int, heads: int = 16, dim: int = 64, units: int = 32, fire: int = 0, taps: int = 1,
    backward: bool = False, length: int = LENGTH,
) -> Iterator[tuple[Any, dict[str, Any]]]:  # fmt: skip
    """(kernel, its arguments by name) of each launch of one causal call with a batch of 1; nothing runs."""
    from posattn.kernels import mix_launch

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, out = (empty(1, heads, length, dim, dtype=DTYPES[bits]) for _ in range(4))
    weights = empty(units, 2 * heads, taps), empty(units), empty(heads, units, taps), empty(heads)
    offsets = 2 * length - 1
    bias = dict.fromkeys(("table", "line", "rows", "first", "last", "last_bias"))
    if fire:
        bias.update(line=empty(offsets), rows=empty(length), first=empty(2, fire), last=empty(heads, fire))
        bias.update(last_bias=empty(heads))
    else:
        bias.update(table=empty(heads, offsets))
    call = dict(key_mask=None, scale=dim**-0.5, shift=0, left=-1, right=0, negative_slope=0.01, published=False, **bias)
    with written_down(chip) as made:
        if backward:
            need = dict.fromkeys(("need_q", "need_kv", "need_weights", "need_base"), True)
            mix_launch.backward(out, None, q, k, v, out, empty(1, heads, length), out, *weights, **call, **need)
        else:
            mix_launch.forward(q, k, v, *weights, **call, keep_rest=bits == 16)
    yield from made


def compile_and_count(chip: str, name: str, bits: int, width: int, rule: str) -> dict[str, Any]:
    """One row of the report; a compiler's failure is in its "error", not raised."""
    direction, backward = KERNELS[name]
    sizes = dict(dim=width) if name in BY_HEAD_DIM else dict(zip(("heads", "units", "fire"), SIZES[rule]))
    # The scores are stored twice as often backward, and by the heavier form of the kernel.
    backward = backward or name == "store_scores"
    found = launches(chip, bits, taps=3 if name.startswith("conv") else 1, backward=backward, **sizes)
    kernel, arguments = next((k, a) for k, a in found if k.__name__ == name)
    block_m, block_n = arguments.get("BLOCK_M", 1), arguments["BLOCK_N"]
    row = dict(chip=chip, direction=name, bits=bits, width=width, rule=rule, row=direction)
    row.update(block_m=block_m, block_n=block_n, num_warps=arguments["num_warps"])
    row.update(num_stages=arguments["num_stages"], precision=arguments["PRECISION"])
    return counted(row, kernel, arguments, block_m * block_n)


def jobs(chips: list[str] | None, everything: bool) -> list[tuple[Any, ...]]:
    """(chip, kernel, bits, width, rule): all sizes of sm_90 in 16 bits, else the largest of each row."""
    from posattn.kernels.mix_configs import MIXING, PRODUCTS

    made: list[tuple[Any, ...]] = []
    for name, (direction, _) in KERNELS.items():
        if name in BY_HEAD_DIM:
            made += [(chip, name, bits, width, "-") for chip, row, bits, width in PRODUCTS if row == direction]
            continue
        for (chip, row, bits), rows in MIXING.items():
            if row != direction:
                continue
            by_row: dict[int, list[str]] = {}
            for rule, size in SIZES.items():
                if sum(size) > max(rows):
                    continue
                by_row.setdefault(min(limit for limit in rows if limit >= sum(size)), []).append(rule)
            for width, rules in by_row.items():
                chosen = rules if everything or (chip, bits) == ("sm_90", 16) else rules[-1:]
                made += [(chip, name, bits, width, rule) for rule in chosen]
    return [job for job in made if chips is None or job[0] in chips]


# ----------------------------------------------------------------------------------------------- the prediction


def bytes_moved(name: str, heads: int, dim: int, rows: int, keys: int) -> float:
    """Per pair of positions, in cells of rows x keys: scratch, and fp32 sums from cell to cell. The rest is in L2."""
    item = 2 * heads
    sums = 8 * heads * dim  # read and written
    return {
        "store_scores": item, "store_scores backward": 2 * item, "mix_forward": 2 * item,
        "attend_stored": item + sums / keys, "mix_backward": 4 * item, "stored_rows": item + sums / keys,
        "stored_columns": 2 * item + 2 * sums / rows,
    }[name]  # fmt: skip


def predict(heads: int, dim: int, chip: str = "sm_90") -> list[dict[str, Any]]:
    """Per kernel of a causal call at N = 8192, B = 1, hidden 32: instructions and bytes a pair, milliseconds."""
    pairs = LENGTH * (LENGTH + 1) / 2
    rows = []
    for backward in (False, True):
        seen = set()
        for kernel, arguments in launches(chip, 16, heads, dim, backward=backward):
            name = kernel.__name__
            if name in seen or name not in KERNELS:
                continue
            seen.add(name)
            tile = arguments.get("BLOCK_M", 1) * arguments["BLOCK_N"]
            found = count(chip, compiled(chip, kernel, arguments), tile)
            lanes = found["per_score"] * (heads if name in BY_HEAD_DIM else 1)
            key = name + (" backward" if backward and name == "store_scores" else "")
            moved = bytes_moved(key, heads, dim, arguments["C"], arguments["W"])
            # 132 multiprocessors issue 128 lanes a clock at 1.755 GHz; 4.3 TB/s.
            issue, memory = pairs * lanes / (132 * 128 * 1.755e9) * 1e3, pairs * moved / 4.3e12 * 1e3
            rows.append(dict(kernel=key, backward=backward, lanes=lanes, bytes=moved, issue_ms=issue, memory_ms=memory))
    return rows


def prediction(sizes: list[tuple[int, int]] | None = None) -> str:
    """The table for a reader; floors are those of the products alone at 790 TFLOP/s."""
    lines = [
        "DAPE, predicted for an H200, not measured: causal, N 8192, B 1, bf16, 32 hidden units, KERPLE. A kernel",
        "takes the longer of its instructions (lanes a pair of positions) and its bytes; the floor: products alone.",
        "  H   D  direction  kernel                    lanes  bytes   issue  memory    sum ms   floor ms",
    ]
    for heads, dim in sizes or [(h, d) for h in (8, 12, 16, 32) for d in (64, 128)]:
        rows = predict(heads, dim)
        padded = max(16, 2 ** math.ceil(math.log2(heads)))
        for backward in (False, True):
            mine = [row for row in rows if row["backward"] == backward]
            total = sum(max(row["issue_ms"], row["memory_ms"]) for row in mine)
            flop = 10 * heads * dim + 384 * padded if backward else 4 * heads * dim + 128 * padded
            floor = LENGTH * (LENGTH + 1) / 2 * flop / 790e12 * 1e3
            for n, row in enumerate(mine):
                way = "backward" if backward else "forward"
                line = f"{heads:3} {dim:3}  {way:9}  {row['kernel']:22} {row['lanes']:8.0f}"
                line += f" {row['bytes']:6.0f} {row['issue_ms']:7.2f} {row['memory_ms']:7.2f}"
                lines.append(line + (f"  {total:8.2f}  {floor:9.2f}" if n == len(mine) - 1 else ""))
    return "\n".join(lines)
