"""`python -m bench skip`: causal attention with a bias that decays, with and without the pairs that cannot matter.

For each bias and length: the share of a kernel's tiles, by head, that is left out; the error of out and all gradients
against float64 with all pairs, beside that of the same call with all pairs; the time of both, beside SDPA without any
bias, in turns. One batch entry; queries, keys and values are normal. On the CPU fp32, D 64; on a GPU bf16, D 128.
ALiBi has its published slopes, KERPLE (both kinds) starts as published, and "TISA, strong" has kernels about offset 0,
from amplitude 0.1 in the first head to 20 in the last; the gradients of their parameters are among all gradients.
The job stops timing at its budget, and says what it did not reach.

python -m bench skip                       under three minutes on two CPU cores
python -m bench skip --quick               one small length: shows that it works
python -m bench skip --lengths 65536 --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import posattn
from posattn import near
from posattn.strips import Rule, make_line

from .machine import describe, slug
from .measure import Patience, interleaved, seconds_of, summary
from .report import markdown

RESULTS = Path(__file__).parent / "results"
TILE = (128, 128)  # rows and keys of the forward kernel on a Hopper, head dims 64 and 128
WAYS = {"all pairs": False, "skipping": True}
SDPA = "SDPA, no bias"
PASSES = ("forward", "both")  # both: forward and backward


def _alibi(heads: int) -> posattn.Bias:
    return posattn.ALiBi(heads)


def _kerple(kind: str) -> Callable[[int], posattn.Bias]:
    return lambda heads: posattn.KERPLE(heads, kind=kind)


def _strong_tisa(heads: int) -> posattn.Bias:
    bias = posattn.TISA(heads)
    with torch.no_grad():
        bias.amplitudes.copy_(torch.linspace(0.1, 20.0, heads)[:, None].expand_as(bias.amplitudes))
        bias.offsets.mul_(0.2)
    return bias


class Case(NamedTuple):
    name: str
    heads: int
    make: Callable[[int], posattn.Bias]


CASES = (
    Case("ALiBi", 8, _alibi),
    Case("ALiBi", 16, _alibi),
    Case("KERPLE, log", 8, _kerple("log")),
    Case("KERPLE, power", 8, _kerple("power")),
    Case("TISA, strong", 8, _strong_tisa),
)


class Call:
    """Tensors of one case and length, and what is done with them."""

    def __init__(self, case: Case, length: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        dtype, dim = (torch.bfloat16, 128) if device == "cuda" else (torch.float32, 64)
        shape = (4, 1, case.heads, length, dim)
        *self.qkv, self.grad = (torch.randn(shape).to(device, dtype)).unbind()
        torch.manual_seed(0)
        self.bias = case.make(case.heads).to(device)

    def attend(self, skip: bool, qkv: list[Tensor], bias: posattn.Bias) -> tuple[Tensor, Tensor]:
        made = posattn.attention(*qkv, bias, is_causal=True, skip_negligible=skip, return_lse=True)
        assert isinstance(made, tuple)
        return made

    def gradients(self, skip: bool | None, double: bool = False) -> dict[str, Tensor]:
        """out and what follows of `grad`; skip None: SDPA's, without bias; double: in float64."""
        qkv, grad, bias = self.qkv, self.grad, self.bias
        if double:
            qkv, grad = [t.double() for t in qkv], grad.double()
            bias = deepcopy(bias).double()
        inputs = [t.detach().requires_grad_() for t in qkv]
        wanted = dict(zip(("dq", "dk", "dv"), inputs))
        if skip is None:
            out = F.scaled_dot_product_attention(*inputs, is_causal=True)
        else:
            out = self.attend(skip, inputs, bias)[0]
            wanted |= {f"d{name}": p for name, p in bias.named_parameters()}
        found = torch.autograd.grad(out, list(wanted.values()), grad)
        return {"out": out.detach(), **dict(zip(wanted, found))}

    def runs(self, which: str) -> dict[str, Callable[[], Any]]:
        def forward(skip: bool | None) -> Any:
            with torch.no_grad():
                if skip is None:
                    return F.scaled_dot_product_attention(*self.qkv, is_causal=True)
                return self.attend(skip, self.qkv, self.bias)

        one = forward if which == "forward" else self.gradients
        return {name: (lambda skip=skip: one(skip)) for name, skip in (*WAYS.items(), (SDPA, None))}


@torch.no_grad()
def shares(call: Call, backward: bool) -> dict[str, list[float]]:
    """By head, the part of a causal mask's tiles that nobody needs: forward, and backward, which knows the lse."""
    q, k = call.qkv[:2]
    length = q.shape[2]
    rule = Rule(length, length, 0, -1, 0)
    slopes = call.bias.slopes()
    table = None if slopes is not None else call.bias.table(length, length)
    line = make_line(rule, table, slopes, call.bias.symmetric, q, torch.float32)
    scale = q.shape[3] ** -0.5
    known: dict[str, Tensor | None] = {"forward": None}
    if backward:
        known["backward"] = call.attend(True, call.qkv, call.bias)[1]
    found = {}
    for name, total in known.items():
        needed = near.needed_keys(q, k, line, rule, key_mask=None, scale=scale, lse=total)
        found[name] = tiles_left_out(*needed, length)
    return found


def tiles_left_out(first: Tensor, last: Tensor, length: int) -> list[float]:
    rows, keys = TILE
    step = rows // near.ROWS
    end = torch.arange(rows, length + rows, rows, device=first.device).clamp(max=length)
    visible = end.add(keys - 1).div(keys, rounding_mode="floor")
    pad = -first.shape[2] % step
    low = F.pad(first, (0, pad), value=length).unflatten(2, (-1, step)).amin(3)
    high = torch.minimum(F.pad(last, (0, pad)).unflatten(2, (-1, step)).amax(3), end)
    needed = high.add(keys - 1).div(keys, rounding_mode="floor") - low.div(keys, rounding_mode="floor")
    part: Tensor = 1 - needed.sum((0, 2)) / (visible.sum() * first.shape[0])
    return part.tolist()


def errors(call: Call) -> dict[str, dict[str, float]]:
    """Of each way and each result, the largest error over the largest number."""
    exact = call.gradients(False, double=True)
    made = {}
    for name, skip in WAYS.items():
        found = call.gradients(skip)
        made[name] = {
            part: ((found[part].double() - want).abs().max() / want.abs().max()).item()
            for part, want in exact.items()
        }
    return made


def times(call: Call, patience: Patience) -> dict[str, dict[str, Any]]:
    made = {}
    for which in PASSES:
        runs = call.runs(which)
        first = {name: seconds_of(run, call.device) for name, run in runs.items()}
        taken = interleaved(runs, first, call.device, patience)
        made[which] = {name: summary(seconds) for name, seconds in taken.items()}
    return made


def text(rows: list[dict[str, Any]]) -> str:
    head = ["bias, heads, length", "tiles left out: forward", "by head"]
    head += ["backward", "forward: all pairs", "skipping", "SDPA", "both: all pairs", "skipping", "SDPA"]
    head += ["error: all pairs", "skipping"]
    table = []
    for row in rows:
        share = row["shares"]
        line = [f"{row['bias']}, {row['heads']}, {row['length']}"]
        forward, backward = share["forward"], share.get("backward")
        line += [
            f"{_mean(forward):.0%}",
            " ".join(f"{100 * part:.0f}" for part in forward),
            f"{_mean(backward):.0%}" if backward else "-",
        ]
        for which in PASSES:
            for name in (*WAYS, SDPA):
                line.append(f"{row['times'][which][name]['median'] * 1e3:,.1f} ms" if row["times"] else "-")
        for name in WAYS:
            line.append(f"{max(row['errors'][name].values()):.1e}" if row["errors"] else "-")
        table.append(line)
    return markdown(head, table)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "bench skip", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small length: shows that it works")
    parser.add_argument("--lengths", type=int, nargs="+", help="2048 to 32768 by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument(
        "--budget", type=float, default=150, metavar="SECONDS", help="when to stop timing (150)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    lengths = options.lengths or ([512] if options.quick else [2048 << n for n in range(5)])
    compared = 4096  # the longest that is compared with float64
    patience = Patience(
        fewest=3, most=3 if options.quick else 9, seconds=0.05 if options.quick else 0.5, slow=8.0
    )
    machine = describe(device)
    print(f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}", flush=True)

    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    spent: dict[Case, float] = {}  # of the last length, seconds by length^2
    for length in lengths:
        for case in CASES:
            expected = spent.get(case, 0.0) * length**2
            timed = time.perf_counter() - start + expected <= options.budget
            label = f"{case.name}, {case.heads}, {length}"
            if not timed:
                missing.append(label)
            began = time.perf_counter()
            call = Call(case, length, device)
            row: dict[str, Any] = dict(
                bias=case.name, heads=case.heads, length=length, shares=None, errors=None
            )
            row["times"] = times(call, patience) if timed else None
            if timed:
                spent[case] = (time.perf_counter() - began) / length**2
            if timed and length <= compared:
                row["errors"] = errors(call)
            row["shares"] = shares(call, timed)
            rows.append(row)
            print(
                f"  {label}: {time.perf_counter() - began:.1f} s{'' if timed else ', not timed'}", flush=True
            )
    results = {
        "machine": machine, "tile": TILE, "rows": rows, "not_timed": missing,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{'quick-' if options.quick else ''}skip-{slug(machine)}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"\n{text(rows)}\n\nerror: of out and all gradients, relative, the largest\nwritten: {path}")
    if missing:
        print(f"not timed, the budget was spent: {'; '.join(missing)}")
    return 0
