"""Laws of FedX: reference images that no client has, masks by relevance, an end-to-end run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import interrupted, random_vector, reply_of, same_history, tiny_config, tiny_data, tiny_module

from feddip_lite import run
from feddip_lite.core.flat import FlatModel
from feddip_lite.core.sparsity import num_kept, topk_mask
from feddip_lite.core.state import ServerState
from feddip_lite.data.datasets import load_dataset, normalise
from feddip_lite.methods.base import Context
from feddip_lite.methods.fedx import FedX
from feddip_lite.train.setup import reference_of, split_of

RULES = pytest.mark.parametrize("relevance", ["lrp", "gradient_activation"])
LEARNS = {"width": 0.5, "local_epochs": 5, "batch_size": 16, "rounds": 10, "mask_interval": 3}


def method_of(layout, relevance="lrp", per_class=2, **changes):
    """FedX on the tiny module, with `per_class` reference images of each of its classes."""
    data = tiny_data(60)
    kept = torch.cat([(data.train_labels == label).nonzero().view(-1)[:per_class] for label in range(4)])
    images = normalise(data.train_images[kept], data)
    context = Context(lambda: FlatModel(tiny_module(9), layout), 0, images, data.train_labels[kept])
    settings = {"layout": layout, "rounds": 20, "seed": 0, "reference_per_class": per_class, "relevance": relevance}
    return FedX(**{**settings, "context": context, **changes})


def state_before(layout, t, mask=None):
    mask = torch.ones(layout.prunable, dtype=torch.bool) if mask is None else mask
    buffers = torch.tensor([0.1, -0.2, 0.3, 1.0, 2.0, 0.5])
    return ServerState(t, 0.3 * random_vector(layout.size, 2), buffers, mask)


def merge(method, state):
    """The state after a round whose clients change nothing."""
    weights = method.layout.masked(state.weights, state.mask)
    return method.merge(state, {0: reply_of(weights, 1, state.buffers)}, state.round)


@RULES
def test_masks_keep_the_exact_count_are_nested_and_end_at_the_target(layout, relevance):
    method = method_of(layout, relevance)
    state = state_before(layout, 0)
    for t in range(method.rounds):
        new = merge(method, state)
        if t % 5 == 0 or t == 19:
            sparsity = 0.9 * (1 - (1 - t / 19) ** 3)
            assert int(new.mask.sum()) == num_kept(sparsity, layout.prunable)
        else:
            assert torch.equal(new.mask, state.mask)
        assert not bool((new.mask & ~state.mask).any())
        assert torch.equal(new.mask, state.mask) == (t % 5 > 0 and t < 19 or t == 0)
        state = new
    assert int(state.mask.sum()) == num_kept(0.9, layout.prunable)


@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
def test_a_run_of_any_length_ends_at_the_target_or_as_it_began(layout, rounds):
    method = method_of(layout, rounds=rounds)
    state = state_before(layout, 0)
    for _ in range(rounds):
        state = merge(method, state)
    assert int(state.mask.sum()) == num_kept(0.9 if rounds > 1 else 0.0, layout.prunable)


@RULES
def test_the_mask_keeps_the_most_relevant_weights_whatever_their_magnitude(layout, relevance):
    method = method_of(layout, relevance)
    new = merge(method, state_before(layout, 10))
    scores = method.scores(replace(new, mask=torch.ones_like(new.mask)))
    assert scores[new.mask].min() >= scores[~new.mask].max()
    magnitudes = new.weights[: layout.prunable].abs()
    assert not torch.equal(new.mask, topk_mask(magnitudes, int(new.mask.sum())))


@RULES
def test_scores_are_not_negative_and_those_of_pruned_weights_are_zero(layout, relevance):
    method, mask = method_of(layout, relevance), torch.arange(layout.prunable) % 3 > 0
    scores = method.scores(state_before(layout, 5, mask))
    assert scores.shape == (layout.prunable,)
    assert bool((scores >= 0).all())
    assert torch.count_nonzero(scores[~mask]) == 0
    assert torch.count_nonzero(scores[mask]) > 0.5 * int(mask.sum())


@RULES
def test_scores_are_the_mean_over_classes_of_each_classes_own(layout, relevance):
    method, state = method_of(layout, relevance), state_before(layout, 5)
    context, each = method.context, []
    for label in range(4):
        one = context.labels == label
        alone = replace(context, images=context.images[one], labels=context.labels[one])
        each.append(replace(method, context=alone).scores(state))
    torch.testing.assert_close(method.scores(state), sum(each) / 4)


@RULES
def test_permuting_the_labels_of_the_reference_images_changes_the_mask(layout, relevance):
    method, state = method_of(layout, relevance), state_before(layout, 10)
    other = replace(method, context=replace(method.context, labels=method.context.labels.roll(2)))
    assert not torch.equal(merge(method, state).mask, merge(other, state).mask)


def test_the_two_relevances_choose_different_masks(layout):
    state = state_before(layout, 10)
    masks = [merge(method_of(layout, relevance), state).mask for relevance in ("lrp", "gradient_activation")]
    assert not torch.equal(*masks)


# The reference images


@pytest.mark.parametrize("partition", ["iid", "pathological", "dirichlet"])
def test_reference_images_belong_to_no_client_and_every_other_sample_to_one(partition):
    data = load_dataset("digits")
    config = tiny_config(method="fedx", partition=partition, method_options={"reference_per_class": 7})
    reference, split = reference_of(data, config), split_of(data, config)
    assert data.train_labels[reference].tolist() == [label for label in range(10) for _ in range(7)]
    everything = np.sort(np.concatenate([reference, *split.train]))
    assert np.array_equal(everything, np.arange(len(data.train_labels)))
    assert np.array_equal(np.sort(np.concatenate(split.test)), np.arange(len(data.test_labels)))


def test_reference_images_are_a_function_of_the_seed_and_only_methods_with_that_option_have_any(federation):
    data = load_dataset("digits")
    first, again, other = (reference_of(data, tiny_config(method="fedx", seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(reference_of(data, tiny_config(method="fedavg"))) == 0
    assert len(federation(tiny_config(method="fedavg"))[2].context.images) == 0


def test_the_method_gets_its_reference_images_as_clients_see_theirs(federation):
    config = tiny_config(method="fedx", method_options={"reference_per_class": 3})
    _, clients, method = federation(config)
    reference = reference_of(load_dataset("digits"), config)
    assert torch.equal(method.context.images, normalise(clients.data.train_images[reference], clients.data))
    assert torch.equal(method.context.labels, clients.data.train_labels[reference])


def test_more_reference_images_than_a_class_can_spare_are_refused(federation):
    with pytest.raises(ValueError, match=r"reference_per_class: 500 is not valid; expected an integer in \[1, 1\d\d\]"):
        federation(tiny_config(method="fedx", method_options={"reference_per_class": 500}))


# Whole runs


@RULES
def test_fedx_learns_digits_at_90_percent_sparsity(relevance):
    history = run(tiny_config(method="fedx", method_options={"relevance": relevance}, **LEARNS), progress=False)
    assert history["accuracy"].tail(3).min() > 0.6
    assert history["sparsity"].iloc[-1] == pytest.approx(0.9, abs=1e-3)
    assert history["up_bytes"].iloc[-1] < 0.3 * history["up_bytes"].iloc[0]
    assert history["regrown"].sum() == 0


def test_fedx_prunes_a_model_with_batchnorm_and_shortcuts(train):
    options = {"reference_per_class": 2}
    changes = {"model": "resnet18", "width": 0.05, "clients": 60, "clients_per_round": 2, "rounds": 2}
    _, (state, record) = train(tiny_config(method="fedx", method_options=options, mask_interval=1, **changes))
    assert record.sparsity == pytest.approx(0.9, abs=1e-3)
    assert state.weights.isfinite().all()


def test_resumed_run_equals_the_uninterrupted(tmp_path):
    config = tiny_config(method="fedx", mask_interval=1, clients=60, clients_per_round=2)
    count, history = interrupted(config, tmp_path)
    assert count == 2
    assert same_history(history, run(config, progress=False))


def test_workers_never_change_a_bit(train):
    one, three = (train(tiny_config(method="fedx", mask_interval=1, workers=workers)) for workers in (1, 3))
    assert torch.equal(one[-1][0].weights, three[-1][0].weights)
    assert torch.equal(one[-1][0].mask, three[-1][0].mask)
