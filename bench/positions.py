"""How a small model is told positions: every way that the benchmarks compare, in one table.

DAPE and the bias that it mixes start from the same numbers for the same seed: all biases are made first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import posattn

if TYPE_CHECKING:
    from .byte_model import Size

Attend = Callable[[Tensor, Tensor, Tensor, "nn.Module | None"], Tensor]
BASE = 10000.0  # of the wavelengths of sinusoids and of RoPE


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: nn.Module | None, causal: bool = True
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def rotary_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: nn.Module | None, causal: bool = True
) -> Tensor:
    """RoPE: queries and keys turned by angles that grow with their position."""
    return plain_attention(rotate(query), rotate(key), value, None, causal)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: nn.Module | None, causal: bool = True
) -> Tensor:
    return posattn.attention(query, key, value, bias, is_causal=causal)


def windowed_attention(keys: int) -> Attend:
    """As `fused_attention`, each query seeing itself and the `keys` - 1 positions before it."""

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: nn.Module | None) -> Tensor:
        return posattn.attention(query, key, value, bias, is_causal=True, window=(keys - 1, 0))

    return attend


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """RoPE of (..., L, D), positions from `start`: dimension d and d + D/2 are a plane that turns."""
    angles = _angles(x.shape[-2], x.shape[-1], start, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    left, right = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1).to(x.dtype)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """(L, width) of mean square 1: sines, then cosines."""
    angles = _angles(length, width, 0, device)
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def _angles(length: int, width: int, start: int, device: torch.device) -> Tensor:
    """(L, width / 2), fp64: position times BASE^(-2 d / width)."""
    position = torch.arange(start, start + length, device=device, dtype=torch.float64)
    rate = BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    return position[:, None] * rate


class Position(NamedTuple):
    label: str
    vectors: str | None = None  # added to the embedding: "learned" or "sinusoidal"
    attend: Callable[..., Tensor] = plain_attention
    bias: Callable[[Size], nn.Module] | None = None  # one per layer
    mixes: str | None = None  # DAPE: the kind whose bias it mixes with the scores


def _fire(size: Size, negative_slope: float = 0.0) -> nn.Module:
    length = size.fire_length
    return posattn.FIRE(
        size.num_heads, hidden=size.fire_hidden, init_length=length, negative_slope=negative_slope
    )


POSITIONS = {
    "none": Position("none"),
    "absolute": Position("learned absolute", vectors="learned"),
    "sinusoidal": Position("sinusoidal", vectors="sinusoidal"),
    "rope": Position("RoPE", attend=rotary_attention),
    "tisa": Position("TISA", None, fused_attention, lambda size: posattn.TISA(size.num_heads, size.tisa_kernels)),
    "alibi": Position("ALiBi", None, fused_attention, lambda size: posattn.ALiBi(size.num_heads)),
    "kerple": Position("KERPLE", None, fused_attention, lambda size: posattn.KERPLE(size.num_heads)),
    "fire": Position("FIRE", None, fused_attention, _fire),
    "dape-alibi": Position(
        "DAPE-ALiBi", None, fused_attention, lambda size: posattn.ALiBi(size.num_heads), "alibi"
    ),
    "dape-kerple": Position(
        "DAPE-KERPLE", None, fused_attention, lambda size: posattn.KERPLE(size.num_heads), "kerple"
    ),
    # As published: FIRE's own network is leaky inside DAPE.
    "dape-fire": Position("DAPE-FIRE", None, fused_attention, partial(_fire, negative_slope=0.01), "fire"),
}


def attention_of(kind: str, causal: bool) -> Attend:
    return partial(POSITIONS[kind].attend, causal=causal)


def make_biases(kind: str, size: Size) -> list[nn.Module | None]:
    """A bias of its own for each layer, or None's; random ones are drawn from torch's global generator."""
    position = POSITIONS[kind]
    if position.bias is None:
        return [None] * size.depth
    biases = [position.bias(size) for _ in range(size.depth)]
    if position.mixes is None:
        return biases
    return [posattn.DAPE(size.num_heads, base=bias, hidden=size.dape_hidden) for bias in biases]


def chosen(names: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Kinds named on a command line, in the table's order. Raises ValueError with the names there are."""
    if names is None:
        return default
    wanted = [name.strip().lower() for name in names.split(",")]
    unknown = [name for name in wanted if name not in POSITIONS]
    if unknown:
        raise ValueError(f"no method {', '.join(unknown)}; there are {', '.join(POSITIONS)}")
    return tuple(kind for kind in POSITIONS if kind in wanted)
