"""One case of attention, a few times over, for a profiler: `ncu ... python -m bench.speed_once --bias KERPLE`.

Without a profiler: `--kernels` prints the time of each kernel by torch.profiler, forward and backward, and beside each
the time that its products alone would take at 790 TFLOP/s. `--sample PATH`: where its warps stand and why they wait, by
Triton's profiler (samples of the program counter, where the machine allows them).
"""

from __future__ import annotations

import argparse
import sys

from .mixing_where import by_kernel, device_events
from .speed_parts import place_of
from .speed_peers import BIASES, ours, with_bias
from .speed_timing import Place, Timer, both

# kernel -> products of a score, by the head dim
PRODUCTS = {"attend_forward": 4, "attend_forward_specialised": 4, "attend_backward_rows": 6, "attend_backward_cols": 8}
PEAK = 790e12


def floor_ms(kernel: str, place: Place) -> float | None:
    products = PRODUCTS.get(kernel)
    return None if products is None else products / 4 * place.flop() / PEAK * 1e3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.speed_once", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--bias", choices=["none", *BIASES], default="KERPLE")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--kernels", action="store_true", help="print the time of each kernel")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--sample", metavar="PATH", help="write PATH.hatchet (see proton-viewer)")
    options = parser.parse_args(argv)
    place, timer = place_of(options.dim, options.length), Timer(options.device)
    if options.device == "cpu":
        place = place._replace(batch=1, heads=2)
    peer = ours(place, options.device)
    if options.bias != "none":
        peer = with_bias(place, options.device, options.bias)
    call = both(peer, timer.inputs(place, 0))
    for _ in range(options.times):
        call()
    timer.wait()
    if options.sample:
        from triton import profiler

        profiler.start(options.sample, backend="cupti", mode="pcsampling")
        call()
        timer.wait()
        profiler.finalize()
    if options.kernels and options.device == "cuda":
        rows = by_kernel(device_events(call))
        total = sum(row["ms"] for row in rows)
        print(f"{place} B {place.batch} H {place.heads}, {options.bias}: {total:.3f} ms in kernels")
        for row in rows[:12]:
            floor = floor_ms(row["kernel"], place)
            beside = "" if floor is None else f"  products alone {floor:.3f} ms, {row['ms'] / floor:.2f} times that"
            print(f"  {row['ms']:9.3f} ms {row['launches']:4}  {row['kernel'][:60]}{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
