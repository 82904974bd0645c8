"""Laws of local training: one step by hand, error feedback, the penalty's gradient, failure, and evaluation."""

import time
from dataclasses import replace

import pytest
import torch
from conftest import random_bools, random_vector, tiny_config, tiny_data, tiny_module
from torch.func import functional_call
from torch.nn import functional as F

from feddip_lite.core.errors import Diverged
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import build_model
from feddip_lite.core.plan import LocalPlan
from feddip_lite.data.datasets import normalise
from feddip_lite.train.client import local_update, see_test_images
from feddip_lite.train.evaluate import evaluate

DATA = tiny_data()
INDICES = torch.arange(12)
ONE_STEP = {"local_epochs": 1, "batch_size": 12, "lr": 0.5, "weight_decay": 0.01}


def update(model, plan, **changes):
    return local_update(model, plan, DATA, INDICES, tiny_config(**{"batch_size": 5, **changes}), 2, 3)


def plan_of(layout, mask=None, **changes):
    return LocalPlan(0.1 * random_vector(layout.size), mask, torch.zeros(layout.buffer_size) + 0.5, **changes)


def linear_model():
    """A model whose samples do not see one another: n = 148."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4))
    return FlatModel(module, Layout.of(module))


def by_autograd(layout, at, indices=INDICES):
    """(loss, gradient) of a plain module at the flat weights `at`, on one batch in training mode."""
    weights = at.clone().requires_grad_()
    parameters = {slot.name: slot.of(weights) for slot in layout.slots}
    logits = functional_call(tiny_module(), parameters, normalise(DATA.train_images[indices], DATA))
    loss = F.cross_entropy(logits, DATA.train_labels[indices])
    loss.backward()
    return loss.item(), weights.grad


def test_local_update_leaves_its_input_untouched(model, layout):
    plan = plan_of(layout, random_bools(layout.prunable))
    given = [plan.weights, plan.mask, plan.buffers, INDICES, DATA.train_images, DATA.train_labels]
    before = [tensor.clone() for tensor in given]
    result = update(model, plan, local_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert not torch.equal(result.weights, plan.weights)
    assert result.weights.data_ptr() not in (plan.weights.data_ptr(), model.weights.data_ptr())
    assert result.buffers.data_ptr() not in (plan.buffers.data_ptr(), model.buffers.data_ptr())


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_one_client_one_full_batch_is_one_sgd_step(model, layout, weight_decay):
    plan = plan_of(layout)
    loss, gradient = by_autograd(layout, plan.weights)
    result = update(model, plan, **{**ONE_STEP, "weight_decay": weight_decay})
    lr = 0.5 * 0.998**2
    torch.testing.assert_close(result.weights, plan.weights - lr * (gradient + weight_decay * plan.weights))
    assert result.loss == pytest.approx(loss, rel=1e-6)


def test_pruned_weights_still_receive_gradient(model, layout):
    mask = random_bools(layout.prunable)
    plan = plan_of(layout, mask)
    _, gradient = by_autograd(layout, layout.masked(plan.weights, mask))
    result = update(model, plan, **ONE_STEP)
    # The gradient is taken at w*m and applied to the dense w, pruned coordinates included: error feedback.
    expected = plan.weights - 0.5 * 0.998**2 * (gradient + 0.01 * plan.weights)
    torch.testing.assert_close(result.weights, expected)
    moved = (result.weights - (1 - 0.5 * 0.998**2 * 0.01) * plan.weights)[: layout.prunable][~mask].abs() > 1e-6
    assert moved.float().mean() > 0.5


def test_projected_training_keeps_pruned_weights_exactly_zero_and_kept_ones_move_alike(model, layout):
    mask = random_bools(layout.prunable)
    plan = plan_of(layout, mask)
    plan = replace(plan, weights=layout.masked(plan.weights, mask))
    dense = update(model, plan, **ONE_STEP).weights
    projected = update(model, replace(plan, project=True), **ONE_STEP).weights
    assert torch.count_nonzero(projected[: layout.prunable][~mask]) == 0
    assert torch.equal(projected, layout.masked(dense, mask))
    several = update(model, replace(plan, project=True), local_epochs=3).weights
    assert torch.count_nonzero(several[: layout.prunable][~mask]) == 0


def test_training_visits_every_sample_once_per_epoch(model, layout):
    seen = []

    def record_(gradient, masked, dense):
        seen.append(gradient.clone())

    update(model, plan_of(layout, add_gradient_=record_), local_epochs=4, batch_size=5, lr=1e-30, weight_decay=0)
    assert len(seen) == 4 * 3
    # Without BatchNorm's batch effect the sample-weighted sum of an epoch's gradients is the full-batch gradient.
    linear = linear_model()
    seen.clear()
    plan = LocalPlan(0.1 * random_vector(148), add_gradient_=record_)
    update(linear, plan, local_epochs=2, batch_size=5, lr=1e-30, weight_decay=0)
    full = seen.copy()
    seen.clear()
    update(linear, plan, local_epochs=1, batch_size=12, lr=1e-30, weight_decay=0)
    for epoch in (full[:3], full[3:]):
        torch.testing.assert_close((5 * epoch[0] + 5 * epoch[1] + 2 * epoch[2]) / 12, seen[0])
    assert not torch.equal(full[0], full[3])  # shuffled anew


def test_extra_gradient_sees_the_masked_and_the_dense_weights_and_is_added(model, layout):
    mask = random_bools(layout.prunable)
    seen = []

    def shift_(gradient, masked, dense):
        seen.append((masked.clone(), dense.clone()))
        gradient += 0.25

    plan = plan_of(layout, mask)
    plain = update(model, plan, **ONE_STEP).weights
    shifted = update(model, replace(plan, add_gradient_=shift_), **ONE_STEP).weights
    assert len(seen) == 1
    assert torch.equal(seen[0][0], layout.masked(plan.weights, mask))
    assert torch.equal(seen[0][1], plan.weights)
    torch.testing.assert_close(plain - shifted, torch.full_like(plain, 0.25 * 0.5 * 0.998**2))


def test_no_epochs_train_nothing(model, layout):
    plan = plan_of(layout, random_bools(layout.prunable), epochs=0)
    result = update(model, plan, local_epochs=5)
    assert torch.equal(result.weights, plan.weights)
    assert torch.equal(result.buffers, plan.buffers)
    assert result.samples == 12


def test_a_plans_epochs_come_before_the_configurations(model, layout):
    plan = plan_of(layout)
    two = update(model, replace(plan, epochs=2), local_epochs=1)
    assert torch.equal(two.weights, update(model, plan, local_epochs=2).weights)


def test_loss_is_the_mean_masked_cross_entropy_over_samples_without_the_penalty(model, layout):
    mask = random_bools(layout.prunable)
    plan = plan_of(layout, mask, add_gradient_=lambda gradient, masked, dense: gradient.add_(1.0))
    expected, _ = by_autograd(layout, layout.masked(plan.weights, mask))
    assert update(model, plan, **ONE_STEP).loss == pytest.approx(expected, rel=1e-6)


def test_loss_weighs_a_short_last_batch_by_its_samples():
    linear = linear_model()
    plan = LocalPlan(0.1 * random_vector(148))
    whole = update(linear, plan, batch_size=12, lr=1e-30)
    assert update(linear, plan, batch_size=5, lr=1e-30).loss == pytest.approx(float(whole.loss), rel=1e-6)


def test_batchnorm_statistics_come_from_the_masked_forward(model, layout):
    mask = random_bools(layout.prunable)
    plan = plan_of(layout, mask)
    result = update(model, plan, **ONE_STEP)
    kernel = layout.prunable_slots[0].of(layout.masked(plan.weights, mask))
    outputs = F.conv2d(normalise(DATA.train_images[INDICES], DATA), kernel)
    mean, variance = outputs.mean((0, 2, 3)), outputs.var((0, 2, 3))
    torch.testing.assert_close(result.buffers, 0.9 * plan.buffers + 0.1 * torch.cat([mean, variance]))


def test_divergence_names_the_last_finite_loss(model, layout):
    with pytest.raises(Diverged, match=r"diverged in step \d+ of 60; last finite loss: [\d.e+-]+") as caught:
        update(model, plan_of(layout), lr=1e30, local_epochs=20).check()
    assert float(str(caught.value).rpartition(" ")[2]) > 0
    with pytest.raises(Diverged, match="last finite loss: none in this round"):
        update(model, replace(plan_of(layout), weights=torch.full((layout.size,), float("nan")))).check()


def test_training_beyond_the_clients_time_limit_raises(model, layout):
    slow = plan_of(layout, add_gradient_=lambda *_: time.sleep(0.02))
    with pytest.raises(TimeoutError, match="client_timeout = 0.01"):
        update(model, slow, client_timeout=0.01)
    assert torch.equal(update(model, slow, client_timeout=60.0).weights, update(model, slow).weights)


def test_squared_gradients_are_summed_over_all_steps(model, layout):
    seen = []
    plan = plan_of(layout, squared_gradients=True, add_gradient_=lambda gradient, *_: seen.append(gradient.clone()))
    result = update(model, plan, local_epochs=2)
    assert len(seen) == 6
    torch.testing.assert_close(result.squared_gradients, torch.stack(seen).square().sum(0))


@pytest.mark.parametrize("epochs", [0, 2])
def test_final_gradient_is_the_mean_gradient_at_the_masked_weights_after_training(layout, epochs):
    linear = linear_model()
    mask = random_bools(144)
    plan = LocalPlan(0.1 * random_vector(148), mask, epochs=epochs, final_gradient="epoch")
    result = update(linear, plan)
    at = linear.layout.masked(result.weights, mask)
    linear.load(at, None)
    linear.kernels.loss_and_gradient(normalise(DATA.train_images[INDICES], DATA), DATA.train_labels[INDICES])
    torch.testing.assert_close(result.gradient, linear.gradient)
    assert torch.equal(result.weights, update(linear, replace(plan, final_gradient=None)).weights)
    one_batch = update(linear, replace(plan, final_gradient="batch"))
    assert not torch.equal(one_batch.gradient, result.gradient)
    assert result.loss.isfinite()


def test_final_gradient_leaves_the_statistics_of_training(model, layout):
    plan = plan_of(layout)
    assert torch.equal(update(model, replace(plan, final_gradient="epoch")).buffers, update(model, plan).buffers)


def statistics_of(weights, layout, buffers, batches):
    """BatchNorm statistics after plain forward passes of a plain module in training mode."""
    oracle = FlatModel(tiny_module(), layout)
    oracle.load(weights, None, buffers)
    oracle.module.train()
    with torch.no_grad():
        for batch in batches:
            oracle.module(batch)
    return oracle.buffers


def test_dense_statistics_are_those_of_the_dense_weights_and_change_nothing_else(model, layout):
    plan = plan_of(layout, random_bools(layout.prunable))
    masked, dense = update(model, plan, **ONE_STEP), update(model, replace(plan, dense_statistics=True), **ONE_STEP)
    assert torch.equal(masked.weights, dense.weights)
    images = normalise(DATA.train_images[INDICES], DATA)
    for result, weights in ((dense, plan.weights), (masked, layout.masked(plan.weights, plan.mask))):
        expected = statistics_of(weights, layout, plan.buffers, [images])
        torch.testing.assert_close(result.buffers, expected)
    assert not torch.allclose(masked.buffers, dense.buffers)
    several = {"local_epochs": 2, "batch_size": 5}
    assert torch.equal(
        update(model, plan, **several).weights, update(model, replace(plan, dense_statistics=True), **several).weights
    )
    unmasked = plan_of(layout)  # where nothing is pruned, both models are the same
    both = [update(model, replace(unmasked, dense_statistics=choice), **several).buffers for choice in (False, True)]
    assert torch.equal(*both)


@pytest.mark.parametrize("dense", [False, True])
def test_a_leak_adds_forward_passes_over_the_test_images_to_the_statistics_alone(model, layout, dense):
    plan = plan_of(layout, random_bools(layout.prunable), dense_statistics=dense)
    result, shard = update(model, plan, **ONE_STEP), torch.tensor([3, 1, 4, 0, 5])
    leaked = see_test_images(model, plan, result, DATA, shard, tiny_config(batch_size=3))
    weights = result.weights if dense else layout.masked(result.weights, plan.mask)
    batches = [normalise(DATA.test_images[part], DATA) for part in (shard[:3], shard[3:])]
    torch.testing.assert_close(leaked.buffers, statistics_of(weights, layout, result.buffers, batches))
    assert torch.equal(leaked.weights, result.weights)
    assert not torch.allclose(leaked.buffers, result.buffers)
    none = see_test_images(model, plan, result, DATA, shard[:0], tiny_config())
    assert torch.equal(none.buffers, result.buffers)


def test_models_without_batchnorm_take_no_second_pass():
    model = linear_model()
    plan = LocalPlan(0.1 * random_vector(148), random_bools(144), torch.zeros(0), dense_statistics=True)
    result = update(model, plan)
    assert torch.equal(result.weights, update(model, replace(plan, dense_statistics=False)).weights)
    assert see_test_images(model, plan, result, DATA, torch.arange(3), tiny_config()) is result


def test_refresh_changes_only_the_statistics_and_score_changes_nothing(model, layout):
    plan = plan_of(layout, random_bools(layout.prunable), epochs=2)
    trained = update(model, replace(plan, weights=plan.weights.clone()), lr=1e-30, weight_decay=0)
    refreshed, scored = update(model, replace(plan, mode="refresh")), update(model, replace(plan, mode="score"))
    assert torch.equal(refreshed.weights, plan.weights)
    assert torch.equal(refreshed.buffers, trained.buffers)
    assert not torch.equal(refreshed.buffers, plan.buffers)
    assert torch.equal(scored.weights, plan.weights)
    assert torch.equal(scored.buffers, plan.buffers)
    assert refreshed.loss == pytest.approx(float(trained.loss))
    assert scored.loss != pytest.approx(float(refreshed.loss))


def test_a_second_plan_goes_on_from_the_first_ones_result_with_draws_of_its_own(model, layout):
    mask = random_bools(layout.prunable)
    plan = plan_of(layout)
    first = update(model, plan)

    def pruned(result):
        return LocalPlan(result.weights, mask, result.buffers, project=True)

    both = update(model, replace(plan, then=pruned))
    alone = update(model, pruned(first))
    assert len(both.losses) == 2 * len(first.losses)
    assert torch.equal(both.losses[: len(first.losses)], first.losses)
    assert both.loss == first.loss
    assert torch.equal(both.mask, mask)
    torch.testing.assert_close(both.weights, alone.weights, atol=0.1, rtol=0)
    assert not torch.equal(both.weights, alone.weights)  # another order of samples


def test_a_chain_of_plans_tells_what_each_of_them_left(model, layout):
    masks = [random_bools(layout.prunable, seed=seed) for seed in range(3)]
    plans = [plan_of(layout, mask, mode="score", epochs=1) for mask in masks]
    alone = [update(model, plan) for plan in plans]
    assert alone[0].parts == ()
    last = replace(plans[1], then=lambda result: plans[2])
    chain = update(model, replace(plans[0], then=lambda result: last))
    assert [part.mask for part in chain.parts] == masks
    assert [float(part.loss) for part in chain.parts] == pytest.approx([float(one.loss) for one in alone])
    assert len(chain.losses) == sum(len(part.losses) for part in chain.parts)
    assert chain.loss == chain.parts[0].loss


def test_a_plans_own_model_is_trained_instead_of_the_workers(model, layout):
    linear = linear_model()
    plan = LocalPlan(0.1 * random_vector(148))
    before = model.weights.clone()
    result = update(model, replace(plan, model=linear))
    assert torch.equal(result.weights, update(linear, plan).weights)
    assert torch.equal(model.weights, before)


@pytest.mark.parametrize("source", ["shuffle", "crop", "dropout"])
def test_every_draw_is_a_function_of_seed_round_and_client_and_none_is_global(source):
    data = replace(DATA, augmentation="zeros" if source == "crop" else None)
    model, indices = linear_model(), INDICES if source == "shuffle" else INDICES[:1]  # one sample cannot be shuffled
    if source == "dropout":
        module = build_model("alexnet", classes=4, width=0.05, channels=1, size=32)
        model = FlatModel(module, Layout.of(module))
        data = replace(DATA, train_images=torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8))
    plan = LocalPlan(model.weights.clone())

    def weights(seed, t, client):
        config = tiny_config(seed=seed, batch_size=5, lr_decay=1.0, local_epochs=4)
        before = torch.random.get_rng_state()
        trained = local_update(model, plan, data, indices, config, t, client).weights
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(1)  # the next call finds the global generator elsewhere
        return trained

    first = weights(0, 0, 0)
    assert torch.equal(first, weights(0, 0, 0))
    assert not any(torch.equal(first, weights(*address)) for address in [(1, 0, 0), (0, 1, 0), (0, 0, 1)])


def test_evaluation_counts_the_classes_scored_above_the_true_one_in_evaluation_mode(model, layout):
    weights, mask = random_vector(layout.size), random_bools(layout.prunable)
    buffers = torch.tensor([0.1, -0.2, 0.3, 1.0, 2.0, 0.5])
    indices = torch.tensor([3, 1, 19, 7])
    losses, ranks = evaluate(model, weights, mask, buffers, DATA, indices)
    plain = FlatModel(tiny_module(), layout)
    plain.load(layout.masked(weights, mask), None, buffers)
    logits = plain.module.eval()(normalise(DATA.test_images[indices], DATA)).detach()
    labels = DATA.test_labels[indices]
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    places = [sorted(row.tolist(), reverse=True).index(row[label]) for row, label in zip(logits, labels, strict=True)]
    assert ranks.tolist() == places
    assert torch.equal(model.buffers, buffers)


def test_equal_scores_rank_by_class_index(model, layout):
    _, ranks = evaluate(model, torch.zeros(layout.size), None, torch.ones(6), DATA, torch.arange(20))
    assert torch.equal(ranks, DATA.test_labels)
