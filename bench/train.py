"""Training the byte model, and what it has learned at lengths that it has never seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .byte_model import ByteModel
from .corpus import Batches

BITS = 1 / math.log(2)
# How many bytes before each multiple of the longest length are also looked at by themselves.
LAST = 256


class Recipe(NamedTuple):
    length: int = 256
    batch_size: int = 8
    steps: int = 800
    warmup: int = 50
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: ByteModel, text: Tensor, recipe: Recipe, device: str, tell: Callable[[int, float], None]
) -> dict[str, Any]:
    """Train in place; `tell` hears each step and its loss in bits per byte. Returns all losses and the time."""
    model.to(device).train()
    batches = Batches(text, recipe.batch_size, recipe.length, recipe.seed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    losses = []
    start = time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        inputs, targets = (t.to(device) for t in batches.next())
        loss = model.loss(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() * BITS)
        tell(step + 1, losses[-1])
    return {"seconds": time.perf_counter() - start, "bits_per_byte": losses}


def curve(losses: Sequence[float]) -> list[float]:
    """Means of so many steps each that 50 numbers are left: enough for a model, of any length of training."""
    each = -(-len(losses) // 50)
    parts = (losses[i : i + each] for i in range(0, len(losses), each))
    return [round(sum(part) / len(part), 4) for part in parts]


@torch.no_grad()
def evaluate(
    model: ByteModel,
    text: Tensor,
    lengths: Sequence[int],
    device: str,
    tell: Callable[[int, float], None] = lambda done, value: None,
) -> list[dict[str, Any]]:
    """Bits per byte of the same text, cut into windows of each length in turn.

    "all": every byte. "last": the 256 bytes before each multiple of the longest length. These end a window at
    every length, so the same bytes are predicted each time, from more and more of what stands before them.
    `tell` hears how many lengths are done and the bits of "last" at that one.
    """
    model.eval()
    longest = max(lengths)
    usable = (text.numel() - 1) // longest * longest
    inputs, targets = text[:usable].long(), text[1 : usable + 1].long()
    position = torch.arange(usable) % longest
    rows = []
    for length in lengths:
        start = time.perf_counter()
        windows = max(1, 4096 // length)  # at once
        losses = []
        for x, y in zip(inputs.view(-1, length).split(windows), targets.view(-1, length).split(windows)):
            logits = model(x.to(device)).flatten(0, 1).float()
            losses.append(F.cross_entropy(logits, y.to(device).flatten(), reduction="none").cpu())
        bits = torch.cat(losses) * BITS
        last = bits[position >= longest - LAST]
        rows.append(
            {
                "length": length,
                "all": bits.mean().item(),
                "last": last.mean().item(),
                "bytes": usable,
                "seconds": time.perf_counter() - start,
            }
        )
        tell(len(rows), rows[-1]["last"])
    return rows
