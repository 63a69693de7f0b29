"""`python -m bench floater`: position vectors from a neural ODE (FLOATER).

--part speed      solve time, evaluations, error and memory to 65536 positions beside the published way; evaluation
                  with kept vectors, the three ways to gradients, a transformer's training step
--part language   a language model with sinusoidal, learned and FLOATER positions, beyond its training length
Each part has results and a plot of its own; an interrupted one goes on with the same command.

python -m bench floater             both
python -m bench floater --quick     both at toy size: shows that it works
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .machine import describe, installed_version, slug

PARTS = ("speed", "language")


def without_output(argv: list[str]) -> list[str]:
    """The arguments but for the folder of the results, which is a place on one machine."""
    kept: list[str] = []
    name = "--o"  # argparse takes the beginning of a name for it
    for before, argument in zip(["", *argv], argv):
        if not argument.startswith(name) and not (before.startswith(name) and "=" not in before):
            kept.append(argument)
    return kept


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench floater", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given twice")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--seeds", type=int, help="of the language models, from 0 (default: 2; quick: 1)")
    told = "of speed: no part begins after it (900)"
    parser.add_argument("--budget", type=float, default=900, metavar="SECONDS", help=told)
    parser.add_argument("--fresh", action="store_true", help="start over: nothing finished is reused")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    default = Path(__file__).parent / "results"
    parser.add_argument("--output", "--out", type=Path, default=default, help="folder for results")
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")

    machine = {**describe(device), "torchdiffeq": installed_version("torchdiffeq")}
    machine["command"] = " ".join(["python", "-m", "bench", "floater", *without_output(argv)])
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.part or PARTS:
        print(f"== {part}", flush=True)
        path = options.output / f"{'quick-' if options.quick else ''}floater-{part}-{slug(machine)}.json"
        if part == "speed":
            from . import floater_speed

            code = floater_speed.measure(path, machine, options.quick, options.fresh, options.budget)
        else:
            from . import floater_language

            seeds = options.seeds or (1 if options.quick else 2)
            code = floater_language.measure(path, machine, options.quick, options.fresh, seeds)
        if code:
            return code
    return 0
