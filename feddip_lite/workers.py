"""Clients side by side: a few threads, each with its own scratch model and one intra-op thread.

Results never depend on the number of workers: every job is a function of its arguments, and what torch sets per
thread is set alike in every worker.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event, Lock

import torch

from .layout import FlatModel

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Workers:
    """A pool of one thread per scratch model, of which `slots` run at a time.

    A job hands its slot on whenever it calls `model.pause()`, as `local_update` does between epochs. So five equal
    clients take 2.6 client-times on two cores (25 epochs, two at a time) rather than 3, and no thread disturbs another.
    """

    def __init__(self, models: list[FlatModel], slots: int):
        self.slots = min(slots, len(models))
        self._models: SimpleQueue[FlatModel] = SimpleQueue()
        self._turns = _Turns(self.slots)
        for model in models:
            model.pause = self._turns.hand_on
            self._models.put(model)
        # Set per thread: more intra-op threads would change the order of sums, and so the bits.
        self._pool = ThreadPoolExecutor(len(models), "client", initializer=torch.set_num_threads, initargs=(1,))

    def submit(self, job: Callable, *arguments) -> Future:
        """Queue `job(model, *arguments)`; its result or exception is in the future."""

        def call():
            model = self._models.get()
            self._turns.take()
            try:
                return job(model, *arguments)
            finally:
                self._turns.give()
                self._models.put(model)

        return self._pool.submit(call)

    def close(self) -> None:
        """Wait for running jobs, drop queued ones, and end the threads."""
        self._pool.shutdown(cancel_futures=True)


class _Turns:
    """`slots` threads at a time, first come first served (a semaphore would let the giver of a slot take it again)."""

    def __init__(self, slots: int):
        self._free, self._waiting, self._lock = slots, deque(), Lock()

    def take(self) -> None:
        """Wait for a slot."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            mine = Event()
            self._waiting.append(mine)
        mine.wait()

    def give(self) -> None:
        """Give this thread's slot to the one that has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    def hand_on(self) -> None:
        """Let the others have a turn, if any of them waits."""
        with self._lock:
            if not self._waiting:
                return
            self._waiting.popleft().set()
            mine = Event()
            self._waiting.append(mine)
        mine.wait()


def num_workers(setting: str | int, clients_per_round: int, device: torch.device) -> tuple[int, int]:
    """(clients under way, of which running at a time) that `setting` ("auto" or a number of the latter) means.

    On a CPU all clients of the cohort are under way, up to three per core, and one per core is running. On a GPU jobs
    share the device, so it is one. More would only cost memory.
    """
    cores = 1 if device.type == "cuda" else os.cpu_count() or 1
    running = cores if setting == "auto" else int(setting)
    under_way = running if running == 1 else 3 * running
    return max(1, min(under_way, clients_per_round)), running


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
