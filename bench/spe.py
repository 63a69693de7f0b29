"""`python -m bench spe`: stochastic positional encoding (SineSPE, ConvSPE) with linear attention.

--part speed      time and memory beside the same formula with the codes of all positions in memory, linear attention
                  without positions, and softmax attention, up to 131072 positions
--part quality    the error of the encoding against the number of realisations
--part language   byte models with linear attention, told positions in four ways, far beyond their training length
Each part has results and a plot of its own; an interrupted one goes on with the same command.

python -m bench spe             all three: about 40 minutes on two idle CPU cores
python -m bench spe --quick     all three at toy size, one to two minutes: shows that it works
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import spe_language, spe_quality, spe_speed
from .machine import describe, slug

PARTS = ("speed", "quality", "language")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench spe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given twice")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--seeds", type=int, help="of the language models, from 0 (default: 2; quick: 1)")
    parser.add_argument("--kinds", help="of the language models, some of: " + ",".join(spe_language.KINDS))
    parser.add_argument("--workers", type=int, help="language models at once (default: one a core; on a GPU 1)")
    parser.add_argument("--budget", type=float, default=1200, metavar="SECONDS", help="of speed: when to stop (1200)")
    parser.add_argument("--fresh", action="store_true", help="start over: nothing finished is reused")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    default = Path(__file__).parent / "results"
    parser.add_argument("--output", "--out", type=Path, default=default, help="folder for results")
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kinds = tuple(spe_language.KINDS)
    if options.kinds:
        kinds = tuple(name.strip() for name in options.kinds.split(","))
        if unknown := [name for name in kinds if name not in spe_language.KINDS]:
            parser.error(f"no kind {', '.join(unknown)}; there are {', '.join(spe_language.KINDS)}")

    machine = describe(device)
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.part or PARTS:
        print(f"== {part}", flush=True)
        path = options.output / f"{'quick-' if options.quick else ''}spe-{part}-{slug(machine)}.json"
        if part == "speed":
            code = spe_speed.measure(path, machine, options.quick, options.fresh, options.budget)
        elif part == "quality":
            code = spe_quality.measure(path, machine, options.quick)
        else:
            seeds = options.seeds or (1 if options.quick else 2)
            fresh, workers = options.fresh, options.workers
            code = spe_language.measure(path, machine, options.quick, fresh, seeds, kinds, workers)
        if code:
            return code
    return 0
