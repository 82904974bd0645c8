"""Four ways to run the same FedDIP round; each has `train()` and `evaluate()`, for one model, data set and device.

a  Published   the published code's procedure, rebuilt from its description: images pass through PIL and a DataLoader
               with two workers per client and epoch; a masked deep copy of the model per batch; a second, dense forward
               pass; the client's model is evaluated on its test shard, the global one on training and test set
b  Careful     one client after the other on all cores, by nano's `local_update`: data as tensors, a masked leaf, one
               forward, stock operators
c  Engine      this package
d  Floor       stock operators' bare forward and backward of the same batches at fixed weights, clients side by side
"""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from torchvision import transforms

from feddip_lite import nano
from feddip_lite.config import Config
from feddip_lite.core import linear as operators
from feddip_lite.core.models import build_model
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.round import run_round, sample_cohort
from feddip_lite.train.run import running
from feddip_lite.train.setup import prepare

PENALTY = 5e-4


def stock_model(config: Config, data) -> nn.Module:
    """The model with PyTorch's own linear layers, and memory laid out as PyTorch does by default."""
    channels, size = data.train_images.shape[1:3]
    model = build_model(config.model, classes=data.classes, width=config.width, channels=channels, size=size)
    for layer in model.modules():
        if isinstance(layer, operators.Linear):
            layer.__class__ = nn.Linear
    return model.to(data.train_images.device)


class Engine:
    """c: `run_round` and `evaluate_state`, as `run` calls them."""

    def __init__(self, config: Config):
        self.config = config.resolved()
        self.state, self.clients, self.method = prepare(self.config)

    def train(self):
        with running(self.config):
            self.state, _ = run_round(self.state, self.clients, self.method, self.config)

    def evaluate(self):
        with running(self.config):
            return evaluate_state(self.state, self.clients)["accuracy"]


class _Stock:
    """What a, b and d share: data, split, a stock model, masks by tensor name, a round counter."""

    def __init__(self, config: Config):
        self.config = config.resolved()
        state, clients, method = prepare(self.config)
        clients.workers.close()
        self.data, self.train_shards, self.test_shards = clients.data, clients.train, clients.test
        self.model = stock_model(config, self.data)
        self.masks = {slot.name: slot.of(state.mask).float() for slot in method.layout.prunable_slots}
        self.device = state.weights.device
        self.t = 0

    def cohort(self) -> list[int]:
        self.t += 1
        return sample_cohort(self.config, self.t - 1)

    def batches(self, client: int, epochs: int = 1):
        draw = torch.Generator().manual_seed(client)
        return nano.batches(self.data, self.train_shards[client], self.config.batch_size, epochs, draw)

    def average_and_prune(self, states: list[dict]) -> None:
        mean = {key: torch.stack([state[key].double() for state in states]).mean(0) for key in states[0]}
        self.model.load_state_dict({key: value.to(states[0][key].dtype) for key, value in mean.items()})
        if (self.t - 1) % self.config.mask_interval == 0:
            work = copy.deepcopy(self.model)
            targets = [(work.get_submodule(name.rpartition(".")[0]), "weight") for name in self.masks]
            prune.global_unstructured(targets, prune.L1Unstructured, amount=0.6)
            self.masks = {name: layer.weight_mask for name, (layer, _) in zip(self.masks, targets, strict=True)}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.masks:
                    parameter.mul_(self.masks[name])


class Published(_Stock):
    """a: see the top of this file."""

    def __init__(self, config: Config):
        super().__init__(config)
        padding = {"zeros": "constant", "reflect": "reflect"}.get(self.data.augmentation)
        steps = [transforms.RandomCrop(32, 4, padding_mode=padding), transforms.RandomHorizontalFlip()]
        steps = (steps if padding else []) + [transforms.ToTensor()]
        self.transform = transforms.Compose(
            steps + [transforms.Normalize(self.data.mean, self.data.std)] * bool(padding)
        )

    def loader(self, images, labels, indices, shuffle=False):
        indices = indices.to(images.device)
        samples = _Samples(images[indices].cpu(), labels[indices].cpu(), self.transform)  # workers see no GPU
        # Forked workers, as DataLoader's on Linux by default; spawned ones would import torch anew for every epoch.
        context = {"num_workers": 2, "multiprocessing_context": "fork"}
        for batch in DataLoader(samples, self.config.batch_size, shuffle=shuffle, **context):
            yield [tensor.to(self.device) for tensor in batch]

    def masked_copy(self, model):
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in masked.named_parameters():
                if name in self.masks:
                    parameter.mul_(self.masks[name])
        return masked

    def train(self):
        self.average_and_prune([self.client(client) for client in self.cohort()])

    def client(self, client: int) -> dict:
        data, model = self.data, copy.deepcopy(self.model).train()
        sgd = torch.optim.SGD(model.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)
        for _ in range(self.config.local_epochs):
            for images, labels in self.loader(data.train_images, data.train_labels, self.train_shards[client], True):
                masked = self.masked_copy(model)
                norms = nano.penalty(dict(masked.named_parameters()), self.masks)
                (F.cross_entropy(masked(images), labels) + PENALTY * norms).backward()
                for own, lent in zip(model.parameters(), masked.parameters(), strict=True):
                    own.grad = lent.grad
                sgd.step()
                F.cross_entropy(model(images), labels).item()
        self.score(model, self.loader(data.test_images, data.test_labels, self.test_shards[client]))
        return model.state_dict()

    @torch.no_grad()
    def score(self, model, loader) -> float:
        model.eval()
        right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
        return float(torch.cat(right).mean())

    def evaluate(self):
        data, both = self.data, []
        for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
            both.append(self.score(self.model, self.loader(images, labels, torch.arange(len(labels)))))
        return both[1]


class _Samples:
    """Images one by one, as torchvision's data sets give them."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        pixels = self.images[k].permute(1, 2, 0).squeeze(-1).numpy()
        return self.transform(Image.fromarray(pixels)), int(self.labels[k])


class Careful(_Stock):
    """b: see the top of this file."""

    def train(self):
        self.average_and_prune([self.client(client) for client in self.cohort()])

    def client(self, client: int) -> dict:
        batches, own = self.batches(client, self.config.local_epochs), self.model.state_dict()
        step = {"lr": self.config.lr, "weight_decay": self.config.weight_decay, "strength": PENALTY}
        return nano.local_update(self.model, own, self.masks, batches, **step)[0]

    def evaluate(self):
        return nano.evaluate(self.model, self.model.state_dict(), {}, self.data)


class Floor(_Stock):
    """d: see the top of this file. Batches are made before the clock runs; an epoch is a task, so that cores are never
    idle; there is nothing to evaluate."""

    def __init__(self, config: Config):
        super().__init__(config)
        cores = os.cpu_count() if self.device.type == "cpu" else 1
        self.models = SimpleQueue()
        for _ in range(cores):
            self.models.put(copy.deepcopy(self.model).train())
        self.pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
        self.work = []
        for client in self.cohort():
            self.work.append(list(self.batches(client)))

    def train(self):
        list(self.pool.map(self.forward_backward, self.work * self.config.local_epochs))

    def forward_backward(self, batches):
        model = self.models.get()
        for images, labels in batches:
            for parameter in model.parameters():
                parameter.grad = None
            F.cross_entropy(model(images), labels).backward()
        self.models.put(model)

    def evaluate(self):
        return float("nan")


CONTENDERS = {"a": Published, "b": Careful, "c": Engine, "d": Floor}
