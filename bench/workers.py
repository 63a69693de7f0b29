"""Models trained side by side: on a CPU one process and one thread each, as many as there are cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch


def each(function: Callable[..., Any], calls: list[tuple[Any, ...]], workers: int) -> Iterator[tuple[Any, Any]]:
    """(arguments, result) of every call as it ends. One worker: in this process, one after the other.

    The function is a module's own; with more workers it is called in fresh processes.
    """
    if workers <= 1 or not calls:
        for arguments in calls:
            yield arguments, function(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(calls)), context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = {pool.submit(function, *arguments): arguments for arguments in calls}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
