"""Laws of FedSparsify: the purging schedule, nested masks, the majority vote, and the tuning after a purge."""

from dataclasses import replace

import pytest
import torch
from conftest import LEARNING, answers, random_bools, random_vector, reply_of, started, state_of, tiny_config

from feddip_lite import run
from feddip_lite.core.sparsity import num_kept
from feddip_lite.methods.fedsparsify import FedSparsifyGlobal, FedSparsifyLocal

BOTH = pytest.mark.parametrize("cls", [FedSparsifyGlobal, FedSparsifyLocal])
NAMES = pytest.mark.parametrize("method", ["fedsparsify_global", "fedsparsify_local"])


def method_of(layout, cls=FedSparsifyGlobal, **changes):
    return cls(**{"layout": layout, "rounds": 20, "seed": 0, **changes})


def purged(layout, mask, dense, samples=1):
    """A reply of FedSparsify-Local: what `mask` leaves of `dense`."""
    return replace(reply_of(layout.pack(dense, mask), samples, torch.zeros(6)), mask=mask)


# The schedule


@BOTH
@pytest.mark.parametrize("interval", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("rounds", [2, 5, 20])
def test_purges_follow_the_published_cubic_and_the_last_meets_the_target(layout, cls, rounds, interval):
    method = method_of(layout, cls, rounds=rounds, mask_interval=interval)
    for t in range(rounds):
        r = t + 1  # the source counts rounds from 1
        sparsity = 0.9 * (1 - (1 - (r - 1) / (rounds - 1)) ** 3)
        assert abs(method.kept(t) - num_kept(sparsity, layout.prunable)) <= 1e-9
        assert method.purges(t) == ((r % interval == 0 or r == rounds) and r > 1)
    assert method.kept(rounds - 1) == num_kept(0.9, layout.prunable)


@BOTH
def test_one_round_ends_at_the_initial_sparsity(layout, cls):
    assert method_of(layout, cls, rounds=1).kept(0) == layout.prunable
    assert method_of(layout, cls, rounds=1, initial_sparsity=0.5).kept(0) == num_kept(0.5, layout.prunable)


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_global_model_has_the_exact_count_after_every_purge(train, interval):
    rounds = train(tiny_config(method="fedsparsify_global", rounds=6, mask_interval=interval))
    prunable, kept = len(rounds[0][0].mask), []
    for t in range(6):
        due = (t + 1) % interval == 0 or t == 5
        kept.append(num_kept(0.9 * (1 - (1 - t / 5) ** 3), prunable) if due else (kept or [prunable])[-1])
    assert [int(state.mask.sum()) for state, _ in rounds] == kept
    assert kept[-1] < kept[0]


@NAMES
def test_masks_are_nested(train, method):
    states = [state for state, _ in train(tiny_config(method=method, rounds=5))]
    assert all(not bool((b.mask & ~a.mask).any()) for a, b in zip(states, states[1:], strict=False))
    assert len({int(state.mask.sum()) for state in states}) == 5


# Global


def test_global_purge_keeps_the_largest_magnitudes_of_the_average_over_all_layers(layout):
    method = method_of(layout)
    dense = random_vector(layout.size, 3)
    dense[:27] *= 1e-3  # one threshold for all layers: the small one is purged to nothing
    mask = method.merge(state_of(layout, t=10), {0: reply_of(dense, 1, torch.zeros(6))}, 10).mask
    magnitudes = dense[: layout.prunable].abs()
    assert magnitudes[mask].min() > magnitudes[~mask].max()
    assert not bool(mask[:27].any())


def test_permuting_magnitudes_permutes_the_global_mask(layout):
    method = method_of(layout)
    dense = random_vector(layout.size, 3)
    order = torch.randperm(layout.prunable)
    shuffled = torch.cat([dense[: layout.prunable][order], dense[layout.prunable :]])
    mask, other = (
        method.merge(state_of(layout, t=10), {0: reply_of(vector, 1, torch.zeros(6))}, 10).mask
        for vector in (dense, shuffled)
    )
    assert torch.equal(other, mask[order])
    assert not torch.equal(other, mask)


# Local


@pytest.mark.parametrize("tune_epochs", [0, 2])
def test_clients_send_what_their_own_purge_leaves_with_their_own_mask(layout, tune_epochs):
    method = method_of(layout, FedSparsifyLocal, tune_epochs=tune_epochs)
    mask = random_bools(layout.prunable, 0.9)
    replies = answers(method, started(method, mask, 10), local_epochs=3)
    keep = method.kept(10)
    for reply in replies.values():
        assert int(reply.mask.sum()) == keep
        assert not bool((reply.mask & ~mask).any())
        assert reply.values.numel() == keep + layout.size - layout.prunable
    masks = [reply.mask for reply in replies.values()]
    assert not all(torch.equal(own, masks[0]) for own in masks)


def test_client_keeps_the_largest_magnitudes_of_what_it_trained(layout):
    dense = method_of(layout, FedSparsifyLocal, mask_interval=50)  # the same training, and no purge in round 10
    method = method_of(layout, FedSparsifyLocal)
    state = started(method, random_bools(layout.prunable, 0.9), 10)
    trained, sent = answers(dense, state)[2], answers(method, state)[2]
    assert trained.mask is None
    weights = layout.unpack(trained.values, state.mask)
    magnitudes = weights[: layout.prunable].abs()
    assert magnitudes[sent.mask].min() > magnitudes[~sent.mask].max()
    assert torch.equal(layout.unpack(sent.values, sent.mask), layout.masked(weights, sent.mask))


def test_tuning_trains_what_the_purge_left_and_nothing_else(layout):
    state = started(method_of(layout, FedSparsifyLocal), random_bools(layout.prunable, 0.9), 10)
    plain, tuned = (answers(method_of(layout, FedSparsifyLocal, tune_epochs=e), state)[0] for e in (0, 3))
    assert torch.equal(plain.mask, tuned.mask)
    assert not torch.equal(plain.values, tuned.values)
    assert torch.equal(plain.extras["loss"], tuned.extras["loss"])


@pytest.mark.parametrize(("clients", "needed"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_a_weight_survives_with_the_votes_of_half_the_clients_rounded_down(layout, clients, needed):
    method = method_of(layout, FedSparsifyLocal)
    dense = random_vector(layout.size, 1)
    replies = {}
    for client in range(clients):  # weight i is kept by i of the clients
        mask = torch.arange(layout.prunable) > client
        mask[10:] = False
        replies[client] = purged(layout, mask, dense)
    new = method.merge(state_of(layout, t=10), replies, 10)
    assert new.mask.nonzero().squeeze(1).tolist() == list(range(needed, 10))


def test_vote_and_mean_with_zeros_counted_of_three_clients_by_hand(layout):
    method = method_of(layout, FedSparsifyLocal)
    masks, dense = torch.zeros(4, layout.prunable, dtype=torch.bool), torch.zeros(layout.size)
    masks[0, :2] = masks[1, 0] = masks[1, 2] = masks[2, 0] = masks[3, 0] = True
    dense[:4] = torch.tensor([8.0, 4.0, 2.0, 1.0])
    replies = {c: purged(layout, masks[c], (c + 1) * dense, samples) for c, samples in enumerate([10, 20, 30, 20])}
    new = method.merge(state_of(layout, t=10), replies, 10)
    assert new.mask.nonzero().squeeze(1).tolist() == [0]  # two of four votes needed; weights 1 and 2 have one each
    # 0: 8 * (1*10 + 2*20 + 3*30 + 4*20)/80; 1: 4 * 10/80, zeros counted; 2: 2 * 2*20/80
    assert new.weights[:4].tolist() == [22.0, 0.5, 1.0, 0.0]
    three = method.merge(state_of(layout, t=10), {c: replies[c] for c in range(3)}, 10)
    assert three.mask.nonzero().squeeze(1).tolist() == [0, 1, 2]  # one of three is enough
    assert three.weights[1].item() == pytest.approx(4 * 10 / 60)


def test_permuting_the_votes_permutes_the_merged_mask(layout):
    method = method_of(layout, FedSparsifyLocal)
    masks = [random_bools(layout.prunable, 0.3, seed) for seed in range(5)]
    order = torch.randperm(layout.prunable)
    dense = random_vector(layout.size)

    def merged(masks):
        replies = {client: purged(layout, mask, dense) for client, mask in enumerate(masks)}
        return method.merge(state_of(layout, t=10), replies, 10).mask

    mask, other = merged(masks), merged([mask[order] for mask in masks])
    assert torch.equal(other, mask[order])
    assert not torch.equal(other, mask)


@BOTH
def test_nothing_is_purged_and_no_mask_travels_between_purges(layout, cls):
    method = method_of(layout, cls, mask_interval=5)
    state = started(method, random_bools(layout.prunable, 0.9), 10)
    replies = answers(method, state)
    assert all(reply.mask is None for reply in replies.values())
    assert torch.equal(method.merge(state, replies, 10).mask, state.mask)


def test_local_purging_sends_less_than_global(train):
    sent = {}
    for name in ("fedsparsify_global", "fedsparsify_local"):
        sent[name] = [record.up_bytes for _, record in train(tiny_config(method=name, rounds=4))]
    assert sent["fedsparsify_global"][0] == sent["fedsparsify_local"][0]  # round 0 purges nothing
    assert sent["fedsparsify_global"][1] > sent["fedsparsify_local"][1]


def test_one_identical_client_makes_local_equal_global(layout):
    """With one voter the merged model is that client's own purge, which is the server's."""
    state = started(method_of(layout), random_bools(layout.prunable, 0.9), 10)
    states = []
    for cls in (FedSparsifyGlobal, FedSparsifyLocal):
        method = method_of(layout, cls)
        states.append(method.merge(state, answers(method, state, samples=(8,)), 10))
    assert torch.equal(states[0].mask, states[1].mask)
    sparse = [layout.masked(new.weights, new.mask) for new in states]
    assert torch.equal(sparse[0], sparse[1])


@NAMES
def test_fedsparsify_learns_the_digits_at_its_target_sparsity(method):
    last = run(tiny_config(**LEARNING, method=method, target_sparsity=0.8), progress=False).iloc[-1]
    assert last.accuracy > 0.6
    assert last.sparsity == pytest.approx(0.8, abs=1e-3 if method == "fedsparsify_global" else 0.03)
