"""A small transformer that is told positions in one way or another; nothing else differs between two of them.

`POSITIONS` (positions.py) lists the ways. "absolute": a learned vector per position is added to the embedding,
attention is PyTorch's. "tisa": no such vectors; attention is `posattn.attention` with a TISA bias in each layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import POSITIONS, Attend, attention_of, make_biases, sinusoids

EMBEDDING_STD = 0.1


class Size(NamedTuple):
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    tisa_kernels: int = 5
    max_length: int = 8192  # rows of the table of absolute positions
    fire_hidden: int = 32
    fire_length: int = 512  # where FIRE's learned threshold starts
    dape_hidden: int = 32


class Block(nn.Module):
    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.num_heads, self.attend = size.num_heads, attend
        self.attention_norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.attention_out = nn.Linear(size.width, size.width, bias=False)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp_in = nn.Linear(size.width, 4 * size.width)
        self.mlp_out = nn.Linear(4 * size.width, size.width)
        self.bias: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        mixed = self.attend(query, key, value, self.bias)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Logits per token: (B, L) int64 below `inputs` -> (B, L, outputs). The seed decides every initial weight.

    What all kinds have is initialised first and from the same seed, so it starts equal in all.
    """

    def __init__(self, kind: str, size: Size, seed: int, attend: Attend, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(inputs, size.width)
        self.blocks = nn.ModuleList(Block(size, attend) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, outputs, bias=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.modules():
                if isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=EMBEDDING_STD)
                elif isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            if POSITIONS[kind].vectors == "learned":
                rows = torch.randn(size.max_length, size.width)
                self.positions = nn.Parameter(EMBEDDING_STD * rows)
            for block, bias in zip(self.blocks, make_biases(kind, size)):
                block.bias = bias

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        vectors = POSITIONS[self.kind].vectors
        if vectors == "learned":
            x = x + self.positions[: tokens.shape[1]]
        elif vectors == "sinusoidal":
            x = x + EMBEDDING_STD * sinusoids(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def attend_with(self, attend: Attend) -> None:
        """Compute attention in another way from now on; the weights stay."""
        for block in self.blocks:
            block.attend = attend


class ByteModel(Transformer):
    """Logits of the next byte: (B, L) int64 -> (B, L, 256)."""

    def __init__(self, kind: str, size: Size = Size(), seed: int = 0, attend: Attend | None = None) -> None:
        super().__init__(kind, size, seed, attend or attention_of(kind, causal=True), 256, 256)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
