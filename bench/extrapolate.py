"""`python -m bench extrapolate`: what each way to tell positions is worth far beyond the training length.

Small byte models that differ in nothing else are trained on the sources of Python's standard library at one length
and evaluated at up to 64 times that length: none, learned absolute, sinusoidal, RoPE, TISA, ALiBi, KERPLE, FIRE, and
the last three mixed by DAPE. Every finished model is kept at once: after an interruption the same command goes on.

python -m bench extrapolate                            all methods, several seeds: about an hour on two CPU cores
python -m bench extrapolate --quick                    ALiBi, KERPLE and DAPE-KERPLE, one seed, in five minutes
python -m bench extrapolate --methods fire,dape-fire   only these; finished ones of the same plan stay in the table
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import extrapolate_report as report
from .byte_model import ByteModel, Size
from .corpus import Corpus, read_corpus
from .machine import describe, slug
from .positions import POSITIONS, chosen
from .progress import progress
from .resume import Finished, name_of
from .train import LAST, Recipe, curve, evaluate, train

VERSION = 1  # to be raised when the code changes what a plan gives: results of another version are not reused
QUICK = ("alibi", "kerple", "dape-kerple")


class Plan(NamedTuple):
    size: Size
    recipe: Recipe
    evaluated: tuple[int, ...]  # lengths; the last one divides into windows of all the others
    held_out: int  # bytes
    half: bool = False  # bfloat16 autocast


def plan(quick: bool, device: str) -> Plan:
    lengths = (128, 256, 512, 1024, 2048, 4096, 8192)
    if device == "cuda":
        size = Size(width=512, depth=6, num_heads=8, max_length=8192, fire_length=256)
        recipe = Recipe(length=512, batch_size=32, steps=2000, warmup=100, learning_rate=1e-3)
        if quick:
            return Plan(size, recipe._replace(steps=300), lengths, 8 * 8192, half=True)
        return Plan(size, recipe, lengths, 32 * 8192, half=True)
    size = Size(width=64, depth=3, num_heads=4, max_length=8192, fire_length=64)
    recipe = Recipe(length=128, batch_size=16, steps=600, warmup=50)
    if quick:
        return Plan(size, recipe._replace(steps=300), lengths, 2 * 8192)
    return Plan(size, recipe, lengths, 6 * 8192)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench extrapolate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"one seed of {', '.join(QUICK)}, smaller")
    parser.add_argument("--methods", help="some of: " + ",".join(POSITIONS))
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default: 3 on a GPU, else 2)")
    parser.add_argument("--fresh", action="store_true", help="start over: nothing finished is reused")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU when there is one")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder for results"
    )
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        methods = chosen(options.methods, QUICK if options.quick else tuple(POSITIONS))
    except ValueError as error:
        parser.error(str(error))
    seeds = options.seeds or (1 if options.quick else 3 if device == "cuda" else 2)
    todo = plan(options.quick, device)
    return run(todo, methods, range(seeds), device, options.output, options.quick, options.fresh)


def run(
    todo: Plan,
    methods: tuple[str, ...],
    seeds: range,
    device: str,
    output: Path,
    quick: bool = False,
    fresh: bool = False,
) -> int:
    """0, or 130 when interrupted."""
    start = time.perf_counter()
    machine, corpus = describe(device), read_corpus()
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{'quick-' if quick else ''}extrapolate-{slug(machine)}.json"
    finished = Finished(path, whole_plan(todo, machine, corpus), fresh)
    models = [(kind, seed) for seed in seeds for kind in methods]
    left = [model for model in models if name_of(*model) not in finished]
    print(
        f"{machine['device_name']}, {machine['cores']} cores, torch {machine['torch']}\n"
        f"Text: {corpus.num_files} files of Python's standard library, {len(corpus.train) / 1e6:.1f} MB to train on;"
        f" {todo.held_out} bytes of other files to evaluate (digest {corpus.digest[:12]})\n"
        f"{len(models)} models, {len(models) - len(left)} of them finished before; trained at {todo.recipe.length}",
        flush=True,
    )
    try:
        for number, (kind, seed) in enumerate(left, 1):
            print(f"{number}/{len(left)}: {POSITIONS[kind].label}, seed {seed}", flush=True)
            finished.add(name_of(kind, seed), one_model(todo, kind, seed, corpus, device))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last finished model")
        return 130

    finished.look()
    found = report.gather(finished.plan, list(finished.parts.values()))
    plot = path.with_suffix(".png")
    report.plot(found, machine, plot)
    finished.finish(
        {"machine": machine, "quick": quick, **found, "seconds": time.perf_counter() - start}
    )
    print(f"\n{report.text(found)}\n\nwritten: {path}, {plot}")
    return 0


def whole_plan(todo: Plan, machine: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """All that one model's result depends on beside its method and its seed."""
    recipe = todo.recipe._asdict()
    del recipe["seed"]
    return {
        "job": "extrapolate",
        "version": VERSION,
        "size": todo.size._asdict(),
        "recipe": recipe,
        "lengths": todo.evaluated,
        "held_out": todo.held_out,
        "last": LAST,
        "corpus": corpus.digest,
        "precision": "bfloat16 autocast" if todo.half else "float32",
        "device": machine["device_name"],
        "torch": machine["torch"],
        "posattn": machine["posattn"],
    }


def one_model(todo: Plan, kind: str, seed: int, corpus: Corpus, device: str) -> dict[str, Any]:
    model = ByteModel(kind, todo.size, seed)
    recipe = todo.recipe._replace(seed=seed)
    with precision(todo, device):
        with progress("training", recipe.steps, "bits per byte") as tell:
            training = train(model, corpus.train, recipe, device, tell)
        # Windows of every length must end where the longest end.
        held_out = corpus.held_out[: todo.held_out + 1]
        with progress("evaluating", len(todo.evaluated), "bits per byte") as tell:
            rows = evaluate(model, held_out, todo.evaluated, device, tell)
    return {
        "kind": kind,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {"seconds": training["seconds"], "bits_per_byte": curve(training["bits_per_byte"])},
        "lengths": rows,
    }


def precision(todo: Plan, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if todo.half else nullcontext()
