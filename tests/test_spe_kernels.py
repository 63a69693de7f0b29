"""The functions behind SPE's operators, each backend's called directly, against the oracle."""

from __future__ import annotations

import math
from typing import NamedTuple

import oracle_spe as oracle
import pytest
import torch
from spe_calls import BACKENDS, DEVICE, at_most_twice, compare, functions


class Codes(NamedTuple):
    """kind: sine, conv (noise written out), seed."""

    kind: str = "sine"
    queries: int = 70
    keys: int = 70
    dim: int = 16
    rows: int = 2  # sines or taps
    realizations: int = 16
    gated: bool = True
    starts: tuple[int, int] = (0, 0)
    heads: int = 1
    batch: int = 1

    def tensors(self, dtype):
        """q, k; turns, phases, gains or the two filters; gate gains: what is differentiated."""
        wide = torch.float64 if self.kind == "sine" or dtype == torch.float64 else torch.float32
        made = [torch.randn(self.batch, self.heads, n, self.dim).to(dtype) for n in (self.queries, self.keys)]
        shape = self.heads, self.dim, self.rows
        if self.kind == "sine":
            made += [torch.rand(shape, dtype=wide) / 2, torch.randn(shape, dtype=wide), torch.rand(shape, dtype=wide)]
        else:
            made += [torch.randn(shape).to(wide), torch.rand(shape).to(wide)]
        return made + ([torch.rand(shape[:2]).to(wide)] if self.gated else [])

    def noise(self):
        """z, e in float32; z may be a seed."""
        rows = 2 * self.rows
        if self.kind != "sine":
            rows = max(self.starts) + max(self.queries, self.keys) + self.rows - 1
        z = torch.tensor([2**35 + 77])
        if self.kind != "seed":
            z = torch.randn(self.heads, self.dim, rows, self.realizations)
        return z, torch.randn(self.heads, self.dim, self.realizations) if self.gated else None

    def oracle(self, tensors, noise):
        q, k, *parts = tensors
        gate = parts.pop() if self.gated else None
        z, e = noise
        first = 0
        if self.kind == "seed":
            first = min(self.starts)
            span = max(self.starts) - first + max(self.queries, self.keys) + self.rows
            z = oracle.conv_noise(z.item(), self.heads, self.dim, first, span, self.realizations)
        z, hats = z.double(), []
        for number, (x, start) in enumerate(zip((q, k), self.starts)):
            at = start + torch.arange(x.shape[2])
            if self.kind == "sine":
                turns, phases, gains = (p[:, None] for p in parts)
                angle = 2 * math.pi * turns * at[:, None, None] + (phases if number == 0 else 0.0)
                code = torch.einsum("hldk,hdkr->hldr", gains * angle.cos(), z[:, :, 0::2])
                code = code + torch.einsum("hldk,hdkr->hldr", gains * angle.sin(), z[:, :, 1::2])
            else:
                heard = z[:, :, (at - first)[:, None] + torch.arange(self.rows)]  # (H, D, L, P, R)
                code = torch.einsum("hdp,hdlpr->hldr", parts[number].double(), heard)
            if gate is not None:
                code = code + (gate.double()[..., None] * e.double())[:, None]
            hats.append(oracle.encoded(x, code))
        return hats

    def keywords(self, parts, noise, device, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        z, e = noise
        z = z if self.kind == "seed" else z.to(wide)
        names = ["turns", "phases", "gains"] if self.kind == "sine" else ["filter_q", "filter_k"]
        made = dict(zip([*names, "gate_gains"], parts))
        made.setdefault("gate_gains", None)
        made |= dict(noise=z, gate_noise=None if e is None else e.to(wide))
        made = {name: t if t is None else t.to(device) for name, t in made.items()}
        if self.kind != "sine":
            made["realizations"] = self.realizations
        return made | dict(zip(("query_start", "key_start"), self.starts))

    def run(self, backend, tensors, noise, grads, device, need=(True, True)):
        """The two features and the gradients of all tensors."""
        module, kind = functions(backend, "spe"), "sine" if self.kind == "sine" else "conv"
        tensors = [t.to(device) for t in tensors]
        keywords = self.keywords(tensors[2:], noise, device, tensors[0].dtype)
        hats = getattr(module, f"{kind}_forward")(*tensors[:2], **keywords)
        grads = [g.to(hats[0]) for g in grads]
        needs = dict(zip(("need_inputs", "need_codes"), need))
        return hats, getattr(module, f"{kind}_backward")(*grads, *tensors[:2], **keywords, **needs)


CODES = {
    "sine": Codes(dim=8),
    "sine, ungated, 40 wide, far": Codes(
        queries=18, keys=34, dim=40, rows=3, realizations=24, gated=False, starts=(1_000_000, 999_971)
    ),
    "sine, 10 sines, two of each": Codes(queries=18, keys=18, dim=4, rows=10, realizations=32, heads=2, batch=2),
    "sine, one of everything": Codes(queries=1, keys=1, dim=1, rows=1, realizations=1),
    "sine, fewer keys": Codes(queries=66, keys=3, dim=5, rows=4, realizations=20, starts=(5, 0)),
    "conv": Codes("conv", dim=8, rows=5),
    "conv, ungated, 40 wide": Codes("conv", 18, 34, 40, 5, 24, False, (3, 1)),
    "conv, one tap": Codes("conv", 9, 9, 5, 1, 8),
    "conv, long filter, two of each": Codes("conv", 18, 18, 6, 40, 16, heads=2, batch=2),
    "seed": Codes("seed", 34, 34, 5, 3, 8),
    "seed, ungated, odd, far": Codes("seed", 9, 17, 3, 4, 21, False, (1_000_000, 999_990), heads=2),
    "seed, one of everything": Codes("seed", 1, 1, 1, 1, 1),
}


@BACKENDS
@pytest.mark.parametrize("name", CODES)
def test_codes(name, backend, device, dtype, tolerance):
    case = CODES[name]
    tensors, noise = case.tensors(dtype), case.noise()
    exact = [t.double().requires_grad_() for t in tensors]
    want = case.oracle(exact, noise)
    grads = [torch.randn_like(w) for w in want]
    expected = torch.autograd.grad(want, exact, grads)
    hats, gradients = case.run(backend, tensors, noise, grads, device)
    tolerance = max(tolerance, 1e-14 * max(case.starts))  # the oracle's phases are not reduced to one turn
    assert all(h.dtype == dtype and h.is_contiguous() for h in hats)
    compare(hats, want, tolerance)
    compare(gradients[: len(expected)], expected, 3 * tolerance)
    assert [g.dtype for g in gradients[: len(expected)]] == [t.dtype for t in tensors]


@BACKENDS
@pytest.mark.parametrize("kind", ["sine", "conv"])
def test_gradients_of_some_tensors(kind, backend, device, dtype, tolerance):
    case = Codes(kind, 20, 18, 9, 3, 8)
    tensors, noise = case.tensors(dtype), case.noise()
    grads = [torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (20, 18)]
    whole = case.run(backend, tensors, noise, grads, device)[1]
    for need in ((True, False), (False, True)):
        some = case.run(backend, tensors, noise, grads, device, need)[1]
        for number, (a, b) in enumerate(zip(some, whole)):
            assert not need[number > 1] or torch.equal(a, b)


# ------------------------------------------------------------------------------------- 16 bits, determinism


def plain_codes(case, tensors, noise):
    """The code of each position rounded to the dtype, and one product with it."""
    q, k, *parts = tensors
    eye = torch.eye(case.dim, dtype=torch.float64)
    ones = [eye[:, None, None].expand(-1, case.heads, n, -1) for n in (case.queries, case.keys)]
    codes = case.oracle([*ones, *parts], noise)  # (D, H, L, R)
    return [torch.einsum("bhld,dhlr->bhlr", x, code.to(x.dtype)) for x, code in zip((q, k), codes)]


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["sine", "conv"])
def test_16_bit_codes_at_most_twice_the_error_of_plain(kind):
    """fp16: the interpreter has no products of bf16."""
    case, runs = Codes(kind, 34, 34, 8, 4, 16), []
    for seed in range(3):
        torch.manual_seed(seed)
        tensors, noise = case.tensors(torch.float16), case.noise()
        grads = [torch.randn(1, 1, 34, 16).half() for _ in range(2)]
        exact, eager = ([t.detach().to(w).requires_grad_() for t in tensors] for w in (torch.float64, None))
        truth, rough = case.oracle(exact, noise), plain_codes(case, eager, noise)
        hats, gradients = case.run("triton", tensors, noise, grads, DEVICE)
        run = [[*hats, *gradients]]
        for results, inputs in ((rough, eager), (truth, exact)):
            run.append([*results, *torch.autograd.grad(results, inputs, [g.to(results[0]) for g in grads])])
        runs.append(run)
    at_most_twice(runs)


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["sine", "seed"])
def test_the_same_bits_again(kind):
    case, runs = Codes(kind, 34, 34, 5, 3, 8), []
    for _ in range(2):
        torch.manual_seed(0)
        tensors = case.tensors(torch.float32)
        hats, gradients = case.run("triton", tensors, case.noise(), [torch.randn(1, 1, 34, 8)] * 2, DEVICE)
        runs.append([*hats, *gradients])
    assert all(map(torch.equal, *runs))


@BACKENDS
@pytest.mark.parametrize("part", [2, 3, 4], ids=["turns", "phases", "gains"])
def test_nan_shows(backend, device, dtype, tolerance, part):
    """Also where an angle is an integer, which knows none: in the features of its head and of no other."""
    case = Codes(queries=3, keys=3, dim=2, rows=2, realizations=4, heads=2)
    tensors = case.tensors(dtype)
    tensors[part][1, 0, 1] = math.nan
    hats, _ = case.run(backend, tensors, case.noise(), [torch.randn(1, 2, 3, 4, dtype=dtype)] * 2, device)
    assert hats[0][:, 1].isnan().all()
    assert all(hat[:, 0].isfinite().all() for hat in hats)
