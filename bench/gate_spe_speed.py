"""The GPU gate's figures of SPE: time and peak memory of the whole call and of its parts, beside their floors.

SineSPE, causal, gated, B 1. "features" makes qhat and khat; "attention" takes them as they are; "codes in memory" is
the formula with the codes of all positions in memory (spe_published.py). "fla" is flash-linear-attention, a package
that need not be here, of phi(qhat) and phi(khat), made before the clock starts; its second row leaves out the
denominators. A floor is the products of a part at RATE, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import posattn

from . import spe_published
from .gate_speed import release
from .measure import peak_memory, seconds_of
from .spe_speed import FEATURES

RATE = 790e12  # flop a second of an H200, 16 bits
CHUNK = 128  # of the pairs that linear attention makes
LENGTHS = (8192, 1024, 32768, 131072, 2048, 4096, 16384, 65536)
Peer = tuple[Callable[..., Any], list[Tensor], list[Tensor]]  # function, its arguments, parameters that it uses


def floors(heads: int, dim: int, sines: int, realizations: int, length: int) -> dict[str, tuple[float, float]]:
    """ms of a part's products, forward; forward and backward."""
    expand = 2 * 2 * dim * 2 * sines * realizations  # of a position and head: queries and keys
    state, pairs = 2 * realizations * dim, CHUNK * (realizations + dim)
    attend = 2 * state + pairs, 7 * state + 4 * pairs  # backward makes both states again, reads dq, dk and dv
    ms = heads * length / RATE * 1e3
    made = {"features": (expand * ms, 2 * expand * ms), "attention": (attend[0] * ms, attend[1] * ms)}
    whole = [sum(part) for part in zip(*made.values())]
    return {**made, "whole": (whole[0], whole[1])}


def part_of(name: str) -> str:
    """Which floor is under a peer."""
    return {"features": "features", "posattn": "whole", "codes in memory": "whole"}.get(name, "attention")


def fla_of() -> tuple[Callable[..., Tensor] | None, str]:
    """attention(q, k, v, normalize) in (B, L, H, R) of flash-linear-attention; or why there is none."""
    try:
        import inspect

        from fla.ops.linear_attn import chunk_linear_attn
    except Exception as error:  # an import that breaks in another way must not end the run
        return None, f"{type(error).__name__}: {str(error)[:100]}"
    # Older versions have the heads first, unless told otherwise.
    known = inspect.signature(chunk_linear_attn).parameters
    options = {"scale": 1.0, **({"head_first": False} if "head_first" in known else {})}
    return lambda q, k, v, normalize: chunk_linear_attn(q, k, v, normalize=normalize, **options)[0], ""


def peers(
    heads: int, dim: int, sines: int, realizations: int, length: int, device: torch.device, fla: Any
) -> dict[str, Peer]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spe = posattn.SineSPE(heads, dim, sines, realizations).to(device)
    q, k, v = (torch.randn(1, heads, length, dim, device=device, dtype=dtype) for _ in "qkv")
    attend = partial(posattn.linear_attention, feature_map=FEATURES, is_causal=True, backend="triton")
    codes, parameters = spe(), list(spe.parameters())
    with torch.no_grad():
        qhat, khat = codes.features(q, k, backend="triton")
        phi = [(torch.relu(x) + 1e-3).transpose(1, 2).contiguous() for x in (qhat, khat)]
    made: dict[str, Peer] = {
        "posattn": (partial(attend, spe=spe), [q, k, v], parameters),
        "features": (partial(codes.features, backend="triton"), [q, k], parameters),
        "attention": (attend, [qhat, khat, v], []),
        "codes in memory": (lambda q, k, v: attend(*spe_published.features(q, k, spe), v), [q, k, v], parameters),
    }
    if fla is not None:
        made["fla"] = (partial(fla, normalize=True), [*phi, v.transpose(1, 2).contiguous()], [])
        made["fla, numerators alone"] = (partial(fla, normalize=False), made["fla"][1], [])
    return made


def difference(made: dict[str, Peer]) -> float | None:
    """Largest difference of fla's output and posattn's, as a part of the largest number: the two compute the same."""
    if "fla" not in made:
        return None
    with torch.no_grad():
        (ours, given, _), (theirs, features, _) = made["attention"], made["fla"]
        want = ours(*given).float()
        found = theirs(*features).transpose(1, 2).float()
    return ((found - want).abs().max() / want.abs().max()).item()


def forward(peer: Peer) -> Any:
    with torch.no_grad():
        return peer[0](*peer[1])


def both(peer: Peer) -> Any:
    call, tensors, parameters = peer
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, [*leaves, *parameters], [torch.ones_like(x) for x in outputs])


def measured(peer: Peer, device: torch.device, do_bench: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    row = {}
    for name, direction in (("forward", forward), ("both", both)):
        run = partial(direction, peer)
        row[f"{name}_ms"] = do_bench(run)
        if device.type == "cuda":
            row[f"{name}_bytes"] = peak_memory(run, "cuda")
    return row


def line(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return str(row["not_run"])[:100]
    made = ""
    for name in ("forward", "both"):
        made += f"{row[f'{name}_ms']:9.3f} ms, floor {row[f'{name}_floor_ms']:7.3f}"
        made += f", {row[f'{name}_bytes'] / 2**20:8.0f} MiB   " if f"{name}_bytes" in row else "   "
    return made


def speed(
    device: torch.device, still_open: Callable[[], bool], lengths: tuple[int, ...] = LENGTHS, heads: int = 16,
    dim: int = 64, sines: int = 10, realizations: tuple[int, ...] = (64, 128),
) -> dict[str, Any]:  # fmt: skip
    """Medians in ms and bytes beyond the inputs, forward; forward and backward, the parameters included."""
    if device.type == "cuda":
        from triton.testing import do_bench as measure

        do_bench = lambda run: measure(run, warmup=50, rep=200, return_mode="median")
    else:
        do_bench = lambda run: seconds_of(run, "cpu") * 1e3
    fla, why = fla_of()
    if fla is None:
        print(f"  without fla, which is not here: {why}")
    rows: list[dict[str, Any]] = []
    not_reached, too_large = [], set()
    for length, count in ((n, r) for n in lengths for r in realizations):
        if not still_open():
            not_reached.append(f"N {length}, R {count}")
            continue
        sizes = dict(heads=heads, dim=dim, sines=sines, realizations=count, length=length)
        floor = floors(**sizes)
        text = ", ".join(f"{part} {a:.3f} and {b:.3f} ms" for part, (a, b) in floor.items())
        print(f"  N {length}, R {count}, H {heads}, D {dim}, K {sines}; floors: {text}", flush=True)
        try:
            made = peers(**sizes, device=device, fla=fla)
        except Exception as error:
            print(f"    {type(error).__name__}: {str(error)[:200]}", flush=True)
            rows.append(dict(name="posattn", **sizes, not_run=f"{type(error).__name__}: {str(error)[:200]}"))
            continue
        for name, peer in made.items():
            row: dict[str, Any] = dict(name=name, **sizes)
            row["forward_floor_ms"], row["both_floor_ms"] = floor[part_of(name)]
            try:
                if any(name == other and length >= n and count >= r for other, n, r in too_large):
                    raise torch.OutOfMemoryError("out of memory, as at a shorter length")
                row.update(measured(peer, device, do_bench))
                if name == "fla":
                    row["differs"] = difference(made)
            except torch.OutOfMemoryError as error:
                too_large.add((name, length, count))
                row["not_run"] = f"out of memory: {str(error)[:100]}"
            except Exception as error:  # a peer that does not serve this
                row["not_run"] = f"{type(error).__name__}: {str(error).strip()[-200:]}".replace("\n", " ")
            rows.append(row)
            tail = f"   differs by {row['differs']:.1e}" if "differs" in row else ""
            print(f"    {name:22} {line(row)}{tail}", flush=True)
            release()
        del made
        release()
    failed = [f"{row['name']} at N {row['length']}, R {row['realizations']}: {row['not_run']}" for row in rows
              if "not_run" in row and row["name"] in ("posattn", "features", "attention")]  # fmt: skip
    return {"rows": rows, "not_reached": not_reached, "without": why, "failed": failed}


def rehearsal() -> dict[str, Any]:
    """Sizes for the interpreter."""
    return dict(lengths=(40,), heads=1, dim=8, sines=2, realizations=(8,))
