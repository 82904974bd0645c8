"""Laws of FedDST: counts per layer, what a client drops and grows, the mean per coordinate, masks kept by clients."""

from dataclasses import replace
from math import cos, pi, prod

import pytest
import torch
from conftest import (
    FAST,
    interrupted,
    random_bools,
    random_vector,
    reply_of,
    same_history,
    state_of,
    tiny_config,
    tiny_data,
)

from feddip_lite import run
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import build_model
from feddip_lite.core.sparsity import erk_densities, kept_per_layer, layerwise_mask
from feddip_lite.methods.feddst import FedDST, mean_where_kept, replaceable, without_smallest
from feddip_lite.train.client import local_update
from feddip_lite.train.round import run_round
from feddip_lite.train.setup import prepare

PRESETS = pytest.mark.parametrize("preset", ["paper", "repo"])


def method_of(layout, preset="paper", **changes):
    own = {"rounds": 20, "seed": 0, "target_sparsity": 0.5, "mask_interval": 4, "replaced": 0.5}
    return FedDST(**{"layout": layout, **FedDST.presets[preset], **own, **changes})


def begun(method, seed=0):
    """The state before round 0."""
    state = state_of(method.layout, method.start()[0], seed)
    return method.begin(replace(state, buffers=torch.ones(method.layout.buffer_size)))


def readjusting(method):
    """The first round in which clients readjust."""
    return 1 if method.readjust_in == "second" else method.mask_interval - 1


def trained(method, model, state, t, memory=None, client=3):
    """(the plan, the result, the reply, the memory) of one client's round on twelve small images."""
    plan = method.plan(method.offer(state, t, client), memory or {}, t)
    result = local_update(model, plan, tiny_data(), torch.arange(12), tiny_config(batch_size=5), t, client)
    return plan, result, *method.reply(result, memory or {}, t)


def rounds_of(config):
    """[(state, record, memories), ...] of its rounds, clients remembering."""
    config = config.resolved()
    state, clients, method = prepare(config)
    done = []
    for _ in range(config.rounds):
        state, record = run_round(state, clients, method, config)
        done.append((state, record, state.memories))
    clients.workers.close()
    return method, done


def test_fewer_signals_pass_an_untrained_alexnet_under_the_densities_of_the_published_formula():
    """Why its own formula, sparsity proportional to 1 - sum(shape) / prod(shape), is not followed (deviations.md)."""
    images = torch.randn(64, 3, 32, 32)

    def own_formula(shapes, density):
        raw, sizes = [1 - sum(shape) / prod(shape) for shape in shapes], [prod(shape) for shape in shapes]
        scale = (1 - density) * sum(sizes) / sum(r * n for r, n in zip(raw, sizes, strict=True))
        return [1 - scale * r for r in raw]

    for seed in range(3):
        module = build_model("alexnet", classes=10, width=0.25, channels=3, size=32, seed=seed).eval()
        model = FlatModel(module, Layout.of(module))
        weights, slots = model.weights.clone(), model.layout.prunable_slots
        spread = []
        for densities_of in (erk_densities, own_formula):
            densities = densities_of([slot.shape for slot in slots], 0.1)
            keep = [round(d * (slot.stop - slot.start)) for d, slot in zip(densities, slots, strict=True)]
            model.load(weights, layerwise_mask(model.layout, weights[: model.layout.prunable].abs(), keep))
            with torch.no_grad():
                spread.append(float(module(images).std(0).mean()))
        assert spread[1] < spread[0] / 2


@PRESETS
@pytest.mark.parametrize("target", [0.5, 0.8, 0.9])
def test_every_layer_keeps_its_erk_count_from_before_the_first_round_on(layout, preset, target):
    method = method_of(layout, preset, target_sparsity=target)
    densities = erk_densities([slot.shape for slot in layout.prunable_slots], 1 - target)
    counts = [round(d * (slot.stop - slot.start)) for d, slot in zip(densities, layout.prunable_slots, strict=True)]
    assert kept_per_layer(layout, begun(method).mask) == counts == method.counts
    assert abs(sum(counts) - (1 - target) * layout.prunable) <= len(counts) / 2


def test_first_mask_of_paper_keeps_the_largest_initial_weights_of_each_layer(layout):
    method = method_of(layout)
    state = begun(method)
    magnitudes = state.weights.abs()
    for slot in layout.prunable_slots:
        kept = slot.of(state.mask)
        assert slot.of(magnitudes)[kept].min() > slot.of(magnitudes)[~kept].max()


def test_first_mask_of_repo_is_random_and_a_function_of_the_seed(layout):
    masks = [begun(method_of(layout, "repo", seed=seed)).mask for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(masks[0], begun(method_of(layout, "repo", seed=1), seed=9).mask)  # whatever the weights


@pytest.mark.parametrize(
    ("preset", "rounds", "until"), [("paper", [1, 5, 9], 10), ("repo", [3, 7, 11, 15, 19], 20)], ids=["paper", "repo"]
)
def test_share_replaced_falls_along_a_cosine_in_the_rounds_that_readjust_and_is_0_in_all_others(
    layout, preset, rounds, until
):
    method = method_of(layout, preset)
    for t in range(20):
        expected = 0.25 * (1 + cos(pi * t / until)) if t in rounds else 0.0
        assert method.share(t) == pytest.approx(expected, abs=1e-12)


@PRESETS
def test_rounds_without_readjustment_are_masked_sgd_and_send_no_mask(layout, model, preset):
    method = method_of(layout, preset)
    state = begun(method)
    plan, result, reply, memory = trained(method, model, state, 2)
    assert plan.then is None
    assert plan.project
    assert reply.mask is None
    assert memory == {}
    assert torch.equal(layout.unpack(reply.values, state.mask), result.weights)


@PRESETS
def test_gradient_that_decides_growth_is_taken_at_the_trained_weights_before_the_drop(layout, model, preset):
    method = method_of(layout, preset)
    state, t = begun(method), readjusting(method)
    plan, result, *_ = trained(method, model, state, t)
    assert plan.final_gradient == method.grow_by
    alone = local_update(
        model, replace(plan, then=None), tiny_data(), torch.arange(12), tiny_config(batch_size=5), t, 3
    )
    assert torch.equal(result.parts[0].gradient, alone.gradient)
    second = plan.then(alone)
    assert (second.epochs, second.final_gradient) == (0, None)
    assert torch.equal(second.weights, layout.masked(alone.weights, second.mask))
    assert bool((state.mask & ~second.mask).any())
    assert torch.equal(result.mask, second.mask)
    assert torch.equal(result.weights, second.weights)


@PRESETS
def test_a_client_drops_the_smallest_and_grows_the_largest_gradients_of_each_layer_as_many(layout, model, preset):
    method = method_of(layout, preset)
    state, t = begun(method), readjusting(method)
    plan, result, reply, memory = trained(method, model, state, t)
    readjusted = memory.get("mask", reply.mask)
    share = method.share(t)
    magnitudes = (plan.weights if preset == "repo" else local_update(
        model, replace(plan, then=None), tiny_data(), torch.arange(12), tiny_config(batch_size=5), t, 3
    ).weights).abs()  # fmt: skip
    assert kept_per_layer(layout, readjusted) == method.counts
    for slot, count in zip(layout.prunable_slots, method.counts, strict=True):
        before, pruned, after = (slot.of(mask) for mask in (state.mask, result.mask, readjusted))
        dropped, grown = before & ~pruned, after & ~pruned
        assert int(dropped.sum()) == int(grown.sum()) == round(share * count) > 0
        assert slot.of(magnitudes)[dropped].max() <= slot.of(magnitudes)[pruned].min()
        gradient = slot.of(result.parts[0].gradient).abs()
        assert gradient[grown].min() >= gradient[~after].max()


def test_grown_weights_travel_as_zeros_packed_by_the_clients_own_mask(layout, model):
    method = method_of(layout)
    _, result, reply, _ = trained(method, model, begun(method), readjusting(method))
    sent = layout.unpack(reply.values, reply.mask)
    assert torch.equal(sent, result.weights)
    assert torch.count_nonzero(sent[: layout.prunable][reply.mask & ~result.mask]) == 0
    assert reply.values.numel() == sum(method.counts) + layout.size - layout.prunable


def test_under_repo_a_readjusted_mask_acts_from_the_next_participation_on(layout, model):
    method = method_of(layout, "repo")
    state, t = begun(method), readjusting(method)
    _, result, reply, memory = trained(method, model, state, t)
    assert torch.equal(reply.mask, state.mask)
    assert torch.equal(layout.unpack(reply.values, reply.mask), result.parts[0].weights)
    plan, *_ = trained(method, model, state, t + 1, memory)
    assert torch.equal(plan.mask, memory["mask"])
    assert not torch.equal(plan.mask, state.mask)


def test_permuting_gradients_permutes_what_grows(layout):
    method = method_of(layout)
    mask = without_smallest(layout, begun(method).mask, random_vector(layout.size), [5, 20])
    order = torch.cat([torch.randperm(27), 27 + torch.randperm(192)])

    gradient = random_vector(layout.size, 7)
    permuted = torch.cat([gradient[: layout.prunable][order], gradient[layout.prunable :]])
    assert torch.equal(method.regrown(mask[order], permuted), method.regrown(mask, gradient)[order])
    assert not torch.equal(method.regrown(mask, permuted), method.regrown(mask, gradient))


def test_a_dense_layer_stays_as_it_is(layout):
    mask = random_bools(layout.prunable)
    mask[:27] = True
    mask[27:217] = True
    mask[217:] = False
    assert replaceable(layout, mask, 0.5) == [0, 2]


def own(layout, values, mask, samples):
    """A reply with a mask of its own."""
    weights = layout.masked(values, mask)
    return replace(reply_of(layout.pack(weights, mask), samples, torch.zeros(layout.buffer_size)), mask=mask)


def test_each_coordinate_is_averaged_over_the_clients_that_kept_it(layout):
    masks = torch.zeros(3, layout.prunable, dtype=torch.bool)
    masks[0, [0, 1, 2]] = masks[1, [1, 2]] = masks[2, 2] = True
    vectors = [torch.full((layout.size,), value) for value in (1.0, 2.0, 4.0)]
    samples = (10, 30, 40)
    replies = {n: own(layout, vectors[n], masks[n], samples[n]) for n in range(3)}
    mean, support = mean_where_kept(layout, state_of(layout).mask, replies)
    torch.testing.assert_close(mean[:4], torch.tensor([1.0, (10 + 60) / 40, (10 + 60 + 160) / 80, 0.0]))
    torch.testing.assert_close(mean[layout.prunable :], torch.full((10,), 230 / 80))
    assert support[:4].tolist() == pytest.approx([10 / 80, 40 / 80, 1.0, 0.0])


def test_paper_divides_by_those_who_kept_a_weight_and_repo_by_all(layout):
    mask = begun(method_of(layout)).mask
    kept, shared = [int(i) for i in mask.nonzero()[[0, -1]].squeeze(1)]
    less = mask.clone()
    less[kept] = False
    vector = torch.full((layout.size,), 3.0)
    replies = {0: own(layout, vector, mask, 10), 1: own(layout, vector, less, 30)}
    state = state_of(layout, mask)
    for preset, expected in (("paper", 3.0), ("repo", 0.75)):
        new = method_of(layout, preset).merge(state, replies, 0)
        assert new.weights[[kept, shared]].tolist() == [expected, 3.0]
        assert torch.equal(new.mask, mask)


@PRESETS
def test_a_union_that_is_too_dense_is_pruned_back_layer_by_layer_by_magnitude(layout, preset):
    method = method_of(layout, preset)
    masks = [random_bools(layout.prunable, 0.9, n) for n in (1, 2, 3)]
    replies = {n: own(layout, random_vector(layout.size, n), mask, 10) for n, mask in enumerate(masks)}
    new = method.merge(begun(method), replies, 0)
    assert kept_per_layer(layout, new.mask) == method.counts
    for slot in layout.prunable_slots:
        magnitudes = slot.of(new.weights).abs()
        assert magnitudes[slot.of(new.mask)].min() > magnitudes[~slot.of(new.mask)].max()


def test_grown_weights_fill_what_everybody_dropped_those_with_most_samples_behind_them_first(layout):
    method = method_of(layout)
    mask = begun(method).mask
    dropped = [int(i) for i in mask[:27].nonzero()[:2].squeeze(1)]
    free = [int(i) for i in (~mask[:27]).nonzero()[:3].squeeze(1)]
    masks = [mask.clone() for _ in range(3)]
    for own_mask, grown in zip(masks, ([0, 2], [1, 2], [1, 2]), strict=True):
        own_mask[dropped] = False
        own_mask[[free[i] for i in grown]] = True
    values = random_vector(layout.size)
    values[free] = 0
    replies = {n: own(layout, values, own_mask, count) for n, (own_mask, count) in
               enumerate(zip(masks, (90, 20, 10), strict=True))}  # fmt: skip
    new = method.merge(state_of(layout, mask), replies, 0)
    assert new.mask[dropped].tolist() == [False, False]
    assert new.mask[free].tolist() == [
        True,
        False,
        True,
    ]  # 90 of 120 samples against 30, though two clients against one


@PRESETS
def test_masks_change_when_clients_readjust_and_only_then(preset):
    settings = {"preset": preset, "mask_interval": 3, "method_options": {"replaced": 0.5}, "target_sparsity": 0.8}
    method, done = rounds_of(tiny_config(method="feddst", rounds=8, **settings))
    first = readjusting(method)
    for state, record, memories in done:
        assert kept_per_layer(method.layout, state.mask) == method.counts
        if method.share(record.round) and preset == "paper":
            assert record.regrown > 0
        elif preset == "paper" or record.round <= first:
            assert record.regrown == 0  # of as many weights as before: the same mask
        assert bool(memories) == (preset == "repo" and record.round >= first)
    assert sum(record.regrown for _, record, _ in done) > 0


def test_a_client_of_repo_keeps_the_mask_it_readjusted_whatever_the_server_sends(layout, model):
    method = method_of(layout, "repo")
    state, t = begun(method), readjusting(method)
    *_, memory = trained(method, model, state, t)
    assert list(memory) == ["mask"]
    plan, result, reply, kept = trained(method, model, state, t + 1, memory)
    assert torch.equal(plan.mask, memory["mask"])
    assert not torch.equal(plan.mask, state.mask)
    assert torch.equal(reply.mask, memory["mask"])  # the server could not place the weights without it
    assert torch.count_nonzero(result.weights[: layout.prunable][~memory["mask"]]) == 0
    assert kept is memory


def test_nothing_is_readjusted_at_sparsity_0(layout, model):
    method = method_of(layout, target_sparsity=0.0)
    plan, _, reply, _ = trained(method, model, begun(method), readjusting(method))
    assert plan.mask is None
    assert reply.mask is None


def test_interrupted_run_of_clients_with_masks_of_their_own_resumes_to_the_same_bits(tmp_path):
    settings = {"method": "feddst", "preset": "repo", "mask_interval": 2, "rounds": 4}
    config = tiny_config(**{**FAST, **settings, "clients": 60, "clients_per_round": 40, "local_epochs": 1})
    _, resumed = interrupted(config, tmp_path)
    assert same_history(run(config, progress=False), resumed)


@pytest.mark.parametrize(("preset", "rounds"), [("paper", 9), ("repo", 16)])
def test_feddst_learns_digits_at_its_target_sparsity(preset, rounds):
    settings = {"width": 0.5, "local_epochs": 5, "batch_size": 8, "target_sparsity": 0.8, "mask_interval": 5}
    history = run(tiny_config(method="feddst", preset=preset, rounds=rounds, **settings), progress=False)
    assert history.sparsity.iloc[-1] == pytest.approx(0.8, abs=2e-3)
    assert history.accuracy.iloc[-1] > 0.6
