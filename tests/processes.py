"""Gloo processes that run the same checks: starting them takes longer than running them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

Check = tuple[Callable, tuple]
gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo"
)


def pass_in_processes(checks: Sequence[Check], world: int, folder: Path, seconds: float) -> None:
    """Start `world` processes, each of which calls check(*arguments, rank) for all of checks, well within `seconds`."""
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    # A file, not a port: a port that is free now may be taken when the processes bind it.
    arguments = (checks, world, str(folder / "store"), failures)
    processes = [context.Process(target=_run, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=seconds)
        messages = []
        while not failures.empty():
            messages.append(failures.get())
        assert not messages, "\n".join(messages)
        assert [process.exitcode for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()


def _run(rank: int, checks: Sequence[Check], world: int, store: str, failures: multiprocessing.Queue) -> None:
    """In one of the processes; what fails is put into `failures`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=20),
    )
    for check, arguments in checks:
        try:
            check(*arguments, rank)
        except Exception:
            of = ", ".join(map(str, arguments))
            failures.put(f"rank {rank}, {check.__name__} of {of}:\n{traceback.format_exc()}")
    dist.destroy_process_group()
