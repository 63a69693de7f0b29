"""What `python -m bench kernels --model` prints: clocks of each kernel's tile, predicted goals, what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from .model import (
    FLOP_A_CLOCK,
    LENGTH,
    PEAK,
    Kernels,
    Row,
    clocks,
    computing,
    extra_bytes,
    jobs,
    of_the_call,
    operations,
    predicted_tflops,
    predictions,
)

RESULTS = Path(__file__).parent / "results"
TERMS = {"products": 9, "operands": 8, "issue": 5, "special": 7, "L1": 5, "L2": 5, "total": 5}
HEAD = (
    f"{'':36} {'regs':>4} {'prog':>4} {'instr':>6} {'exp':>6} {'loads':>6} | {'clocks a tile':50}"
    f" | {'':18} all keys  causal\n"
    f"{'kernel':36} {'':4} {'a SM':>4} {'a score':>20} |"
    + "".join(f" {name:>{width}}" for name, width in TERMS.items())
    + f" | {'binds':18}  TFLOP/s TFLOP/s"
)


def measured(folder: Path) -> dict[tuple[str, str], float]:
    """(key of a goal, head dim) -> what `python -m bench speed` has found at N 8192 on a chip of this kind."""
    made = {}
    for path in sorted(folder.glob("speed-*.json")):
        found = json.loads(path.read_text("utf-8"))
        if found.get("machine", {}).get("capability") != [9, 0]:
            continue
        for line in found["goals"]:
            for place in line["places"]:
                if place["where"].endswith("N 8192"):
                    made[line["key"], place["where"].removesuffix(" N 8192")] = place["value"]
    return made


def line(row: Row) -> str:
    name = f"{row['direction']:7} D {row['width']:3} {row['rule']}"
    if "error" in row:
        return f"{name}  {row['error'].splitlines()[0][:120]}"
    tile, threads = row["block_m"] * row["block_n"], 32 * computing(row)
    made = clocks(row)
    loads = sum(count for op, count in row["accesses"].items() if op.startswith("LDG.")) * threads / tile
    text = f"{name:36} {row['registers']:4} {row['programs']:4} {row['per_score']:6.1f}"
    text += f" {row['exponentials'] * threads / tile:6.2f} {loads:6.2f} |"
    text += "".join(f" {made[key]:{width}.0f}" for key, width in TERMS.items())
    text += f" | {made['binds']:18}"
    if row["direction"] == "forward":
        text += f" {predicted_tflops(row):6.0f} {predicted_tflops(row, LENGTH):7.0f}"
    return text


def text(rows: list[Row], found: dict[tuple[str, str], float]) -> str:
    from .speed_goals import show

    kernels = Kernels(rows)
    made = [HEAD, *map(line, rows), ""]
    made.append("backward (rows, cols), TFLOP/s by 10 flop a score and element, N 8192, causal:")
    for width in (64, 128, 256):
        both = {"no bias": ("Plain", "Plain"), "a learned table": ("Gradient", "Toeplitz")}
        speeds = [f"{name} {backward(kernels, width, *rules)}" for name, rules in both.items()]
        for rule in ("Plain", "Gradient"):
            if ("once", width, rule) in kernels.rows:
                speeds.append(f"in one pass, {rule}: {one_pass(kernels, width, rule):.0f}")
        made.append(f"  D {width:3}: {', '.join(speeds)}")
    made += ["", f"{'goal, N 8192, causal':28} {'':6} {'predicted':>14} {'measured':>14}"]
    for key, name, value, unit in predictions(kernels):
        was = show(found[key, name], unit) if (key, name) in found else "-"
        made.append(f"{key:28} {name:6} {show(value, unit):>14} {was:>14}")
    for width in (128, 64):
        extra, part = extra_bytes(width)
        text = f"{'memory, N 32768, B 1':28} D {width:3}  {show(part, '%'):>14}"
        made.append(f"{text} {extra / 2**20:10.0f} MiB of buffers")
    made += ["", "forward from a bias's parameters by that without a bias, D 128; its own operations take 4.5 us each:"]
    for kind in ("TISA", "T5", "KERPLE", "ALiBi") if predictions(kernels) else ():
        speeds = ", ".join(f"N {n}: {of_the_call(kernels, kind, 128, n):.3f}" for n in (2048, 8192, 32768))
        made.append(f"  {kind:7} {operations(kind):3} operations   {speeds}")
    return "\n".join(made)


def backward(kernels: Kernels, width: int, rows: str, cols: str) -> str:
    try:
        return f"{kernels.backward_tflops(width, rows, cols):.0f}"
    except KeyError as missing:
        return f"unknown: {missing} does not compile"


def one_pass(kernels: Kernels, width: int, rule: str) -> float:
    """dQ is added to in memory; the kernel that makes delta and the one that turns dQ are not counted."""
    return PEAK / 1e12 * 10 * width / FLOP_A_CLOCK / kernels.score("once", width, rule)


def first_call() -> str:
    """Seconds of compiling alone, here; on a GPU machine the same work stands in the first call."""
    from .speed_first import cold_and_warm

    try:
        cold, warm = cold_and_warm("--compile", "sm_90")
    except Exception as error:  # a kernel that does not compile is in the table above
        return f"first forward + backward with TISA: {type(error).__name__}: {str(error)[:200]}"
    each = ", ".join(f"{name} {seconds:.2f}" for name, seconds in cold["kernels"].items())
    return (
        f"first forward + backward with TISA, D 128, compiling alone, on this machine's CPU: {cold['compile']:.1f} s\n"
        f"from an empty cache ({each}), {warm['compile']:.2f} s from a filled one"
    )


def report(workers: int) -> str:
    from .kernels import compile_all

    rows = compile_all(jobs(), workers)
    return f"{text(rows, measured(RESULTS))}\n\n{first_call()}"
