"""The same federation written twice: slow and obvious here, with modules, deep copies, `torch.optim.SGD` and a list of
clients; and the package's. What the two share is their input: data, split, initial weights, cohorts and shuffles."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from feddip_lite.config import Config
from feddip_lite.core.models import MODELS, build_model
from feddip_lite.core.seeds import derive, torch_generator
from feddip_lite.core.sparsity import num_kept, topk_mask
from feddip_lite.train.client import local_update
from feddip_lite.train.round import run_round, sample_cohort
from feddip_lite.train.setup import prepare

TOLERANCE = 1e-5
SMALL = dict(
    dataset="digits", width=0.5, rounds=3, clients=6, clients_per_round=3, local_epochs=1, batch_size=120, lr=0.05
)


class SmallBatchNorm(nn.Module):
    """A network with BatchNorm whose steps do not amplify rounding: ResNet-18 at its start does, 20 to 50 times a step,
    so that two correct programs part after three rounds."""

    def __init__(self, classes: int, width: float, channels: int, size: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 16, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))


def is_prunable(module: nn.Module, name: str) -> bool:
    owner = module.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Conv2d | nn.Linear) and name.endswith(".weight") and "shortcut" not in name


def apply_masks(module: nn.Module, masks: dict) -> nn.Module:
    masked = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return masked


def textbook_client(module, masks, images, labels, indices, config, t, client, penalty, test_images=None):
    """One client's round: a masked deep copy for each batch lends its gradient to the dense module's SGD step.

    BatchNorm sees what the masked copy sees; under `repo` what the dense module sees, test images last (D12, D13).
    """
    published = config.preset == "repo"
    lr = config.lr * config.lr_decay**t
    dense = copy.deepcopy(module).train()
    optimiser = torch.optim.SGD(dense.parameters(), lr=lr, weight_decay=config.weight_decay)
    shuffle = torch_generator(config.seed, "shuffle", t, client)
    losses = []
    for _ in range(config.local_epochs):
        order = indices[torch.randperm(len(indices), generator=shuffle)]
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            masked = apply_masks(dense, masks)
            cross_entropy = F.cross_entropy(masked(images[batch]), labels[batch])
            norms = [p.norm() for name, p in masked.named_parameters() if is_prunable(module, name)]
            (cross_entropy + penalty * sum(norms)).backward()
            for own, lent in zip(dense.parameters(), masked.parameters(), strict=True):
                own.grad = lent.grad.clone()
            if published:
                with torch.no_grad():
                    dense(images[batch])
            else:
                for own, seen in zip(dense.buffers(), masked.buffers(), strict=True):
                    own.copy_(seen)
            optimiser.step()
            losses += [cross_entropy.item()] * len(batch)
    with torch.no_grad():
        for part in test_images.split(config.batch_size) if published else ():
            dense(part)
    return dense, sum(losses) / len(losses)


def textbook_mask(module: nn.Module, sparsity: float) -> dict:
    """`torch.nn.utils.prune`'s global magnitude mask at exactly round(sparsity * P) zeros."""
    names = [name for name, _ in module.named_parameters() if is_prunable(module, name)]
    work = copy.deepcopy(module)
    targets = [(work.get_submodule(name.rpartition(".")[0]), "weight") for name in names]
    count = sum(owner.weight.numel() for owner, _ in targets)
    prune.global_unstructured(targets, prune.L1Unstructured, amount=round(sparsity * count))
    return {name: owner.weight_mask for name, (owner, _) in zip(names, targets, strict=True)}


def average(modules: list, sizes: list) -> nn.Module:
    result = copy.deepcopy(modules[0])
    with torch.no_grad():
        for name, value in result.state_dict().items():
            if value.is_floating_point():
                parts = [m.state_dict()[name] * (size / sum(sizes)) for m, size in zip(modules, sizes, strict=True)]
                value.copy_(sum(parts))
    return result


def masks_of(vector, layout) -> dict:
    return {slot.name: slot.of(vector).clone().float() for slot in layout.prunable_slots}


def textbook_federation(config: Config, state, clients, method):
    """All rounds of FedAvg, FedDP or FedDIP with a list of clients. Yields (dense module, masks, train loss)."""
    data, layout = clients.data, method.layout
    images, labels = data.train_images.float() / data.scale, data.train_labels
    channels, size = data.train_images.shape[1:3]
    seed = derive(config.seed, "initial weights")
    shape = dict(classes=10, width=config.width, channels=channels, size=size)
    server = build_model(config.model, **shape, seed=seed)
    remembered = copy.deepcopy(server)
    pruning = config.method != "fedavg"
    options = config.method_options
    masks = {}
    steps = config.penalty_steps
    for t in range(config.rounds):
        sent = apply_masks(server, masks)
        locals_, sizes, losses = [], [], []
        penalty = 0.0
        if config.method == "feddip" and config.preset == "repo":  # fewer rounds than steps: the last value throughout
            penalty = 5e-4 + (steps - 2) * (config.penalty_max - 5e-4) / (steps - 1)
        elif config.method == "feddip":
            penalty = config.penalty_max * (steps * t // config.rounds) / steps
        for client in sample_cohort(config, t):
            own = masks
            if pruning and t == 0:  # every client has a random mask of its own, the download is dense (D7)
                own = masks_of(method.erk_mask(derive(config.seed, "mask", t, client)), layout)
            shard = clients.train[client]
            tests = data.test_images[clients.test[client]].float() / data.scale
            local, loss = textbook_client(sent, own, images, labels, shard, config, t, client, penalty, tests)
            locals_.append(local)
            sizes.append(len(shard))
            losses.append(loss)
        dense = average(locals_, sizes)
        if options.get("server_memory"):
            with torch.no_grad():
                for kept, new, old in zip(remembered.parameters(), dense.parameters(), sent.parameters(), strict=True):
                    kept.add_(new - old)
            for kept, new in zip(remembered.buffers(), dense.buffers(), strict=True):
                kept.copy_(new)
            dense = copy.deepcopy(remembered)
        if pruning and t % config.mask_interval == 0:
            start, end = config.initial_sparsity, config.target_sparsity
            sparsity = end + (start - end) * (1 - t / config.rounds) ** 3
            source = apply_masks(dense, masks) if options["mask_source"] == "masked_average" else dense
            masks = textbook_mask(source, sparsity)
        server = dense
        yield dense, masks, sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / sum(sizes)


CASES = [("fedavg", "paper"), ("feddp", "paper"), ("feddp", "repo"), ("feddp", "memory")]
CASES += [("feddip", "paper"), ("feddip", "repo"), ("feddip", "memory")]


@pytest.mark.parametrize("model", ["lenet5", "batchnorm"])
@pytest.mark.parametrize("partition", ["iid", "pathological"])
@pytest.mark.parametrize(("method", "preset"), CASES)
def test_three_rounds_agree_with_the_textbook(method, preset, partition, model, monkeypatch):
    monkeypatch.setitem(MODELS, "batchnorm", SmallBatchNorm)
    extra = {} if method == "fedavg" else {"mask_interval": 2}
    if method == "feddip":
        extra["penalty_max"] = 0.05  # large enough that a wrong penalty could not hide in the tolerance
    settings = {**SMALL, "method": method, "preset": preset, "partition": partition, "model": model, **extra}
    config = Config(**settings).resolved()
    state, clients, ours = prepare(config)
    for dense, masks, train_loss in textbook_federation(config, state, clients, ours):
        state, record = run_round(state, clients, ours, config)
        expected = dict(apply_masks(dense, masks).named_parameters())
        sparse = ours.layout.masked(state.weights, state.mask)
        for slot in ours.layout.slots:
            torch.testing.assert_close(slot.of(sparse), expected[slot.name].detach(), atol=TOLERANCE, rtol=0)
        statistics = dict(dense.named_buffers())
        for slot in ours.layout.buffer_slots:
            torch.testing.assert_close(slot.of(state.buffers), statistics[slot.name], atol=TOLERANCE, rtol=1e-5)
        assert record.train_loss == pytest.approx(train_loss, abs=TOLERANCE)
        for name, mask in masks.items():
            slot = next(slot for slot in ours.layout.slots if slot.name == name)
            assert torch.equal(slot.of(state.mask), mask.bool())
    clients.workers.close()


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_local_update_agrees_with_the_textbook(penalty):
    shared = {"erk": "shared"}  # a mask that the state has in every round
    config = Config(method="feddip", penalty_max=0.1, penalty_steps=2, method_options=shared, **SMALL).resolved()
    state, clients, method = prepare(config)
    t, client = (2, 1) if penalty else (0, 1)  # Eq. 3 with two steps: 0, then half the peak
    assert method.penalty(t) == penalty
    plan = method.plan(method.offer(state, t, client), {}, t)
    job = clients.workers.submit(local_update, plan, clients.data, clients.train[client], config, t, client)
    result = job.result()

    module = build_model("lenet5", classes=10, width=0.5, channels=1, size=28, seed=derive(0, "initial weights"))
    masks = masks_of(state.mask, method.layout)
    data = clients.data
    inputs = (data.train_images.float() / data.scale, data.train_labels, clients.train[client])
    dense, loss = textbook_client(apply_masks(module, masks), masks, *inputs, config, t, client, penalty)
    for slot in method.layout.slots:
        expected = dict(dense.named_parameters())[slot.name].detach()
        torch.testing.assert_close(slot.of(result.weights), expected, atol=TOLERANCE, rtol=0)
    assert result.loss == pytest.approx(loss, abs=TOLERANCE)
    assert result.samples == len(clients.train[client])
    clients.workers.close()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.995])
def test_topk_mask_is_the_global_magnitude_mask_of_torch_prune(sparsity):
    module = build_model("lenet5", classes=10, width=0.5, channels=1, size=28, seed=3)
    names = [name for name, _ in module.named_parameters() if is_prunable(module, name)]
    flat = torch.cat([module.get_parameter(name).detach().flatten() for name in names])
    theirs = torch.cat([mask.flatten() for mask in textbook_mask(module, sparsity).values()])
    assert torch.equal(topk_mask(flat.abs(), num_kept(sparsity, len(flat))), theirs.bool())


def test_feddp_with_memory_and_one_client_is_centralised_dpf():
    """DPF: w <- w - lr * grad f(w*m) on one dense w that nothing ever resets, a new mask every R rounds."""
    config = Config(
        method="feddp", preset="memory", weight_decay=0.0, mask_interval=2, rounds=5, clients=1, clients_per_round=1,
        local_epochs=1, batch_size=240, width=0.5,
    ).resolved()  # fmt: skip
    state, clients, method = prepare(config)
    data = clients.data
    images, labels = data.train_images.float() / data.scale, data.train_labels
    module = build_model("lenet5", classes=10, width=0.5, channels=1, size=28, seed=derive(0, "initial weights"))
    masks = masks_of(method.erk_mask(derive(config.seed, "mask", 0, 0)), method.layout)  # the client's own (D7)
    for t in range(config.rounds):
        shuffle = torch_generator(config.seed, "shuffle", t, 0)
        order = clients.train[0][torch.randperm(len(labels), generator=shuffle)]
        for batch in order.split(config.batch_size):
            masked = apply_masks(module, masks)
            F.cross_entropy(masked(images[batch]), labels[batch]).backward()
            with torch.no_grad():
                for own, lent in zip(module.parameters(), masked.parameters(), strict=True):
                    own.sub_(config.lr * config.lr_decay**t * lent.grad)
        if t % config.mask_interval == 0:
            masks = textbook_mask(module, 0.9 + (0.5 - 0.9) * (1 - t / config.rounds) ** 3)
        state, _ = run_round(state, clients, method, config)
        for slot in method.layout.slots:  # the whole dense vector, pruned coordinates too
            expected = module.get_parameter(slot.name).detach()
            torch.testing.assert_close(slot.of(state.weights), expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(state.mask, torch.cat([mask.flatten() for mask in masks.values()]).bool())
    clients.workers.close()
