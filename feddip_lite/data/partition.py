"""Who owns which sample: three ways to split a data set over clients, train and test alike.

A partition first decides how many samples of each class every client gets, then deals shuffled samples out. Train and
test samples are dealt by the same shares, so that a client is tested on the mixture of classes it trains on. The data
itself is in `datasets.py`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from ..core.settings import integer, real

MAX_DRAWS = 100  # of the Dirichlet proportions, before the request is called hopeless
ALPHA = real("(0, 1e6]")  # huge values would overflow the draw, and from about 1e4 on it looks like IID anyway


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of every client, as sorted int64 index arrays into the training and the test set.

    `train[k]` and `test[k]` belong to client k. Over all clients every index occurs exactly once; no `train[k]` is
    empty, a `test[k]` may be when there are fewer test samples than clients.
    """

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]

    @property
    def sha256(self) -> str:
        """Checksum of who owns what: hex digest over the shard sizes and indices as little-endian int64."""
        digest = hashlib.sha256()
        for shards in (self.train, self.test):
            digest.update(np.array([len(shards), *map(len, shards)], dtype="<i8").tobytes())
            for shard in shards:
                digest.update(np.ascontiguousarray(shard, dtype="<i8").tobytes())
        return digest.hexdigest()


def partition_iid(train_labels: np.ndarray, test_labels: np.ndarray, clients: int, rng: np.random.Generator) -> Split:
    """Deal each class round-robin: all clients have the same share of every class, up to rounding.

    Sample i of the shuffled, class-sorted list goes to client i mod `clients`. The deal runs on from class to class,
    so that not only the samples per class but also the totals of two clients differ by at most one.

    Args:
        train_labels, test_labels: (N,) integers, the class of every sample.
        clients: number of clients, 1 to the number of training samples.
        rng: the only source of randomness; the same state gives the same split.

    Raises:
        ValueError: labels that are not one-dimensional integers, or `clients` out of range.

    Source: the FedDIP authors' stratified IID split.
    """
    train_labels, test_labels = _checked(train_labels, test_labels, clients)

    def shards(labels: np.ndarray) -> tuple[np.ndarray, ...]:
        shuffled = rng.permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        owners = np.empty(len(labels), dtype=np.int64)
        owners[by_class] = np.arange(len(labels)) % clients
        return _shards(owners, clients)

    return Split(shards(train_labels), shards(test_labels))


def partition_pathological(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    classes_per_client: int = 2,
    in_order: bool = False,
) -> Split:
    """Give every client exactly `classes_per_client` classes, each class to equally many clients up to one.

    A class is split evenly, up to one sample, over the clients that hold it; a client holds the same classes in
    training and test.

    Args:
        train_labels, test_labels, clients, rng: as in `partition_iid`.
        classes_per_client: 1 to the number of classes, with clients * classes_per_client >= classes, because
            otherwise some class would have no owner.
        in_order: take the classes in their order, as published (with two of ten classes (0, 1), (2, 3), ... (8, 9), and
            again), rather than draw which go together; then only the samples depend on `rng`.

    Raises:
        ValueError: an argument out of range, or a class with fewer training samples than clients that hold it.

    Source: the FedDIP authors' `pat` split, `functions_new.py:create_pat_partition`. Differs: theirs takes classes in
    order (docs/deviations.md D27), deals samples unshuffled, and counts clients per class with a formula that leaves
    slots over unless the class count divides evenly; here every slot is dealt.
    """
    train_labels, test_labels = _checked(train_labels, test_labels, clients)
    classes = np.union1d(train_labels, test_labels)
    integer(1, len(classes)).require("classes_per_client", classes_per_client)
    if clients * classes_per_client < len(classes):
        raise ValueError(
            f"clients * classes_per_client must be at least the number of classes ({len(classes)}), or some class has "
            f"no owner; got clients={clients}, classes_per_client={classes_per_client}"
        )
    holds = _class_slots(len(classes), clients, classes_per_client, None if in_order else rng)
    shares = holds / holds.sum(axis=1, keepdims=True)
    counts = _counts(train_labels, classes, shares)
    for label, held, got in zip(classes, holds, counts, strict=True):
        if (got[held] == 0).any():
            raise ValueError(
                f"clients={clients} with classes_per_client={classes_per_client} is too many: class {label} has "
                f"{got.sum()} training samples for {held.sum()} clients"
            )
    return _deal_by_shares(train_labels, test_labels, classes, shares, rng)


def partition_dirichlet(
    train_labels: np.ndarray, test_labels: np.ndarray, clients: int, rng: np.random.Generator, alpha: float = 0.5
) -> Split:
    """Split each class over the clients by proportions drawn from a symmetric Dirichlet distribution.

    One draw of proportions serves training and test. Small `alpha` concentrates a class on few clients, large
    `alpha` approaches IID. Proportions are redrawn until every client has a training sample.

    Args:
        train_labels, test_labels, clients, rng: as in `partition_iid`.
        alpha: concentration, in (0, 1e6].

    Raises:
        ValueError: an argument out of range, or a client without training samples in each of 100 draws.

    Source: Hsu et al. 2019 (arXiv 1909.06335), the usual per-class form. The FedDIP authors' own `dir` split cannot
    run, and would draw training and test proportions independently.
    """
    train_labels, test_labels = _checked(train_labels, test_labels, clients)
    ALPHA.require("alpha", alpha)
    classes = np.union1d(train_labels, test_labels)
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(clients, float(alpha)), size=len(classes))
        if _counts(train_labels, classes, shares).sum(axis=0).min() > 0:
            return _deal_by_shares(train_labels, test_labels, classes, shares, rng)
    raise ValueError(
        f"alpha={alpha:g} with clients={clients} left a client without training samples in {MAX_DRAWS} draws; "
        "use a larger alpha or fewer clients"
    )


def _checked(train_labels, test_labels, clients) -> tuple[np.ndarray, np.ndarray]:
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    for name, labels in (("train_labels", train_labels), ("test_labels", test_labels)):
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name} must be a one-dimensional integer array, got {labels.dtype} {labels.shape}")
    integer(1, len(train_labels)).require("clients", clients, "the number of training samples")
    return train_labels, test_labels


def _class_slots(classes: int, clients: int, classes_per_client: int, rng: np.random.Generator | None) -> np.ndarray:
    """Which client holds which class: (classes, clients) bool, row sums equal up to one; in order without `rng`."""
    holds, holders = np.zeros((classes, clients), dtype=bool), np.zeros(classes, dtype=np.int64)
    for client in range(clients):
        # The classes with the fewest holders so far, so that the numbers of holders stay equal up to one.
        ties = np.arange(classes) if rng is None else rng.random(classes)
        own = np.lexsort((ties, holders))[:classes_per_client]
        holds[own, client] = True
        holders[own] += 1
    return holds


def _counts(labels: np.ndarray, classes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Samples per class and client, (classes, clients): each class cut at the cumulated `shares`.

    The cuts are rounded, which also absorbs that a cumulated float misses 1 by a hair.
    """
    totals = np.array([np.count_nonzero(labels == label) for label in classes])
    cuts = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
    return np.diff(cuts, axis=1, prepend=0)


def _deal_by_shares(train_labels, test_labels, classes, shares, rng) -> Split:
    def shards(labels: np.ndarray) -> tuple[np.ndarray, ...]:
        owners, clients = np.empty(len(labels), dtype=np.int64), np.arange(shares.shape[1])
        for label, counts in zip(classes, _counts(labels, classes, shares), strict=True):
            owners[rng.permutation(np.flatnonzero(labels == label))] = np.repeat(clients, counts)
        return _shards(owners, len(clients))

    return Split(shards(train_labels), shards(test_labels))


def _shards(owners: np.ndarray, clients: int) -> tuple[np.ndarray, ...]:
    """The samples of every client, ascending, from the `owners` of all samples."""
    ends = np.cumsum(np.bincount(owners, minlength=clients))
    return tuple(np.split(np.argsort(owners, kind="stable"), ends[:-1]))
