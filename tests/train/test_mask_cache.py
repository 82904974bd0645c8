"""Laws of masks told over those that clients hold: the same run for fewer bytes down, and never over another mask."""

from dataclasses import replace

import pytest
import torch
from conftest import interrupted, random_bools, same_history, tiny_config

from feddip_lite import run
from feddip_lite.core.errors import ClientFailure
from feddip_lite.core.flat import sha256_of
from feddip_lite.core.message import Message, decode, encode, num_bytes
from feddip_lite.core.state import EMPTY
from feddip_lite.methods import METHODS
from feddip_lite.methods.registry import settings_of
from feddip_lite.train.checkpoint import load_checkpoint
from feddip_lite.train.mask_cache import HELD, PART, held_part, packed, told, whole
from feddip_lite.train.round import run_round

CPU = torch.device("cpu")
SMALL = {"width": 0.1, "rounds": 4, "clients": 3, "clients_per_round": 2, "mask_interval": 1}
MASKED = [name for name in METHODS if name not in ("fedavg", "fedprox")]


def fewer(mask, share, seed):
    return mask & random_bools(len(mask), share, seed)


HELD_AND_NEW = {
    "the same": lambda mask: (mask, mask.clone()),
    "fewer": lambda mask: (mask, fewer(mask, 0.9, 1)),
    "none of them": lambda mask: (mask, ~mask),
    "some return": lambda mask: (fewer(mask, 0.9, 2), fewer(mask, 0.9, 3)),
    "all, then some": lambda mask: (torch.ones_like(mask), mask),
    "none, then some": lambda mask: (torch.zeros_like(mask), mask),
    "some, then none": lambda mask: (mask, torch.zeros_like(mask)),
}


@pytest.mark.parametrize("case", HELD_AND_NEW)
def test_a_mask_arrives_to_the_bit_whatever_was_held(case, layout):
    held, new = HELD_AND_NEW[case](random_bools(layout.prunable, 0.4))
    offer = Message(torch.arange(5.0), new, {"more": torch.ones(2)})
    message = told(offer, packed(held))
    assert message.mask is None and len(encode(message)) == num_bytes(message)
    found = whole(decode(encode(message), layout), held_part({}, held), layout.prunable, CPU)
    assert torch.equal(found.mask, new) and torch.equal(found.values, offer.values)
    assert set(found.extras) == {"more"}


@pytest.mark.parametrize("left", [0.97, 0.5, 0.03])
def test_a_mask_that_is_held_costs_four_bytes_and_one_that_prunes_further_a_bit_a_weight_at_most(left):
    held = random_bools(50_000, 0.1)
    assert len(told(Message(mask=held.clone()), packed(held)).extras[PART]) == 4
    new = fewer(held, left, 1)
    message = told(Message(mask=new), packed(held))
    assert len(message.extras[PART]) <= 1.02 * int(held.sum()) / 8 + 20
    assert num_bytes(message) < num_bytes(Message(mask=new)) / (2 if left > 0.9 else 1)


def test_without_a_mask_or_nothing_held_an_offer_is_as_it_was(layout):
    mask = random_bools(layout.prunable, 0.4)
    plain, masked = Message(torch.ones(3)), Message(mask=mask)
    assert told(plain, packed(mask)) is plain and told(masked, None) is masked
    assert whole(masked, {HELD: packed(~mask)}, layout.prunable, CPU) is masked
    assert held_part({HELD: packed(mask), "own": mask}, None).keys() == {HELD} and held_part({}, None) == {}


def test_over_another_mask_or_damaged_nothing_is_read(layout):
    held = random_bools(layout.prunable, 0.4)
    message = told(Message(mask=fewer(held, 0.9, 1)), packed(held))
    for memory in (EMPTY, {HELD: packed(~held)}):
        with pytest.raises(ValueError, match="over one that this client does not hold; run without mask_cache"):
            whole(message, memory, layout.prunable, CPU)
    code = message.extras[PART]
    for count in range(len(code)):
        if count == 4:
            continue  # what says "the same as held"
        with pytest.raises(ValueError):
            whole(Message(extras={PART: code[:count]}), {HELD: packed(held)}, layout.prunable, CPU)


@pytest.mark.parametrize("method", MASKED)
def test_every_method_is_the_same_run_for_no_more_bytes_down(method, train):
    settings = dict(SMALL)
    if "mask_interval" not in settings_of(method, "paper"):
        del settings["mask_interval"]
    plain, cached = (train(tiny_config(method=method, mask_cache=cache, **settings)) for cache in (False, True))
    overhead = 4 + 4 + 1 + len(PART) + 5  # a checksum, a length, and the part's own head; for each client
    for (state, record), (other, other_record) in zip(plain, cached, strict=True):
        for name in ("weights", "buffers", "mask"):
            assert torch.equal(getattr(state, name), getattr(other, name)), name
        assert sha256_of(state.memory) == sha256_of(other.memory)
        assert (record.up_bytes, record.train_loss) == (other_record.up_bytes, other_record.train_loss)
        assert other_record.down_bytes <= record.down_bytes + overhead * SMALL["clients_per_round"]


def test_both_ends_hold_the_mask_of_the_last_merged_round(train):
    state, _ = train(tiny_config(method="feddip", mask_cache=True, **SMALL))[-1]
    assert set(state.held) == set(state.memories) != set()
    for client, held in state.held.items():
        assert torch.equal(held, state.memories[client][HELD])


def test_a_client_that_failed_holds_what_it_held_and_is_told_so(federation):
    settings = {**SMALL, "clients_per_round": 3, "on_client_failure": "skip"}
    config = tiny_config(method="feddip", mask_cache=True, **settings).resolved()
    state, clients, method = federation(config)
    for _ in range(2):
        state, _ = run_round(state, clients, method, config)
    lost = {**state.memories, 1: EMPTY}
    after, record = run_round(replace(state, memories=lost), clients, method, config)
    assert list(record.skipped) == [1] and "does not hold" in record.skipped[1]
    assert torch.equal(after.held[1], state.held[1]) and after.memories[1] == EMPTY
    with pytest.raises(ClientFailure, match="client 1: ValueError: the offer tells its mask over one that this client"):
        run_round(replace(state, memories=lost), clients, method, replace(config, on_client_failure="abort"))


def test_an_interrupted_run_goes_on_with_what_is_held(tmp_path):
    config = tiny_config(method="feddip", mask_cache=True, **SMALL)
    whole_run = run(config, results_dir=tmp_path / "whole", progress=False)
    count, history = interrupted(config, tmp_path / "parts")
    assert count and same_history(whole_run, history)


def test_an_older_checkpoint_holds_nothing(federation, tmp_path):
    config = tiny_config(method="feddip", **SMALL)
    assert interrupted(config, tmp_path, stops=1)[0] == 1
    assert load_checkpoint(tmp_path / f"{config.run_id}.checkpoint", config.resolved(), CPU).state.held == {}
