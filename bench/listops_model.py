"""A bidirectional encoder with linear attention that reads an expression and says its value."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import posattn

from .listops_data import PAD, TOKENS
from .spe_language import make_spe

KINDS = {"none": "none", "absolute": "learned absolute", "sine": "SineSPE, gated", "conv": "ConvSPE, gated"}


class Shape(NamedTuple):
    width: int = 512
    depth: int = 6
    num_heads: int = 8
    hidden: int = 2048
    tied: bool = True  # all layers are one
    dropout: float = 0.1
    pooling: str = "cls"  # or "mean"
    features: str = "relu"
    longest: int = 2000  # rows of the table of absolute positions
    realizations: int = 64
    sines: int = 10
    taps: int = 128


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm, self.mlp_norm = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.attention_out = nn.Linear(shape.width, shape.width, bias=False)
        self.mlp_in = nn.Linear(shape.width, shape.hidden)
        self.mlp_out = nn.Linear(shape.hidden, shape.width)
        self.spe: nn.Module | None = None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (B, L, width); counts (B, L), True for a token and False for padding."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.shape.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = posattn.linear_attention(
            query, key, value, spe=self.spe, feature_map=self.shape.features, key_padding_mask=counts
        )
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(mixed, self.shape.dropout, self.training)
        hidden = F.dropout(F.gelu(self.mlp_in(self.mlp_norm(x))), self.shape.dropout, self.training)
        return x + F.dropout(self.mlp_out(hidden), self.shape.dropout, self.training)


class Encoder(nn.Module):
    """Logits of the ten values: (B, L) int64 tokens -> (B, 10). Equal seeds give all kinds equal weights, but for what
    a kind has of its own."""

    def __init__(self, kind: str, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(TOKENS, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(1 if shape.tied else shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.before, self.head = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, 10)
        self.positions: nn.Parameter | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.modules():
                if isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.5)
                elif isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            if kind == "absolute":
                self.positions = nn.Parameter(0.5 * torch.randn(1 + shape.longest, shape.width))
            elif kind != "none":
                for layer in self.layers:
                    layer.spe = make_spe(kind, shape.num_heads, shape.width // shape.num_heads, shape)

    def forward(self, tokens: Tensor) -> Tensor:
        counts = tokens != PAD
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[1]]
        x = F.dropout(x, self.shape.dropout, self.training)
        for number in range(self.shape.depth):
            x = self.layers[number % len(self.layers)](x, counts)
        x = self.norm(x)
        if self.shape.pooling == "cls":
            pooled = x[:, 0]
        else:
            pooled = (x * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
        return self.head(F.relu(self.before(pooled)))


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices of layers, none for vectors, positions and encodings."""
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or ".spe." in name or name == "positions"]
    names = {id(p) for p in plain}
    return [
        {"params": [p for p in model.parameters() if id(p) not in names], "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
    ]
