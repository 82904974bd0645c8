"""Laws of the three partitions: every index once, exact sizes, train and test alike, refusals."""

import time

import numpy as np
import pytest

from feddip_lite.data.partition import partition_dirichlet, partition_iid, partition_pathological

PARTITIONS = {
    "iid": partition_iid,
    "pathological": lambda *args: partition_pathological(*args, classes_per_client=3),
    "dirichlet": lambda *args: partition_dirichlet(*args, alpha=0.5),
}
every_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)


def labels_of(sizes, seed=0):
    """Shuffled labels with sizes[c] samples of class c."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def class_counts(shards, labels, classes):
    """(clients, classes) samples of each class at each client."""
    return np.array([np.bincount(labels[shard], minlength=classes) for shard in shards])


TRAIN = labels_of([83, 91, 77, 60, 100, 83, 95, 81, 70, 88])
TEST = labels_of([21, 23, 19, 15, 25, 21, 24, 20, 17, 22], seed=1)


@every_partition
@pytest.mark.parametrize("clients", [4, 7, 50])
def test_every_index_belongs_to_exactly_one_client(partition, clients):
    split = partition(TRAIN, TEST, clients, np.random.default_rng(3))
    for shards, labels in ((split.train, TRAIN), (split.test, TEST)):
        assert len(shards) == clients
        assert all(shard.dtype == np.int64 and (np.diff(shard) > 0).all() for shard in shards)
        assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert min(map(len, split.train)) > 0


@every_partition
def test_same_rng_state_gives_the_same_split_and_another_seed_another(partition):
    def checksum(seed):
        return partition(TRAIN, TEST, 10, np.random.default_rng(seed)).sha256

    assert checksum(5) == checksum(5)
    assert len({checksum(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("partition", [partition_iid, partition_pathological, partition_dirichlet])
def test_samples_of_a_class_are_shuffled_before_they_are_dealt(partition):
    options = {partition_pathological: [1], partition_dirichlet: [1e6]}.get(partition, [])
    shard = partition(labels_of([100]), labels_of([20]), 2, np.random.default_rng(0), *options).train[0]
    assert 49 <= len(shard) <= 51
    assert len(np.unique(np.diff(shard))) > 2  # neither a run of neighbours nor every second sample


@every_partition
def test_global_numpy_generator_is_neither_read_nor_moved(partition):
    np.random.seed(1)
    before = partition(TRAIN, TEST, 10, np.random.default_rng(0)).sha256
    moved = np.random.random()
    np.random.seed(1)
    assert moved == np.random.random()
    assert partition(TRAIN, TEST, 10, np.random.default_rng(0)).sha256 == before


def test_split_checksum_sees_a_sample_that_changes_hands():
    split = partition_iid(TRAIN, TEST, 10, np.random.default_rng(0))
    moved = type(split)((split.train[0][:-1], np.sort(np.append(split.train[1], split.train[0][-1]))), split.test)
    assert type(split)(split.train[:2], split.test).sha256 != moved.sha256
    assert type(split)(split.test, split.train).sha256 != split.sha256


@pytest.mark.parametrize("clients", [1, 3, 10, 50])
def test_iid_clients_differ_by_at_most_one_per_class_and_in_total(clients):
    split = partition_iid(TRAIN, TEST, clients, np.random.default_rng(0))
    for shards, labels in ((split.train, TRAIN), (split.test, TEST)):
        counts = class_counts(shards, labels, 10)
        assert np.ptp(counts, axis=0).max() <= 1
        assert np.ptp(counts.sum(axis=1)) <= 1


def test_iid_with_as_many_clients_as_training_samples_gives_each_one():
    split = partition_iid(TRAIN, TEST, len(TRAIN), np.random.default_rng(0))
    assert set(map(len, split.train)) == {1}
    assert sum(map(len, split.test)) == len(TEST)


@pytest.mark.parametrize("clients, per_client", [(5, 2), (50, 2), (7, 3), (10, 1), (4, 10), (13, 9)])
def test_pathological_clients_hold_exactly_their_number_of_classes_alike_in_train_and_test(clients, per_client):
    split = partition_pathological(TRAIN, TEST, clients, np.random.default_rng(2), classes_per_client=per_client)
    train, test = class_counts(split.train, TRAIN, 10), class_counts(split.test, TEST, 10)
    assert ((train > 0).sum(axis=1) == per_client).all()
    assert ((test > 0) <= (train > 0)).all()
    holders = (train > 0).sum(axis=0)
    assert np.ptp(holders) <= 1
    assert holders.sum() == clients * per_client
    for counts in (train, test):
        for label in range(10):
            assert np.ptp(counts[train[:, label] > 0, label]) <= 1


def test_pathological_pairings_of_classes_are_drawn_and_not_fixed():
    splits = [partition_pathological(TRAIN, TEST, 10, np.random.default_rng(seed)) for seed in range(4)]
    held = {(class_counts(split.train, TRAIN, 10) > 0).tobytes() for split in splits}
    assert len(held) == 4


def test_pathological_classes_in_order_are_fixed_pairs_with_equally_many_clients_each_and_shuffled_samples():
    splits = [partition_pathological(TRAIN, TEST, 50, np.random.default_rng(seed), in_order=True) for seed in range(2)]
    held = [(class_counts(split.train, TRAIN, 10) > 0) for split in splits]
    assert (held[0] == held[1]).all()
    pairs = [tuple(np.flatnonzero(row).tolist()) for row in held[0]]
    assert {pair: pairs.count(pair) for pair in pairs} == {(c, c + 1): 10 for c in range(0, 10, 2)}
    assert splits[0].sha256 != splits[1].sha256


@pytest.mark.parametrize("alpha", [0.1, 0.5, 10.0])
def test_dirichlet_cuts_train_and_test_at_the_same_fractions(alpha):
    train_labels, test_labels = labels_of([2000] * 5), labels_of([400] * 5)
    split = partition_dirichlet(train_labels, test_labels, 8, np.random.default_rng(1), alpha=alpha)
    train = class_counts(split.train, train_labels, 5) / 2000
    test = class_counts(split.test, test_labels, 5) / 400
    assert np.abs(train - test).max() <= 1 / 400 + 1 / 2000  # both cuts are rounded to whole samples


def test_large_alpha_approaches_iid_and_small_alpha_concentrates_classes():
    labels = labels_of([3000] * 10)

    def largest_share(alpha):
        split = partition_dirichlet(labels, TEST, 10, np.random.default_rng(0), alpha=alpha)
        return class_counts(split.train, labels, 10).max(axis=0).mean() / 3000

    assert largest_share(1e6) == pytest.approx(0.1, abs=0.002)
    assert largest_share(0.5) > 0.25
    assert largest_share(0.05) > 0.6


@every_partition
def test_five_hundred_clients_and_a_hundred_classes_take_seconds(partition):
    train, test = labels_of([500] * 100), labels_of([100] * 100)
    start = time.perf_counter()
    split = partition(train, test, 500, np.random.default_rng(0))
    assert time.perf_counter() - start < 5
    assert sum(map(len, split.train)) == 50_000


@every_partition
@pytest.mark.parametrize("clients", [0, -1, 829, 2.0, True, "5"])
def test_number_of_clients_out_of_range_is_refused(partition, clients):
    with pytest.raises(ValueError, match=r"clients: .* \[1, 828\]"):
        partition(TRAIN, TEST, clients, np.random.default_rng(0))


@every_partition
@pytest.mark.parametrize("labels", [TRAIN.astype(float), TRAIN.reshape(2, -1)], ids=["float", "two-dimensional"])
def test_labels_that_are_not_integers_in_a_row_are_refused(partition, labels):
    with pytest.raises(ValueError, match="train_labels"):
        partition(labels, TEST, 2, np.random.default_rng(0))


@pytest.mark.parametrize("per_client", [0, 11, 2.5, None])
def test_classes_per_client_out_of_range_is_refused(per_client):
    with pytest.raises(ValueError, match=r"classes_per_client: .* \[1, 10\]"):
        partition_pathological(TRAIN, TEST, 10, np.random.default_rng(0), classes_per_client=per_client)


def test_pathological_refuses_fewer_slots_than_classes():
    with pytest.raises(ValueError, match="clients=4, classes_per_client=2"):
        partition_pathological(TRAIN, TEST, 4, np.random.default_rng(0), classes_per_client=2)


def test_pathological_refuses_a_class_with_fewer_samples_than_holders():
    with pytest.raises(ValueError, match="class 1 has 3 training samples for 8 clients"):
        partition_pathological(labels_of([50, 3]), labels_of([5, 5]), 8, np.random.default_rng(0), 2)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), 1e7, "0.5", True])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha: "):
        partition_dirichlet(TRAIN, TEST, 5, np.random.default_rng(0), alpha=alpha)


def test_dirichlet_gives_up_when_some_client_always_stays_empty():
    with pytest.raises(ValueError, match=r"alpha=0.001 with clients=50 .* in 100 draws"):
        partition_dirichlet(TRAIN, TEST, 50, np.random.default_rng(0), alpha=0.001)
