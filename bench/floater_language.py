"""What FLOATER's positions are worth to a small language model, at its training length and beyond.

Models of torch.nn's layers (floater_model.py) that differ in nothing else are trained on the sources of Python's
standard library: sinusoidal and learned positions, none, and FLOATER by `posattn.floater.attach`, from scratch and as
a warm start: a trained sinusoidal model is attached and trains on, beside the same model without.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .corpus import Batches, corpus
from .floater_model import (
    CHAIN,
    KINDS,
    Guarded,
    LanguageModel,
    Size,
    attempt,
    encoder_of,
    make_model,
    with_floater,
)
from .measure import Patience, interleaved, seconds_of, summary
from .resume import Finished, name_of
from .train import BITS, LAST, Recipe, curve, evaluate, train
from .workers import each

VERSION = 1  # to be raised when the code changes what a plan gives: results of another version are not reused


class Plan(NamedTuple):
    size: Size
    recipe: Recipe
    further: Recipe  # how a trained model goes on: half the steps at half the rate
    evaluated: tuple[int, ...]
    held_out: int  # bytes
    half: bool = False  # bfloat16 autocast


def plan(quick: bool, device: str) -> Plan:
    lengths = (128, 256, 512, 1024)
    if device == "cuda":
        size = Size(width=512, depth=6, num_heads=8)
        recipe = Recipe(length=128, batch_size=128, steps=100 if quick else 2000, warmup=100, learning_rate=1e-3)
        return Plan(size, recipe, half_of(recipe), lengths, 128 * 1024, half=True)
    if quick:
        recipe = Recipe(length=128, batch_size=8, steps=40, warmup=10)
        return Plan(Size(width=64, depth=2, num_heads=4), recipe, half_of(recipe), lengths, 2 * 1024)
    recipe = Recipe(length=128, batch_size=16, steps=900, warmup=50)
    return Plan(Size(), recipe, half_of(recipe), lengths, 48 * 1024)


def half_of(recipe: Recipe) -> Recipe:
    return recipe._replace(
        steps=recipe.steps // 2, warmup=recipe.warmup // 2, learning_rate=recipe.learning_rate / 2
    )


# ----------------------------------------------------------------------------------------------------------- a model


@torch.no_grad()
def by_length(todo: Plan, model: LanguageModel, device: str) -> list[dict[str, Any]]:
    """Bits per byte at each length; None and a note where there is no number."""
    model.eval()
    encoder = encoder_of(model)
    notes = {n: attempt(partial(encoder, n))[1] if encoder else "" for n in todo.evaluated}
    # Windows of every length must end where the longest end.
    rows = evaluate(Guarded(model, notes), corpus().held_out[: todo.held_out + 1], todo.evaluated, device)
    for row in rows:
        row["note"] = notes[row["length"]]
        if not (math.isfinite(row["last"]) and math.isfinite(row["all"])):
            row.update({"last": None, "all": None, "note": row["note"] or "the model's output is not finite"})
    return rows


@torch.enable_grad()
def solve_figures(todo: Plan, model: LanguageModel, device: str) -> dict[str, Any]:
    """What the trained model's solve takes, alone and as a part of a training step; and how far its vectors go."""
    encoder = encoder_of(model)
    recipe = todo.recipe._replace(steps=1, learning_rate=0.0)  # a whole step that changes nothing
    cotangent = torch.randn_like(encoder.train()(recipe.length))

    def solve() -> None:
        torch.autograd.grad(encoder(recipe.length), list(encoder.parameters()), cotangent)

    calls = {"solve": solve, "step": partial(train, model, corpus().train, recipe, device, lambda done, value: None)}
    first = {name: seconds_of(call, device) for name, call in calls.items()}
    taken = {name: summary(found) for name, found in interleaved(calls, first, device, Patience()).items()}
    found = {"seconds": taken, "share": taken["solve"]["median"] / taken["step"]["median"], "lengths": []}
    found["training"] = encoder.last_solve._asdict()
    model.eval()
    for length in todo.evaluated:
        encoder.clear()
        with torch.no_grad():
            vectors, note = attempt(partial(encoder, length))
        row = {"length": length, "note": note}
        if vectors is not None:
            added = vectors - encoder.initial.detach()[:, :, None]
            row.update({**encoder.last_solve._asdict(), "largest": float(added.abs().max())})
        found["lengths"].append(row)
    return found


# ---------------------------------------------------------------------------------------------------------- training


def trained(
    todo: Plan, kind: str, seed: int, model: LanguageModel, recipe: Recipe, device: str, plots: Path | None
) -> dict[str, Any]:
    """Train a model in place, and all there is to say of it."""
    from . import floater_language_report as report

    half = torch.autocast(device, torch.bfloat16) if todo.half else nullcontext()
    with half:
        training, note = attempt(
            lambda: train(model, corpus().train, recipe, device, lambda done, value: None)
        )
        part = {"kind": kind, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "note": note}
        if training is None:  # lost on the way
            empty = [{"length": n, "last": None, "all": None, "note": note} for n in todo.evaluated]
            return {**part, "training": {"seconds": None, "bits_per_byte": []}, "lengths": empty}
        bits = training["bits_per_byte"]
        part["training"] = {"seconds": training["seconds"], "first": bits[0], "bits_per_byte": curve(bits)}
        part["lengths"] = by_length(todo, model, device)
        if encoder_of(model) is None:
            return part
        part["solve"] = solve_figures(todo, model, device)
    reached = [row["length"] for row in part["solve"]["lengths"] if not row["note"]]
    if plots is not None and reached:
        with torch.no_grad():
            vectors = encoder_of(model)(max(reached)).float().cpu()
        report.plot_trajectories(vectors, plots, KINDS[kind].label, todo.recipe.length)
    return part


@torch.no_grad()
def first_batch(todo: Plan, model: LanguageModel, recipe: Recipe, device: str) -> tuple[float, Tensor]:
    """Loss in nats and logits of the batch that training with `recipe` begins with."""
    batches = Batches(corpus().train, recipe.batch_size, recipe.length, recipe.seed)
    inputs, targets = (t.to(device) for t in batches.next())
    return float(model.loss(inputs, targets)), model(inputs)


def gone_on(
    todo: Plan, kind: str, seed: int, base: LanguageModel, device: str, plots: Path | None
) -> dict[str, Any]:
    """A copy of the trained model, trained on. If it is attached: how the two compare before that."""
    recipe, model = todo.further._replace(seed=seed + 1000), copy.deepcopy(base)
    if not KINDS[kind].delta_t:
        return trained(todo, kind, seed, model, recipe, device, plots)
    model = with_floater(model, kind, seed).to(device)
    (before, logits), (after, same) = (first_batch(todo, m.train(), recipe, device) for m in (base, model))
    difference = float((logits - same).abs().max())
    start = {"base": before * BITS, "model": after * BITS, "difference": (after - before) * BITS, "logits": difference}
    start["largest_logit"] = float(logits.abs().max())
    return {**trained(todo, kind, seed, model, recipe, device, plots), "start": start}


def some_models(todo: Plan, kinds: tuple[str, ...], seed: int, device: str, plots: Path | None) -> list[dict[str, Any]]:
    """One kind, or some of those that come out of one trained sinusoidal model. Plots of the first seed."""
    files = {kind: plots.with_name(f"{plots.name}-{kind}.png") if plots and seed == 0 else None for kind in kinds}
    recipe = todo.recipe._replace(seed=seed)
    kind = "sinusoidal" if kinds[0] in CHAIN else kinds[0]
    model = make_model(kind, todo.size, seed).to(device)
    parts = [trained(todo, kind, seed, model, recipe, device, files.get(kind))]
    parts += [gone_on(todo, kind, seed, model, device, files[kind]) for kind in kinds if KINDS[kind].goes_on]
    return [part for part in parts if part["kind"] in kinds]


def tasks_of(left: list[tuple[str, int]]) -> list[tuple[tuple[str, ...], int]]:
    """Kinds and a seed for `some_models`: the longest first, so that no core is left alone with one at the end."""
    seeds = dict.fromkeys(seed for kind, seed in left if kind in CHAIN)
    chains = [(tuple(kind for kind in CHAIN if (kind, seed) in left), seed) for seed in seeds]
    return chains + [((kind,), seed) for kind, seed in left if kind not in CHAIN]


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
    from . import floater_language_report as report

    start = time.perf_counter()
    device = machine["device"]
    todo = todo or plan(quick, device)
    workers = workers or (machine["cores"] if device == "cpu" else 1)
    finished = Finished(path, whole_plan(todo, machine), fresh)
    left = [(kind, seed) for seed in range(seeds) for kind in kinds if name_of(kind, seed) not in finished]
    recipe, size, further = todo.recipe, todo.size, todo.further
    print(
        f"{len(kinds) * seeds} models, {len(kinds) * seeds - len(left)} of them finished before, {workers} side by"
        f" side; {recipe.steps} steps of {recipe.batch_size} x {recipe.length} bytes, {further.steps} more to go on;"
        f" width {size.width}, depth {size.depth}, {size.num_heads} heads\ndigest of the text {corpus().digest[:12]}",
        flush=True,
    )
    try:
        plots = path.with_name(f"{path.stem}-trajectories")
        for _, parts in each(some_models, [(todo, *task, device, plots) for task in tasks_of(left)], workers):
            for part in parts:
                finished.add(name_of(part["kind"], part["seed"]), part)
                print(report.line(part, time.perf_counter() - start), flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last finished model")
        return 130
    finished.look()
    found = report.gather(finished.plan, list(finished.parts.values()))
    plot = path.with_suffix(".png")
    report.plot(found, machine, plot)
    finished.finish({"machine": machine, "quick": quick, **found, "seconds": time.perf_counter() - start})
    print(f"\n{report.text(found)}\n\nwritten: {path}, {plot}, {plots.name}-*.png")
    return 0


def whole_plan(todo: Plan, machine: dict[str, Any]) -> dict[str, Any]:
    """All that one model's result depends on beside its kind and its seed."""
    recipes = {name: getattr(todo, name)._asdict() for name in ("recipe", "further")}
    for recipe in recipes.values():
        del recipe["seed"]
    return {
        "job": "floater language",
        "version": VERSION,
        **todo._asdict(),
        "size": todo.size._asdict(),
        **recipes,
        "last": LAST,
        "corpus": corpus().digest,
        "device": machine["device_name"],
        "torch": machine["torch"],
        "torchdiffeq": machine.get("torchdiffeq"),
        "posattn": machine["posattn"],
    }
