"""What stochastic positional encoding is worth to a small language model with linear attention.

Byte models that differ in nothing else (bench/byte_model.py, causal linear attention in each layer) are trained on
the sources of Python's standard library at one length and evaluated up to 32 times that length: no positions, learned
absolute ones, gated SineSPE, gated ConvSPE. The noise is drawn anew for every batch, in training and in evaluation.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import posattn

from .byte_model import ByteModel, Size
from .corpus import corpus
from .resume import Finished, name_of
from .train import LAST, Recipe, curve, evaluate, train
from .workers import each

VERSION = 1  # to be raised when the code changes what a plan gives: results of another version are not reused
KINDS = {"none": "none", "absolute": "learned absolute", "sine": "SineSPE, gated", "conv": "ConvSPE, gated"}


class Plan(NamedTuple):
    size: Size
    recipe: Recipe
    evaluated: tuple[int, ...]
    held_out: int  # bytes
    realizations: int = 64
    sines: int = 5
    taps: int = 32
    features: str = "elu"
    half: bool = False  # bfloat16 autocast


def plan(quick: bool, device: str) -> Plan:
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    if device == "cuda":
        size = Size(width=512, depth=6, num_heads=8)
        recipe = Recipe(length=256, batch_size=64, steps=2000, warmup=100, learning_rate=1e-3)
        todo = Plan(size, recipe, lengths, 32 * 8192, sines=10, taps=128, half=True)
        return todo._replace(recipe=recipe._replace(steps=200), held_out=8 * 8192) if quick else todo
    size = Size(width=128, depth=3, num_heads=2)
    todo = Plan(size, Recipe(length=256, batch_size=8, steps=500, warmup=50), lengths, 4 * 8192)
    if quick:
        size, recipe = size._replace(depth=2), todo.recipe._replace(steps=40, warmup=10)
        return todo._replace(size=size, recipe=recipe, evaluated=lengths[:4], held_out=2 * 2048, realizations=32)
    return todo


def attend_with(features: str) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, spe: nn.Module | None) -> Tensor:
        return posattn.linear_attention(query, key, value, spe=spe, feature_map=features, is_causal=True)

    return attend


def make_model(kind: str, todo: Plan, seed: int) -> ByteModel:
    """Equal weights for equal seeds, but for what a kind has of its own; an encoding of its own in each layer."""
    size = todo.size
    model = ByteModel("absolute" if kind == "absolute" else "none", size, seed, attend_with(todo.features))
    if kind not in ("sine", "conv"):
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in model.blocks:
            block.bias = make_spe(kind, size.num_heads, size.width // size.num_heads, todo)
    return model


def make_spe(kind: str, heads: int, head_dim: int, sizes: Any) -> nn.Module:
    """Gated, with the realisations, sines and taps of a plan."""
    if kind == "sine":
        return posattn.SineSPE(heads, head_dim, num_sines=sizes.sines, num_realizations=sizes.realizations)
    return posattn.ConvSPE(heads, head_dim, kernel_size=sizes.taps, num_realizations=sizes.realizations)


def one_model(todo: Plan, kind: str, seed: int, device: str) -> dict[str, Any]:
    model = make_model(kind, todo, seed)
    half = torch.autocast(device, torch.bfloat16) if todo.half else nullcontext()
    with torch.random.fork_rng(), half:  # the noise is drawn from the global generator
        torch.manual_seed(seed + 1000)
        training = train(model, corpus().train, todo.recipe._replace(seed=seed), device, lambda done, value: None)
        # Windows of every length must end where the longest end.
        rows = evaluate(model, corpus().held_out[: todo.held_out + 1], todo.evaluated, device)
    return {
        "kind": kind,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {"seconds": training["seconds"], "bits_per_byte": curve(training["bits_per_byte"])},
        "lengths": rows,
    }


def measure(
    path: Path,
    machine: dict[str, Any],
    quick: bool,
    fresh: bool,
    seeds: int,
    kinds: tuple[str, ...] = tuple(KINDS),
    workers: int | None = None,
    todo: Plan | None = None,
) -> int:
    """0, or 130 when interrupted."""
    from . import spe_report as report

    start = time.perf_counter()
    device = machine["device"]
    todo = todo or plan(quick, device)
    workers = workers or (machine["cores"] if device == "cpu" else 1)
    finished = Finished(path, whole_plan(todo, machine), fresh)
    models = [(kind, seed) for seed in range(seeds) for kind in kinds]
    left = [model for model in models if name_of(*model) not in finished]
    recipe, size = todo.recipe, todo.size
    print(
        f"{len(models)} models, {len(models) - len(left)} of them finished before, {min(workers, len(models))} side by"
        f" side; {recipe.steps} steps of {recipe.batch_size} x {recipe.length} bytes; width {size.width}, depth"
        f" {size.depth}, {size.num_heads} heads\n"
        f"digest of the text {corpus().digest[:12]}; feature map {todo.features}, R {todo.realizations},"
        f" K {todo.sines}, {todo.taps} taps",
        flush=True,
    )
    # The slowest first, so that no core is left alone with one at the end.
    left.sort(key=lambda model: -list(KINDS).index(model[0]))
    try:
        for (_, kind, seed, _), found in each(one_model, [(todo, *model, device) for model in left], workers):
            finished.add(name_of(kind, seed), found)
            seconds, bits = time.perf_counter() - start, [round(row["last"], 3) for row in found["lengths"]]
            print(f"  {KINDS[kind]}, seed {seed}: {bits} bits per byte, after {seconds:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last finished model")
        return 130
    finished.look()
    found = report.gather_language(finished.plan, list(finished.parts.values()))
    plot = path.with_suffix(".png")
    report.plot_language(found, machine, plot)
    finished.finish({"machine": machine, "quick": quick, **found, "seconds": time.perf_counter() - start})
    print(f"\n{report.language_text(found)}\n\nwritten: {path}, {plot}")
    return 0


def whole_plan(todo: Plan, machine: dict[str, Any]) -> dict[str, Any]:
    """All that one model's result depends on beside its kind and its seed."""
    recipe = todo.recipe._asdict()
    del recipe["seed"]
    return {
        "job": "spe language",
        "version": VERSION,
        **todo._asdict(),
        "size": todo.size._asdict(),
        "recipe": recipe,
        "last": LAST,
        "corpus": corpus().digest,
        "device": machine["device_name"],
        "torch": machine["torch"],
        "posattn": machine["posattn"],
    }
