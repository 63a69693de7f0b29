"""`python -m bench ring`: a sequence spread over processes, against one process and against the formula of its traffic.

Each case is computed by all processes and by the first one alone. What is sent is counted where it is handed to
torch.distributed: out, lse and all gradients must agree, and each process's bytes be those of the formula.

python -m bench ring                                    four gloo processes on this machine's CPU
python -m bench ring --quick                            the same at toy size
torchrun --nproc-per-node 8 -m bench ring --length 65536 --dtype bfloat16        one process a GPU, NCCL
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import posattn
from posattn.distributed import context_parallel_attention, gather, layout, shard

from .machine import describe, slug
from .report import markdown

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 4e-2}
BIASES = {
    "none": lambda heads: None,
    "tisa": posattn.TISA,
    "alibi": posattn.ALiBi,
    "fire": lambda heads: posattn.FIRE(heads, hidden=16),
    "dape": lambda heads: posattn.DAPE(heads, posattn.KERPLE(heads), hidden=16),
}


class Plan(NamedTuple):
    length: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: str


class Case(NamedTuple):
    bias: str
    order: str
    window: int | None = None


CASES = [Case(bias, order) for bias in BIASES for order in layout.ORDERS] + [
    Case("tisa", "contiguous", window=100)
]


class Traffic:
    """Bytes that this process hands over to be sent, and to be summed with everyone's."""

    def __init__(self) -> None:
        self.sent = self.summed = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        batch, reduce = dist.batch_isend_irecv, dist.all_reduce

        def counting_batch(messages: list[Any]) -> Any:
            self.sent += sum(m.tensor.numel() * m.tensor.itemsize for m in messages if m.op is dist.isend)
            return batch(messages)

        def counting_reduce(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
            self.summed += tensor.numel() * tensor.itemsize
            return reduce(tensor, *args, **keywords)

        dist.batch_isend_irecv, dist.all_reduce = counting_batch, counting_reduce
        try:
            yield
        finally:
            dist.batch_isend_irecv, dist.all_reduce = batch, reduce


def formula(plan: Plan, case: Case, rank: int, world: int, bias: Any) -> dict[str, int]:
    """Bytes a process sends: the keys and values of `hops` shards, with 32-bit gradients of as many in backward."""
    right, left = 0, -1 if case.window is None else case.window
    lengths = [layout.shard_length(plan.length, world, r, case.order) for r in range(world)]
    hops = layout.hops(plan.length, world, case.order, left, right)
    if case.window is None:
        assert hops == world - 1
    a_position = plan.key_heads * 2 * plan.head_dim
    passed = sum(lengths[(rank - step) % world] for step in range(hops))  # its own, then what came
    followed = sum(lengths[(rank - step) % world] for step in range(1, hops + 1))
    keys, element = (
        passed * a_position * getattr(torch, plan.dtype).itemsize,
        max(4, getattr(torch, plan.dtype).itemsize),
    )
    return {
        "forward": keys,
        "backward": keys + followed * a_position * element,
        "summed": summed_numbers(plan, bias) * element if world > 1 else 0,
    }


def summed_numbers(plan: Plan, bias: Any) -> int:
    """Of the parts of a bias that are differentiated: each process has them whole, and they are summed once."""
    offsets = 2 * plan.length - 1
    if isinstance(bias, posattn.DAPE):
        return sum(p.numel() for p in bias.parameters(recurse=False)) + summed_numbers(plan, bias.base)
    if isinstance(bias, posattn.FIRE):
        return offsets + plan.length + plan.heads * (bias.hidden + 1) * 2
    return plan.heads * offsets if isinstance(bias, (posattn.TISA, posattn.KERPLE)) else 0


def visible_pairs(plan: Plan, case: Case, world: int) -> list[int]:
    """Of every process: its share of the work."""
    left = plan.length if case.window is None else case.window
    work = []
    for rank in range(world):
        rows = torch.cat(
            [torch.arange(p.start, p.stop) for p in layout.pieces(plan.length, world, rank, case.order)]
        )
        work.append(int((rows.clamp(max=left) + 1).sum()))
    return work


def tensors(plan: Plan, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, plan.dtype)
    shapes = [
        (1, h, plan.length, plan.head_dim) for h in (plan.heads, plan.key_heads, plan.key_heads, plan.heads)
    ]
    return [torch.randn(shape, dtype=torch.float32).to(device, dtype) for shape in shapes]


def make_bias(name: str, plan: Plan, device: str) -> Any:
    torch.manual_seed(1)
    bias = BIASES[name](plan.heads)
    return (
        None if bias is None else bias.to(device, torch.float64 if plan.dtype == "float64" else torch.float32)
    )


def measure(plan: Plan, case: Case, device: str) -> dict[str, Any]:
    """One case, forward and backward, on all processes; the result is the same everywhere but for the comparison."""
    rank, world = dist.get_rank(), dist.get_world_size()
    *whole, weight = tensors(plan, device)
    bias = make_bias(case.bias, plan, device)
    parameters = [] if bias is None else list(bias.parameters())
    here = [shard(t, 2, order=case.order).clone().requires_grad_() for t in whole]
    own_weight = shard(weight, 2, order=case.order)
    keywords: dict[str, Any] = dict(is_causal=True, enable_gqa=True)
    if case.window is not None:
        keywords["window"] = (case.window, None)
    forward, backward = Traffic(), Traffic()
    wait(device)
    start = time.perf_counter()
    with forward.counted():
        out = context_parallel_attention(*here, bias, order=case.order, length=plan.length, **keywords)
    with backward.counted():
        found = torch.autograd.grad((out * own_weight).sum(), [*here, *parameters])
    wait(device)
    seconds = time.perf_counter() - start

    got = [gather(t, 2, plan.length, order=case.order) for t in (out, *found[:3])] + list(found[3:])
    error = alone = 0.0
    if rank == 0:
        whole = [t.requires_grad_() for t in whole]
        start = time.perf_counter()
        expected = posattn.attention(*whole, bias, **keywords)
        gradients = torch.autograd.grad((expected * weight).sum(), [*whole, *parameters])
        if device == "cuda":
            torch.cuda.synchronize()
        alone = time.perf_counter() - start
        error = max(
            ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()
            for a, b in zip(got, (expected, *gradients))
        )
    expected_bytes = formula(plan, case, rank, world, bias)
    counted = {"forward": forward.sent, "backward": backward.sent, "summed": forward.summed + backward.summed}
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, {"counted": counted, "formula": expected_bytes, "seconds": seconds})
    work = visible_pairs(plan, case, world)
    return {
        **case._asdict(),
        "processes": gathered,
        "visible_pairs": work,
        "balance": sum(work) / (world * max(work)),
        "relative_error": error,
        "equal": error <= TOLERANCE[plan.dtype],
        "traffic_as_formula": all(p["counted"] == p["formula"] for p in gathered),
        "seconds": max(p["seconds"] for p in gathered),
        "seconds_alone": alone,
    }


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def text(rows: list[dict[str, Any]]) -> str:
    head = [
        "bias, order",
        "error",
        "K/V forward",
        "backward",
        "bias summed",
        "as formula",
        "visible pairs",
        "balance",
    ]
    table = []
    for row in rows:
        name = f"{row['bias']}, {row['order']}" + (
            f", window {row['window']}" if row["window"] is not None else ""
        )
        most = {
            key: max(p["counted"][key] for p in row["processes"]) for key in ("forward", "backward", "summed")
        }
        table.append(
            [
                name,
                f"{row['relative_error']:.1e}",
                *(f"{most[key]:,}" for key in ("forward", "backward", "summed")),
                "yes" if row["traffic_as_formula"] else "NO",
                " ".join(f"{n:,}" for n in row["visible_pairs"]),
                f"{row['balance']:.3f}",
            ]
        )
    return markdown(head, table)


def work(plan: Plan, output: Path, quick: bool, device: str) -> int:
    """What every process does; the first one reports."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = []
    for case in CASES:
        rows.append(measure(plan, case, device))
        if rank == 0:
            print(
                f"  {case.bias}, {case.order}: {rows[-1]['seconds']:.3g} s, alone {rows[-1]['seconds_alone']:.3g} s"
            )
    passed = all(row["equal"] and row["traffic_as_formula"] for row in rows)
    if rank == 0:
        machine = describe(device)
        backend = dist.get_backend()
        results = {
            "machine": machine,
            "plan": plan._asdict(),
            "processes": world,
            "backend": backend,
            "rows": rows,
        }
        path = output / f"{'quick-' if quick else ''}ring-{slug(machine)}.json"
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**results, "passed": passed}, indent=1) + "\n", encoding="utf-8")
        print(f"\n{world} processes, {backend}; bytes are the most that one process sends\n\n{text(rows)}\n")
        print(f"{'passed' if passed else 'FAILED'}; written: {path}", flush=True)
    return 0 if passed else 1


def one_of(rank: int, world: int, store: str, plan: Plan, output: Path, quick: bool) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        code = work(plan, output, quick, "cpu")
    finally:
        dist.destroy_process_group()
    sys.exit(code)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "bench ring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--processes", type=int, default=4, help="to start, unless torchrun did")
    parser.add_argument("--length", type=int, help="of the whole sequence, any number")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder for results"
    )
    options = parser.parse_args(argv)
    if options.head_dim * getattr(torch, options.dtype).itemsize % 16:
        parser.error("--head-dim must fill whole 16 bytes")
    length = options.length or (203 if options.quick else 2051)
    plan = Plan(length, options.heads, options.key_heads, options.head_dim, options.dtype)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            return work(plan, options.output, options.quick, "cuda" if cuda else "cpu")
        finally:
            dist.destroy_process_group()

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.processes, f"{folder}/store", plan, options.output, options.quick)
        processes = [
            context.Process(target=one_of, args=(rank, *arguments)) for rank in range(options.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return int(any(process.exitcode for process in processes))
