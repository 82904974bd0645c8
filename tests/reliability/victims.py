"""Processes that die, disks that fill up: faults at every step of a write, in this process or in one that is killed.

Children come from a fork server that has imported torch already, so that one costs a fraction of a second.
"""

import ctypes
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import stat
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from feddip_lite.__main__ import main
from feddip_lite.core import autograd as arithmetic
from feddip_lite.core.state import ServerState
from feddip_lite.fast import lenet_blocks as lenet
from feddip_lite.methods import METHODS
from feddip_lite.records import store as results
from feddip_lite.train import evaluate
from feddip_lite.train import run as engine
from feddip_lite.train.checkpoint import load_checkpoint, save_checkpoint
from feddip_lite.train.observe import Observer

STEPS = ("open", "write", "flush", "fsync", "rename", "renamed", "open folder", "fsync folder")
"""What `atomic_write` does, in order. "write" is when half is written, "renamed" when the new file is in place."""

PLACES = ("local training", "merge", "evaluation", "checkpoint write", "results write", "any moment")
"""Where a run is killed."""

_processes = get_context("forkserver")
_processes.set_forkserver_preload(["feddip_lite.__main__", "sklearn.datasets"])


def die() -> None:
    """kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


class Faults:
    """Stands in for `os` and `open` of feddip_lite.results: the `nth` time that a file whose name ends in `suffix` is
    written, `step` ends in `fault()`."""

    def __init__(self, step: str, fault, suffix: str = "", nth: int = 1):
        self.step, self.fault, self.suffix, self.left = step, fault, suffix, nth

    def install(self, patch=setattr) -> None:
        """`patch` is setattr, or a monkeypatch's."""
        patch(results, "os", self)
        patch(results, "open", self.open_file)

    def __getattr__(self, name):
        return getattr(os, name)

    def reach(self, step: str) -> None:
        if step == self.step and self.left == 0:
            self.left = -1
            self.fault()

    def open_file(self, path: Path, mode: str):
        self.left -= path.name.split(".part")[0].rpartition(".")[0].endswith(self.suffix) and self.left > 0
        self.reach("open")
        return _File(open(path, mode), self)

    def fsync(self, descriptor: int) -> None:
        self.reach("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync")
        os.fsync(descriptor)

    def replace(self, part, path) -> None:
        self.reach("rename")
        os.replace(part, path)
        self.reach("renamed")

    def open(self, path, flags: int) -> int:
        self.reach("open folder")
        return os.open(path, flags)


class _File:
    def __init__(self, file, faults: Faults):
        self.file, self.faults = file, faults

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.faults.reach("write")
        self.file.write(data[len(data) // 2 :])

    def flush(self) -> None:
        self.faults.reach("flush")
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def child(job, *arguments):
    """A started process that calls `job(*arguments)`, a function of this module, and exits with what it returns."""
    process = _processes.Process(target=_call, args=(job, arguments))
    process.start()
    return process


def _call(job, arguments) -> None:
    os._exit(job(*arguments) or 0)


def doomed_run(config, folder: Path, place: str, seed: int) -> None:
    """`run` with a checkpoint every round, killed in `place` at a moment drawn from `seed`; every round that ends adds
    a line to the file `rounds`."""
    draw = random.Random(f"{config.run_id} {place} {seed}")
    notes = Notes(folder / "rounds")
    calls = config.rounds * config.clients_per_round
    if place == "local training":
        _deadly("loss_and_gradient", draw.randint(1, 3 * calls), lenet.BlockLeNet5, arithmetic.Autograd)
    elif place == "merge":
        _deadly("merge", draw.randint(1, config.rounds), METHODS[config.method])
    elif place == "evaluation":
        _deadly("evaluate", draw.randint(1, config.rounds), evaluate)
    elif place == "checkpoint write":
        Faults(draw.choice(STEPS), die, ".checkpoint", draw.randint(1, config.rounds - 1)).install()
    elif place == "results write":
        suffix = draw.choice((".csv", ".json"))
        Faults(draw.choice(STEPS[: STEPS.index("rename") + 1]), die, suffix).install()
    else:
        timer = threading.Timer(draw.uniform(0, 0.1 * config.rounds), die)
        timer.daemon = True
        timer.start()
    engine.run(config, results_dir=folder, checkpoint_every=1, progress=False, observers=[notes])


def doomed_sweep(arguments: list[str], step: str, suffix: str, nth: int) -> int:
    """`python -m feddip_lite`, killed at that step of that write."""
    Faults(step, die, suffix, nth).install()
    return main(arguments)


class Notes(Observer):
    """Adds a line `<pid> <run id> <round>` to `path` for every round that ends, even if it is the last."""

    def __init__(self, path: Path):
        self.log = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def round_done(self, run, record) -> None:
        os.write(self.log, f"{os.getpid()} {run.config.run_id} {record.round}\n".encode())


class Watch(Observer):
    """[resident bytes, CPU seconds so far] after each round, in `facts`."""

    def __init__(self):
        self.facts = []

    def round_done(self, run, record) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.facts.append((pages * os.sysconf("SC_PAGE_SIZE"), time.process_time()))


def _deadly(name: str, calls: int, *owners) -> None:
    """Make the `calls`-th call of a function its process's last: it does its work, and nobody hears of it."""
    left = itertools.count(calls, -1)

    def deadly(function):
        def counted(*arguments):
            outcome = function(*arguments)
            if next(left) == 1:
                die()
            return outcome

        return counted

    for owner in owners:
        setattr(owner, name, deadly(getattr(owner, name)))


def digest(state: ServerState) -> str:
    """SHA-256 of every tensor of a run: the server's state and memory, and the clients' memories."""
    sha = hashlib.sha256()
    tensors = {name: getattr(state, name) for name in ("weights", "buffers", "mask")}
    tensors |= {f"memory {name}": tensor for name, tensor in state.memory.items()}
    for client, memory in state.memories.items():
        tensors |= {f"client {client} {name}": tensor for name, tensor in memory.items()}
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].cpu().numpy().tobytes())
    return sha.hexdigest()


def doomed_checkpoint(source: Path, path: Path, config, step: str) -> None:
    """Save the checkpoint at `source` at `path`, killed at `step`."""
    progress = load_checkpoint(source, config, torch.device("cpu"))
    Faults(step, die).install()
    save_checkpoint(path, progress, config)


LAYERS = [{"name": "fc", "shape": [2, 3], "kept": 2}]
MASK = torch.tensor([True, False, False, True, False, False])
MODEL = b"what a model's file holds"


def doomed_record(folder: Path, config, history, step: str, suffix: str) -> None:
    """`save_run`, killed at `step` of the file that ends in `suffix`."""
    Faults(step, die, suffix).install()
    results.save_run(folder, config, history, {}, [], LAYERS, MASK, MODEL)


def limited(arguments: list[str], report: Path, limit: str) -> int:
    """`python -m feddip_lite` with its errors in `report`, where files cannot grow beyond 1000 bytes (`limit` = "size")
    or the rights of folders hold for root as well ("rights")."""
    os.dup2(os.open(report, os.O_CREAT | os.O_WRONLY), 2)
    if limit == "size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    elif os.geteuid() == 0:
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # linux/capability.h, version 3
        ctypes.CDLL(None).capget(header, sets)
        sets[0] &= ~0b110  # effective: neither CAP_DAC_OVERRIDE nor CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).capset(header, sets)
    return main(arguments)


def crowd_member(configs, folder: Path, log: Path, seed: int) -> None:
    """Run all `configs`, in an order of its own, and note every round that ends in `log`: `<pid> <run id> <round>`."""
    for config in random.Random(seed).sample(configs, len(configs)):
        engine.run(config, results_dir=folder, checkpoint_every=1, progress=False, observers=[Notes(log)])


def watched_run(config, folder: Path, path: Path) -> None:
    """`run`, and in the JSON file `path` [resident bytes, CPU seconds so far] after each round."""
    watch = Watch()
    engine.run(config, results_dir=folder, checkpoint_every=25, progress=False, observers=[watch])
    path.write_text(json.dumps(watch.facts))
