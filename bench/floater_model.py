"""A language model on bytes made of torch.nn's own transformer layers, as a user would have it, and how it is told
positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posattn import FLOATER
from posattn.floater import attach

from .byte_model import EMBEDDING_STD
from .positions import sinusoids

VECTORS = ("none", "sinusoidal", "learned")  # added to the embedding


class Kind(NamedTuple):
    label: str
    vectors: str = "none"  # added to the embedding
    delta_t: float = 0.0  # of FLOATER; 0: without
    goes_on: bool = False  # the trained sinusoidal model, trained on


KINDS = {
    "none": Kind("none"),
    "sinusoidal": Kind("sinusoidal", "sinusoidal"),
    "learned": Kind("learned", "learned"),
    "floater": Kind("FLOATER", delta_t=0.1),
    "floater-slow": Kind("FLOATER, delta_t 0.01", delta_t=0.01),
    "floater-sinusoidal": Kind("FLOATER + sinusoidal", "sinusoidal", delta_t=0.1),
    # "warm start": the trained sinusoidal model is attached and trains on; "longer": it trains on as it is.
    "longer": Kind("sinusoidal, trained on", "sinusoidal", goes_on=True),
    "warm": Kind("warm start", "sinusoidal", delta_t=0.1, goes_on=True),
    "warm-slow": Kind("warm start, delta_t 0.01", "sinusoidal", delta_t=0.01, goes_on=True),
}
CHAIN = ("sinusoidal", *(name for name, kind in KINDS.items() if kind.goes_on))


class Size(NamedTuple):
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    max_length: int = 1024  # rows of the table of learned positions


class LanguageModel(nn.Module):
    """Logits of the next byte: (B, L) int64 -> (B, L, 256).

    Layers normalise first and have biases on all projections, zero at first. What all ways to tell positions have
    starts from the same numbers for the same seed.
    """

    def __init__(self, vectors: str, size: Size, seed: int) -> None:
        super().__init__()
        if vectors not in VECTORS:
            raise ValueError(f"vectors must be one of {', '.join(VECTORS)}, got {vectors!r}")
        self.vectors = vectors
        self.embedding = nn.Embedding(256, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, size.num_heads, 4 * size.width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(size.width)
        self.transformer = nn.TransformerEncoder(layer, size.depth, norm, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, 256, bias=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.apply(_start)
            if vectors == "learned":
                self.positions = nn.Parameter(EMBEDDING_STD * torch.randn(size.max_length, size.width))

    def forward(self, tokens: Tensor) -> Tensor:
        x, length = self.embedding(tokens), tokens.shape[1]
        if self.vectors == "learned":
            x = x + self.positions[:length]
        elif self.vectors == "sinusoidal":
            x = x + EMBEDDING_STD * sinusoids(length, x.shape[2], x.device)
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype)
        return self.head(self.transformer(x, mask=mask, is_causal=True))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


def _start(module: nn.Module) -> None:
    """Normal weights that keep the size of what passes; biases zero."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=module.embed_dim**-0.5)
        nn.init.zeros_(module.in_proj_bias)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def make_model(kind: str, size: Size, seed: int) -> LanguageModel:
    """Untrained. Equal weights for equal seeds, but for what a kind has of its own."""
    model = LanguageModel(KINDS[kind].vectors, size, seed)
    return with_floater(model, kind, seed) if KINDS[kind].delta_t else model


def with_floater(model: LanguageModel, kind: str, seed: int) -> LanguageModel:
    """The model, attached: its flow starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach(model, delta_t=KINDS[kind].delta_t)
    return model


def encoder_of(model: LanguageModel) -> FLOATER | None:
    return next(iter(model.floater.encoders.values())) if hasattr(model, "floater") else None


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, or None and what FLOATER says of a trajectory that cannot be followed."""
    try:
        return call(), ""
    except RuntimeError as error:
        if "FLOATER" not in str(error):
            raise
        return None, str(error)


class Guarded:
    """A model whose answer is NaN at lengths that FLOATER cannot reach."""

    def __init__(self, model: LanguageModel, notes: dict[int, str]) -> None:
        self.model, self.notes = model, notes

    def eval(self) -> None:
        self.model.eval()

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.notes.get(tokens.shape[1]):
            return torch.full((*tokens.shape, 256), math.nan, device=tokens.device)
        return self.model(tokens)
