"""T5 runs on posattn's kernels as it is: its relative bias is one of them, and nothing of size N x N is made.

A small T5 with random weights, once with attn_implementation="eager" and once with "posattn", the same weights: loss,
logits and gradients agree. Then a training step of each at growing lengths: seconds, and megabytes above what was there
before the step (the resident memory of the process, sampled; on a GPU what was allocated).

    python examples/t5_posattn.py              a minute
    python examples/t5_posattn.py --quick      seconds

It printed, with one thread of a busy CPU:

    loss: eager 4.216566, posattn 4.216566
    largest difference of logits: 1.3e-06
    largest difference of a gradient, relative to its largest entry: 1.2e-06
    a training step at length                eager             posattn
                          1024      0.78 s, 213 MB       0.49 s, 23 MB
                          2048      4.22 s, 435 MB       1.18 s, 43 MB
                          4096    21.44 s, 1504 MB       5.61 s, 72 MB
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from pathlib import Path

import torch
from text import VOCABULARY, options_of, read_text
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import posattn.integrations.transformers  # noqa: F401, makes the name "posattn" known


class PeakMemory:
    """Megabytes above those at the start, at the most."""

    def __init__(self, device: str) -> None:
        self.device, self.peak, self.running = device, 0, True

    def now(self) -> int:
        if not Path("/proc/self/statm").exists():  # not Linux: 0 MB are printed
            return 0
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        return resident * os.sysconf("SC_PAGE_SIZE")

    def watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            return_freed_memory()
            self.start = self.now()
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.running = False
            self.thread.join()
        self.megabytes = (self.peak - self.start) / 2**20


def return_freed_memory() -> None:
    """To the system, where the C library can: what is used again would not be counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def build(implementation: str, device: str, quick: bool) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2 if quick else 3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    config._attn_implementation = implementation
    return T5ForConditionalGeneration(config).to(device)


def step(model: T5ForConditionalGeneration, source: Tensor, target: Tensor) -> tuple[float, float]:
    """Seconds and megabytes of a forward and backward pass."""
    model.zero_grad()
    with PeakMemory(source.device.type) as memory:
        start = time.perf_counter()
        model(input_ids=source, labels=target).loss.backward()
        if source.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.megabytes


def main() -> None:
    options = options_of(__doc__, longest=(4096, "length measured"))
    longest = 512 if options.quick else options.longest
    text = read_text(options.text)[1].long().to(options.device)
    eager, ours = (build(name, options.device, options.quick) for name in ("eager", "posattn"))

    source, target = text[: 2 * 200].view(2, 200), text[400:480].view(2, 40)
    padding = torch.ones_like(source)
    padding[1, 150:] = 0
    outs = [m(input_ids=source, attention_mask=padding, labels=target) for m in (eager, ours)]
    for out in outs:
        out.loss.backward()
    print(f"loss: eager {outs[0].loss.item():.6f}, posattn {outs[1].loss.item():.6f}")
    print(f"largest difference of logits: {(outs[0].logits - outs[1].logits).abs().max().item():.1e}")
    gradients = [dict(model.named_parameters()) for model in (eager, ours)]
    worst = max(
        ((p.grad - gradients[1][name].grad).abs().max() / p.grad.abs().max()).item()
        for name, p in gradients[0].items()
    )
    print(f"largest difference of a gradient, relative to its largest entry: {worst:.1e}")

    print(f"{'a training step at length':26}{'eager':>20}{'posattn':>20}")
    length = longest // (4 if not options.quick else 2)
    step(ours, text[None, :64], target[:1])  # what is made on first use
    while length <= longest:
        cells = []
        for model in (eager, ours):
            seconds, megabytes = step(model, text[None, :length], target[:1])
            cells.append(f"{seconds:.2f} s, {megabytes:.0f} MB")
        print(f"{length:26}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
        length *= 2


if __name__ == "__main__":
    main()
