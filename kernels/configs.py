"""Which tile each kernel runs with: rows of numbers by GPU, direction, dtype width and head dim; no code in rows.

A row is BLOCK_M, BLOCK_N, warps, stages, for fp32 how products are made, and the schedule. Head dims are those of the
padded tile; 64 also serves 16 and 32. Every row compiles for its GPU without spilling more than 64 bytes, inside its
shared memory (python -m bench kernels prints them all); but FIRE's sums at head dim 256 spill 152 on sm_100. No row is
measured yet: they were chosen by instructions per score and occupancy, ahead of time. fp32 beyond 128 has no row: its
backward does not fit in registers.

Direction "once" is "cols" that also adds up dQ, by atomics into fp32 (POSATTN_BACKWARD=once): five products a tile
where "rows" and "cols" take seven, against 4 D more bytes a query, and no fixed order.

Rows of CONFIGS are what runs. Rows of OTHERS are worth a trial on a GPU: POSATTN_AUTOTUNE=1 searches them too, and
POSATTN_SCHEDULE=specialised (or persistent, or descriptors) takes the row of OTHERS with that schedule for every call
that the schedule serves (descriptors.py), and else the row of CONFIGS; POSATTN_SCHEDULE=plain never leaves the latter.

A row is unverified until the numerics gate (python -m bench gate) has passed with it on a GPU and VERIFIED names the
file of bench/results/ that says so. Of an unverified row is known that it compiles, and that its algebra is right in
Triton's interpreter; not that the compiled program is: races, layouts and the compiler's own errors show on a GPU only.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    fp32: str = "tf32x3"  # how products of fp32 tiles are made where torch asks for full precision
    schedule: str = "plain"  # or one of descriptors.py, where it is to be trusted (schedules.py)


# fmt: off
CONFIGS: dict[tuple[str, str, int, int], Config] = {
    # sm_80: mma.sync keeps operands in registers, so tiles are smaller than Hopper's.
    ("sm_80", "forward", 16, 64): Config(128, 64, 4, 3),
    ("sm_80", "forward", 16, 128): Config(128, 64, 8, 2),
    ("sm_80", "forward", 16, 256): Config(64, 32, 8, 2),
    ("sm_80", "rows", 16, 64): Config(64, 64, 8, 1),
    ("sm_80", "rows", 16, 128): Config(64, 32, 8, 1),
    ("sm_80", "rows", 16, 256): Config(64, 16, 8, 1),
    ("sm_80", "sums", 16, 64): Config(64, 32, 4, 1),
    ("sm_80", "sums", 16, 128): Config(64, 16, 4, 1),
    ("sm_80", "sums", 16, 256): Config(64, 16, 8, 1),
    ("sm_80", "sums", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "sums", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_80", "cols", 16, 64): Config(32, 64, 4, 1),
    ("sm_80", "cols", 16, 128): Config(32, 64, 8, 1),
    ("sm_80", "cols", 16, 256): Config(32, 64, 8, 2),
    ("sm_80", "diagonals", 16, 64): Config(64, 64, 8, 1),
    ("sm_80", "diagonals", 16, 128): Config(64, 64, 8, 1),
    ("sm_80", "diagonals", 16, 256): Config(32, 32, 8, 1),
    ("sm_80", "forward", 32, 64): Config(64, 32, 4, 2),
    ("sm_80", "forward", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "rows", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "rows", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_80", "cols", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "cols", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_80", "diagonals", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_80", "diagonals", 32, 128): Config(32, 32, 16, 1, "ieee"),
    # sm_86 (8.6, 8.9, 12.x): as sm_80, in 99 KB of shared memory.
    ("sm_86", "forward", 16, 64): Config(128, 64, 4, 3),
    ("sm_86", "forward", 16, 128): Config(128, 64, 8, 2),
    ("sm_86", "forward", 16, 256): Config(64, 32, 8, 2),
    ("sm_86", "rows", 16, 64): Config(64, 64, 8, 1),
    ("sm_86", "rows", 16, 128): Config(64, 32, 8, 1),
    ("sm_86", "rows", 16, 256): Config(64, 16, 8, 1),
    ("sm_86", "sums", 16, 64): Config(64, 32, 4, 1),
    ("sm_86", "sums", 16, 128): Config(64, 16, 4, 1),
    ("sm_86", "sums", 16, 256): Config(64, 16, 8, 1),
    ("sm_86", "sums", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "sums", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_86", "cols", 16, 64): Config(32, 64, 4, 1),
    ("sm_86", "cols", 16, 128): Config(32, 64, 8, 1),
    ("sm_86", "cols", 16, 256): Config(16, 64, 8, 1),
    ("sm_86", "diagonals", 16, 64): Config(64, 64, 8, 1),
    ("sm_86", "diagonals", 16, 128): Config(64, 64, 8, 1),
    ("sm_86", "diagonals", 16, 256): Config(32, 32, 8, 1),
    ("sm_86", "forward", 32, 64): Config(64, 32, 4, 2),
    ("sm_86", "forward", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "rows", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "rows", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_86", "cols", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "cols", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_86", "diagonals", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_86", "diagonals", 32, 128): Config(32, 32, 16, 1, "ieee"),
    # sm_90: 128 query rows a program, or its K and V tiles outrun L2 (24 bytes a clock and SM).
    ("sm_90", "forward", 16, 64): Config(128, 128, 8, 3),
    ("sm_90", "forward", 16, 128): Config(128, 128, 8, 2),
    ("sm_90", "forward", 16, 256): Config(128, 64, 8, 2),
    ("sm_90", "rows", 16, 64): Config(128, 64, 8, 2),
    ("sm_90", "rows", 16, 128): Config(128, 64, 8, 2),
    ("sm_90", "rows", 16, 256): Config(128, 32, 8, 2),
    ("sm_90", "sums", 16, 64): Config(128, 32, 8, 2),
    ("sm_90", "sums", 16, 128): Config(128, 32, 8, 2),
    ("sm_90", "sums", 16, 256): Config(128, 32, 8, 2),
    ("sm_90", "sums", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_90", "sums", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_90", "cols", 16, 64): Config(64, 128, 8, 2),
    ("sm_90", "cols", 16, 128): Config(64, 128, 8, 2),
    ("sm_90", "cols", 16, 256): Config(32, 64, 8, 1),
    ("sm_90", "once", 16, 64): Config(64, 128, 8, 2),
    ("sm_90", "once", 16, 128): Config(32, 128, 8, 2),
    ("sm_90", "diagonals", 16, 64): Config(64, 64, 8, 2),
    ("sm_90", "diagonals", 16, 128): Config(64, 64, 8, 2),
    ("sm_90", "diagonals", 16, 256): Config(64, 64, 8, 1),
    ("sm_90", "forward", 32, 64): Config(128, 64, 8, 2),
    ("sm_90", "forward", 32, 128): Config(128, 32, 8, 2),
    ("sm_90", "rows", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_90", "rows", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_90", "cols", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_90", "cols", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_90", "diagonals", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_90", "diagonals", 32, 128): Config(32, 32, 16, 1, "ieee"),
    # sm_100: as sm_90; accumulators of products stand in tensor memory.
    ("sm_100", "forward", 16, 64): Config(128, 128, 8, 3),
    ("sm_100", "forward", 16, 128): Config(128, 64, 8, 2),
    ("sm_100", "forward", 16, 256): Config(128, 32, 8, 2),
    ("sm_100", "rows", 16, 64): Config(128, 64, 8, 2),
    ("sm_100", "rows", 16, 128): Config(128, 64, 8, 2),
    ("sm_100", "rows", 16, 256): Config(64, 32, 8, 2),
    ("sm_100", "sums", 16, 64): Config(128, 32, 8, 2),
    ("sm_100", "sums", 16, 128): Config(128, 32, 8, 2),
    ("sm_100", "sums", 16, 256): Config(128, 32, 8, 2),
    ("sm_100", "sums", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "sums", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_100", "cols", 16, 64): Config(64, 128, 8, 2),
    ("sm_100", "cols", 16, 128): Config(64, 128, 8, 2),
    ("sm_100", "cols", 16, 256): Config(32, 64, 8, 2),
    ("sm_100", "diagonals", 16, 64): Config(64, 64, 8, 1),
    ("sm_100", "diagonals", 16, 128): Config(64, 64, 8, 1),
    ("sm_100", "diagonals", 16, 256): Config(64, 64, 8, 1),
    ("sm_100", "forward", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "forward", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "rows", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "rows", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_100", "cols", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "cols", 32, 128): Config(32, 32, 16, 1, "ieee"),
    ("sm_100", "diagonals", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("sm_100", "diagonals", 32, 128): Config(32, 32, 16, 1, "ieee"),
    # gfx942: 64 KB of shared memory; stages beyond the first cost it.
    ("gfx942", "forward", 16, 64): Config(128, 64, 4, 1),
    ("gfx942", "forward", 16, 128): Config(64, 64, 4, 2),
    ("gfx942", "forward", 16, 256): Config(64, 32, 4, 2),
    ("gfx942", "rows", 16, 64): Config(64, 64, 8, 1),
    ("gfx942", "rows", 16, 128): Config(64, 32, 8, 1),
    ("gfx942", "rows", 16, 256): Config(64, 16, 4, 1),
    ("gfx942", "sums", 16, 64): Config(64, 32, 8, 1),
    ("gfx942", "sums", 16, 128): Config(64, 16, 8, 1),
    ("gfx942", "sums", 16, 256): Config(64, 16, 8, 1),
    ("gfx942", "sums", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("gfx942", "sums", 32, 128): Config(32, 16, 8, 1, "ieee"),
    ("gfx942", "cols", 16, 64): Config(32, 64, 4, 1),
    ("gfx942", "cols", 16, 128): Config(32, 64, 4, 2),
    ("gfx942", "cols", 16, 256): Config(16, 32, 8, 1),
    ("gfx942", "diagonals", 16, 64): Config(64, 64, 8, 1),
    ("gfx942", "diagonals", 16, 128): Config(64, 64, 8, 1),
    ("gfx942", "diagonals", 16, 256): Config(32, 32, 8, 1),
    ("gfx942", "forward", 32, 64): Config(64, 32, 4, 2, "ieee"),
    ("gfx942", "forward", 32, 128): Config(32, 32, 8, 1, "ieee"),
    ("gfx942", "rows", 32, 64): Config(64, 32, 8, 1, "ieee"),
    ("gfx942", "rows", 32, 128): Config(32, 32, 4, 1, "ieee"),
    ("gfx942", "cols", 32, 64): Config(32, 32, 4, 1, "ieee"),
    ("gfx942", "cols", 32, 128): Config(32, 32, 4, 1, "ieee"),
    ("gfx942", "diagonals", 32, 64): Config(32, 32, 8, 1, "ieee"),
    ("gfx942", "diagonals", 32, 128): Config(32, 32, 8, 1, "ieee"),
}
# fmt: on
# Rows of one rule, where it spills in those of all.
OWN: dict[tuple[str, str, int, int, str], Config] = {
    ("sm_90", "diagonals", 16, 256, "Scaled"): Config(32, 32, 8, 2),
    ("sm_90", "forward", 32, 128, "Scaled"): Config(128, 32, 8, 1),
    ("sm_100", "rows", 16, 128, "RelativeGradient"): Config(128, 32, 8, 2),
}
# Rows beside those of CONFIGS, the most promising first.
OTHERS: dict[tuple[str, str, int, int], tuple[Config, ...]] = {
    ("sm_90", "forward", 16, 64): (
        # 15% fewer instructions than the plain kernel; the warps that compute spend none on copies, and while one
        # group of them multiplies the other takes exponentials.
        Config(128, 128, 4, 2, schedule="specialised"),
        # The same, and the end of a tile overlaps with the copies of the next.
        Config(128, 128, 4, 2, schedule="persistent"),
        # 7% fewer instructions than the plain kernel: no mask, no pointers.
        Config(128, 128, 8, 3, schedule="descriptors"),
        # Three programs share a multiprocessor, exponentials of one run beside products of another; but K and V are
        # read twice as often. (The plain kernel with this tile takes more registers, and two share.)
        Config(64, 128, 4, 2, schedule="descriptors"),
    ),
    ("sm_90", "forward", 16, 128): (
        # As at 64; 20% fewer instructions.
        Config(128, 128, 4, 2, schedule="specialised"),
        Config(128, 128, 4, 2, schedule="persistent"),
        Config(128, 128, 8, 2, schedule="descriptors"),
    ),
    ("sm_90", "forward", 16, 256): (
        # Not persistent: with Q twice shared memory does not hold it.
        Config(128, 64, 4, 2, schedule="specialised"),
        Config(128, 64, 8, 2, schedule="descriptors"),
    ),
    # dK and dV. Specialised: a tenth and a quarter fewer instructions per score, and products beside the rest.
    ("sm_90", "cols", 16, 64): (
        Config(64, 128, 4, 2, schedule="specialised"),
        # Two programs share a multiprocessor.
        Config(64, 64, 4, 2),
    ),
    ("sm_90", "cols", 16, 128): (
        Config(64, 128, 4, 2, schedule="specialised"),
        # A quarter more instructions per score, and no spills where 64 x 128 has 40 to 56 bytes of them (dropout,
        # packed sequences, relative logits).
        Config(32, 128, 8, 2),
    ),
}
# (chip, direction, bits, head dim, row) -> the file of bench/results/ by which the row passed the gate on a GPU.
VERIFIED: dict[tuple[str, str, int, int, Config], str] = {}


def arch(device: torch.device) -> str:
    """The row of CONFIGS that a GPU reads: its own, or that of the nearest chip with no more shared memory."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8 or major == 12:
        return "sm_80" if minor == 0 and major == 8 else "sm_86"
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_86"


def dot_precision(q: torch.Tensor, config: Config) -> str:
    """How a kernel multiplies fp32 tiles; 16-bit tiles have one way only.

    Three tf32 products ("tf32x3") carry nearly all of fp32, "ieee" all of it without tensor cores and in fewer
    registers; where torch was told that one may do (torch.set_float32_matmul_precision), one does.
    """
    if q.dtype != torch.float32:
        return "tf32"
    if q.device.type == "cpu" or torch.version.hip is not None:
        return "ieee"
    return config.fp32 if torch.get_float32_matmul_precision() == "highest" else "tf32"


def sum_precision(device: torch.device) -> str:
    """How sums that are already fp32 are reduced: without losing any of it."""
    return "ieee" if device.type == "cpu" or torch.version.hip is not None else "tf32x3"


def pick(chip: str, direction: str, bits: int, width: int, rule: str = "") -> Config:
    if chip == "interpreter":
        return Config(32, 16, 4, 1) if direction != "diagonals" else Config(32, 32, 4, 1)
    width = max(64, width)
    return OWN.get((chip, direction, bits, width, rule)) or CONFIGS[chip, direction, bits, width]


def shipped(direction: str, q: torch.Tensor, width: int, rule: str) -> Config:
    return pick(arch(q.device), direction, q.element_size() * 8, width, rule)


def one_pass(q: torch.Tensor, width: int) -> bool:
    """Whether POSATTN_BACKWARD=once asks for dQ, dK and dV in one pass, and there is a row for it."""
    chip, bits = arch(q.device), q.element_size() * 8
    if os.environ.get("POSATTN_BACKWARD") != "once":
        return False
    return chip == "interpreter" or (chip, "once", bits, max(64, width)) in CONFIGS


def widest(bits: int) -> int:
    """The largest head dim with rows in every direction, by the width of the dtype."""
    return max(width for _, direction, b, width in CONFIGS if b == bits and direction == "forward")


def others(chip: str, direction: str, bits: int, width: int) -> tuple[Config, ...]:
    """Rows of OTHERS; in the interpreter, its own with every schedule."""
    if chip == "interpreter":
        every = ("specialised", "persistent", "descriptors")
        schedules = {"forward": every, "cols": every[:1]}.get(direction, ())
        return tuple(pick(chip, direction, bits, width)._replace(schedule=schedule) for schedule in schedules)
    return OTHERS.get((chip, direction, bits, max(64, width)), ())


_tuned: dict[tuple, Config] = {}
# direction -> the row with which it was last launched, for who measures
ran: dict[str, Config] = {}


def run(
    direction, q, width: int, rule: str, length: int, launch: Callable[[Config], None], reset=None,
    serves: Callable[[Config], bool] | None = None,
) -> None:  # fmt: skip
    """Launch with the row of the table; with POSATTN_AUTOTUNE=1, with the fastest of all rows of that direction.

    The search keys on the power of two above the length, never on the length. `reset` undoes what a launch added up;
    `serves` says of a row with another schedule whether it can run this call.
    """
    chip, bits = arch(q.device), q.element_size() * 8
    best = pick(chip, direction, bits, width, rule)
    more = [c for c in others(chip, direction, bits, width) if c.schedule == "plain" or (serves and serves(c))]
    wanted = os.environ.get("POSATTN_SCHEDULE", "")
    if wanted:
        best = next((c for c in more if c.schedule == wanted != "plain"), best)
    elif os.environ.get("POSATTN_AUTOTUNE") == "1" and chip != "interpreter":
        key = (q.device, direction, q.dtype, width, rule, triton.next_power_of_2(length), tuple(more))
        if key not in _tuned:
            rows = {c for (a, d, b, _), c in CONFIGS.items() if (a, d, b) == (chip, direction, bits)}
            _tuned[key] = _search(rows.union(more), launch)
            if reset is not None:
                reset()
        best = _tuned[key]
    launch(best)


def _search(rows: Iterable[Config], launch: Callable[[Config], None]) -> Config:
    times = {}
    for config in sorted(rows):
        # A tile too large for the chip is not a candidate; any other error is an error.
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            times[config] = triton.testing.do_bench(functools.partial(launch, config))
    return min(times, key=times.get)
