"""The places in a model where a projection's bias has become p(0): put there, and undone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .frames import Place, Stack
from .hooks import Adds, arranged, taken_apart
from .models import STREAMS, Attention, is_conv1d
from .multihead import PositionedMultiheadAttention, Vectors

Handles = list[RemovableHandle]


class Site(NamedTuple):
    """A bias that has become p(0). places: where it is now, one a stream, None for those that keep theirs."""

    module: nn.Module
    stack: Stack
    places: list[Place | None]
    layout: str
    head_dim: int
    had_bias: bool
    trained: bool

    @property
    def bias_name(self) -> str:
        return "in_proj_bias" if isinstance(self.module, nn.MultiheadAttention) else "bias"


def place(
    stack: Stack, attention: Attention, layer: int, streams: tuple[str, ...]
) -> tuple[list[Site], Handles]:
    """Have the vectors of one layer added to its projections, and move the biases of these into p(0)."""
    module, cross = attention.module, attention.cross

    def place_of(stream: str) -> Place | None:
        if stream not in streams:
            return None
        role, name = (
            ("cross" if cross and stream != "query" else "own"),
            (f"cross_{stream}" if cross else stream),
        )
        return Place(role, stack.encoders[role].streams.index(name), layer)

    if isinstance(module, nn.MultiheadAttention):
        site = _site(module, stack, [place_of(stream) for stream in STREAMS], "chunks", 0)
        _move(site)
        module.__class__ = PositionedMultiheadAttention
        module.vectors = Vectors(stack, site.places)  # type: ignore[assignment]
        return [site], []
    sites, handles = [], []
    for part in attention.projections:
        places = [place_of(stream) for stream in part.streams]
        if any(places):
            site = _site(part.module, stack, places, part.layout, part.head_dim)
            _move(site)
            counted = cross and part.streams != ("query",)
            handles.append(
                part.module.register_forward_hook(Adds(stack, places, part.layout, part.head_dim, counted))
            )
            sites.append(site)
    return sites, handles


def _site(module: nn.Module, stack: Stack, places: list[Place | None], layout: str, head_dim: int) -> Site:
    site = Site(module, stack, places, layout, head_dim, False, True)
    bias = getattr(module, site.bias_name)
    return site._replace(had_bias=bias is not None, trained=bias is None or bias.requires_grad)


def _row(site: Site, where: Place) -> Tensor:
    """p(0) of a place, to be written into."""
    return site.stack.encoders[where.encoder].initial.detach()[where.stream, where.layer]


@torch.no_grad()
def _move(site: Site) -> None:
    """The bias into p(0). Streams without vectors keep theirs, in a parameter that is zero elsewhere."""
    module, bias = site.module, getattr(site.module, site.bias_name)
    kept = None
    if bias is not None:
        parts: list[Tensor | None] = []
        for where, part in zip(site.places, taken_apart(bias, len(site.places), site.layout, site.head_dim)):
            if where is not None:
                _row(site, where).copy_(part)
            parts.append(torch.zeros_like(part) if where is not None else part)
        if None in site.places:
            kept = nn.Parameter(arranged(parts, site.layout, site.head_dim), bias.requires_grad)
    if isinstance(module, nn.MultiheadAttention):
        module.in_proj_bias = None  # type: ignore[assignment]
        module.register_parameter("kept_bias", kept)
    elif bias is not None and kept is None and is_conv1d(module):  # it computes with a bias in any case
        del module.bias
        module.register_buffer("bias", torch.zeros_like(bias), persistent=False)
    else:
        module.bias = kept  # type: ignore[assignment]


@torch.no_grad()
def restore(site: Site) -> None:
    """The reverse: p(0) is a bias again. Where there was none, there is none if p(0) is zero."""
    module = site.module
    multihead = isinstance(module, nn.MultiheadAttention)
    held = module.kept_bias if multihead else module.bias
    parts: list[Tensor | None] = [
        None if where is None else _row(site, where).clone() for where in site.places
    ]
    bias = arranged(parts, site.layout, site.head_dim)
    if isinstance(held, Tensor):
        bias = bias.to(held) + held
    name = site.bias_name
    if name in module._buffers:
        del module._buffers[name]
    new = nn.Parameter(bias, site.trained) if site.had_bias or bool(bias.any()) else None
    module.register_parameter(name, new) if name not in module._parameters else setattr(module, name, new)
    if multihead:
        del module.kept_bias
        del module.vectors
        module.__class__ = nn.MultiheadAttention
