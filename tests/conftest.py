"""What several test files share: a tiny configuration, a hand-made data set, a small module and replies by hand."""

import os
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from feddip_lite import Config
from feddip_lite.core.errors import OutOfTime
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.message import Message
from feddip_lite.core.models import MODELS
from feddip_lite.core.state import ServerState
from feddip_lite.data.datasets import DATASETS, Dataset
from feddip_lite.methods import METHODS
from feddip_lite.methods.base import Method
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.store import ROOT
from feddip_lite.train.client import local_update
from feddip_lite.train.recording import Recording
from feddip_lite.train.round import run_round
from feddip_lite.train.run import execute
from feddip_lite.train.setup import prepare

TINY = {
    "dataset": "digits",
    "model": "lenet5",
    "width": 0.3,
    "clients": 6,
    "clients_per_round": 3,
    "local_epochs": 1,
    "batch_size": 32,
    "rounds": 3,
    "workers": 1,
    "device": "cpu",
}
"""A run of 0.3 s: 240 digits per client, 8 local steps."""

LEARNING = {"width": 0.5, "clients": 3, "local_epochs": 4, "batch_size": 16, "rounds": 8, "lr": 0.2, "eval_every": 8}
"""With these, FedAvg learns the digits: accuracy above 0.9 in three seconds."""

FAST = {"clients": 60, "clients_per_round": 2}
"""With these, 24 digits per client and one local step."""


def tiny_config(**changes) -> Config:
    """The configuration TINY with `changes`."""
    return Config(**{**TINY, **changes})


def flags(**changes) -> list[str]:
    """TINY with `changes` as flags of `python -m feddip_lite run`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **changes}.items()]


def tiny_module(seed: int = 0) -> nn.Module:
    """Convolution, BatchNorm and a linear head for 6x6 images and 4 classes: n = 229, P = 219."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {"conv": nn.Conv2d(1, 3, 3, bias=False), "norm": nn.BatchNorm2d(3), "relu": nn.ReLU()}
        return nn.Sequential(OrderedDict(**layers, flatten=nn.Flatten(), linear=nn.Linear(48, 4)))


def tiny_data(samples: int = 20, seed: int = 0) -> Dataset:
    """`samples` noisy 6x6 images of 4 classes for training, as many for testing; a bright row tells the class."""
    draw = torch.Generator().manual_seed(seed)

    def part():
        labels = torch.randint(4, (samples,), generator=draw)
        images = torch.randint(0, 100, (samples, 1, 6, 6), generator=draw, dtype=torch.uint8)
        images[torch.arange(samples), 0, labels + 1] += 150
        return images, labels

    values = {"scale": 255.0, "mean": (0.0,), "std": (1.0,), "augmentation": None}
    return Dataset("tiny", 4, *part(), *part(), **values, source="by hand", sha256="", variant="")


def random_vector(size: int, seed: int = 0) -> torch.Tensor:
    """(size,) float32, standard normal."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_bools(size: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    """(size,) bool, each True with probability `density`."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density


def state_of(layout: Layout, mask=None, seed: int = 0, t: int = 0) -> ServerState:
    """A server state of random weights before round t; dense without a mask."""
    mask = torch.ones(layout.prunable, dtype=torch.bool) if mask is None else mask
    return ServerState(t, random_vector(layout.size, seed), torch.zeros(layout.buffer_size), mask)


def reply_of(values: torch.Tensor, samples: int, buffers: torch.Tensor | None = None) -> Message:
    """A client's reply as methods make it."""
    extras = {"samples": torch.tensor([samples]), "loss": torch.tensor([1.0], dtype=torch.float64)}
    return Message(values, None, extras if buffers is None else {**extras, "buffers": buffers})


def started(method: Method, mask: torch.Tensor, t: int = 0) -> ServerState:
    """A state of random weights on `mask` before round t, with the server memory that `method` starts with."""
    return method.begin(replace(state_of(method.layout, mask, t=t), memory=method.start()[1]))


def answers(method: Method, state: ServerState, samples=(6, 2, 5, 11), **changes) -> dict[int, Message]:
    """What clients of so many samples reply to `state`, through the method's own hooks and `local_update`."""
    model, config = FlatModel(tiny_module(), method.layout), tiny_config(batch_size=4, **changes)
    replies, data = {}, tiny_data(max(samples))
    for client, count in enumerate(samples):
        plan = method.plan(method.offer(state, state.round, client), {}, state.round)
        result = local_update(model, plan, data, torch.arange(count), config, state.round, client)
        replies[client], _ = method.reply(result, {}, state.round)
    return replies


@dataclass(frozen=True)
class Remembering(FedAvg):
    """A method with both kinds of memory: a client trains one epoch longer each time, and the server averages its
    weights with those of the round before."""

    def plan(self, offer, memory, t):
        return replace(super().plan(offer, memory, t), epochs=1 + int(memory["times"][0]) if memory else 1)

    def reply(self, result, memory, t):
        reply, _ = super().reply(result, memory, t)
        return reply, {"times": (memory["times"] if memory else torch.zeros(1)) + 1}

    def merge(self, state, replies, t):
        new = super().merge(state, replies, t)
        previous = state.memory.get("previous", state.weights)
        return replace(new, weights=(new.weights + previous) / 2, memory={"previous": state.weights})


def environment(**changes: str) -> dict[str, str]:
    """Environment of a subprocess that finds the package of this checkout from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def names(folder: Path) -> list[str]:
    """The files of a results folder; locks, and the rows of runs that have not ended, aside."""
    aside = (".locks", ".partial.csv")
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(aside))


def csv_without_seconds(path: Path) -> list[str]:
    """The lines of a results file without their last column, which is wall time."""
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


def record_files(*run_ids: str) -> list[str]:
    """The names of the files that these runs leave, sorted; a run that ends dense has no mask file."""
    sparse = [run_id for run_id in run_ids if not run_id.startswith(("fedavg", "fedlp", "remembering"))]
    files = [f"{run_id}.{kind}" for run_id in run_ids for kind in ("csv", "json", "safetensors")]
    return sorted(files + [f"{run_id}.mask" for run_id in sparse])


def interrupted(config, folder, stops=None):
    """The number of interruptions of a run that is stopped after every round (or `stops` times), and its history."""
    count = 0
    while stops is None or count < stops:
        try:
            return count, execute(config, Recording(Path(folder)), deadline=time.monotonic())
        except OutOfTime:
            count += 1
    return count, None


def start(folder: Path, *extra: str, **variables: str) -> subprocess.Popen:
    """`python -m feddip_lite run --quiet --results=folder` with `extra` flags, in a process of its own."""
    command = [sys.executable, "-m", "feddip_lite", "run", "--quiet", f"--results={folder}", *extra]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(**variables), stdout=pipe, stderr=pipe, text=True)


def read_outputs(capsys) -> tuple[list[str], list[str]]:
    """The lines written to stdout and to stderr since the last look."""
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def same_history(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Whether two histories agree exactly, but for wall time."""
    return a.drop(columns="seconds").equals(b.drop(columns="seconds"))


@pytest.fixture(autouse=True)
def repeatable():
    """Unaddressed draws are the same every time; one thread, as clients have, or the last bits would differ."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def agg():
    """Figures without a screen, closed afterwards."""
    import matplotlib.pyplot as plt  # not for the many tests that draw nothing

    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture
def forgetting():
    """Models and data that a test registers are forgotten with it."""
    before = [(names, dict(names)) for names in (MODELS, DATASETS)]
    yield
    for names, kept in before:
        names.clear()
        names.update(kept)


@pytest.fixture
def remembering(monkeypatch) -> str:
    """The name of `Remembering`, known for the length of a test."""
    monkeypatch.setitem(METHODS, "remembering", Remembering)
    return "remembering"


@pytest.fixture
def layout() -> Layout:
    return Layout.of(tiny_module())


@pytest.fixture
def model(layout) -> FlatModel:
    return FlatModel(tiny_module(), layout)


@pytest.fixture
def federation():
    """`federation` is `prepare`, and its threads end with the test."""
    opened = []

    def make(config: Config, *deal):
        state, clients, method = prepare(config, *deal)
        opened.append(clients.workers)
        return state, clients, method

    yield make
    for workers in opened:
        workers.close()


@pytest.fixture
def train(federation):
    """`train(config)`: [(state, record), ...] of its rounds, by `run_round` alone."""

    def rounds(config: Config):
        state, clients, method = federation(config)
        done = []
        for _ in range(config.rounds):
            state, record = run_round(state, clients, method, config.resolved())
            done.append((state, record))
        return done

    return rounds
