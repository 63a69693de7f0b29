"""The main job: train and evaluate both models, hold the contest of attention, write tables, JSON and plots."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import contest, report
from .byte_model import ByteModel, Size
from .corpus import read_corpus
from .machine import describe, slug
from .measure import Patience
from .peers import Problem
from .positions import windowed_attention
from .progress import progress
from .train import Recipe, evaluate, train


class Plan(NamedTuple):
    size: Size
    recipe: Recipe
    evaluated: tuple[int, ...]  # lengths; the last one divides into windows of all the others
    held_out: int  # bytes
    problem: Problem
    lengths: tuple[int, ...]
    patience: Patience


def plan(quick: bool, device: str, seed: int) -> Plan:
    shape = (4, 16, 64) if device == "cuda" else (1, 8, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    problem = Problem(shape[0], shape[1], 256, shape[2], dtype, device)
    if quick:
        return Plan(
            size=Size(width=32, depth=2, num_heads=2, max_length=512),
            recipe=Recipe(length=128, batch_size=4, steps=20, warmup=5, seed=seed),
            evaluated=(128, 256, 512),
            held_out=4096,
            problem=problem,
            lengths=(256,),
            patience=Patience(fewest=2, most=3),
        )
    lengths = (512, 1024, 2048, 4096, 8192)
    return Plan(
        size=Size(),
        recipe=Recipe(seed=seed),
        evaluated=(256, 512, 1024, 2048, 4096, 8192),
        held_out=65536,
        problem=problem,
        lengths=(*lengths, 32768) if device == "cuda" else lengths,
        patience=Patience(),
    )


def run(job: str, quick: bool, device: str | None, output: Path, seed: int) -> int:
    """0, or 1 when posattn failed the gate."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        # One kernel at a time is compiled here; a pool of compilers would only leave semaphores behind.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    todo = plan(quick, device, seed)
    start = time.perf_counter()
    results: dict[str, Any] = {"machine": describe(device), "quick": quick, "seed": seed}
    machine = results["machine"]
    print(
        f"{machine['device_name']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}"
    )
    stem = ("quick-" if quick else "") + slug(machine) + ("" if job == "all" else f"-{job}")
    output.mkdir(parents=True, exist_ok=True)
    written = [output / f"{stem}.json", output / f"{stem}.png"]

    if job in ("all", "model"):
        results["model"], tisa = compare_models(todo, device, seed)
        written.append(output / f"{stem}-tisa.png")
        report.plot_biases(tisa, written[-1])
    fine = True
    if job in ("all", "attention"):
        results["attention"] = compare_attention(todo)
        ours = [row for row in results["attention"]["gate"] if row["peer"].startswith("posattn")]
        fine = all(row["passed"] and not row["note"] for row in ours)

    results["seconds"] = time.perf_counter() - start
    written[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report.plot_results(results, written[1])
    print(f"\n{results['seconds']:.0f} s in all; written: " + ", ".join(str(path) for path in written))
    return 0 if fine else 1


def compare_models(todo: Plan, device: str, seed: int) -> tuple[dict[str, Any], ByteModel]:
    corpus = read_corpus()
    print(
        f"\nText: {corpus.num_files} files of Python's standard library, {len(corpus.train) / 1e6:.1f} MB to train on;"
        f" {min(todo.held_out, len(corpus.held_out))} bytes of other files to evaluate (digest {corpus.digest[:12]})"
    )
    found: dict[str, Any] = {
        "size": todo.size._asdict(),
        "recipe": todo.recipe._asdict(),
        "corpus": {
            "files": corpus.num_files,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "digest": corpus.digest,
        },
        "lengths": todo.evaluated,
        "kinds": {},
    }
    # Windows of every length must end where the longest end.
    held_out = corpus.held_out[: todo.held_out + 1]
    for kind in ("absolute", "tisa"):
        model = ByteModel(kind, todo.size, seed)
        with progress(f"training, {kind}", todo.recipe.steps, "bits per byte") as tell:
            training = train(model, corpus.train, todo.recipe, device, tell)
        rows = evaluate(model, held_out, todo.evaluated, device)
        parameters = sum(p.numel() for p in model.parameters())
        found["kinds"][kind] = {"parameters": parameters, "training": training, "lengths": rows}
    # The model that was trained last, TISA's, as one would use it far beyond its training length.
    model.attend_with(windowed_attention(todo.recipe.length))
    found["kinds"]["tisa_window"] = {"lengths": evaluate(model, held_out, todo.evaluated, device)}
    print(
        f"\nBits per held-out byte, trained at {todo.recipe.length}; lower is better. The rows of the absolute"
        f" positions beyond {todo.recipe.length} were never trained.\n{report.lengths_table(found)}"
    )
    return found, model


def compare_attention(todo: Plan) -> dict[str, Any]:
    problem = todo.problem
    dtype = str(problem.dtype).removeprefix("torch.")
    what = f"B {problem.batch}, H {problem.num_heads}, D {problem.head_dim}, {dtype}, causal"
    print(f"\nAttention, {what}. First the gate, at N = {problem.length}:", flush=True)
    gate = contest.gate(problem)
    allowed = contest.TOLERANCE[problem.dtype]
    print(f"{report.gate_table(gate)}\nallowed: {allowed:.0e} of the largest value\n", flush=True)
    passed = {row["peer"] for row in gate if row["passed"]}
    print("Medians in ms, in the order of the table above:")
    field = contest.Contest(problem, passed, todo.patience)
    cells = [cell for n in todo.lengths for cell in field.at(n, say=partial(print, flush=True))]
    print(f"\n{what}; memory beyond the inputs\n\n{report.attention_tables(cells)}")
    described = {**problem._asdict(), "dtype": dtype}
    return {"problem": described, "tolerance": allowed, "gate": gate, "cells": cells}
