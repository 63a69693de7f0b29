"""What Hopper's attention kernels should take, from what they compile to (`python -m bench kernels --model`).

For one tile of scores on one multiprocessor it counts the clocks of
  products   the tensor cores, 4096 flop a clock
  operands   what products read of shared memory, 128 bytes a clock: B, and A where it is no result (P, dS) in registers
  issue      instructions of a warp for the tile, four a clock over all warps
  special    exponentials, 16 a clock
  L1         wavefronts of loads and stores of the loop, one a clock
  L2         bytes of K and V (or Q and dO, and sums of a table's gradient), 5.5 TB/s
A program does its products (max of products and operands), then what stands between them (max of issue, special, L1);
programs that share a multiprocessor fill each other's gaps:
  plain        clocks = max(products, between, L2, (products + between) / programs)
  specialised  clocks = max(products, between, L2): two groups of warps, one multiplies while the other does softmax
Causal: tiles that stand partly in the future are whole tiles, and a program starts and ends once (START clocks).
Nothing here knows of latencies inside of a tile, of power, of how well waves of programs fill. Rates are those of an
H200: 132 multiprocessors, 790 TFLOP/s in 16 bits, which makes a clock 1.46 GHz. A prediction is no measurement.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
PEAK, MULTIPROCESSORS, FLOP_A_CLOCK = 790e12, 132, 4096
CLOCK = PEAK / MULTIPROCESSORS / FLOP_A_CLOCK
L2_BYTES = 5.5e12 / MULTIPROCESSORS / CLOCK
START = 2500  # clocks of a program's first loads and last stores; a guess
OPERATION = 4.5e-6  # seconds that PyTorch takes to launch a small operation, while the GPU waits; a guess
LENGTH = 8192
RULES = {
    "forward": ("Plain", "Toeplitz", "Toeplitz+span", "Linear"),
    "rows": ("Plain", "Toeplitz", "Gradient", "Toeplitz+span", "Gradient+span", "Gradient+span+tails"),
    "cols": ("Plain", "Toeplitz", "Toeplitz+span"),
}
BY_KEYS = ("cols", "once")  # a program owns keys and walks over queries
WIDE = {"forward": ("Plain", "Toeplitz"), "rows": ("Plain", "Gradient"), "cols": ("Plain", "Toeplitz")}


def jobs() -> list[tuple[Any, ...]]:
    """Every rule that a goal asks for at D 64 and 128, two at 256; ALiBi's backward at 128; forward's schedules."""
    from posattn.kernels.configs import CONFIGS, others

    made: list[tuple[Any, ...]] = []
    for direction in RULES:
        for width in (64, 128, 256):
            rules = (WIDE if width == 256 else RULES)[direction]
            if direction != "forward" and width == 128:
                rules += ("Linear",)
            for schedule in (config.schedule for config in others("sm_90", direction, 16, width)):
                if schedule not in ("plain", "persistent"):  # whose loop is that of "specialised"
                    rules += (f"Plain+{schedule}", f"Toeplitz+{schedule}")
            made += [("sm_90", direction, 16, width, rule) for rule in rules]
    # Backward in one pass, where there is one; a schedule may have several tiles, and the first is compiled.
    once = [width for width in (64, 128, 256) if ("sm_90", "once", 16, width) in CONFIGS]
    made += [("sm_90", "once", 16, width, rule) for width in once for rule in ("Plain", "Gradient")]
    return list(dict.fromkeys(made))


# ------------------------------------------------------------------------------------------------------ a tile's clocks


def flop_a_score(row: Row) -> float:
    made = {"forward": 4, "rows": 6, "cols": 8, "once": 10}[row["direction"]] * row["width"]
    if "Gradient" in row["rule"]:  # a product with a one-hot matrix adds up diagonals of 8 x 8 blocks
        made += 2 * diagonals(row)
    return made


def diagonals(row: Row) -> int:
    """Columns of the one-hot matrix."""
    return max(16, 1 << (row["block_m"] // 8 + row["block_n"] // 8 - 2).bit_length())


def operand_bytes(row: Row) -> float:
    """What the products of a tile read of shared memory, all warps together; 64 rows of A at a time."""
    m, n, d = row["block_m"], row["block_n"], row["width"]
    if row["direction"] in BY_KEYS:  # transposed: keys are the rows of its products
        m, n = n, m
    # (rows of A, columns of B, depth, A in registers)
    scores, weighted = (m, n, d, False), (m, d, n, True)
    made = {"forward": [scores, weighted], "rows": [scores, scores, weighted]}
    made["cols"] = [scores, scores, weighted, weighted]
    made["once"] = [*made["cols"], (d, n, m, False)]
    return sum(
        2 * depth * (rows * (not held) + math.ceil(rows / 64) * columns)
        for rows, columns, depth, held in made[row["direction"]]
    )


def wavefronts(row: Row) -> float:
    """Of a warp's loads and stores in the loop: 128 bytes each."""

    def of(op: str) -> int:
        if op.startswith(("LDSM", "STSM")):
            return 4
        wide = re.search(r"\.(64|128)\b|x(2|4)", op)
        return 1 if not wide else {"64": 2, "128": 4, "2": 2, "4": 4}[wide[1] or wide[2]]

    return sum(of(op) * count for op, count in row["accesses"].items())


def l2_bytes(row: Row) -> float:
    m, n, d = row["block_m"], row["block_n"], row["width"]
    moved = 4 * d * (m if row["direction"] in BY_KEYS else n)
    if row["direction"] in BY_KEYS:
        moved += 8 * m  # lse and delta
    if row["direction"] == "once":
        moved += 4 * d * m  # added to dQ
    if "Gradient" in row["rule"]:
        moved += 4 * 64 * (m // 8 + n // 8 - 1)
    return moved


def computing(row: Row) -> int:
    """Warps of a program that run the loop; of a specialised one some only copy."""
    return int(row.get("computing", row["warps"]))


def clocks(row: Row, far: bool = False) -> Row:
    """The terms of a tile, their sum by the model and what binds; far: a tile where the table is constant."""
    specialised = computing(row) < row["warps"]
    warps = computing(row) / 4
    tile = row["block_m"] * row["block_n"]
    made = {
        "products": tile * flop_a_score(row) / FLOP_A_CLOCK,
        "operands": operand_bytes(row) / 128,
        "issue": warps * row["far_path" if far else "path"],
        "special": warps * 8 * row["exponentials"],
        "L1": 0.0 if far else 4 * warps * wavefronts(row),
        "L2": l2_bytes(row) / L2_BYTES,
    }
    multiply = max(made["products"], made["operands"])
    between = max(made["issue"], made["special"], made["L1"])
    serial = 0.0 if specialised else (multiply + between) / row["programs"]
    total = max(multiply, between, made["L2"], serial)
    binds = max(made, key=made.__getitem__)
    if serial == total > made[binds]:
        parts = [max(names, key=made.__getitem__) for names in (("products", "operands"), ("issue", "special", "L1"))]
        binds = " + ".join(parts)
    return {**made, "total": total, "binds": binds}


def a_score(row: Row, far: bool = False, length: int | None = None) -> float:
    """Clocks of a multiprocessor a useful score; with a length causal, edges and starts included."""
    total, m, n = clocks(row, far)["total"], row["block_m"], row["block_n"]
    if length is None:
        return total / (m * n)
    side, other = (n, m) if row["direction"] in BY_KEYS else (m, n)
    # A program of `side` rows (or keys) goes over all that they see, in steps of `other`.
    programs = length // side
    tiles = sum(math.ceil((p + 1) * side / other) for p in range(programs))
    return (tiles * total + programs * START / row["programs"]) / (length**2 / 2)


def predicted_tflops(row: Row, length: int | None = None) -> float:
    """Of a forward, by 4 flop a score and element; without a length: all keys, no edges, no starts."""
    return PEAK / 1e12 * 4 * row["width"] / FLOP_A_CLOCK / a_score(row, length=length)


# ---------------------------------------------------------------------------------------------------- the whole


class Kernels:
    """Rows by direction, head dim and rule."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = {(r["direction"], r["width"], r["rule"]): r for r in rows if "error" not in r}

    def score(self, direction: str, width: int, rule: str, near: float = 1.0, length: int | None = LENGTH) -> float:
        """Clocks a score where a part `near` of the tiles is near the diagonal and the others are far."""
        row = self.rows[direction, width, rule]
        return near * a_score(row, False, length) + (1 - near) * a_score(row, True, length)

    def forward_tflops(self, width: int, rule: str = "Plain", near: float = 1.0, length: int | None = LENGTH) -> float:
        return PEAK / 1e12 * 4 * width / FLOP_A_CLOCK / self.score("forward", width, rule, near, length)

    def backward(
        self, width: int, rows: str = "Plain", cols: str = "Plain", near: float = 1.0, length: int | None = LENGTH
    ) -> float:
        """Clocks a score of both kernels; delta is made where rows begin."""
        return self.score("rows", width, rows, near, length) + self.score("cols", width, cols, near, length)

    def backward_tflops(self, width: int, *arguments: Any, **more: Any) -> float:
        return PEAK / 1e12 * 10 * width / FLOP_A_CLOCK / self.backward(width, *arguments, **more)


def near_part(reach: int, tile: int, length: int = LENGTH) -> float:
    """Part of the causal tiles that lie within `reach` of the diagonal: a program has length / 2 keys on average."""
    return min(1.0, (reach + 2 * tile) / (length / 2))


REACH = {"TISA": 40, "T5": 128}  # of a TISA as it is initialised, and of T5's buckets


def predictions(kernels: Kernels) -> list[tuple[str, str, float, str]]:
    """(key of a goal, head dim, value, unit) of what kernels decide, at N 8192; TISA's tails have no gradient."""
    made: list[tuple[str, str, float, str]] = []
    for width in (128, 64):
        if any((direction, width, rule) not in kernels.rows for direction in RULES for rule in RULES[direction]):
            continue  # something does not compile
        name, plain = f"D {width}", kernels.forward_tflops(width)
        near = {bias: near_part(reach, 128) for bias, reach in REACH.items()}
        forward = {bias: kernels.forward_tflops(width, "Toeplitz+span", near[bias]) for bias in REACH}
        forward["KERPLE"] = kernels.forward_tflops(width, "Toeplitz")
        forward["ALiBi"] = kernels.forward_tflops(width, "Linear")
        made += [(f"forward {bias} / none", name, speed / plain, "") for bias, speed in forward.items()]
        made += [("forward none", name, plain, "TFLOP/s"), ("forward TISA", name, forward["TISA"], "TFLOP/s")]
        spans = "Toeplitz+span", "Gradient+span"
        made.append(("backward none", name, kernels.backward_tflops(width), "TFLOP/s"))
        learned_tisa = kernels.backward_tflops(width, spans[1], spans[0], near["TISA"])
        made.append(("backward TISA", name, learned_tisa, "TFLOP/s"))
        for bias, rules, part in (
            ("KERPLE", ("Toeplitz", "Gradient", "Toeplitz"), 1.0),
            ("T5", ("Toeplitz+span", "Gradient+span+tails", "Toeplitz+span"), near["T5"]),
            ("TISA", ("Toeplitz+span", "Gradient+span", "Toeplitz+span"), near["TISA"]),
        ):
            frozen, learned = (kernels.backward(width, rule, rules[2], part) for rule in rules[:2])
            made.append((f"share {bias}", name, 1 - frozen / learned, "%"))
    return made


def operations(kind: str) -> int:
    """How many small operations a forward makes before its kernel: the bias's table and support, and their padding."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from posattn.dispatch import made_of

    from .speed_peers import BIASES

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found += not (function.is_view or function.__name__.startswith("empty"))
            return function(*args, **(kwargs or {}))

    bias, call = BIASES[kind](2), (torch.empty(1, 2, 64, 16), (64, 64), (0, 0))
    with torch.no_grad():
        made_of(bias, *call)  # what is kept from then on
        with Count() as count:
            made = made_of(bias, *call)
    return count.found + (made.tensors[0] is not None)


def of_the_call(kernels: Kernels, kind: str, width: int, length: int, tokens: int = 32768) -> float:
    """Speed of a forward from a bias's parameters by that without a bias, its operations not hidden by anything."""
    rule = {"KERPLE": "Toeplitz", "ALiBi": "Linear"}.get(kind, "Toeplitz+span")
    near = near_part(REACH[kind], 128, length) if kind in REACH else 1.0
    flop = 2 * length * tokens * 2048
    plain = flop / kernels.forward_tflops(width, length=length) / 1e12
    biased = flop / kernels.forward_tflops(width, rule, near, length) / 1e12
    return plain / (biased + operations(kind) * OPERATION)


def extra_bytes(head_dim: int, length: int = 32768, batch: int = 1, heads: int = 0) -> tuple[float, float]:
    """(bytes, their part of q, k, v, o, lse and gradients) of training with a table: buffers of backward alone."""
    heads = heads or 2048 // head_dim
    rows = batch * heads * length
    # Causal: lse in base 2 and delta; the table padded, and what its gradient is added up in, of what is visible.
    extra = 2 * 4 * rows + 2 * 4 * heads * length
    return extra, extra / (rows * (8 * head_dim * 2 + 4))
