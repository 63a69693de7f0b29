"""What the GPU gate checks of linear attention and SPE: values, states and all gradients, against float64.

The rule, with error(x) = x - x64: of 16 bits, neither max |error| nor its root mean square may be more than twice that
of `plain` (spe_truth.py) and ATOL of the largest value (FLOOR of the root mean square); of fp32, max |error| may be
FP32 of the largest value. The errors of few rows say little about the size of rounding errors, so then those of plain
are the largest of DRAWS inputs, by the size of the result. Every call is made twice and must give the same bits. The
truth is dense; for lengths from LONG on it is the blockwise backend's in float64.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posattn
from posattn.noise import Noise

from .gate_numerics import ATOL, distance
from .gate_spe_cases import FAR, VARIANTS, Case, cases, rehearsal
from .spe_truth import Formula, named, noise_at

__all__ = ["Case", "cases", "check", "rehearsal"]
FP32, FLOOR, LONG = 3e-5, 2.0**-16, 4096
COUNT = 1000  # as if so many keys were in a state
SMALL = 25  # a rehearsal divides lengths by this
FEW, DRAWS = 4096, 8  # with fewer rows than FEW, errors of plain are drawn more often

# --------------------------------------------------------------------------------------------------- one case


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    before: list[Tensor]  # kv and k of the state that the first call goes on from, or nothing
    start: int
    module: Any
    noise: Noise
    pieces: list[tuple[slice, slice]]  # queries and keys of each call
    limit: Tensor  # query i sees the keys before limit[i]
    mask: Tensor | None
    keep: bool  # the state behind the last key counts
    grads: tuple[Tensor, ...] | None  # of out and state; None: only what the last call gives is looked at
    options: dict[str, Any]  # of posattn.linear_attention


def make_module(case: Case) -> Any:
    """With waves that turn several times within a short sequence."""
    if case.spe == "none":
        return None
    if case.spe in ("conv", "seed"):
        return posattn.ConvSPE(case.heads, case.head_dim, case.rows, case.realizations, case.gated)
    realizations = None if case.spe == "exact" else case.realizations
    made = posattn.SineSPE(case.heads, case.head_dim, case.rows, realizations, case.gated)
    with torch.no_grad():
        made.freqs.add_(2.0)
    return made


def make_inputs(case: Case, device: torch.device, rehearse: bool, draw: int = 0) -> Inputs:
    torch.manual_seed(sum(str(case).encode()) + 10_000 * draw)
    variant = dict(VARIANTS[case.variant])
    queries, start, causal = variant["queries"], variant.get("start", 0), variant.get("is_causal", True)
    keys = variant.get("keys", queries)
    if rehearse:
        queries, keys = (tuple(max(1, n // SMALL) for n in some) for some in (queries, keys))
    if case.length:
        queries, keys = ((case.length, *some[1:]) for some in (queries, keys))
    gradient, keep = variant.get("gradient", True), variant.get("keep", False)
    batch = 1 if case.length or not gradient else 2
    pieces, limit, i, j = [], [], 0, 0
    for more, others in zip(queries, keys):
        pieces.append((slice(i, i + more), slice(j, j + others)))
        i, j = i + more, j + others
        limit.append(torch.arange(j - others, j) + 1 if causal else torch.full((more,), j))

    def normal(length: int, dim: int) -> Tensor:
        shape = (batch, length, case.heads, dim) if variant.get("heads_last") else (batch, case.heads, length, dim)
        made = torch.randn(shape, device=device).to(case.dtype)
        return (made.transpose(1, 2) if variant.get("heads_last") else made).requires_grad_(gradient)

    value_dim = variant.get("value_dim", case.head_dim)
    width = 128 if case.feature_map == "favor" else case.head_dim if case.spe == "none" else case.realizations
    state = batch, case.heads, width
    before = []
    if start:
        before = [torch.randn(*state, value_dim, device=device) * COUNT**0.5]
        before += [(torch.rand(state, device=device) + 0.5) * COUNT]
        before = [t.requires_grad_() for t in before]
    mask = None
    if variant.get("padding"):
        mask = torch.rand(batch, j, device=device) < 0.8
        mask[0, : j // 4] = False  # with a causal mask, the first queries see nothing
    grads = None
    if gradient:
        # fp16 needs its loss scaled; the state's part of the gradients is to be about as large as that of out.
        size = 256.0 if case.dtype == torch.float16 else 1.0
        grads = [torch.randn(batch, case.heads, i, value_dim, device=device) * size]
        part = size / (width * (j + (COUNT if start else 0)) ** 0.5)
        grads += [torch.randn(*state, value_dim, device=device) * part, torch.randn(state, device=device) * part]
        grads[0] = grads[0].to(case.dtype)
    module = make_module(case)
    noise = Noise(torch.empty(0), None)
    if module is not None:
        noise = module.draw(torch.Generator().manual_seed(5))
        if case.spe == "conv":
            places = start + max(i, j) + case.rows
            noise = noise._replace(codes=torch.randn(case.heads, case.head_dim, places, case.realizations))
        module = module.to(device)
    return Inputs(
        normal(i, case.head_dim), normal(j, case.head_dim), normal(j, value_dim), before, start, module,
        Noise(*(None if t is None else t.to(device) for t in noise)), pieces, torch.cat(limit).to(device), mask, keep,
        None if grads is None else tuple(grads), dict(feature_map=case.feature_map, is_causal=causal, eps=1e-6),
    )  # fmt: skip


def attend(given: Inputs, backend: str = "triton") -> dict[str, Tensor]:
    """out of all calls (of the last one, without gradients), state, gradients, by name."""
    noise, parameters = None, {}
    if given.module is not None:
        noise, parameters = given.noise, dict(given.module.named_parameters())
    state = posattn.LinearState(*given.before, given.start, noise) if given.before else None
    outs = []
    with torch.set_grad_enabled(given.grads is not None):
        for queries, keys in given.pieces:
            out, state = posattn.linear_attention(
                given.q[:, :, queries], given.k[:, :, keys], given.v[:, :, keys],
                spe=None if noise is None else given.module(noise), initial_state=state, return_state=True,
                key_padding_mask=None if given.mask is None else given.mask[:, keys], backend=backend, **given.options,
            )  # fmt: skip
            outs.append(out)
    out = outs[-1] if given.grads is None else torch.cat(outs, 2)
    return named(given, (out, state.kv, state.k), [given.q, given.k, given.v, *given.before], parameters)


def blockwise(given: Inputs) -> dict[str, Tensor]:
    """The same in float64 by the other backend."""
    doubled = {name: getattr(given, name).detach().double().requires_grad_() for name in ("q", "k", "v")}
    module = None if given.module is None else copy.deepcopy(given.module).double()
    return attend(given._replace(**doubled, module=module), backend="blockwise")


def truth_of(case: Case, given: Inputs) -> dict[str, Tensor]:
    dense = given.grads is None or given.q.shape[2] < LONG
    return Formula("exact", case, given).run(given) if dense else blockwise(given)


def sizes(x: Tensor) -> tuple[float, float]:
    """Largest and root mean square."""
    return x.abs().max().item(), x.square().mean().sqrt().item()


def rounding(case: Case, given: Inputs, truth: dict[str, Tensor]) -> dict[str, list[float]]:
    """Errors of plain by the size of the result, as `sizes`."""
    plain = Formula("plain", case, given).run(given)
    pairs = {name: zip(sizes(plain[name].double() - x), sizes(x)) for name, x in truth.items()}
    return {name: [error / size if size else 0.0 for error, size in pair] for name, pair in pairs.items()}


def check(case: Case, device: torch.device, rehearse: bool = False) -> dict[str, Any]:
    """As gate_numerics.check; and "relative": {gradient of a parameter: [error, error of plain] by its size}."""
    if case.variant == "noise alone":
        return check_noise(case, device, rehearse)
    given = make_inputs(case, device, rehearse)
    truth = truth_of(case, given)
    plain = {name: [0.0, 0.0] for name in truth}
    spare: dict[str, Any] = dict.fromkeys(truth, 0.0)  # of errors, what slopes that jump explain
    if case.dtype != torch.float32:
        plain = rounding(case, given, truth)
        rows = given.q.shape[0] * given.q.shape[1] * (1 if given.grads is None else given.q.shape[2])
        for draw in range(1, DRAWS if rows < FEW and given.q.shape[2] < LONG else 1):
            other = make_inputs(case, device, rehearse, draw)
            for name, pair in rounding(case, other, truth_of(case, other)).items():
                plain[name] = [max(some) for some in zip(plain[name], pair)]
    elif case.feature_map == "relu":
        jumped = Formula("jumped", case, given).run(given)
        spare = {name: 2 * (jumped[name] - x).abs() for name, x in truth.items()}
        spare = {name: x if name in ("out", "dq", "dk", "dv") else x.max() for name, x in spare.items()}
    found, again = attend(given), attend(given)
    errors, relative = {}, {}
    for name, x in truth.items():
        size, mean = sizes(x)
        off = found[name].double() - x
        errors[name] = [(off.abs() - spare[name]).clamp(min=0).max().item(), FP32 * size]
        if case.dtype != torch.float32:
            errors[name][1] = (2 * plain[name][0] + ATOL[case.dtype]) * size
            errors[f"{name} rms"] = [sizes(off)[1], (2 * plain[name][1] + FLOOR) * mean]
        if given.module is not None and name[1:] in dict(given.module.named_parameters()):
            relative[name] = [errors[name][0] / (size or 1.0), plain[name][0]]
    failed = [name for name, (error, bound) in errors.items() if not error <= bound]
    failed += [f"{name} differs when repeated" for name in found if not torch.equal(found[name], again[name])]
    return {"case": str(case), "errors": errors, "failed": failed, "relative": relative}


def check_noise(case: Case, device: torch.device, rehearse: bool) -> dict[str, Any]:
    """Queries and keys of one dimension each, filters of one tap: the features are the noise. Near 0 and far away."""
    module = posattn.ConvSPE(case.heads, case.head_dim, case.rows, case.realizations, gated=False)
    with torch.no_grad():
        for weight, tap in ((module.filter_q, -1), (module.filter_k, 0)):
            weight.zero_()[..., tap] = (case.realizations * case.head_dim) ** 0.25
    length = VARIANTS[case.variant]["queries"][0] // (SMALL if rehearse else 1)
    dims = torch.arange(length) % case.head_dim
    x = torch.eye(case.head_dim)[dims].expand(1, case.heads, -1, -1)
    errors = {}
    for seed, start in ((7, 0), (2**62 + 12345, FAR)):
        noise = Noise(torch.tensor([seed]), None)
        cpu = module.cpu()(noise).features(x, x, start, start)
        module.to(device)
        far = module(Noise(noise.codes.to(device), None))
        rows = x.to(device, case.dtype)
        found = far.features(rows, rows, start, start, "triton")
        z = noise_at(noise.codes, case.heads, case.head_dim, case.realizations, start, length + case.rows - 1)
        for name, tap, ours, theirs in zip(("queries", "keys"), (case.rows - 1, 0), found, cpu):
            truth = z[:, dims, torch.arange(length) + tap][None]
            bound = (FP32 if case.dtype == torch.float32 else 2 * ATOL[case.dtype]) * truth.abs().max().item()
            errors[f"{name} at {start}"] = [distance(ours.cpu(), theirs.double()), bound]
            errors[f"{name} at {start}, of the CPU"] = [distance(theirs, truth), FP32 * truth.abs().max().item()]
    failed = [name for name, (error, bound) in errors.items() if not error <= bound]
    return {"case": str(case), "errors": errors, "failed": failed}
