"""`python -m bench gate`: what a GPU must show before a release: numerics, memory, then a short table of speeds.

Numerics go through `posattn.attention(backend="triton")` and are held against float64: biases of the offset in
gate_numerics.py, packed sequences, dropout and other options in gate_features.py, caches in gate_decode.py, DAPE and
FIRE in gate_mixing.py, and `posattn.linear_attention` with SPE in gate_spe.py; FLOATER's solves are checked in
gate_floater.py; memory and speed are in gate_speed.py and gate_spe_speed.py. Everything stops politely at the time
budget, says what it did not reach, and is written to one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import gate_speed
from .gate_rows import bits_and_width, configs_covered, served, verdicts

RESULTS = Path(__file__).parent / "results"
# Of the budget, by the end of that part: the first cases, the options, caches, DAPE and FIRE, SPE, FLOATER, the mixed
# cases, memory.
FIRST_SHARE, FEATURES_SHARE, DECODE_SHARE, MIXING_SHARE, SPE_SHARE = 0.22, 0.33, 0.43, 0.55, 0.66
FLOATER_SHARE, NUMERICS_SHARE, MEMORY_SHARE = 0.69, 0.74, 0.79
SCHEDULE = os.environ.get("POSATTN_SCHEDULE", "")
PARTS = ("numerics", "features", "decode", "mixing", "spe", "floater")


class Clock:
    """Seconds of the budget; `share` of it may be spent by the part that asks."""

    def __init__(self, budget: float):
        self.start, self.budget = time.perf_counter(), budget

    def spent(self) -> float:
        return time.perf_counter() - self.start

    def open(self, share: float = 1.0) -> bool:
        return self.spent() < share * self.budget


# ---------------------------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    import triton

    from .kernels import ptxas_versions

    made: dict[str, Any] = dict(
        torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda, hip=torch.version.hip,
        ptxas=ptxas_versions(), device="cpu",
    )  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        made.update(device=properties.name, memory=properties.total_memory, processors=properties.multi_processor_count)
        made["capability"] = list(torch.cuda.get_device_capability(0))
        made["nvidia_smi"] = nvidia_smi()
    return made


def nvidia_smi() -> dict[str, str] | None:
    keys = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={keys}", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(keys.split(","), (part.strip() for part in text.strip().split(","))))


# --------------------------------------------------------------------------------------------------- numerics


def numerics(cases: list[Any], device: torch.device, clock: Clock, rehearse: bool, share: float) -> dict[str, Any]:
    from . import gate_decode, gate_features, gate_floater, gate_mixing, gate_numerics, gate_spe

    modules = gate_numerics, gate_features, gate_decode, gate_mixing, gate_spe, gate_floater
    checks: dict[type, Any] = {module.Case: module.check for module in modules}
    rows: list[dict[str, Any]] = []
    for n, case in enumerate(cases):
        if not clock.open(share):
            break
        started = time.perf_counter()
        try:
            # With another schedule, the first call of a kind only judges it (kernels/schedules.py).
            for _ in range(2 if SCHEDULE else 1):
                row = checks[type(case)](case, device, rehearse)
        except torch.cuda.OutOfMemoryError:
            row = {"case": str(case), "errors": {}, "failed": [], "not_run": "float64 does not fit this GPU's memory"}
        except Exception as error:  # one broken config must not hide the others
            row = {"case": str(case), "errors": {}, "failed": [f"{type(error).__name__}: {str(error)[:500]}"]}
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
        worst = max((e / b if b else float(e > 0) for e, b in row["errors"].values()), default=0.0)
        verdict = "FAILED " + ", ".join(row["failed"]) if row["failed"] else row.get("not_run", f"ok {worst:.2f}")
        verdict += furthest_gradient(row)
        print(f"  {n + 1:3}/{len(cases)} {row['case']:64} {verdict}  ({row['seconds']:.1f} s)", flush=True)
        gate_speed.release()
    return {"rows": rows, "not_reached": [str(case) for case in cases[len(rows) :]]}


def furthest_gradient(row: dict[str, Any]) -> str:
    """The base's parameter (or the network's) whose gradient is furthest off by its size; and plain PyTorch's error."""
    pairs = row.get("relative", {})
    pairs = {name: pair for name, pair in pairs.items() if name.startswith("dbase.")} or pairs
    if not pairs:
        return ""
    name = max(pairs, key=lambda name: pairs[name][0])
    return ", {} {:.1e}/{:.0e}".format(name, *pairs[name])


# ------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench gate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="when to stop (480)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: bench/results/gate-<gpu>-torch...json")
    which = "biases of the offset, memory, speed; or packed sequences and options, DAPE and FIRE, SPE, or FLOATER, "
    which += "which then have the whole budget; or all of these; or time and memory of SPE"
    parts = ["all", "attention", "features", "decode", "mixing", "spe", "floater", "spe-speed"]
    parser.add_argument("--part", choices=parts, default="all", help=which)
    some = "which cases of one part: 7: after the seventh; 1::4 for the second of four processes"
    parser.add_argument("--cases", type=slice_of, default=slice(None), metavar="A:B:C", help=some)
    rehearse = "rehearse on the CPU interpreter (TRITON_INTERPRET=1), tiny shapes, no speed table"
    parser.add_argument("--interpret", action="store_true", help=rehearse)
    arguments = parser.parse_args(argv)
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no GPU here: nothing was run (--interpret rehearses a few cases on the CPU)")
        return 0

    torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(arguments.budget)
    device = torch.device("cpu" if arguments.interpret else "cuda:0")
    report: dict[str, Any] = {"machine": machine(), "budget": arguments.budget, "interpreted": arguments.interpret}
    print(json.dumps(report["machine"]))
    print("numerics: error by what is allowed, the worst of all outputs and gradients (1 is the limit)")
    print("some also: the parameter (of a DAPE's base) whose gradient is furthest off, by size: posattn/plain PyTorch")
    done, failures = [], []
    left: list[Any] = []  # of the first cases: they come before the mixed ones
    for part, cases, share in planned(arguments, device):
        cases = left + cases if part == "numerics" else cases
        found = numerics(cases, device, clock, arguments.interpret, share)
        before = report.setdefault(part, {"rows": []})
        before["rows"] += found["rows"]
        before["not_reached"] = found["not_reached"]
        left = cases[len(found["rows"]) :] if part == "numerics" else left
        failures += [f"{row['case']}: {', '.join(row['failed'])}" for row in found["rows"] if row["failed"]]
        if part == "numerics":
            done += [c for c, row in zip(cases, found["rows"]) if not row["failed"] and "not_run" not in row]
    if arguments.part == "spe-speed":
        from . import gate_spe_speed

        print("speed and memory of SPE: forward; forward and backward")
        sizes = gate_spe_speed.rehearsal() if arguments.interpret else {}
        report["spe_speed"] = gate_spe_speed.speed(device, clock.open, **sizes)
        failures += report["spe_speed"]["failed"]
    if not arguments.interpret and arguments.part in ("all", "attention"):
        report["configs"] = configs_covered(done, device)
        report["verdicts"] = verdicts(device)
        if arguments.cases == slice(None):  # or processes side by side would time one another
            memory_and_speed(report, device, clock)
            failures += report["memory"]["failed"]
    if report["machine"].get("nvidia_smi"):
        report["nvidia_smi_after"] = nvidia_smi()
    report["seconds"] = clock.spent()
    report["failures"] = failures
    path = arguments.json
    if path is None and not arguments.interpret:
        RESULTS.mkdir(exist_ok=True)
        parts = report["machine"]["device"].replace(" ", "-"), torch.__version__, report["machine"]["triton"]
        name = "gate" if arguments.part in ("all", "attention") else f"gate-{arguments.part}"
        name += f"-{SCHEDULE}" if SCHEDULE else ""
        path = RESULTS / "{}-{}-torch{}-triton{}.json".format(name, *parts)
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(f"wrote {path}")
    report_unreached(report)
    print("\n".join(["FAILED:", *failures]) if failures else f"passed, {cases_run(report)} cases")
    return int(bool(failures))


def memory_and_speed(report: dict[str, Any], device: torch.device, clock: Clock) -> None:
    print("peak memory of forward and backward, bf16, H 8, D 64, TISA, causal")
    try:
        report["memory"] = gate_speed.memory(device, lambda: clock.open(MEMORY_SHARE))
    except Exception as error:  # the report of what ran before is worth more
        report["memory"] = {"rows": [], "failed": [f"memory: {type(error).__name__}: {str(error)[:500]}"]}
    print("speed, bf16: forward; forward and backward")
    report["speed"] = gate_speed.speed(device, clock.open)


def slice_of(text: str) -> slice:
    return slice(*(int(part) if part else None for part in text.split(":")))


def planned(arguments: argparse.Namespace, device: torch.device) -> list[tuple[str, list[Any], float]]:
    """(part of the report, cases, share of the budget by the end of them)"""
    from . import gate_decode, gate_features, gate_floater, gate_mixing, gate_numerics, gate_spe

    parts = ("attention", "features", "decode", "mixing", "spe", "floater")
    with_attention, with_features, with_decode, with_mixing, with_spe, with_floater = (
        arguments.part in ("all", part) for part in parts
    )
    alone = arguments.part != "all"
    made: list[tuple[str, list[Any], float]] = []
    if arguments.interpret:
        made += [("numerics", list(gate_numerics.rehearsal()), NUMERICS_SHARE)] * with_attention
        made += [("features", list(gate_features.rehearsal())[arguments.cases], 1.0)] * with_features
        made += [("decode", list(gate_decode.rehearsal())[arguments.cases], 1.0)] * with_decode
        made += [("mixing", list(gate_mixing.rehearsal())[arguments.cases], 1.0)] * with_mixing
        made += [("spe", list(gate_spe.rehearsal())[arguments.cases], 1.0)] * with_spe
        return made + [("floater", list(gate_floater.rehearsal()), 1.0)] * with_floater
    first, every = (served(list(cases()), device) for cases in (gate_numerics.first_cases, gate_numerics.cases))
    if SCHEDULE:  # which 32 bits have no row of
        first, every = ([case for case in cases if bits_and_width(case)[0] == 16] for cases in (first, every))
    some = arguments.cases != slice(None)
    if alone and some:
        first, every = [], every[arguments.cases]
    # An attempt at another schedule is about numerics alone.
    numerics_end = 1.0 if alone and (SCHEDULE or some) else NUMERICS_SHARE
    mixing = served(list(gate_mixing.cases()), device)[arguments.cases]
    made += [("numerics", first, numerics_end if alone else FIRST_SHARE)] * with_attention
    features = served(list(gate_features.cases()), device)[arguments.cases]
    made += [("features", features, 1.0 if alone else FEATURES_SHARE)] * with_features
    decode = served(list(gate_decode.cases()), device)[arguments.cases]
    made += [("decode", decode, 1.0 if alone else DECODE_SHARE)] * with_decode
    made += [("mixing", mixing, 1.0 if alone else MIXING_SHARE)] * with_mixing
    made += [("spe", list(gate_spe.cases())[arguments.cases], 1.0 if alone else SPE_SHARE)] * with_spe
    made += [("floater", list(gate_floater.cases()), 1.0 if alone else FLOATER_SHARE)] * with_floater
    return made + [("numerics", every[len(first) :], numerics_end)] * with_attention


def cases_run(report: dict[str, Any]) -> int:
    return sum(len(report.get(part, {}).get("rows", [])) for part in PARTS)


def report_unreached(report: dict[str, Any]) -> None:
    for part in (*PARTS, "speed", "spe_speed"):
        if missing := report.get(part, {}).get("not_reached"):
            print(f"not reached in the budget, {part}: {len(missing)}: {'; '.join(missing[:6])}")
    if missing := report.get("configs", {}).get("not_covered"):
        print(f"config rows without a passing case: {', '.join(missing)}")


if __name__ == "__main__":
    sys.exit(main())
