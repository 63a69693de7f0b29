"""Which keys the kernels leave out where a bias decays: the bound of kernels/near.py, held against float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from posattn.kernels import launch, near
from posattn.kernels.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LN2 = math.log(2.0)
BITS = 26


class Case(NamedTuple):
    queries: int = 200
    keys: int = 200
    slopes: tuple[float, ...] = (2.0, 1.0)
    table: str = ""  # what becomes of the table of these slopes; "": slopes
    key_heads: int = 1
    head_dim: int = 16
    left: int = -1
    right: int = -1
    shift: int | None = None
    symmetric: bool = True
    scale: float | None = None
    change: str = ""  # of q and k
    padding: str = ""
    dtype: torch.dtype = torch.float32


CASES = {
    "causal": Case(right=0),
    "both sides": Case(),
    "table": Case(table="same", right=0, slopes=(3.0, 0.5)),
    "table, both sides, GQA": Case(table="same", key_heads=2, slopes=(2.0, 1.0, 0.5, 0.0)),
    "slopes grow": Case(slopes=(-1.0, 2.0)),
    "one-sided slopes": Case(symmetric=False, slopes=(2.0, -2.0)),
    "fewer queries": Case(queries=70, keys=200, right=0),
    "fewer keys": Case(queries=200, keys=70, right=0),
    "window": Case(left=90, right=11),
    "keys far ahead": Case(shift=120, left=150, right=-1),
    "queries far ahead": Case(shift=-260, right=0),
    "valley and hill": Case(table="hill", right=0),
    "hidden offsets": Case(table="hidden"),
    "constant": Case(table="constant"),
    "negative scale": Case(scale=-0.5, right=0),
    "a loud key far away": Case(change="loud key", right=0, slopes=(4.0, 2.0)),
    "a loud query": Case(change="loud query", right=0),
    "no queries to speak of": Case(change="zero queries"),
    "keys of zero": Case(change="zero keys"),
    "opposed": Case(change="opposed", right=0, slopes=(4.0, 2.0)),
    "underflow": Case(change="underflow", slopes=(8.0, 4.0)),
    "padded near keys": Case(padding="near", right=0),
    "gaps": Case(padding="gaps", queries=130, keys=190),
    "half": Case(dtype=torch.float16, right=0),
}


def make(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    heads, n, m = len(case.slopes), case.queries, case.keys
    shift = n - m if case.shift is None else case.shift  # first on first by default, so that both sides exist
    q = torch.randn(2, heads, n, case.head_dim, generator=generator)
    k, v = (torch.randn(2, case.key_heads, m, case.head_dim, generator=generator) for _ in "kv")
    if case.change == "loud key":
        k[:, :, 5] = 8 * q[:, :1, -1]
    elif case.change == "loud query":
        q[:, :, 37] *= 30
    elif case.change == "zero queries":
        q[:] = 0
    elif case.change == "zero keys":
        k[:] = 0
    elif case.change == "opposed":  # own keys as low as the bound, one far key as high
        k = k.abs() * 2
        q = -k.repeat_interleave(heads // case.key_heads, 1)
        k[:, :, 3] *= -1
    elif case.change == "underflow":
        q, k = q.sign() * 1e-20, k.sign() * 2e18
    offset = torch.arange(1 - n, m) + shift
    slopes = torch.tensor(case.slopes)
    line = slopes[:, None] * (-offset.abs() if case.symmetric else offset)
    if case.table == "hill":
        line = torch.where(offset.abs() > 150, line.new_tensor(-3.0), line)
    elif case.table == "hidden":
        line = torch.where(offset.abs() == 3, -math.inf, line)
    elif case.table == "constant":
        line = torch.zeros_like(line)
    mask = None
    if case.padding:
        mask = torch.ones(2, m, dtype=torch.bool)
        if case.padding == "near":
            mask[0, 100:] = False
        else:
            mask[:, ::3] = False
    q, k, v = (t.to(DEVICE, case.dtype) for t in (q, k, v))
    told = dict(
        table=line.to(DEVICE) if case.table else None, slopes=None if case.table else slopes.to(DEVICE), shift=shift,
        key_mask=None if mask is None else mask.to(DEVICE), left=case.left, right=case.right, softcap=0.0,
        symmetric=case.symmetric, scale=case.head_dim**-0.5 if case.scale is None else case.scale, support=None,
    )  # fmt: skip
    return dict(q=q, k=k, v=v, line=line, offset=offset, told=told)


def problem(made: dict[str, Any]) -> Problem:
    told = made["told"]
    names = "table", "support", "slopes", "scaled", "relative", "key_mask", "scale", "softcap", "shift", "left", "right"
    settings = [told.get(name) for name in names]
    return Problem(made["q"], made["k"], made["v"], *settings, told["symmetric"], None, None)


def logits(made: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Float64, (2, H, Lq, Lk): logits, -inf where not visible; the bias; bound U of q.k."""
    told = made["told"]
    q, k = made["q"].cpu().double(), made["k"].cpu().double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    n, m = q.shape[2], k.shape[2]
    x = torch.arange(m)[None, :] - torch.arange(n)[:, None]
    bias = made["line"].double()[:, x + n - 1]
    seen = torch.ones(2, 1, n, m, dtype=torch.bool)
    o = x + told["shift"]
    if told["left"] >= 0:
        seen = seen & (o >= -told["left"])
    if told["right"] >= 0:
        seen = seen & (o <= told["right"])
    if told["key_mask"] is not None:
        seen = seen & told["key_mask"].cpu()[:, None, None, :]
    s = (told["scale"] * q @ k.mT + bias).masked_fill(~seen, -math.inf)
    bound = abs(told["scale"]) * q.norm(dim=-1)[..., None] * k.norm(dim=-1).amax(-1)[..., None, None]
    return s, bias.expand_as(s), bound


def outside(ranges: Tensor, n: int, m: int) -> Tensor:
    """(2, H, Lq, Lk): pairs that no row's range has."""
    ranges = ranges.cpu().repeat_interleave(16, 2)[:, :, :n]
    j = torch.arange(m)
    return (j < ranges[..., :1]) | (j >= ranges[..., 1:])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("saved", [False, True], ids=["forward", "backward"])
def test_what_is_left_out_is_negligible(name, saved):
    """All of a row that is left out has less than 2^-26 of its sum, by the exact softmax and not by the bound."""
    case = CASES[name]
    made = make(case)
    s, _, _ = logits(made)
    lse = s.logsumexp(-1)
    given = lse.float().to(DEVICE) if saved else None
    told = made["told"]
    ranges = near.near(problem(made), told["table"], told["slopes"], told["symmetric"], given)
    left_out = outside(ranges, case.queries, case.keys)
    weight = torch.where(left_out, (s - lse[..., None]).exp(), 0.0).nan_to_num(0.0)  # NaN: rows that see nothing
    assert weight.sum(-1).max() < 2.0**-BITS
    seen = s > -math.inf
    print(f"{name}: {(left_out & seen).sum() / seen.sum():.3f} of the visible pairs left out")
    back = near.turned(problem(made), ranges).cpu().repeat_interleave(16, 2)[:, :, : case.keys]
    i = torch.arange(case.queries)[:, None]
    kept = (i >= back[..., 0][:, :, None, :]) & (i < back[..., 1][:, :, None, :])
    assert (kept | left_out).all()  # what rows need of keys, keys need of rows


@pytest.mark.parametrize("name", ["causal", "both sides", "table", "fewer queries", "window", "half"])
def test_ranges_are_as_short_as_the_bound_allows(name):
    """A range ends where the bound does, within the slack for rounding: the formula again, in float64, from the lse."""
    case = CASES[name]
    made = make(case)
    s, bias, bound = logits(made)
    lse, told = s.logsumexp(-1), made["told"]
    ranges = near.near(problem(made), told["table"], told["slopes"], told["symmetric"], lse.float().to(DEVICE))
    limit = lse[..., None] - (BITS + math.ceil(math.log2(case.keys))) * LN2 - bound * (1 + 2.0**-6) - 0.01
    far = made["offset"][torch.arange(case.keys)[None, :] - torch.arange(case.queries)[:, None] + case.queries - 1]
    # The largest value at an offset or farther on its side.
    envelope = torch.where(far <= 0, bias.cummax(-1).values, bias.flip(-1).cummax(-1).values.flip(-1))
    needed = envelope >= limit
    groups = math.ceil(case.queries / 16)
    spare = 0
    for g in range(groups):
        rows = needed[:, :, 16 * g : 16 * g + 16]
        any_row = rows.any(2)
        first = torch.where(any_row, torch.arange(case.keys), case.keys).amin(-1)
        spare = max(spare, int((first - ranges[:, :, g, 0].cpu()).max()))
    assert spare <= 1


def test_something_is_left_out():
    """Share of the pairs that a causal row sees, slope 1, 600 keys: less than half is computed."""
    made = make(Case(queries=600, keys=600, slopes=(1.0,), right=0))
    told = made["told"]
    for lse in (None, logits(made)[0].logsumexp(-1).float().to(DEVICE)):
        ranges = near.near(problem(made), None, told["slopes"], True, lse).cpu()
        last = torch.arange(600).view(-1, 1)
        kept = (ranges.repeat_interleave(16, 2)[0, 0, :600, :1] <= last.T) & (last >= last.T)
        assert kept.sum() / (600 * 601 / 2) < 0.35


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "query"])
def test_what_is_no_number_is_never_left_out(bad, where):
    made = make(Case(right=0, slopes=(4.0, 4.0)))
    (made["k"] if where == "key" else made["q"])[0, 0, 2] = bad
    told = made["told"]
    ranges = near.near(problem(made), None, told["slopes"], True).cpu()
    if where == "key":
        assert (ranges[0, :, :, 0] == 0).all() and (ranges[1, :, 5:, 0] > 0).all()
    else:
        assert ranges[0, 0, 0, 0] == 0 and (ranges[0, :, 5:, 0] > 0).all()
    out, _ = launch.forward(made["q"], made["k"], made["v"], **told, skip=True)
    correct, _ = launch.forward(made["q"], made["k"], made["v"], **told)
    assert torch.equal(out.isnan(), correct.isnan())
    assert out.isnan().any()


@pytest.mark.parametrize(
    "name",
    ["causal", "table", "window", "queries far ahead", "valley and hill", "gaps", "half", "opposed"],
)
def test_kernels_with_and_without(name):
    """out, lse and all gradients, tile by tile: what they differ by is below rounding."""
    case = CASES[name]
    made = make(case)
    q, k, v, told = *(made[x][:1] for x in "qkv"), made["told"]
    told["key_mask"] = None if told["key_mask"] is None else told["key_mask"][:1]
    generator = torch.Generator().manual_seed(8)
    grad = torch.randn(q.shape, generator=generator).to(q)
    ways = []
    for skip in (False, True):
        out, lse = launch.forward(q, k, v, **told, skip=skip)
        dlse = torch.where(lse.isfinite(), torch.sin(torch.arange(lse.numel(), device=DEVICE)).view_as(lse), 0.0)
        asked = dict(tails_need_grad=True, need_q=True, need_kv=True, need_table=bool(case.table), deterministic=False)
        ways.append([out, lse, *launch.backward(grad, dlse, q, k, v, out, lse, **told, **asked, skip=skip)])
    for whole, part in zip(*ways):
        assert torch.equal(whole.isfinite(), part.isfinite())
        whole, part = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (whole, part))
        size = whole.abs().amax() if whole.numel() else 0.0
        unit = 2.0**-10 if case.dtype == torch.float16 else 2.0**-23
        assert whole.numel() == 0 or (whole - part).abs().max() <= 2 * unit * size


@pytest.mark.parametrize("ignored", ["softcap", "no bias", "one key"])
def test_where_nothing_can_be_told(ignored):
    made = make(Case(queries=40, keys=1 if ignored == "one key" else 40, right=0))
    told = made["told"] | (dict(softcap=3.0) if ignored == "softcap" else {})
    if ignored == "no bias":
        told["slopes"] = None
    whole = launch.forward(made["q"], made["k"], made["v"], **told)
    part = launch.forward(made["q"], made["k"], made["v"], **told, skip=True)
    for a, b in zip(whole, part):
        assert torch.equal(a, b)
