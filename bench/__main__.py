"""`python -m bench`: the main job. Trains a small model with and without TISA, then times attention.

python -m bench              everything, under ten minutes on two CPU cores
python -m bench --quick      the same at toy size, under a minute: shows that it works, measures nothing
python -m bench attention    only the contest of attention

With options of their own (--help after the job shows them):
python -m bench extrapolate  eleven ways to tell positions, each far beyond its training length
python -m bench chomsky      the same ways on formal-language tasks, trained on short strings, tested on long ones
python -m bench dape         time and memory of DAPE and FIRE beside the same formula in plain PyTorch
python -m bench decode       one token against a cache of keys: time beside SDPA and the memory's floor
python -m bench speed        the table of goals on this GPU, its peers in the same run: speed, memory, first call
python -m bench spe          SineSPE and ConvSPE with linear attention: time, memory, error, a language model
python -m bench floater      FLOATER: the cost of position vectors from a neural ODE, a language model
python -m bench listops      ListOps with linear attention: learned absolute positions against SineSPE
python -m bench skip         ALiBi and others without the keys too far away to matter: share, error, time
python -m bench ring         a sequence over several processes: equality, traffic, balance
python -m bench gate         the kernels against float64
python -m bench kernels      what the kernels compile to, without a GPU; --model: what binds them, and predictions
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    if argv[:1] == ["gate"]:
        from .gate import main as gate

        return gate(argv[1:]) or 0
    if argv[:1] == ["dape"]:
        from .mixing_speed import main as dape

        return dape(argv[1:])
    if argv[:1] == ["decode"]:
        from .decode import main as decode

        return decode(argv[1:])
    if argv[:1] == ["kernels"]:
        from .kernels import main as kernels

        return kernels(argv[1:]) or 0
    if argv[:1] == ["extrapolate"]:
        from .extrapolate import main as extrapolate

        return extrapolate(argv[1:])
    if argv[:1] == ["chomsky"]:
        from .chomsky import main as chomsky

        return chomsky(argv[1:])
    if argv[:1] == ["speed"]:
        from .speed import main as speed

        return speed(argv[1:])
    if argv[:1] == ["spe"]:
        from .spe import main as spe

        return spe(argv[1:])
    if argv[:1] == ["floater"]:
        from .floater import main as floater

        return floater(argv[1:])
    if argv[:1] == ["listops"]:
        from .listops import main as listops

        return listops(argv[1:])
    if argv[:1] == ["skip"]:
        from .skip import main as skip

        return skip(argv[1:])
    if argv[:1] == ["ring"]:
        from .ring import main as ring

        return ring(argv[1:])

    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", nargs="?", choices=["all", "model", "attention"], default="all")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder for results"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    from .main_job import run

    return run(options.job, options.quick, options.device, options.output, options.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
