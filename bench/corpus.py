"""A real text that every machine with Python has: the sources of Python's own standard library, as bytes.

Which files: every ``.py`` below the standard library's folder, except tests, installed packages, encodings
(tables) and files above 100 kB (tables and help texts, mostly). Which are held out: those whose path has a CRC-32
divisible by 12. In what order: by that CRC-32, so that neighbours in the text are unrelated. Nothing else enters:
the same files give the same bytes, and `Corpus.digest` says whether two machines had the same files.
"""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
LARGEST_FILE = 100_000
HELD_OUT_ONE_IN = 12


class Corpus(NamedTuple):
    train: Tensor  # (n,) uint8
    held_out: Tensor  # (m,) uint8
    num_files: int
    digest: str  # SHA-256 of train, then held_out


def read_corpus(folder: Path | None = None) -> Corpus:
    """The corpus of a folder; of the standard library when None."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        # _sysconfigdata_*.py is written when Python is built and differs from machine to machine.
        skipped = not SKIPPED_FOLDERS.isdisjoint(name.parts) or path.name.startswith("_sysconfigdata")
        if not skipped and path.stat().st_size <= LARGEST_FILE:
            files.append((zlib.crc32(name.as_posix().encode()), name.as_posix(), path))
    train, held_out = bytearray(), bytearray()
    for crc, _, path in sorted(files):
        text = held_out if crc % HELD_OUT_ONE_IN == 0 else train
        text += path.read_bytes().replace(b"\r\n", b"\n") + b"\n"
    if not held_out or not train:
        raise RuntimeError(f"{folder} holds no Python sources to train on")
    digest = hashlib.sha256(bytes(train) + bytes(held_out)).hexdigest()
    tensors = (torch.frombuffer(text, dtype=torch.uint8) for text in (train, held_out))
    return Corpus(*tensors, num_files=len(files), digest=digest)


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    """What `read_corpus` gives, read once in a process."""
    return read_corpus()


class Batches:
    """Endless (inputs, targets) of random pieces of the text; the seed alone decides which."""

    def __init__(self, text: Tensor, batch_size: int, length: int, seed: int) -> None:
        self.text, self.batch_size, self.length = text, batch_size, length
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Two (batch_size, length) int64 tensors; targets are the inputs one byte later."""
        last = self.text.numel() - self.length
        starts = torch.randint(last, (self.batch_size, 1), generator=self.generator)
        pieces = self.text[starts + torch.arange(self.length + 1)].long()
        return pieces[:, :-1], pieces[:, 1:]
