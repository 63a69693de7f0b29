"""Ahead of time: compile the kernels as a launch would, for any chip and without one, and count what was made.

The arguments are those of the launch itself: `posattn.kernels.launch` runs on meta tensors, and where it would launch,
its arguments are written down instead. They are specialised by Triton's rules (divisibility by 16, the integer 1 a
constant, neither for `do_not_specialize`), compiled for the chip, and the machine code is read back.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .machine_code import ACCESS, TENSOR_CORE, Code, read_amdgcn, read_sass

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Chip(NamedTuple):
    target: GPUTarget
    block_shared: int  # bytes of shared memory that one program may have
    shared: int  # bytes of it on a multiprocessor
    block_reserved: int  # bytes of it that every program costs besides its own
    registers: int  # 32-bit registers per lane position of a multiprocessor, over all warps
    register_step: int  # what a warp's registers per lane are rounded up to
    warps: int  # most warps on a multiprocessor


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 1 << 10, 2048, 8, 64),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99 << 10, 100 << 10, 1 << 10, 2048, 8, 48),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 1 << 10, 2048, 8, 64),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 1 << 10, 2048, 8, 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 0, 2048, 8, 32),
}


# --------------------------------------------------------------------------------------- what a launch passes

# rule -> what attention is called with, and whether the table wants a gradient
RULES: dict[str, dict[str, bool]] = {
    "Plain": {},
    "Linear": {"slopes": True, "past_only": True},
    "Distance": {"slopes": True},
    "Toeplitz": {"table": True},
    "Toeplitz+span": {"table": True, "support": True},
    "Gradient": {"table": True, "gradient": True},
    "Gradient+span": {"table": True, "support": True, "gradient": True},
    "Gradient+span+tails": {"table": True, "support": True, "gradient": True, "tails": True},
    "Scaled": {"scaled": True},
    "Scaled+gradient": {"scaled": True, "gradient": True},
    "Scaled+gradient+softcap": {"scaled": True, "gradient": True, "softcap": True},
    "Toeplitz+span+softcap": {"table": True, "support": True, "softcap": True},
    "Gradient+span+tails+softcap": {"table": True, "support": True, "gradient": True, "tails": True, "softcap": True},
    "Relative": {"relative": True},
    "Relative+gradient": {"relative": True, "gradient": True},
    "Plain+dropout": {"dropout": True},
    "Toeplitz+dropout": {"table": True, "dropout": True},
    "Toeplitz+sequences": {"table": True, "sequences": True},
    "Gradient+dropout": {"table": True, "dropout": True, "gradient": True},
    "Gradient+sequences": {"table": True, "sequences": True, "gradient": True},
    # Schedules beside the plain one (kernels/descriptors.py); causal, as "no bias" is, with a table of zeros.
    "Toeplitz+skip": {"table": True, "skip": True},
    "Toeplitz+specialised": {"table": True, "past_only": True, "specialised": True},
    "Toeplitz+skip+specialised": {"table": True, "past_only": True, "skip": True, "specialised": True},
    "Plain+specialised": {"specialised": True},
    "Toeplitz+persistent": {"table": True, "past_only": True, "persistent": True},
    "Toeplitz+skip+persistent": {"table": True, "past_only": True, "skip": True, "persistent": True},
    "Plain+persistent": {"persistent": True},
    "Toeplitz+descriptors": {"table": True, "past_only": True, "descriptors": True},
    "Toeplitz+skip+descriptors": {"table": True, "past_only": True, "skip": True, "descriptors": True},
    "Plain+descriptors": {"descriptors": True},
}
TOEPLITZ = ("Toeplitz", "Toeplitz+span")
GRADIENT = ("Gradient", "Gradient+span", "Gradient+span+tails")
LOGITS = ("Plain", "Linear", "Distance", "Scaled", *TOEPLITZ)
# direction -> the rules it can meet; of these the one that spills first on most chips; and the last with a softcap
DIRECTIONS = {"forward": LOGITS, "rows": (*LOGITS, *GRADIENT), "sums": ("Scaled+gradient",), "cols": LOGITS,
              "diagonals": ("Scaled", *TOEPLITZ), "once": ("Plain", "Linear", "Gradient", "Gradient+span")}
HEAVIEST = {
    "forward": "Toeplitz+span",
    "rows": "Gradient+span+tails",
    "sums": "Scaled+gradient",
    "cols": "Toeplitz+span",
    "diagonals": "Toeplitz+span",
}
SOFTCAP = {direction: f"{rules[-1]}+softcap" for direction, rules in DIRECTIONS.items() if direction != "once"}
# schedule -> its rules; of these the first so many are compiled by default, where configs.OTHERS has a row
SCHEDULES = {
    "specialised": ("Toeplitz+specialised", "Toeplitz+skip+specialised", "Plain+specialised"),
    "persistent": ("Toeplitz+persistent", "Toeplitz+skip+persistent", "Plain+persistent"),
    "descriptors": ("Toeplitz+descriptors", "Toeplitz+skip+descriptors", "Plain+descriptors"),
}
FEW = {
    ("forward", "specialised", 64): 1, ("forward", "specialised", 128): 2, ("forward", "specialised", 256): 1,
    ("forward", "persistent", 128): 1, ("forward", "descriptors", 64): 1,
    ("cols", "specialised", 64): 1, ("cols", "specialised", 128): 1,
}  # fmt: skip
# What only sm_90 in 16 bits compiles by default, for head dims up to 128: other calls of the same kernels.
CALLS = {
    "forward": ("Relative", "Plain+dropout", "Toeplitz+sequences", "Toeplitz+skip"),
    "rows": ("Relative+gradient", "Toeplitz+dropout", "Gradient+sequences"),
    "cols": ("Relative", "Toeplitz+dropout", "Toeplitz+sequences", "Toeplitz+skip"),
}
BATCH, HEADS, LENGTH, KNOTS, WIDTH, SEQUENCES = 2, 16, 4096, 32, 256, 40
DTYPES = {16: torch.bfloat16, 32: torch.float32}


def launch_arguments(
    chip: str, direction: str, bits: int, width: int, rule: str
) -> tuple[Any, dict[str, Any], Any]:
    """(kernel, its arguments by name, row of the config table) of the launch that attention makes; nothing runs."""
    from posattn.kernels import configs, launch, schedules

    made: list[tuple[Any, dict[str, Any]]] = []
    picked = []
    want = RULES[rule]
    schedule = next((name for name in SCHEDULES if name in want), "plain")

    def write_down(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.append((kernel, {**dict(zip(kernel.arg_names, args)), **kwargs}))

    def only_this_direction(name: str, q: Tensor, width: int, rule: str, length: int, run: Any, *_: Any) -> None:
        if name == direction:
            made.clear()  # what prepared it
            more = [c for c in configs.others(chip, name, bits, width) if c.schedule == schedule != "plain"]
            picked.append(more[0] if more else configs.pick(chip, name, bits, width, rule))
            run(picked[0])

    def always(call: Any, config: Any, plain: Any) -> None:
        call.launch(config, *call.outputs)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sequences = dropout = None
    if "sequences" in want:
        cu_q, cu_k = (empty(SEQUENCES + 1, dtype=torch.int32) for _ in range(2))
        sequences = SimpleNamespace(cu_q=cu_q, cu_k=cu_k, max_q=LENGTH, max_k=LENGTH)
    if "dropout" in want:
        dropout = SimpleNamespace(p=0.1, seed=empty(4, dtype=torch.int64))
    q, k, v, out = (empty(BATCH, HEADS, LENGTH, width, dtype=DTYPES[bits]) for _ in range(4))
    problem = dict(
        table=empty(HEADS, 2 * LENGTH - 1) if "table" in want else None,
        support=empty(2, HEADS, dtype=torch.int32) if "support" in want else None,
        slopes=empty(HEADS) if "slopes" in want else None,
        scaled=None, sequences=sequences, dropout=dropout,
        relative=empty(BATCH, HEADS, LENGTH, WIDTH, dtype=DTYPES[bits]) if "relative" in want else None,
        key_mask=None, scale=width**-0.5, softcap=20.0 if "softcap" in want else 0.0, shift=0, left=-1,
        right=0 if "past_only" in want else -1, symmetric=True,
    )  # fmt: skip
    if "scaled" in want:
        problem["scaled"] = empty(2 * LENGTH - 1), empty(LENGTH), empty(KNOTS), empty(HEADS, KNOTS + 1, 2)
    kept = configs.run, triton.runtime.JITFunction.run, schedules.Schedules.run, configs.one_pass
    configs.run, triton.runtime.JITFunction.run, schedules.Schedules.run = only_this_direction, write_down, always
    configs.one_pass = lambda q, width: direction == "once"
    try:
        if direction == "forward":
            launch.forward(q, k, v, **problem, skip="skip" in want)
        else:
            launch.backward(
                out, None, q, k, v, out, empty(BATCH, HEADS, LENGTH), **problem, tails_need_grad="tails" in want,
                skip="skip" in want,
                need_q=True, need_kv=True, need_table="gradient" in want or direction == "diagonals",
                deterministic=direction == "diagonals",
            )  # fmt: skip
    finally:
        configs.run, triton.runtime.JITFunction.run, schedules.Schedules.run, configs.one_pass = kept
    return *made[0], picked[0]


def specialised(value: Any, specialise: bool, hip: bool) -> tuple[str, list[list[Any]]]:
    """(type in the signature, attributes) that Triton's launcher gives an argument; "constexpr" for a constant."""
    aligned = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        name = {"bfloat16": "bf16", "int32": "i32", "int64": "i64", "uint8": "u8"}
        name |= {f"float{bits}": f"fp{bits}" for bits in (16, 32, 64)}
        near = [["tt.pointer_range", 32]] if hip and value.nbytes <= 2**31 - 1 else []
        return "*" + name[str(value.dtype).removeprefix("torch.")], aligned + near
    if isinstance(value, float):
        return "fp32", []
    if isinstance(value, int) and not isinstance(value, bool) and not (specialise and value == 1):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, aligned if specialise and value % 16 == 0 else []
    return "constexpr", []


def source(kernel: Any, arguments: dict[str, Any], hip: bool) -> ASTSource:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def enter(path: tuple[int, ...], value: Any, specialise: bool) -> str:
        kind, attribute = specialised(value, specialise, hip)
        if kind == "constexpr":
            constants[path] = value
        elif attribute:
            attributes[path] = attribute
        return kind

    for n, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[n,] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = type(value)(*(enter((n, m), x, True) for m, x in enumerate(value)))
        else:
            signature[parameter.name] = enter((n,), value, not parameter.do_not_specialize)
    return ASTSource(kernel, signature, constants, attributes)


# ------------------------------------------------------------------------------------------------- the counts


def _tool(name: str, cubin: bytes, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        return subprocess.run([TOOLS / name, *flags, path], capture_output=True, text=True, check=True).stdout


def count(chip_name: str, compiled: Any, tile: int, asked: int | None = None) -> dict[str, Any]:
    """Resources of a compiled kernel and the instructions of its loop; `tile` is BLOCK_M * BLOCK_N.

    `asked` is how many warps were asked for. Specialised, as many copy, and the other groups run the loop that counts.
    """
    chip = CHIPS[chip_name]
    computing = compiled.metadata.num_warps
    if asked is not None and computing > asked:
        computing -= asked
    threads = computing * chip.target.warp_size
    if chip.target.backend == "cuda":
        usage = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        code = Code(read_sass(_tool("cuobjdump", compiled.asm["cubin"], "-sass")))
    else:
        text = compiled.asm["amdgcn"]
        # Accumulation registers included: on CDNA both kinds are one file.
        registers, stack = (int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in
                            ("vgpr_count", "private_segment_fixed_size"))  # fmt: skip
        code = Code(read_amdgcn(text))
    near, far = code.shortest(near=True), code.shortest(near=False)
    shared = compiled.metadata.shared
    step = chip.register_step
    by_registers = chip.registers // (math.ceil(max(registers, 1) / step) * step) // compiled.metadata.num_warps
    by_shared = chip.shared // (shared + chip.block_reserved) if shared else chip.warps
    products = Counter(TENSOR_CORE.match(op)[0] for op in near if TENSOR_CORE.match(op))
    return dict(
        registers=registers, stack=stack, shared=shared, warps=compiled.metadata.num_warps,
        programs=min(by_registers, by_shared, chip.warps // compiled.metadata.num_warps),
        products=dict(products), exponentials=sum(op.startswith(("MUFU", "v_exp")) for op in near),
        path=len(near), far_path=len(far), loop=len(code.loop[1]) if code.loop else 0,
        staged=sum(i.op.startswith("LDGSTS") for i in code.instructions),
        specialised="ttg.warp_specialize" in compiled.asm.get("ttgir", ""), computing=computing,
        per_score=len(near) * threads / tile, accesses=dict(Counter(op for op in near if ACCESS.match(op))),
    )  # fmt: skip


@contextmanager
def written_down(chip: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Within, kernels pick the rows of a chip, and (kernel, its arguments and grid) are written down, not launched."""
    from posattn.kernels import configs

    made: list[tuple[Any, dict[str, Any]]] = []

    def write_down(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.append((kernel, {**dict(zip(kernel.arg_names, args)), **kwargs, "grid": grid}))

    kept = configs.arch, triton.runtime.JITFunction.run
    configs.arch, triton.runtime.JITFunction.run = lambda device: chip, write_down
    try:
        yield made
    finally:
        configs.arch, triton.runtime.JITFunction.run = kept


def compiled(chip: str, kernel: Any, arguments: dict[str, Any]) -> Any:
    target = CHIPS[chip].target
    options = {name: arguments[name] for name in ("num_warps", "num_stages")}
    return triton.compile(source(kernel, arguments, target.backend == "hip"), target=target, options=options)


def counted(row: dict[str, Any], kernel: Any, arguments: dict[str, Any], tile: int) -> dict[str, Any]:
    """A row of the report with its counts; a compiler's failure is in its "error", not raised."""
    try:
        return {**row, **count(row["chip"], compiled(row["chip"], kernel, arguments), tile, arguments["num_warps"])}
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return {**row, "error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}


def compile_and_count(chip: str, direction: str, bits: int, width: int, rule: str) -> dict[str, Any]:
    """One row of the report; a compiler's failure is in its "error", not raised."""
    kernel, arguments, config = launch_arguments(chip, direction, bits, width, rule)
    row = dict(chip=chip, direction=direction, bits=bits, width=width, rule=rule, **config._asdict())
    row["precision"] = arguments.get("PRECISION", "tf32")
    tile = config.block_m * (config.block_m if direction == "diagonals" else config.block_n)
    return counted(row, kernel, arguments, tile)
