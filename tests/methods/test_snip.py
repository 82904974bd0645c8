"""Laws of SNIP: round 0 only scores, the mask is the top of the mean score, and nothing changes it afterwards."""

from dataclasses import replace

import pytest
import torch
from conftest import LEARNING, answers, random_bools, started, state_of, tiny_config, tiny_data
from torch.nn import functional as F

from feddip_lite import run
from feddip_lite.core.message import Message, num_bytes
from feddip_lite.core.plan import LocalPlan
from feddip_lite.core.sparsity import num_kept
from feddip_lite.data.datasets import normalise
from feddip_lite.methods.snip import SNIP
from feddip_lite.train.client import local_update

SCORED = pytest.mark.parametrize("scored", ["xavier", "initial"])


def method_of(layout, scored="xavier", **changes):
    return SNIP(**{"layout": layout, "rounds": 10, "seed": 0, "scored_weights": scored, **changes})


def dense(layout):
    return torch.ones(layout.prunable, dtype=torch.bool)


def scored(scores, samples):
    return Message(None, None, {"samples": torch.tensor([samples]), "loss": torch.ones(1), "scores": scores})


@SCORED
def test_round_0_keeps_the_exact_count_and_leaves_the_weights_alone(layout, scored):
    method = method_of(layout, scored)
    state = started(method, dense(layout))
    new = method.merge(state, answers(method, state), 0)
    assert torch.equal(new.weights, state.weights)
    assert torch.equal(new.buffers, state.buffers)
    assert int(new.mask.sum()) == num_kept(0.9, layout.prunable)
    assert new.round == 1


@SCORED
def test_mask_is_fixed_from_round_1_on(train, scored):
    states = [state for state, _ in train(tiny_config(method="snip", method_options={"scored_weights": scored}))]
    assert all(torch.equal(state.mask, states[0].mask) for state in states)
    assert torch.equal(states[1].weights != 0, states[2].weights != 0)
    assert not torch.equal(states[1].weights, states[2].weights)


def test_mask_is_the_top_of_the_mean_score_weighted_by_samples(layout):
    method = method_of(layout, target_sparsity=1 - 2 / layout.prunable)
    scores = torch.zeros(2, layout.prunable)
    scores[0, [3, 7, 9]] = torch.tensor([0.5, 0.3, 0.2])
    scores[1, [9, 11]] = torch.tensor([0.4, 0.6])
    # means with weights 3/4 and 1/4: 3 -> .375, 7 -> .225, 9 -> .25, 11 -> .15
    new = method.merge(state_of(layout), {4: scored(scores[1], 10), 0: scored(scores[0], 30)}, 0)
    assert new.mask.nonzero().squeeze(1).tolist() == [3, 9]


def test_one_client_alone_scores_if_asked_for(layout):
    method = method_of(layout, target_sparsity=1 - 1 / layout.prunable, scored_by="client")
    scores = torch.zeros(2, layout.prunable)
    scores[0, 3], scores[1, 11] = 0.4, 0.6
    for first, kept in ((0, 3), (5, 11)):
        new = method.merge(state_of(layout), {4: scored(scores[1], 90), first: scored(scores[0], 10)}, 0)
        assert new.mask.nonzero().squeeze(1).tolist() == [kept]


def test_permuting_the_scores_permutes_the_mask(layout):
    method = method_of(layout)
    scores = torch.rand(layout.prunable)
    order = torch.randperm(layout.prunable)
    mask = method.merge(state_of(layout), {0: scored(scores, 1)}, 0).mask
    other = method.merge(state_of(layout), {0: scored(scores[order], 1)}, 0).mask
    assert torch.equal(other, mask[order])
    assert not torch.equal(other, mask)


def test_scores_are_the_normalised_sensitivity_to_a_factor_on_each_connection(layout):
    method = method_of(layout, "initial", scored_data="epoch")
    state = started(method, dense(layout))
    reply = answers(method, state, samples=(4,))[0]  # one batch of 4
    data = tiny_data(4)
    # By the definition: |dloss/dc| at c = 1 of the model with weights c * w.
    factors = torch.ones(layout.size, requires_grad=True)
    tensors = {slot.name: slot.of(factors * state.weights) for slot in layout.slots}
    hidden = F.conv2d(normalise(data.train_images, data), tensors["conv.weight"])
    hidden = F.batch_norm(hidden, None, None, tensors["norm.weight"], tensors["norm.bias"], training=True)
    logits = F.linear(hidden.relu().flatten(1), tensors["linear.weight"], tensors["linear.bias"])
    F.cross_entropy(logits, data.train_labels).backward()
    expected = factors.grad[: layout.prunable].abs()
    torch.testing.assert_close(reply.extras["scores"], expected / expected.sum(), rtol=1e-4, atol=1e-7)


@SCORED
def test_scores_sum_to_one_and_cost_four_bytes_for_each_prunable_weight(layout, scored):
    method = method_of(layout, scored)
    reply = answers(method, started(method, dense(layout)))[0]
    assert float(reply.extras["scores"].sum()) == pytest.approx(1, rel=1e-5)
    assert reply.values is None
    assert reply.mask is None
    assert set(reply.extras) == {"samples", "loss", "scores"}
    assert 0 < num_bytes(reply) - 4 * layout.prunable < 100


def test_scores_without_any_gradient_are_zero_never_nan(layout, model):
    method = method_of(layout)
    plan = LocalPlan(torch.zeros(layout.size), epochs=0)
    result = local_update(model, plan, tiny_data(), torch.arange(4), tiny_config(), 0, 0)
    reply, _ = method.reply(replace(result, gradient=torch.zeros(layout.size)), {}, 0)
    assert torch.count_nonzero(reply.extras["scores"]) == 0


def test_clients_score_at_the_same_xavier_weights(layout):
    method = method_of(layout)
    state = state_of(layout)
    plans = [method.plan(method.offer(state, 0, client), {}, 0) for client in (1, 2)]
    assert torch.equal(plans[0].weights, plans[1].weights)
    assert torch.equal(plans[0].weights[layout.prunable :], state.weights[layout.prunable :])
    assert not bool((plans[0].weights == state.weights)[: layout.prunable].any())
    linear = layout.prunable_slots[1].of(plans[0].weights)  # 192 draws
    assert float(linear.std()) == pytest.approx((2 / (48 + 4)) ** 0.5, rel=0.2)


def test_xavier_scoring_weights_are_a_function_of_the_seed_and_change_the_mask(layout):
    weights, masks = [], []
    for scored, seed in (("xavier", 0), ("xavier", 1), ("xavier", 0), ("initial", 0)):
        method = method_of(layout, scored, seed=seed)
        state = started(method, dense(layout))
        weights.append(method.plan(method.offer(state, 0, 0), {}, 0).weights)
        masks.append(method.merge(state, answers(method, state), 0).mask)
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(masks[0], masks[2])
    assert not any(torch.equal(weights[0], weights[i]) or torch.equal(masks[0], masks[i]) for i in (1, 3))


@SCORED
def test_later_rounds_are_masked_training_from_the_initial_weights(layout, scored):
    method = method_of(layout, scored)
    state = started(method, random_bools(layout.prunable), 1)
    plan = method.plan(method.offer(state, 1, 0), {}, 1)
    assert plan.project
    assert (plan.epochs, plan.final_gradient) == (None, None)


@SCORED
def test_snip_learns_the_digits_at_its_target_sparsity(scored):
    settings = {**LEARNING, "method": "snip", "method_options": {"scored_weights": scored}, "target_sparsity": 0.8}
    last = run(tiny_config(**settings), progress=False).iloc[-1]
    assert last.accuracy > 0.6
    assert last.sparsity == pytest.approx(0.8, abs=1e-3)
