"""`python -m bench chomsky`: formal-language tasks, trained on short strings and tested on long ones.

An encoder reads a string and as many placeholders as the answer is long, at which it says the answer. It is trained
on lengths 1 to 40 and scored by its mean accuracy over lengths 41 to 500.
Every finished model is kept at once: after an interruption the same command goes on.

python -m bench chomsky                              on a GPU all tasks; on a CPU two tasks, smaller
python -m bench chomsky --quick                      two tasks, two methods, short strings: a minute, to see it work
python -m bench chomsky --tasks parity,reverse --methods alibi,dape-alibi --seeds 3 --steps 200000
"""

from __future__ import annotations

import argparse
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chomsky_report as report
from .byte_model import Size, Transformer
from .chomsky_tasks import TASKS, Task
from .machine import describe, slug
from .positions import POSITIONS, attention_of, chosen
from .progress import progress
from .resume import Finished

VERSION = 1  # to be raised when the code changes what a plan gives: results of another version are not reused
METHODS = ("none", "tisa", "alibi", "kerple", "fire", "dape-alibi", "dape-kerple", "dape-fire")


class Plan(NamedTuple):
    size: Size
    batch_size: int
    steps: int
    longest: int  # trained on lengths from 1 to this one
    tested: tuple[int, ...]  # lengths
    samples: int  # strings per tested length
    learning_rate: float = 1e-3
    clip: float = 1.0


def plan(quick: bool, device: str) -> Plan:
    # An answer may be twice as long as its string.
    size = Size(width=64, depth=5, num_heads=8, max_length=1500, fire_length=40)
    if quick:
        return Plan(size._replace(depth=2), 32, 200, longest=12, tested=(13, 24, 48), samples=64)
    if device == "cuda":
        return Plan(size, 128, 3000, longest=40, tested=tuple(range(41, 501, 3)), samples=64)
    return Plan(size, 32, 1000, longest=40, tested=(41, 60, 100, 150, 200, 300, 400, 500), samples=64)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench chomsky",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--tasks", help="some of: " + ",".join(TASKS))
    parser.add_argument("--methods", help="some of: " + ",".join(POSITIONS))
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--steps", type=int, help="of training (200000 as published)")
    parser.add_argument("--fresh", action="store_true", help="start over: nothing finished is reused")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder for results"
    )
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    small = options.quick or device == "cpu"
    default = METHODS
    if small:
        default = ("kerple", "dape-kerple") if options.quick else ("alibi", "kerple", "dape-alibi", "dape-kerple")
    tasks = ("even-pairs", "missing-duplicate") if small else tuple(TASKS)
    if options.tasks:
        tasks = tuple(name.strip() for name in options.tasks.split(","))
        if unknown := [name for name in tasks if name not in TASKS]:
            parser.error(f"no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    try:
        methods = chosen(options.methods, default)
    except ValueError as error:
        parser.error(str(error))
    todo = plan(options.quick, device)
    stem = ("quick-" if options.quick else "") + "chomsky"
    if options.steps and options.steps != todo.steps:
        todo = todo._replace(steps=options.steps)
        stem += f"-{options.steps}-steps"
    return run(todo, tasks, methods, range(options.seeds), device, options.output, stem, options.fresh)


def run(
    todo: Plan,
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: range,
    device: str,
    output: Path,
    stem: str = "chomsky",
    fresh: bool = False,
) -> int:
    """0, or 130 when interrupted."""
    start = time.perf_counter()
    machine = describe(device)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{stem}-{slug(machine)}.json"
    finished = Finished(path, whole_plan(todo, machine), fresh)
    models = [(task, kind, seed) for seed in seeds for task in tasks for kind in methods]
    left = [model for model in models if name_of(*model) not in finished]
    print(
        f"{machine['device_name']}, {machine['cores']} cores, torch {machine['torch']}\n{len(models)} models,"
        f" {len(models) - len(left)} of them finished before; {todo.steps} steps on lengths 1 to {todo.longest}",
        flush=True,
    )
    try:
        for number, (task, kind, seed) in enumerate(left, 1):
            print(f"{number}/{len(left)}: {TASKS[task].label}, {POSITIONS[kind].label}, seed {seed}", flush=True)
            finished.add(name_of(task, kind, seed), one_model(todo, task, kind, seed, device))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last finished model")
        return 130

    finished.look()
    found = report.gather(finished.plan, list(finished.parts.values()))
    finished.finish({"machine": machine, **found, "seconds": time.perf_counter() - start})
    print(f"\n{report.text(found)}\n\nwritten: {path}")
    return 0


def name_of(task: str, kind: str, seed: int) -> str:
    return f"{task}, {kind}, seed {seed}"


def whole_plan(todo: Plan, machine: dict[str, Any]) -> dict[str, Any]:
    """All that one model's result depends on beside its task, its method and its seed."""
    return {
        "job": "chomsky",
        "version": VERSION,
        **todo._asdict(),
        "size": todo.size._asdict(),
        "device": machine["device_name"],
        "torch": machine["torch"],
        "posattn": machine["posattn"],
    }


def one_model(todo: Plan, name: str, kind: str, seed: int, device: str) -> dict[str, Any]:
    task = TASKS[name]
    # One token more than the task has: the placeholder.
    model = Transformer(kind, todo.size, seed, attention_of(kind, causal=False), task.inputs + 1, task.outputs)
    with progress("training", todo.steps, "accuracy") as tell:
        training = train(model.to(device), task, todo, seed, device, tell)
    with progress("testing", len(todo.tested), "accuracy") as tell:
        accuracy = test(model, name, todo, device, tell)
    return {
        "task": name,
        "kind": kind,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "score": sum(accuracy) / len(accuracy),
        "accuracy": accuracy,
        **training,
    }


def answer(model: Transformer, task: Task, x: Tensor, y: Tensor) -> Tensor:
    """Logits at the placeholders: (B, m, outputs)."""
    placeholders = x.new_full(y.shape, task.inputs)
    return model(torch.cat([x, placeholders], dim=1))[:, -y.shape[1] :]


def train(model: Transformer, task: Task, todo: Plan, seed: int, device: str, tell: Any) -> dict[str, Any]:
    """Train in place, one length a batch; the accuracy is that of the last tenth of the steps."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=todo.learning_rate)
    correct = []
    start = time.perf_counter()
    for step in range(todo.steps):
        length = int(torch.randint(1, todo.longest + 1, (), generator=generator))
        x, y = (t.to(device) for t in task.make(todo.batch_size, length, generator))
        logits = answer(model, task, x, y)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), todo.clip)
        optimizer.step()
        correct.append((logits.detach().argmax(-1) == y).float().mean().item())
        tell(step + 1, correct[-1])
    last = correct[-max(1, todo.steps // 10) :]
    return {"trained_accuracy": sum(last) / len(last), "seconds": time.perf_counter() - start}


@torch.no_grad()
def test(model: Transformer, name: str, todo: Plan, device: str, tell: Any) -> list[float]:
    """Accuracy at each tested length: the share of right tokens, on the same strings for every model."""
    model.eval()
    found = []
    for length in todo.tested:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {length}".encode()))
        x, y = (t.to(device) for t in TASKS[name].make(todo.samples, length, generator))
        right = answer(model, TASKS[name], x, y).argmax(-1) == y
        found.append(right.float().mean().item())
        tell(len(found), found[-1])
    return found
