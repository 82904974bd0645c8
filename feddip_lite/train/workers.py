"""Clients side by side: a few threads, each with its own scratch model and one intra-op thread.

Results never depend on the number of workers: every job is a function of its arguments, and what torch sets per
thread is set alike in every worker.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Condition

import torch

from ..core.flat import FlatModel

QUOTA = Path("/sys/fs/cgroup/cpu.max")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Job(Future):
    """The future result of `function(model, *arguments)`; `model` and `started` are known once it runs."""

    def __init__(self, function: Callable, arguments: tuple):
        super().__init__()
        self.function, self.arguments = function, arguments
        self.model, self.started = None, None


class Workers:
    """A pool of one thread per scratch model, of which `slots` run at a time.

    A job hands its slot on whenever it calls `model.pause()`, as `local_update` does between epochs. So five equal
    clients take 2.6 client-times on two cores (25 epochs, two at a time) rather than 3, and no thread disturbs another.

    Args:
        spare: makes one more model, for the thread that takes the place of one whose job never ends.
    """

    def __init__(self, models: list[FlatModel], slots: int, spare: Callable[[], FlatModel]):
        self.slots = min(slots, len(models))
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._turns = _Turns(self.slots)
        self._spare = spare
        self._threads: dict[FlatModel, threading.Thread] = {}
        for model in models:
            self._start(model)
        weakref.finalize(self, self._jobs.put, None)  # the threads know the queue, not this object

    def submit(self, function: Callable, *arguments) -> Job:
        """Queue `function(model, *arguments)`; its result or exception is in the job."""
        job = Job(function, arguments)
        self._jobs.put(job)
        return job

    def result(self, job: Job, limit: float | None = None):
        """The job's result, waited for; jobs must be asked for in the order in which they were submitted.

        Raises:
            TimeoutError: the job has been running for `limit` seconds. It is given up: what it returns is not looked
                at, another thread takes its place, and it ends when it next pauses, if it ever does.
        """
        while limit is not None and not job.done():
            left = limit if job.started is None else job.started + limit - time.monotonic()
            if left <= 0:
                self._give_up(job, TimeoutError(f"no reply within {limit:g} s"))
            wait([job], left)
        return job.result()

    def close(self) -> None:
        """Wait for running jobs, drop queued ones, and end the threads; one that was given up is not waited for."""
        try:
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job.cancel()
        except Empty:
            self._jobs.put(None)
        for thread in self._threads.values():
            thread.join()

    def _start(self, model: FlatModel) -> None:
        model.pause = self._turns.hand_on
        # A daemon, so that a job that never ends does not keep the process from ending.
        thread = threading.Thread(target=_work, args=(self._jobs, self._turns, model), name="client", daemon=True)
        self._threads[model] = thread
        thread.start()

    def _give_up(self, job: Job, error: Exception) -> None:
        try:
            job.set_exception(error)
        except InvalidStateError:  # it has just ended
            return
        job.model.pause = _stop
        del self._threads[job.model]
        self._start(self._spare())
        self._turns.give()


def _work(jobs: SimpleQueue[Job | None], turns: _Turns, model: FlatModel) -> None:
    """A thread's life: one job after the other, until None comes, which is left for the others."""
    torch.set_num_threads(1)  # more would change the order of sums, and so the bits
    for job in iter(jobs.get, None):
        if not job.set_running_or_notify_cancel():
            continue
        turns.take()
        job.model, job.started = model, time.monotonic()
        try:
            deliver, outcome = job.set_result, job.function(model, *job.arguments)
        except BaseException as error:
            deliver, outcome = job.set_exception, error
        try:
            deliver(outcome)
        except InvalidStateError:  # given up: slot and place in the pool are another's
            return
        turns.give()
        del job, deliver, outcome  # results are large, and the next job may be long in coming
    jobs.put(None)


def _stop() -> None:
    raise TimeoutError("given up")


class _Turns:
    """`slots` threads at a time, by ticket: first come first served, also when the giver of a slot wants it again."""

    def __init__(self, slots: int):
        self._tickets, self._admitted, self._change = count(), slots, Condition()

    def take(self) -> None:
        """Wait for a slot."""
        with self._change:
            mine = next(self._tickets)
            self._change.wait_for(lambda: mine < self._admitted)

    def give(self) -> None:
        """Give this thread's slot to the one that has waited longest."""
        with self._change:
            self._admitted += 1
            self._change.notify_all()

    def hand_on(self) -> None:
        """Let the others have a turn, if any of them waits."""
        self.give()
        self.take()


def num_workers(setting: str | int, clients_per_round: int, device: torch.device) -> tuple[int, int]:
    """(clients under way, of which running at a time) that `setting` ("auto", "together" or a number of the latter)
    means.

    On a CPU all clients of the cohort are under way, up to three per core, and one per core is running. On a GPU jobs
    share the device, so it is one. More would only cost memory. Clients that are one batch are one job.
    """
    cores = 1 if device.type == "cuda" or setting == "together" else usable_cores()
    running = setting if isinstance(setting, int) else cores
    under_way = running if running == 1 else 3 * running
    return max(1, min(under_way, clients_per_round)), running


def usable_cores() -> int:
    """Cores that this process may use, of those that the machine has: its affinity (which batch systems set), SLURM's
    word, a container's quota of time."""
    cores = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if (told := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        cores.append(int(told))
    with suppress(OSError, ValueError):  # "max" where there is no quota
        quota, period = QUOTA.read_text().split()
        cores.append(math.ceil(int(quota) / int(period)))
    return max(1, min(cores))


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
