"""`python -m bench kernels`: what every shipped config compiles to, counted without a GPU; a budget for the tests.

What is counted: `path` is the number of instructions that one warp issues for one turn of the inner loop when the tile
needs no edge mask and does touch the table (masks and far tiles are branches; of all ways round the loop, those with
the most products, loads and reductions, and of these the shortest); `far` is the shortest way of all, which is that
of a tile where the table is constant. Of a Scaled rule `far` is a tile without knots, the most frequent, and `path` one
with (of its sums, with as many as can be). A predicated instruction counts whether or not it acts, a product of the
tensor cores counts as one. instr/score = threads * path / (BLOCK_M * BLOCK_N).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BUDGET = Path(__file__).parent.parent / "tests" / "aot_budget.json"
UNVERIFIED = "?: unverified, the numerics gate has not passed with this row on a GPU (kernels/configs.py)"
MODEL = "predicted, not measured: TFLOP/s on an H200 without a program's start and end (see --model)"


def jobs(chips: list[str] | None, everything: bool) -> list[tuple[Any, ...]]:
    """(chip, direction, bits, width, rule): all of sm_90 in 16 bits, else the one that spills first as a rule."""
    from posattn.kernels.configs import CONFIGS, others

    from . import aot_decode, aot_mixing, aot_spe
    from .aot import CALLS, DIRECTIONS, FEW, HEAVIEST, SCHEDULES, SOFTCAP

    made: list[tuple[Any, ...]] = []
    for chip, direction, bits, width in CONFIGS:
        rules = DIRECTIONS[direction]
        calls = CALLS.get(direction, ())
        if everything:
            rules += (*([SOFTCAP[direction]] if direction in SOFTCAP else []), *calls)
        elif (chip, bits) != ("sm_90", 16):
            rules = (HEAVIEST[direction],)
        elif width <= 128:
            rules += calls
        for schedule in dict.fromkeys(config.schedule for config in others(chip, direction, bits, width)):
            named = SCHEDULES.get(schedule, ())
            rules += named if everything else named[: FEW.get((direction, schedule, width), 0)]
        if chips is None or chip in chips:
            made += [(chip, direction, bits, width, rule) for rule in rules]
    return made + [job for special in (aot_mixing, aot_spe, aot_decode) for job in special.jobs(chips, everything)]


def _enter_worker(hip: bool) -> None:
    # A compiler that fails prints its whole program; the row has the message.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if hip:
        import torch

        torch.version.hip = "ahead of time"  # read by kernels/ when it is imported, and when precision is chosen


def _work(job: tuple[Any, ...]) -> dict[str, Any]:
    from . import aot, aot_decode, aot_mixing, aot_spe

    for special in (aot_mixing, aot_spe, aot_decode):
        if job[1] in special.KERNELS:
            return special.compile_and_count(*job)
    return aot.compile_and_count(*job)


def compile_all(todo: list[tuple[Any, ...]], workers: int) -> list[dict[str, Any]]:
    """Rows in the order of `todo`; one pool a vendor, because the kernels' constants differ."""
    rows: dict[int, dict[str, Any]] = {}
    for hip in (False, True):
        mine = [n for n, job in enumerate(todo) if job[0].startswith("gfx") == hip]
        if not mine:
            continue
        with ProcessPoolExecutor(workers, get_context("spawn"), _enter_worker, (hip,)) as pool:
            for n, row in zip(mine, pool.map(_work, [todo[n] for n in mine])):
                rows[n] = row
    return [rows[n] for n in range(len(todo))]


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row "ratio", its instructions per score by those of Plain; to sm_90 forward "predicted" TFLOP/s."""
    from . import model

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["chip"], row["direction"], row["bits"], row["width"]

    plain = {place(row): row["per_score"] for row in rows if row["rule"] == "Plain" and "error" not in row}
    for row in rows:
        if "error" in row:
            continue
        if plain.get(place(row)):
            row["ratio"] = row["per_score"] / plain[place(row)]
        if place(row)[:3] == ("sm_90", "forward", 16):
            row["predicted"] = model.predicted_tflops(row)


COLUMNS = (
    "rule                         head dim  tile     warps stages   regs spill  shared prog/SM"
    "  products    path   far  instr/score  ratio"
)


def show(rows: list[dict[str, Any]]) -> str:
    lines, place = [], None
    for row in rows:
        if place != (place := (row["chip"], row["direction"], row["bits"])):
            dtype = "bf16" if row["bits"] == 16 else "fp32"
            lines += ["", f"{row['chip']} {row['direction']} {dtype}", COLUMNS]
        n = row["block_m"] if row["direction"] == "diagonals" else row["block_n"]
        line = f"{row['rule']:28} {row['width']:8}  {row['block_m']:3}x{n:<4}"
        line += f" {row['num_warps']:5} {row['num_stages']:6} {'' if verified(row) else '?':1}"
        if "error" in row:
            lines.append(f"{line}  {row['error'].splitlines()[0][:160]}")
            continue
        products = " ".join(f"{n} {op}" for op, n in row["products"].items()) or f"none ({row['precision']})"
        ratio = f"{row['ratio']:6.2f}" if "ratio" in row else "     -"
        line += f"  {row['registers']:4} {row['stack']:5} {row['shared']:7} {row['programs']:7}  {products:11}"
        line += f" {row['path']:5} {row['far_path']:5} {row['per_score']:12.2f} {ratio}"
        if "predicted" in row:
            line += f"  {row['predicted']:4.0f} TFLOP/s predicted"
        lines.append(line)
    return "\n".join(lines)


def verified(row: dict[str, Any]) -> bool:
    """Whether a file says that the row passed the gate on a GPU; other tables of rows keep no such list."""
    from posattn.kernels.configs import VERIFIED, Config

    if "schedule" not in row:
        return True
    config = Config(*(row[field] for field in Config._fields))
    return (row["chip"], row["direction"], row["bits"], row["width"], config) in VERIFIED


def budget_key(row: dict[str, Any]) -> str:
    return f"{row['direction']}/{row['width']}/{row['rule']}"


def budget_entry(row: dict[str, Any]) -> dict[str, Any]:
    tile = [row[key] for key in ("block_m", "block_n", "num_warps", "num_stages")]
    return {"config": tile, "path": row["path"], "registers": row["registers"]}


def update_budget(rows: list[dict[str, Any]], triton_version: str) -> None:
    """Write the paths of sm_90 in 16 bits into tests/aot_budget.json, under this Triton's major.minor."""
    kept = json.loads(BUDGET.read_text("utf-8")) if BUDGET.exists() else {}
    wanted = [row for row in rows if (row["chip"], row["bits"]) == ("sm_90", 16)]
    if failed := [budget_key(row) for row in wanted if "error" in row]:
        raise SystemExit(f"no budget written, these do not compile: {', '.join(failed)}")
    kept[triton_version] = {budget_key(row): budget_entry(row) for row in wanted}
    versions = []
    for version in sorted(kept):
        entries = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in kept[version].items())
        versions.append(f"{json.dumps(version)}: {{\n{entries}\n}}")
    BUDGET.write_text("{\n" + ",\n".join(versions) + "\n}\n", "utf-8")


def ptxas_versions() -> dict[str, str]:
    from .aot import TOOLS

    made = {}
    for name in ("ptxas", "ptxas-blackwell"):
        path = Path(os.environ.get("TRITON_PTXAS_PATH", TOOLS / name)) if name == "ptxas" else TOOLS / name
        if path.exists():
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            made[name] = text.strip().splitlines()[-1]
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench kernels", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", metavar="A,B", help="only these chips (sm_80, sm_86, sm_90, sm_100, gfx942)")
    everything = "every rule of every config; the default takes, beyond sm_90 in 16 bits, those that spill first"
    parser.add_argument("--all", action="store_true", help=everything)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows there")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--update-budget", action="store_true", help=f"rewrite tests/{BUDGET.name} (sm_90, 16 bits)")
    parser.add_argument("--predict", action="store_true", help="instead: what DAPE, SPE and decoding should take")
    parser.add_argument("--model", action="store_true", help="instead: what attention should take on a Hopper, and why")
    arguments = parser.parse_args(argv)
    # Compiled, not interpreted: workers inherit the environment, and only they import the kernels.
    os.environ.pop("TRITON_INTERPRET", None)

    import triton

    from .aot import CHIPS

    if arguments.predict:
        from . import aot_decode, aot_mixing, aot_spe

        print(*(special.prediction() for special in (aot_mixing, aot_spe, aot_decode)), sep="\n\n")
        return 0

    if arguments.model:
        from .model_report import report

        print(f"Triton {triton.__version__}; predicted for an H200, not measured\n{report(arguments.jobs)}")
        return 0

    chips = arguments.arch.split(",") if arguments.arch else ["sm_90"] if arguments.update_budget else None
    if unknown := set(chips or ()) - set(CHIPS):
        parser.error(f"unknown chip {', '.join(sorted(unknown))}; known: {', '.join(CHIPS)}")
    todo = jobs(chips, arguments.all)
    if not todo:
        parser.error(f"no config for {arguments.arch or 'any chip'} in kernels/configs.py")
    started = time.perf_counter()
    rows = compile_all(todo, arguments.jobs)
    compare(rows)
    print(f"Triton {triton.__version__}; " + "; ".join(f"{k}: {v}" for k, v in ptxas_versions().items()))
    if not arguments.all:
        print("sm_90 in 16 bits: every rule; elsewhere the rules that spill first (--all for every rule, and softcap)")
    print(show(rows))
    if not all(map(verified, rows)):
        print(f"\n{UNVERIFIED}")
    print(f"\n{len(rows)} kernels in {time.perf_counter() - started:.0f} s, {sum('error' in r for r in rows)} failed")
    if any("predicted" in row for row in rows):
        print(MODEL)
    if arguments.json:
        made = dict(triton=triton.__version__, ptxas=ptxas_versions(), all=arguments.all, rows=rows)
        arguments.json.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    if arguments.update_budget:
        update_budget(rows, ".".join(triton.__version__.split(".")[:2]))
        print(f"wrote {BUDGET}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
