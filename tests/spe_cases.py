"""Calls of linear attention, with and without SPE, and what the oracle says to each."""

from __future__ import annotations

from typing import Any, NamedTuple

import oracle_spe as oracle
import torch
from torch import Tensor

from posattn import ConvSPE, Favor, LinearState, SineSPE
from posattn.noise import Noise


class Case(NamedTuple):
    """One call. spe: none, sine, exact, conv, seed (conv, noise made from a seed); mask: none, gaps, blind (left)."""

    spe: str = "sine"
    gated: bool = True
    feature_map: Any = "elu"
    causal: bool = True
    queries: int = 21
    keys: int | None = None
    heads: int = 2
    dim: int = 6
    value_dim: int = 5
    sines: int = 2
    taps: int = 5
    realizations: int = 12
    mask: str = "none"
    state: bool = False
    start: int = 7  # of a call with a state
    eps: float = 1e-6
    batch: int = 2

    @property
    def width(self) -> int:
        """Of what goes into the feature map."""
        exact = (2 * self.sines + self.gated) * self.dim
        return {"none": self.dim, "exact": exact}.get(self.spe, self.realizations)

    def module(self, dtype: torch.dtype = torch.float32) -> SineSPE | ConvSPE | None:
        if self.spe == "none":
            return None
        if self.spe in ("sine", "exact"):
            number = self.realizations if self.spe == "sine" else None
            made: SineSPE | ConvSPE = SineSPE(self.heads, self.dim, self.sines, number, self.gated)
            with torch.no_grad():
                made.freqs.add_(3)  # some turns within a short sequence
        else:
            made = ConvSPE(self.heads, self.dim, self.taps, self.realizations, self.gated)
        return made.to(dtype)

    def noise(self) -> Noise | None:
        """Drawn, or for conv written out; that of `exact` is empty."""
        module = self.module()
        if module is None or self.spe in ("exact", "seed"):
            return None if module is None else module.draw(torch.Generator().manual_seed(5))
        rows = 2 * self.sines if self.spe == "sine" else self.begin + self.queries + (self.keys or 0) + self.taps
        gate = torch.randn(self.heads, self.dim, self.realizations) if self.gated else None
        return Noise(torch.randn(self.heads, self.dim, rows, self.realizations), gate)

    @property
    def begin(self) -> int:
        return self.start if self.state else 0

    @property
    def rounding(self) -> float:
        """Of the oracle: its phases are products in float64 that are not reduced to one turn."""
        return 1e-14 * (self.begin + self.queries)

    def map(self, x: Tensor, query: bool) -> Tensor:
        if self.feature_map == "favor":
            return oracle.favor(x, Favor(x.shape[-1]).projection.to(x.device), query)
        return {"elu": oracle.elu, "relu": oracle.relu}.get(self.feature_map, self.feature_map)(x)

    def make(self, dtype: torch.dtype) -> tuple[list[Tensor], Any, dict[str, Any]]:
        """query, key, value and with a state its kv and k, all to be differentiated; module; keywords."""
        keys = self.keys or self.queries
        rows = (self.queries, self.dim), (keys, self.dim), (keys, self.value_dim)
        tensors = [torch.randn(self.batch, self.heads, *row, dtype=dtype) for row in rows]
        if self.state:
            width = 128 if self.feature_map == "favor" else self.width
            sums = torch.rand(self.batch, self.heads, width, dtype=dtype) + 0.5
            double = torch.float64 if dtype == torch.float64 else torch.float32
            kv = torch.randn(*sums.shape, self.value_dim, dtype=double)
            tensors += [kv, sums.to(double)]
        keywords = dict(is_causal=self.causal, feature_map=self.feature_map, eps=self.eps)
        if self.mask == "gaps":
            keywords["key_padding_mask"] = torch.rand(self.batch, keys) < 0.6
        if self.mask == "blind":  # the first queries of a causal call see nothing, nor does the second entry at all
            keywords["key_padding_mask"] = (torch.arange(keys) > 4) & (torch.arange(self.batch)[:, None] != 1)
        return [t.requires_grad_() for t in tensors], self.module(dtype), keywords

    def call(self, attend, tensors: list[Tensor], module: Any, noise: Noise | None, keywords: dict[str, Any]):
        """out, kv, k."""
        state = LinearState(*tensors[3:], self.start, noise) if self.state else None
        codes = None if module is None else module(noise)
        out, after = attend(*tensors[:3], spe=codes, initial_state=state, return_state=True, **keywords)
        assert after.position == self.begin + tensors[1].shape[2]
        return out, after.kv, after.k

    def codes(self, module: Any, noise: Noise, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """Qbar, Kbar (H, L, D, R) of the module's parameters and the noise."""
        positions = [self.begin + torch.arange(length) for length in (queries, keys)]
        if self.spe in ("sine", "exact"):
            parameters = module.freqs, module.offsets, module.gains, module.gate
            drawn = noise
            if self.spe == "exact":
                drawn = oracle.exact_noise(self.heads, self.dim, self.sines, self.gated)
            return oracle.sine_codes(*parameters, *drawn, *positions)
        z = noise.codes
        if self.spe == "seed":
            length = self.begin + max(queries, keys) + self.taps
            z = oracle.conv_noise(z.item(), self.heads, self.dim, 0, length, self.realizations)
        return oracle.conv_codes(module.filter_q, module.filter_k, module.gate, z, noise.gate, *positions)

    def hats(self, query: Tensor, key: Tensor, module: Any, noise: Noise | None) -> list[Tensor]:
        if module is None:
            return [query.double(), key.double()]
        codes = self.codes(module, noise, query.shape[2], key.shape[2])
        return [oracle.encoded(x, code) for x, code in zip((query, key), codes)]

    def oracle(self, tensors: list[Tensor], module: Any, noise: Noise | None, keywords: dict[str, Any]):
        """out, kv, k."""
        query, key = self.hats(*tensors[:2], module, noise)
        more = dict(zip(("state", "sums"), tensors[3:]))
        mask = keywords.get("key_padding_mask")
        phi_q, phi_k = self.map(query, True), self.map(key, False)
        return oracle.linear_oracle(phi_q, phi_k, tensors[2], eps=self.eps, causal=self.causal, mask=mask, **more)


def softplus(x: Tensor) -> Tensor:
    """A map of a user's own that changes the width."""
    return torch.nn.functional.softplus(torch.cat([x, -x[..., :3]], -1))


CASES = {
    f"{spe}, {gate}, {kind}, {order}": Case(spe, gate == "gated", kind, order == "causal")
    for spe in ("sine", "conv")
    for gate in ("gated", "ungated")
    for kind in ("elu", "relu", "favor")
    for order in ("causal", "full")
}
CASES |= {f"none, {kind}": Case("none", feature_map=kind) for kind in ("elu", "relu", "favor")}
CASES |= {f"exact, {kind}": Case("exact", feature_map=kind, causal=kind != "elu") for kind in ("elu", "relu", "favor")}
CASES |= {f"length {n}": Case(queries=n, heads=1, batch=1) for n in (1, 63, 65, 127)}
CASES |= {f"conv, length {n}": Case("conv", queries=n, heads=1, batch=1, causal=n != 65) for n in (1, 63, 65, 127)}
CASES |= {f"seed, length {n}": Case("seed", queries=n, heads=1, batch=1) for n in (1, 65)}
CASES |= {
    "widths 40, 64": Case(dim=40, realizations=64, value_dim=24, batch=1),
    "widths 64, 128": Case(dim=64, realizations=128, value_dim=80, batch=1, causal=False),
    "conv, widths 40, 64": Case("conv", dim=40, realizations=64, value_dim=40, batch=1, taps=9),
    "one of everything": Case(dim=1, realizations=1, value_dim=1, sines=1, heads=1, batch=1),
    "conv, one of everything": Case("conv", dim=1, realizations=1, value_dim=1, taps=1, heads=1, batch=1),
    "10 sines": Case(sines=10, queries=70, heads=3),
    "kernel longer than the sequence": Case("seed", taps=50, queries=9),
    "odd realizations of a seed": Case("seed", realizations=7, queries=30),
    "fewer queries": Case(queries=7, keys=30, causal=False),
    "more queries": Case("conv", queries=30, keys=7, causal=False, feature_map="favor"),
    "own map": Case(feature_map=softplus),
    "own map, exact": Case("exact", False, softplus, causal=False),
    "exact, ungated, favor": Case("exact", False, "favor", sines=1, queries=65),
    "gaps": Case(mask="gaps"),
    "gaps, full, favor": Case("conv", mask="gaps", causal=False, feature_map="favor"),
    "exact, gaps, favor": Case("exact", feature_map="favor", mask="gaps"),
    "none, gaps": Case("none", feature_map="relu", mask="gaps", causal=False),
    "blind": Case("conv", mask="blind"),
    "blind, full": Case("seed", mask="blind", causal=False, feature_map="relu"),
    "state": Case(state=True),
    "state, full, gaps": Case("conv", state=True, causal=False, mask="gaps", feature_map="relu"),
    "state, seed": Case("seed", state=True, start=1000, feature_map="favor"),
    "state, far": Case(state=True, start=1_000_000),
    "state, small seed": Case("seed", queries=9, dim=3, realizations=8, taps=3, heads=1, batch=1, state=True, start=99),
    "state, blind": Case(state=True, mask="blind", feature_map="relu", heads=1, dim=3),
    "exact, small, gaps, favor": Case("exact", feature_map="favor", mask="gaps", queries=9, heads=1, dim=2, sines=1),
    "state, exact": Case("exact", state=True, feature_map="favor"),
    "state, none, own map": Case("none", state=True, feature_map=torch.exp),
    "large eps": Case(eps=3.0, feature_map="relu"),
}

INTERPRETED = ["state, blind", "state, small seed", "exact, small, gaps, favor"]


def close(got: Tensor, want: Tensor, tolerance: float, floor: float = 1e-3) -> None:
    """Equal within tolerance of the largest entry of want, of which floor is the least that is expected."""
    assert got.shape == want.shape
    size = max(floor, want.abs().max().item()) if want.numel() else 1
    got, want = (t.detach().cpu().double() / size for t in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
