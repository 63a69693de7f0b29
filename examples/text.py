"""What the examples share: text as bytes, a training loop, the loss at a length, and how they are called."""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

VOCABULARY = 256  # bytes


def options_of(documentation: str | None, **more: Any) -> argparse.Namespace:
    """The command line: --quick, --text, --steps, --device, and what an example adds as name=(default, help)."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="all of it, but small: seconds")
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text files to read instead of the sources of Python's standard library",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, (default, text) in more.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})"
        )
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"torch {torch.__version__} on {options.device}, {torch.get_num_threads()} threads", flush=True)
    return options


def read_text(files: list[Path] | None) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to evaluate on, the last tenth: uint8."""
    if files is None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        random.Random(0).shuffle(files)
    data = bytearray(b"\n".join(file.read_bytes() for file in files))
    if len(data) < 100_000:
        sys.exit(f"--text: {len(data)} bytes are too few, 100000 are needed")
    text = torch.frombuffer(data, dtype=torch.uint8)
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def train(model: Any, text: Tensor, length: int, steps: int, rate: float = 3e-3, batch: int = 8) -> float:
    """Trains a causal language model on random pieces of the text; returns processor seconds a step."""
    generator = torch.Generator().manual_seed(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.05, 1 - step / steps))
    )
    model.train()
    start = time.process_time()
    for _ in range(steps):
        at = torch.randint(len(text) - length, (batch, 1), generator=generator)
        tokens = text[at + torch.arange(length)].long().to(model.device)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return (time.process_time() - start) / max(1, steps)


@torch.no_grad()
def loss_at(model: Any, text: Tensor, length: int, bytes_read: int) -> float:
    """Mean loss, in nats a byte, of pieces of the text of one length, the same text at every length."""
    model.eval()
    pieces = text[: bytes_read // length * length].view(-1, length).long().to(model.device)
    losses = [model(input_ids=piece, labels=piece).loss.item() * len(piece) for piece in pieces.split(8)]
    return sum(losses) / len(pieces)
