"""`python -m bench listops`: ListOps with linear attention, learned absolute positions against SineSPE.

Expressions such as [MAX 2 9 [MIN 4 7 ] 0 ] are made here by the rules of Long Range Arena, and an encoder says their
values. Brackets are kept. The published ListOps runs of stochastic positional encoding read them without brackets,
which its authors call essentially impossible to solve, so this is a new experiment and reproduces no number of theirs.

python -m bench listops            short expressions and small models on a CPU: ten minutes on two cores
python -m bench listops --full     as published: 500 to 2000 tokens, 6 tied layers of 512, 10000 steps; for a GPU
python -m bench listops --quick    toy size, a minute: shows that it works
An interrupted run goes on with the same command after the last finished model.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .listops_data import Expressions, Rules, make_splits, text_of
from .listops_model import KINDS, Encoder, Shape, groups
from .machine import describe, slug
from .progress import progress
from .resume import Finished, name_of
from .workers import each

VERSION = 1  # to be raised when the code changes what a plan gives: results of another version are not reused
DEFAULT = ("absolute", "sine")
POOL = 16  # batches drawn together and sorted by length, so that little is padding


class Plan(NamedTuple):
    """As published when nothing is given."""

    rules: Rules = Rules()
    shape: Shape = Shape()
    train: int = 96000
    validation: int = 2000
    test: int = 2000
    batch_size: int = 8
    steps: int = 10000
    warmup: int = 1000
    rate: float = 0.0125  # at step s: rate min(1, s / warmup) / sqrt(max(s, warmup))
    decay: float = 0.1
    half: bool = False  # bfloat16 autocast

    def rate_at(self, step: int) -> float:
        return self.rate * min(1.0, (step + 1) / self.warmup) / math.sqrt(max(step + 1, self.warmup))


def plan(size: str, device: str) -> Plan:
    """Of size "full", "small" or "quick"."""
    if size == "full":
        return Plan(half=device == "cuda")
    rules = Rules(shorter=20, longer=80)
    shape = Shape(width=64, depth=3, num_heads=4, hidden=256, tied=False, dropout=0.0, longest=rules.longer)
    small = Plan(rules, shape, 64000, 1000, 2000, batch_size=32, steps=2500, warmup=150, rate=0.03, decay=0.01)
    if size == "quick":
        rules, shape = rules._replace(longer=40), shape._replace(depth=2, realizations=32, sines=5)
        return small._replace(rules=rules, shape=shape, train=2000, validation=200, test=400, steps=80, warmup=20)
    return small


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench listops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="toy size")
    which.add_argument("--full", action="store_true", help="the published sizes")
    parser.add_argument("--kinds", help=f"some of {','.join(KINDS)} (default: {','.join(DEFAULT)})")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default: 2; quick and full: 1)")
    parser.add_argument("--steps", type=int, help="of training, instead of the plan's")
    parser.add_argument("--pooling", choices=["cls", "mean"], default="cls", help="what the value is read from")
    parser.add_argument("--workers", type=int, help="models at once (default: one a core; on a GPU 1)")
    parser.add_argument("--fresh", action="store_true", help="start over: nothing finished is reused")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    default = Path(__file__).parent / "results"
    parser.add_argument("--output", "--out", type=Path, default=default, help="folder for results")
    options = parser.parse_args(argv)
    kinds = DEFAULT
    if options.kinds:
        kinds = tuple(name.strip() for name in options.kinds.split(","))
        if unknown := [name for name in kinds if name not in KINDS]:
            parser.error(f"no kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = "quick" if options.quick else "full" if options.full else "small"
    todo = plan(size, device)
    todo = todo._replace(shape=todo.shape._replace(pooling=options.pooling), steps=options.steps or todo.steps)
    seeds = options.seeds or (2 if size == "small" else 1)
    stem = {"quick": "quick-listops", "full": "listops-full", "small": "listops"}[size]
    return run(todo, kinds, range(seeds), device, options.output, stem, options.fresh, options.workers)


def run(
    todo: Plan,
    kinds: tuple[str, ...],
    seeds: range,
    device: str,
    output: Path,
    stem: str = "listops",
    fresh: bool = False,
    workers: int | None = None,
) -> int:
    """0, or 130 when interrupted."""
    from . import listops_report as report

    start = time.perf_counter()
    machine = describe(device)
    cores = machine["cores"]
    workers = workers or (cores if device == "cpu" else 1)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{stem}-{slug(machine)}.json"
    finished = Finished(path, whole_plan(todo, machine), fresh)
    models = [(kind, seed) for seed in seeds for kind in kinds]
    left = [model for model in models if name_of(*model) not in finished]
    print(f"{machine['device_name']}, {cores} cores, torch {machine['torch']}\n{settings(todo)}", flush=True)
    counts = {"test": todo.test, "validation": todo.validation, "train": todo.train}
    splits = make_splits(todo.rules, counts, workers=cores)
    data = described(splits)
    print(report.data_text(data), flush=True)
    print(f"{len(models)} models, {len(models) - len(left)} of them finished before", flush=True)
    left.sort(key=lambda model: -list(KINDS).index(model[0]))  # the slowest first
    try:
        calls = [(todo, *model, device, splits) for model in left]
        for (_, kind, seed, *_), found in each(one_model, calls, workers):
            finished.add(name_of(kind, seed), found)
            print(f"  {KINDS[kind]}, seed {seed}: {report.accuracy_text(found['test'])}", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last finished model")
        return 130
    finished.look()
    parts = list(finished.parts.values())
    plot = path.with_suffix(".png")
    report.plot(parts, data, machine, plot)
    results = {"machine": machine, "settings": settings(todo), "data": data}
    finished.finish({**results, "kinds": report.gather(parts), "seconds": time.perf_counter() - start})
    print(f"\n{report.text(parts, data)}\n\nwritten: {path}, {plot}")
    return 0


def whole_plan(todo: Plan, machine: dict[str, Any]) -> dict[str, Any]:
    """All that one model's result depends on beside its kind and its seed."""
    kept = {"job": "listops", "version": VERSION, **todo._asdict()}
    kept.update(rules=todo.rules._asdict(), shape=todo.shape._asdict())
    kept.update(device=machine["device_name"], torch=machine["torch"], posattn=machine["posattn"])
    return kept


def settings(todo: Plan) -> str:
    shape, rules = todo.shape, todo.rules
    layers = f"{shape.depth} {'tied ' if shape.tied else ''}layers of {shape.width}, {shape.num_heads} heads"
    return (
        f"Expressions of {rules.shorter + 1} to {rules.longer - 1} tokens, depth {rules.depth} and {rules.arguments}"
        f" arguments at most, brackets kept (the SPE paper's runs had none: no number is comparable).\n"
        f"{layers}, MLP {shape.hidden}, feature map {shape.features}, pooling {shape.pooling}, dropout {shape.dropout};"
        f" R {shape.realizations}, K {shape.sines}; {todo.steps} steps of {todo.batch_size}, rate {todo.rate} warmed up"
        f" over {todo.warmup}, decay {todo.decay}, {'bfloat16' if todo.half else 'float32'}"
    )


def described(splits: dict[str, Expressions]) -> dict[str, Any]:
    """Sizes, lengths, balance of the values, and what always saying training's most frequent value scores."""
    found: dict[str, Any] = {}
    for name, split in splits.items():
        lengths, count = split.lengths().float(), Counter(split.values.tolist())
        found[name] = {
            "expressions": len(split),
            "tokens": {"fewest": int(lengths.min()), "mean": lengths.mean().item(), "most": int(lengths.max())},
            "share_of_each_value": [count[value] / len(split) for value in range(10)],
        }
    shares = found["train"]["share_of_each_value"]
    majority = shares.index(max(shares))
    right = int((splits["test"].values == majority).sum())
    found["majority"] = {"value": majority, **score(right, len(splits["test"]))}
    short = splits["test"].lengths().argmin()
    found["example"] = {"text": text_of(splits["test"].one(int(short))), "value": int(splits["test"].values[short])}
    return found


def score(right: int, total: int) -> dict[str, Any]:
    """Accuracy with the 95 % interval of a binomial (Wilson)."""
    z, share = 1.959964, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return {"accuracy": share, "low": middle - half, "high": middle + half, "right": right, "total": total}


def batches(data: Expressions, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless; every expression once an epoch, in batches of like lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = data.lengths()
    while True:
        order = torch.randperm(len(data), generator=generator)
        for pool in order.split(POOL * size):
            groups_of = pool[lengths[pool].argsort(stable=True)].split(size)
            for number in torch.randperm(len(groups_of), generator=generator).tolist():
                yield data.batch(groups_of[number])


def one_model(
    todo: Plan, kind: str, seed: int, device: str, splits: dict[str, Expressions]
) -> dict[str, Any]:
    model = Encoder(kind, todo.shape, seed).to(device)
    with torch.random.fork_rng(), progress(f"{KINDS[kind]}, seed {seed}", todo.steps, "accuracy") as tell:
        torch.manual_seed(seed + 1000)  # dropout, and the noise of the encoding
        training = train(model, splits, todo, seed, device, tell)
        scores = {name: test(model, splits[name], todo, device) for name in ("validation", "test")}
    parameters = sum(p.numel() for p in model.parameters())
    return {"kind": kind, "seed": seed, "parameters": parameters, "training": training, **scores}


def precision(todo: Plan, device: str) -> Any:
    return torch.autocast(device, torch.bfloat16) if todo.half else nullcontext()


def train(
    model: Encoder, splits: dict[str, Expressions], todo: Plan, seed: int, device: str, tell: Any
) -> dict[str, Any]:
    """Train in place; the course of loss and accuracy in fifty means."""
    model.train()
    optimizer = torch.optim.AdamW(groups(model, todo.decay), betas=(0.9, 0.98), eps=1e-9)
    source = batches(splits["train"], todo.batch_size, seed)
    losses, right = [], []
    start = time.perf_counter()
    for step in range(todo.steps):
        for group in optimizer.param_groups:
            group["lr"] = todo.rate_at(step)
        tokens, values = (t.to(device) for t in next(source))
        with precision(todo, device):
            logits = model(tokens).float()
        loss = F.cross_entropy(logits, values)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        right.append((logits.detach().argmax(-1) == values).float().mean())
        if step == 0 or (step + 1) % 20 == 0:  # on a GPU this waits
            tell(step + 1, torch.stack(right[-100:]).mean().item())
    per = -(-todo.steps // 50)
    course = {"loss": means(losses, per), "accuracy": means(right, per)}
    return {"seconds": time.perf_counter() - start, "steps_a_mean": per, **course}


def means(values: list[Tensor], per: int) -> list[float]:
    return [round(part.mean().item(), 4) for part in torch.stack(values).split(per)]


@torch.no_grad()
def test(model: Encoder, data: Expressions, todo: Plan, device: str) -> dict[str, Any]:
    """Accuracy on all of a split; the noise is drawn anew for every batch, as published."""
    model.eval()
    right = 0
    with precision(todo, device):
        for chosen in data.lengths().argsort(stable=True).split(4 * todo.batch_size):
            tokens, values = (t.to(device) for t in data.batch(chosen))
            right += int((model(tokens).argmax(-1) == values).sum())
    return score(right, len(data))
