"""Clients side by side: a few threads, each with its own scratch model and one intra-op thread.

Results never depend on the number of workers: every job is a function of its arguments, and what torch sets per
thread is set alike in every worker.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import torch

from .layout import FlatModel

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Workers:
    """A pool of `count` threads; `submit(job, ...)` runs `job(model, ...)` on a scratch model of its own."""

    def __init__(self, models: list[FlatModel]):
        self.count = len(models)
        self._models: SimpleQueue[FlatModel] = SimpleQueue()
        for model in models:
            self._models.put(model)
        # Set per thread: more intra-op threads would change the order of sums, and so the bits.
        self._pool = ThreadPoolExecutor(self.count, "client", initializer=torch.set_num_threads, initargs=(1,))

    def submit(self, job: Callable, *arguments) -> Future:
        """Queue `job(model, *arguments)`; its result or exception is in the future."""

        def call():
            model = self._models.get()
            try:
                return job(model, *arguments)
            finally:
                self._models.put(model)

        return self._pool.submit(call)

    def close(self) -> None:
        """Wait for running jobs, drop queued ones, and end the threads."""
        self._pool.shutdown(cancel_futures=True)


def num_workers(setting: str | int, clients_per_round: int, device: torch.device) -> int:
    """How many workers `setting` ("auto" or a number) means: at most one per client of the cohort.

    On a CPU "auto" takes a few more threads than cores: five equal clients on two cores then finish in 2.5 client-times
    rather than 3. On a GPU one, since jobs share the device.
    """
    if setting == "auto":
        setting = 1 if device.type == "cuda" else 2 * (os.cpu_count() or 1) + 1
    return max(1, min(int(setting), clients_per_round))


def keep_freed_memory() -> None:
    """Tell malloc to keep what is freed instead of handing it back to the system; does nothing where it is not glibc.

    A training step frees and allocates the same few large tensors again and again. By default glibc maps them anew
    each time, and faulting their pages in takes longer than the arithmetic (benchmarks/NOTES.md).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 4096)
