"""How far the product of encoded queries and keys is from what it stands for, against the number of realisations.

Over the noise, qhat_m . khat_n / sqrt(R) has the mean  C = sum_d q_d k_d P_d(m - n) / sqrt(D)  and the variance
(A B + C^2) / R, where A and B are what C is of the query with itself and of the key with itself (the codes are
Gaussian). So the error must fall as 1 / sqrt(R), and its size is known without a fit.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posattn

from . import spe_published
from .spe_speed import backend_of


class Plan(NamedTuple):
    heads: int = 8
    head_dim: int = 16
    length: int = 64
    sines: int = 10
    taps: int = 32
    realizations: tuple[int, ...] = tuple(4**n for n in range(1, 7))
    draws: int = 16  # of the noise, at each number of realisations
    many: int = 256  # draws whose mean is compared with C
    few: int = 64  # realisations of those


def plan(quick: bool) -> Plan:
    return Plan(realizations=(4, 16, 64, 256), draws=4, many=32) if quick else Plan()


def make_spe(kind: str, todo: Plan, realizations: int) -> Any:
    """With the same parameters whatever the number of realisations."""
    torch.manual_seed(0)
    sizes = {"num_realizations": realizations, "gated": True}
    if kind == "sine":
        return posattn.SineSPE(todo.heads, todo.head_dim, num_sines=todo.sines, **sizes)
    return posattn.ConvSPE(todo.heads, todo.head_dim, kernel_size=todo.taps, **sizes)


def expectation(spe: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """C and A B + C^2 above for all pairs, (H, N, N) float64 each, of queries and keys (H, N, D)."""
    length, dim = query.shape[1:]
    distances = torch.arange(-length + 1, length, device=query.device)
    cross, own_q, own_k = spe_published.kernels_of(spe, distances)
    place = torch.arange(length, device=query.device)
    weights = cross[:, :, place[:, None] - place + length - 1]  # (H, D, N, N)
    mean = torch.einsum("hmd,hnd,hdmn->hmn", query, key, weights) * dim**-0.5
    of_q, of_k = (torch.einsum("hnd,hd->hn", t**2, own) * dim**-0.5 for t, own in ((query, own_q), (key, own_k)))
    return mean, of_q[:, :, None] * of_k[:, None] + mean**2


@torch.no_grad()
def logits(spe: Any, query: Tensor, key: Tensor, generator: torch.Generator) -> Tensor:
    """qhat . khat / sqrt(R) for one draw, (H, N, N) float64."""
    codes = spe(generator=generator)
    # In PyTorch on every device: so many realisations are beyond the kernels.
    qhat, khat = codes.features(query.float()[None], key.float()[None], 0, 0, "blockwise")
    return (qhat[0].double() @ khat[0].double().mT) * codes.dim**-0.5


def of_kind(kind: str, todo: Plan, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    shape = (todo.heads, todo.length, todo.head_dim)
    query, key = (torch.randn(shape, generator=generator).double().to(device) for _ in range(2))
    rows = []
    for count in todo.realizations:
        spe = make_spe(kind, todo, count).to(device)
        mean, variance = expectation(spe, query, key)
        errors = [((logits(spe, query, key, generator) - mean) ** 2).mean() for _ in range(todo.draws)]
        error = torch.stack(errors).mean().sqrt().item()
        predicted = (variance.mean() / count).sqrt().item()
        size = mean.square().mean().sqrt().item()
        rows.append({"realizations": count, "error": error, "predicted": predicted, "size": size})
    spe = make_spe(kind, todo, todo.few).to(device)
    mean, variance = expectation(spe, query, key)
    total = sum(logits(spe, query, key, generator) for _ in range(todo.many)) / todo.many
    apart = (total - mean).square().mean().sqrt() / (variance.mean() / (todo.few * todo.many)).sqrt()
    library = spe.position_kernel(todo.length - 1)
    distances = torch.arange(-todo.length + 1, todo.length, device=device)
    kernel = spe_published.kernels_of(spe, distances)[0]
    return {
        "rows": rows,
        "slope": slope(rows),
        "mean_of": todo.many * todo.few,
        "mean_error_over_predicted": apart.item(),
        "position_kernel_error": (library.double() - kernel).abs().max().item(),
    }


def slope(rows: list[dict[str, Any]]) -> float:
    """Least squares of log error over log R; a half is lost for each factor e when errors fall as 1 / sqrt(R)."""
    x, y = (torch.tensor([row[what] for row in rows], dtype=torch.float64).log() for what in ("realizations", "error"))
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def measure(path: Path, machine: dict[str, Any], quick: bool, todo: Plan | None = None) -> int:
    import json

    from . import spe_report as report

    start = time.perf_counter()
    todo = todo or plan(quick)
    kinds = {}
    for kind in ("sine", "conv"):
        kinds[kind] = of_kind(kind, todo, machine["device"])
        print(f"  {kind}: slope {kinds[kind]['slope']:.3f}", flush=True)
    results = {"machine": machine, "backend": backend_of("cpu"), "plan": todo._asdict(), "kinds": kinds}
    results["seconds"] = time.perf_counter() - start
    plot = path.with_suffix(".png")
    report.plot_quality(kinds, machine, plot)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{report.quality_text(kinds)}\n\nwritten: {path}, {plot}")
    return 0
