"""Algebra against what others wrote: PyTorch's own pruning, and dynamic pruning with feedback (DPF) on one dense model.

That whole federations are those of the paper is in test_nano.py.
"""

import copy

import pytest
import torch
from torch.nn.utils import prune

from feddip_lite import nano
from feddip_lite.config import Config
from feddip_lite.core.models import build_model
from feddip_lite.core.seeds import derive, torch_generator
from feddip_lite.core.sparsity import num_kept, topk_mask
from feddip_lite.train.round import run_round


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.995])
def test_topk_mask_is_the_global_magnitude_mask_of_torch_prune(sparsity):
    module = build_model("lenet5", classes=10, width=0.5, channels=1, size=28, seed=3)
    flat = torch.cat([module.get_parameter(name).detach().flatten() for name in nano.prunable(module)])
    work = copy.deepcopy(module)
    targets = [(work.get_submodule(name.rpartition(".")[0]), "weight") for name in nano.prunable(module)]
    prune.global_unstructured(targets, prune.L1Unstructured, amount=round(sparsity * len(flat)))
    theirs = torch.cat([layer.weight_mask.flatten() for layer, _ in targets])
    assert torch.equal(topk_mask(flat.abs(), num_kept(sparsity, len(flat))), theirs.bool())


def test_feddp_with_memory_and_one_client_is_centralised_dpf(federation):
    """DPF: w <- w - lr * grad f(w*m) on one dense w that nothing ever resets, a new mask every R rounds."""
    config = Config(
        method="feddp", preset="memory", weight_decay=0.0, mask_interval=2, rounds=5, clients=1, clients_per_round=1,
        local_epochs=1, batch_size=240, width=0.5,
    ).resolved()  # fmt: skip
    state, clients, method = federation(config)
    net = build_model("lenet5", classes=10, width=0.5, channels=1, size=28, seed=derive(0, "initial weights"))
    w, names = {name: value.clone() for name, value in net.state_dict().items()}, nano.prunable(net)
    own = method.erk_mask(derive(config.seed, "mask", 0, 0))  # the client's (D7)
    m = {slot.name: slot.of(own) for slot in method.layout.prunable_slots}
    for t in range(config.rounds):
        shuffle = torch_generator(config.seed, "shuffle", t, 0)
        batches = nano.batches(clients.data, clients.train[0], config.batch_size, 1, shuffle)
        w, _ = nano.local_update(net, w, m, batches, config.lr_at(t), weight_decay=0.0, strength=0.0)
        if t % config.mask_interval == 0:
            m = nano.topk_mask(w, names, nano.sparsity_at(t, 0.5, 0.9, config.rounds))
        state, _ = run_round(state, clients, method, config)
        for slot in method.layout.slots:  # the whole dense vector, pruned coordinates too
            torch.testing.assert_close(slot.of(state.weights), w[slot.name], atol=1e-5, rtol=0)
        assert torch.equal(state.mask, torch.cat([m[name].flatten() for name in names]))
