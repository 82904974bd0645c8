"""Laws of clients side by side: never more than there are slots, first come first served, and nobody is forgotten."""

import os
import threading
import time

import pytest
import torch

from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.train import workers as module
from feddip_lite.train.workers import Workers, keep_freed_memory, num_workers

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def models(count):
    modules = [torch.nn.Sequential(torch.nn.Linear(2, 1)) for _ in range(count)]
    return [FlatModel(module, Layout.of(module)) for module in modules]


@pytest.fixture
def pool():
    """`pool(threads, slots)` is a pool that ends with the test."""
    opened = []

    def make(threads, slots):
        opened.append(Workers(models(threads), slots, lambda: models(1)[0]))
        return opened[-1]

    yield make
    for workers in opened:
        workers.close()


@pytest.mark.parametrize(("threads", "slots"), [(1, 1), (5, 1), (5, 2), (6, 3), (3, 5)])
def test_never_more_jobs_run_than_there_are_slots_and_all_of_them_end(pool, threads, slots):
    lock, running, most = threading.Lock(), 0, []

    def job(model, number):
        nonlocal running
        for _ in range(4):
            with lock:
                running += 1
                most.append(running)
            time.sleep(0.001)
            with lock:
                running -= 1
            model.pause()
        return number

    workers = pool(threads, slots)
    futures = [workers.submit(job, number) for number in range(12)]
    assert [future.result(timeout=60) for future in futures] == list(range(12))
    assert max(most) == min(threads, slots)


def test_jobs_with_one_slot_take_turns_in_order(pool):
    order, workers, started = [], pool(3, 1), threading.Event()

    def first(model):
        started.wait(60)
        time.sleep(0.2)  # until the other two are waiting

    def job(model, name):
        for _ in range(3):
            order.append(name)
            model.pause()

    futures = [workers.submit(first), workers.submit(job, "a"), workers.submit(job, "b")]
    started.set()
    for future in futures:
        future.result(timeout=60)
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    assert all(left != right for left, right in zip(order, order[1:], strict=False))  # alternating


def test_a_job_that_raises_gives_its_slot_and_its_model_back(pool):
    def job(model, fails):
        if fails:
            raise RuntimeError("by intention")
        return model

    workers = pool(2, 1)
    futures = [workers.submit(job, fails) for fails in (True, False, True, True, False)]
    outcomes = [type(future.exception(timeout=60)) for future in futures]
    assert outcomes == [RuntimeError, type(None), RuntimeError, RuntimeError, type(None)]


def test_number_of_workers():
    assert num_workers(1, 5, CPU) == (1, 1)
    assert num_workers(2, 5, CPU) == (5, 2)
    assert num_workers(2, 20, CPU) == (6, 2)
    assert num_workers(8, 3, CPU) == (3, 8)
    assert num_workers("auto", 5, GPU) == (1, 1)
    under_way, running = num_workers("auto", 1000, CPU)
    assert under_way in (1, 3 * running)


def test_keeping_freed_memory_may_be_asked_for_again():
    keep_freed_memory()
    keep_freed_memory()
    assert torch.ones(3).sum() == 3


def test_cores_are_those_that_the_process_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5, 6}, raising=False)
    assert module.usable_cores() == 4
    for quota, cores in (("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("?", 4)):
        (tmp_path / "cpu.max").write_text(quota)
        assert module.usable_cores() == cores
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert module.usable_cores() == 3
