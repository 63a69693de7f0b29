"""Who takes part in `python -m bench speed`: posattn with each kind of bias, torch's SDPA, FlexAttention.

A bias is made from its parameters inside of the call, for posattn and for FlexAttention alike, as in training. "kernel"
in a name: the table was made before the clock started. "frozen": the bias wants no gradient.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import posattn

from .speed_timing import Attend, Peer, Place

SCHEDULES = ("specialised", "persistent", "descriptors")
SDPA = ("FLASH", "CUDNN", "EFFICIENT")
BIASES: dict[str, Callable[[int], posattn.Bias]] = {
    "TISA": posattn.TISA,
    "T5": partial(posattn.T5Bias, bidirectional=False),
    "KERPLE": posattn.KERPLE,
    "ALiBi": posattn.ALiBi,
}
CAN_SKIP = "skip_negligible" in inspect.signature(posattn.attention).parameters
Make = Callable[[], Peer]


class MadeBefore(posattn.Bias):
    """Table and support of another bias, kept: what is timed is then the kernel."""

    def __init__(self, bias: posattn.Bias, length: int) -> None:
        super().__init__(bias.num_heads)
        with torch.no_grad():
            self.kept, self.ends = bias.table(length, length), bias.support()

    def values(self, offsets: Tensor) -> Tensor:
        return self.kept

    def table(self, *lengths: int) -> Tensor:
        return self.kept

    def support(self) -> Tensor | None:
        return self.ends


class RadialBasis(posattn.Bias):
    """Learned Gaussians of the distance |j - i|, as a user would write them: sum_k a exp(-b^2 (|o| - c)^2)."""

    def __init__(self, num_heads: int, num_basis: int = 5) -> None:
        super().__init__(num_heads)
        self.amplitudes = torch.nn.Parameter(0.5 * torch.randn(num_heads, num_basis))
        self.widths = torch.nn.Parameter(0.02 + 0.1 * torch.rand(num_heads, num_basis))
        self.centres = torch.nn.Parameter(20.0 * torch.rand(num_heads, num_basis))

    def values(self, offsets: Tensor) -> Tensor:
        distance = offsets.abs().float() - self.centres[..., None]
        return (self.amplitudes[..., None] * torch.exp(-(self.widths[..., None] * distance).square())).sum(1)


def bias_of(kind: str, heads: int, device: str) -> posattn.Bias:
    torch.manual_seed(0)
    return BIASES[kind](heads).to(device)


def backend_of(device: str) -> str:
    return "triton" if device == "cuda" else "blockwise"


def ours(place: Place, device: str, bias: posattn.Bias | None = None, **options: Any) -> Peer:
    more = dict(is_causal=place.causal, backend=backend_of(device), **options)
    parameters = [] if bias is None else [p for p in bias.parameters() if p.requires_grad]
    return Peer(lambda q, k, v: posattn.attention(q, k, v, bias, **more), parameters)  # type: ignore[arg-type, return-value]


def with_bias(place: Place, device: str, kind: str, how: str = "", **options: Any) -> Peer:
    bias = bias_of(kind, place.heads, device)
    if how == "frozen":
        bias.requires_grad_(False)
    if how == "kernel":
        bias = MadeBefore(bias, place.length)
    if kind == "ALiBi" and CAN_SKIP:  # or it would skip by itself
        options.setdefault("skip_negligible", False)
    return ours(place, device, bias, **options)


def scheduled(place: Place, device: str, kind: str, schedule: str) -> Peer:
    """Forward by another schedule of the kernel; an error where posattn does not take it, with its reason."""
    if device == "cpu":
        raise NotImplementedError("a schedule of the Triton kernels")
    from posattn.kernels import configs, schedules

    peer = with_bias(place, device, kind) if kind != "none" else ours(place, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = os.environ.get("POSATTN_SCHEDULE")
        os.environ["POSATTN_SCHEDULE"] = schedule
        try:
            return peer.attend(q, k, v)
        finally:
            os.environ.pop("POSATTN_SCHEDULE")
            if kept is not None:
                os.environ["POSATTN_SCHEDULE"] = kept

    shape = (place.batch, place.heads, place.length, place.head_dim)
    sample = torch.randn(shape, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(2):  # the first call judges
            attend(sample, sample, sample)
    if configs.ran["forward"].schedule != schedule:
        raise RuntimeError(refusal(schedules.verdicts(), schedule, place.head_dim))
    return Peer(attend, peer.parameters)


def refusal(verdicts: list[dict[str, Any]], schedule: str, head_dim: int) -> str:
    """Why posattn did not take a schedule for its last forward of this head dim."""
    kinds = [v for v in verdicts if (v["direction"], v["head_dim"]) == ("forward", head_dim) and v["why"]]
    whys = [v["why"] for v in kinds if v["config"].schedule == schedule]
    return whys[-1] if whys else "no row of this schedule serves the call"


def sdpa(place: Place, name: str) -> Peer:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, f"{name}_ATTENTION")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=place.causal)

    return Peer(attend, [])


# ------------------------------------------------------------------------------------------------------ FlexAttention


def flex(place: Place, device: str, score: Any, captured: Callable[[], list[Tensor]], parameters: list[Tensor]) -> Peer:
    """score(tensors, score, b, h, i, j); the tensors that it reads are made in the call, inside of autograd."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, mask = place.length, None
    if place.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor]) -> Tensor:
        def change(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score(tensors, s, b, h, i, j)

        more = {} if score is None else {"score_mod": change}
        return flex_attention(q, k, v, block_mask=mask, **more)  # type: ignore[return-value]

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    attend: Attend = lambda q, k, v: compiled(q, k, v, captured())
    return Peer(attend, parameters, again=False)


def flex_plain(place: Place, device: str) -> Peer:
    return flex(place, device, None, list, [])


def flex_table(place: Place, device: str, kind: str) -> Peer:
    """The bias's table, read by score_mod; its gradient comes back into the table."""
    bias, zero = bias_of(kind, place.heads, device), place.length - 1

    def score(tensors: list[Tensor], s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + tensors[0][h, j - i + zero]

    return flex(place, device, score, lambda: [bias.table(place.length, place.length)], list(bias.parameters()))


def flex_slopes(place: Place, device: str) -> Peer:
    slopes = bias_of("ALiBi", place.heads, device).slopes()
    assert slopes is not None

    def score(tensors: list[Tensor], s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s - tensors[0][h] * (i - j).abs()

    return flex(place, device, score, lambda: [slopes], [])


def radial(place: Place, device: str) -> Peer:
    torch.manual_seed(0)
    return ours(place, device, RadialBasis(place.heads).to(device))


def flex_radial(place: Place, device: str, table: bool) -> Peer:
    """The Gaussians of the distance in score_mod, as was filed; or read from a table of them."""
    torch.manual_seed(0)
    bias, zero = RadialBasis(place.heads).to(device), place.length - 1
    own, count = list(bias.parameters()), bias.centres.shape[1]

    def score(tensors: list[Tensor], s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if table:
            return s + tensors[0][h, j - i + zero]
        amplitudes, widths, centres = tensors
        distance = (i - j).abs()
        for n in range(count):
            x = widths[h, n] * (distance - centres[h, n])
            s = s + amplitudes[h, n] * torch.exp(-x * x)
        return s

    captured = (lambda: [bias.table(place.length, place.length)]) if table else (lambda: own)
    return flex(place, device, score, captured, own)


# ------------------------------------------------------------------------------------------------------ who takes part


def forward_peers(place: Place, device: str, with_flex: bool) -> dict[str, Make]:
    """On the CPU one form of FlexAttention is enough: each takes a C++ compiler ten seconds."""
    made: dict[str, Make] = {"posattn none": partial(ours, place, device)}
    made |= {f"posattn {kind}": partial(with_bias, place, device, kind) for kind in BIASES}
    made |= {f"posattn {kind} kernel": partial(with_bias, place, device, kind, "kernel") for kind in ("TISA", "KERPLE")}
    made["posattn ALiBi skipping"] = partial(skipping, place, device)
    made |= {f"SDPA {name.lower()}": partial(sdpa, place, name) for name in SDPA}
    if with_flex:
        made["Flex KERPLE"] = partial(flex_table, place, device, "KERPLE")
    if with_flex and device == "cuda":
        made["Flex none"] = partial(flex_plain, place, device)
        made["Flex ALiBi"] = partial(flex_slopes, place, device)
    return made


def schedule_peers(place: Place, device: str) -> dict[str, Make]:
    """The forward's other schedules, beside the one in use."""
    made: dict[str, Make] = {"posattn none": partial(ours, place, device)}
    made["posattn KERPLE"] = partial(with_bias, place, device, "KERPLE")
    for schedule in SCHEDULES:
        made |= {f"posattn {b} {schedule}": partial(scheduled, place, device, b, schedule) for b in ("none", "KERPLE")}
    return made


def skipping(place: Place, device: str) -> Peer:
    if not CAN_SKIP:
        raise NotImplementedError("this posattn has no skip_negligible")
    return with_bias(place, device, "ALiBi", skip_negligible=True)


def training_peers(place: Place, device: str, with_flex: bool) -> dict[str, Make]:
    made: dict[str, Make] = {"posattn none": partial(ours, place, device)}
    for kind in ("TISA", "T5", "KERPLE"):
        made[f"posattn {kind}"] = partial(with_bias, place, device, kind)
        made[f"posattn {kind} frozen"] = partial(with_bias, place, device, kind, "frozen")
    made["posattn ALiBi"] = partial(with_bias, place, device, "ALiBi")
    made["posattn ALiBi skipping"] = partial(skipping, place, device)
    made |= {f"SDPA {name.lower()}": partial(sdpa, place, name) for name in SDPA}
    if with_flex:
        made["Flex none"] = partial(flex_plain, place, device)
        made["Flex KERPLE"] = partial(flex_table, place, device, "KERPLE")
    return made


def radial_peers(place: Place, device: str) -> dict[str, Make]:
    return {
        "posattn": partial(radial, place, device),
        "Flex": partial(flex_radial, place, device, False),
        "Flex, from a table": partial(flex_radial, place, device, True),
    }
