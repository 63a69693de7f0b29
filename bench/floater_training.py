"""What FLOATER's solve costs a model: the three ways to gradients, training steps with and without it, the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contest import DIRECTIONS, why_not
from .floater_peers import TOGETHER, Made, Place, make, make_cotangent, make_encoder, run
from .measure import Patience, in_fresh_process, interleaved, peak_memory, seconds_of, summary

GRADIENTS = ("checkpoint", "direct", "adjoint")
EXACT = {"rtol": 1e-9, "atol": 1e-10, "gradient": "direct", "max_steps": 1_000_000}
PATIENCE = 30.0  # seconds for one way to gradients, its process's start included


# -------------------------------------------------------------------------------------------------------- gradients


def encoder_of(gradient: str, place: Place, device: str) -> Made:
    encoder = make_encoder(place, device, gradient=gradient)
    leaves = list(encoder.parameters())
    return Made(lambda: encoder(place.length), leaves, encoder.clear, lambda: encoder.last_solve.evaluations)


def by_itself(gradient: str, place: Place) -> tuple[int, float, int, list[Any]]:
    """Bytes beyond encoder and cotangent that forward and backward need on the CPU, seconds, evaluations, gradients as
    arrays; in a process of its own."""
    small = place._replace(length=16)
    run(DIRECTIONS[1], encoder_of(gradient, small, "cpu"), make_cotangent(small, "cpu", place.layers))
    made, cotangent = encoder_of(gradient, place, "cpu"), make_cotangent(place, "cpu", place.layers)
    kept: list[Any] = []

    def timed() -> None:
        kept.append(seconds_of(lambda: kept.append(run(DIRECTIONS[1], made, cotangent)), "cpu"))

    peak = peak_memory(timed, "cpu")
    return peak, kept[1], made.evaluations(), [grad.numpy() for grad in kept[0][1]]


def exact_gradients(place: Place) -> list[Tensor]:
    """float64, at tight tolerance, on the CPU."""
    encoder = make_encoder(place, "cpu", **EXACT).double()
    cotangent = make_cotangent(place, "cpu", place.layers).double()
    return list(torch.autograd.grad(encoder(place.length), list(encoder.parameters()), cotangent))


def gradient_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Of any entry as a part of the largest of its parameter's gradient, and of the norm of the difference as a part
    of the norm; both of the parameter where it is worst."""
    pairs = [(a.double().cpu(), b) for a, b in zip(got, expected)]
    return {
        "error": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "norm_error": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }


def one_way(gradient: str, place: Place, device: str) -> tuple[int, float, int, Sequence[Any]]:
    """Peak bytes, seconds, evaluations and gradients. Raises TimeoutError on a CPU after PATIENCE seconds."""
    if device != "cuda":
        return in_fresh_process(by_itself, gradient, place, timeout=PATIENCE)
    made, cotangent = encoder_of(gradient, place, device), make_cotangent(place, device, place.layers)
    kept: list[Any] = [run(DIRECTIONS[1], made, cotangent)]  # compiles
    seconds = seconds_of(lambda: kept.append(run(DIRECTIONS[1], made, cotangent)), device)
    evaluations, grads = made.evaluations(), kept.pop()[1]
    return peak_memory(partial(run, DIRECTIONS[1], made, cotangent), device), seconds, evaluations, grads


def gradients(place: Place, device: str, patience: Patience, compare: bool = False) -> dict[str, Any]:
    """Seconds, peak bytes and gradient errors of each way; `compare`: and the errors of rk4 with a step a position,
    through plain autograd, which is slow."""
    cotangent = make_cotangent(place, device, place.layers)
    calls = {name: partial(run, DIRECTIONS[1], encoder_of(name, place, device), cotangent) for name in GRADIENTS}
    expected = exact_gradients(place)
    rows: dict[str, dict[str, Any]] = {}
    for name in GRADIENTS:
        try:
            peak, seconds, evaluations, grads = one_way(name, place, device)
        except (RuntimeError, TimeoutError) as error:
            rows[name] = {"note": why_not(error)}
        else:
            rows[name] = {"seconds": summary([seconds]), "peak_bytes": peak, "evaluations": evaluations}
            rows[name].update(gradient_error([torch.as_tensor(grad) for grad in grads], expected))
    first = {name: row["seconds"]["median"] for name, row in rows.items() if "seconds" in row}
    fast = {name: seconds for name, seconds in first.items() if seconds <= patience.slow}
    times = interleaved({name: calls[name] for name in fast}, fast, device, patience)
    for name, found in times.items():
        rows[name]["seconds"] = summary(found)
    rk4 = {}
    if compare:
        grads = run(DIRECTIONS[1], make(TOGETHER, place, device, place.layers), cotangent)[1]
        rk4 = {"rk4": gradient_error(grads, expected)}
    output = cotangent.numel() * cotangent.element_size()
    return {**place._asdict(), "output_bytes": output, "ways": rows, **rk4}


# ---------------------------------------------------------------------------------------------------- training step


def layer_forward(layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    """nn.TransformerEncoderLayer without dropout, with positions (3, length, dim) added to queries, keys and values."""
    attention = layer.self_attn
    made = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, -1))
    made = made + positions.transpose(0, 1)
    query, key, value = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in made.unbind(-2))
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = layer.norm1(x + attention.out_proj(attended))
    return layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))


CONSTANT, LIVE, ALONE = "step, constant positions", "step, solve included", "solve alone"
HELD, HELD_ALONE = "one solve held", "held solve alone"


def make_step(
    place: Place, batch: int, heads: int, device: str, passes: int = 1
) -> tuple[dict[str, Callable[[], Any]], Any]:
    """Training steps (forward, backward, AdamW) of a transformer whose position vectors are solved in the step, or
    constant; and the solve's forward and backward alone. With `passes`: so many steps that share one solve (`hold`),
    as many with constant vectors, and the held solve alone with so many backward passes. Then the encoder."""
    encoder = make_encoder(place, device)
    torch.manual_seed(3)
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(place.dim, heads, 4 * place.dim, dropout=0.0, batch_first=True)
        for _ in range(place.layers)
    ).to(device)
    x = torch.randn(batch, place.length, place.dim, device=device)
    constant = encoder(place.length).detach().clone()
    cotangent = make_cotangent(place, device, place.layers)
    weights = list(layers.parameters())
    tiny = {"lr": 1e-9}  # so that every step costs the same

    def step(solved: bool, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()  # of what it steps
        positions = encoder(place.length) if solved else constant
        y = x
        for index, layer in enumerate(layers):
            y = layer_forward(layer, y, positions[:, index])
        y.square().mean().backward()
        optimizer.step()

    def alone() -> None:
        torch.autograd.grad(encoder(place.length), list(encoder.parameters()), cotangent)

    def held(optimizer: torch.optim.Optimizer, of_encoder: torch.optim.Optimizer) -> None:
        of_encoder.zero_grad()
        with encoder.hold():
            for _ in range(passes):
                step(True, optimizer)
        of_encoder.step()

    def several(call: Callable[[], Any]) -> None:
        for _ in range(passes):
            call()

    def held_alone() -> None:
        encoder.zero_grad()
        with encoder.hold():
            for _ in range(passes):
                encoder(place.length).backward(cotangent)

    of_weights = torch.optim.AdamW(weights, **tiny)
    constant_step = partial(step, False, of_weights)
    if passes > 1:
        of_encoder = torch.optim.AdamW(encoder.parameters(), **tiny)
        return {
            CONSTANT: partial(several, constant_step),
            HELD: partial(held, of_weights, of_encoder),
            HELD_ALONE: held_alone,
        }, encoder
    with_solve = torch.optim.AdamW([*weights, *encoder.parameters()], **tiny)
    return {CONSTANT: constant_step, LIVE: partial(step, True, with_solve), ALONE: alone}, encoder


def taking_turns(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float, fewest: int = 5, most: int = 11
) -> dict[str, list[float]]:
    """Seconds of each call, round after round: `fewest` rounds if they fit into `seconds`, `most` if they do into a
    quarter of it; at least one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for count in range(1, most + 1):
        for name, call in calls.items():
            times[name].append(seconds_of(call, device))
        used = time.perf_counter() - start
        if used * (count + 1) / count > (seconds if count < fewest else seconds / 4):
            break
    return times


def training_step(
    place: Place, batch: int, heads: int, device: str, seconds: float, passes: int = 1
) -> dict[str, Any]:
    """Shares of a step with constant vectors, in percent: of the solve alone, and of what a step with the solve in it
    takes more. With `passes`: of so many steps that share one solve."""
    calls, encoder = make_step(place, batch, heads, device, passes)
    constant, solved, alone = calls
    if passes == 1:
        calls[constant]()
    calls[alone]()  # the first calls bring memory and code
    times = taking_turns({name: calls[name] for name in (constant, solved)}, device, seconds)
    times.update(taking_turns({alone: calls[alone]}, device, seconds / 8))
    found = {name: summary(values) for name, values in times.items()}
    medians = {name: found[name]["median"] for name in calls}
    return {
        **place._asdict(),
        "batch": batch,
        "heads": heads,
        "passes": passes,
        "evaluations": encoder.last_solve.evaluations,
        "seconds": found,
        "solve_percent": 100 * medians[alone] / medians[constant],
        "difference_percent": 100 * (medians[solved] / medians[constant] - 1),
    }


# ------------------------------------------------------------------------------------------------------- evaluation


def cached(place: Place, more: int, device: str, patience: Patience) -> dict[str, Any]:
    """Evaluation: a call whose vectors are kept; `more` positions on top of them, 16 times in a row, and the slowest
    of each 16; the first `more`, from an empty table; all from scratch."""
    encoder = make_encoder(place, device).eval()
    longer, calls, times_more = place.length + more, 100, 16
    names = ("kept", "extended", "slowest of a row", "first alone", "from scratch")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    evaluations = 0
    with torch.no_grad():
        for turn in range(max(patience.fewest, patience.most) + 1):
            if turn == 1:  # the first round warms up
                seconds = {name: [] for name in seconds}
            encoder.clear()
            seconds["first alone"].append(seconds_of(lambda: encoder(more), device))
            encoder.clear()
            seconds["from scratch"].append(seconds_of(lambda: encoder(longer), device))
            encoder.clear()
            encoder(place.length)
            seconds["kept"].append(
                seconds_of(lambda: [encoder(place.length) for _ in range(calls)], device) / calls
            )
            evaluations = 0
            for count in range(1, times_more + 1):
                before = encoder.last_solve
                length = place.length + count * more
                seconds["extended"].append(seconds_of(lambda length=length: encoder(length), device))
                evaluations += 0 if encoder.last_solve is before else encoder.last_solve.evaluations
            seconds["slowest of a row"].append(max(seconds["extended"][-times_more:]))
    found = {name: summary(values) for name, values in seconds.items()}
    made = {"more": more, "extensions": times_more, "evaluations_of_extensions": evaluations}
    return {**place._asdict(), **made, "seconds": found}
