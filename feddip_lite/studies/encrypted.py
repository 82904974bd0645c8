"""What a round costs under encryption: the mean of clients' weights, by a server that cannot read them.

CKKS (Cheon, Kim, Kim, Song 2017) by TenSEAL, the extra `feddip-lite[encrypted]`: numbers lie side by side in the slots
of ciphertexts that can be added and scaled without a key. Clients encrypt with the public key; only who holds the
secret key can read the mean. All clients of a round share the mask, so what they keep lies in the same slots, and what
is pruned is not sent. The mask itself travels in the clear.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..report import style
from ..report.style import BLUE, GREEN, ORANGE, styled

RECORD = "encrypted_cpu.json"
DEGREE = 8192  # of the polynomials: a ciphertext has half as many slots
SLOTS = DEGREE // 2
MODULI_BITS = (60, 40, 60)
"""Sizes of the primes of the modulus: one rescaling, by the middle one. 160 bits in all, of the 218 that this degree
allows at 128 bits of security (homomorphicencryption.org's standard)."""
SCALE = 2.0**40  # numbers are rounded to multiples of about its inverse
STAGES = {"encrypt_s": "a client encrypts", "add_s": "the server adds and scales", "decrypt_s": "the mean is decrypted"}


def encrypted_mean(vectors: Sequence[np.ndarray], sizes: Sequence[int]) -> tuple[np.ndarray, dict[str, float]]:
    """The mean of clients' vectors, weighted by their `sizes`, as a server computes it that sees ciphertexts alone.

    Args:
        vectors: one (n,) of float per client, finite and within ±1e3; n > 0, the same for all.
        sizes: how many samples each client has.

    Returns:
        the mean (n,), float64; and what it took: `encrypt_s` a client, `add_s` the server (reading the messages and
        writing its own included), `decrypt_s`, seconds; `up_bytes` of a client's message, `down_bytes` of the mean's,
        and `key_bytes` of the public key, which each client needs once.

    Raises:
        ValueError: TenSEAL is not installed, or the vectors are not as above.
    """
    try:
        import tenseal
    except ImportError as error:
        raise ValueError(f"encryption needs one more package ({error}); install feddip-lite[encrypted]") from error
    if len({np.shape(vector) for vector in vectors}) != 1 or np.ndim(vectors[0]) != 1 or not len(vectors[0]):
        raise ValueError(f"vectors of shapes {[np.shape(vector) for vector in vectors]}; expected one length above 0")
    if not np.max(np.abs(vectors)) <= 1e3:
        raise ValueError("a vector holds NaN or a number beyond 1e3, which the ciphertext's modulus has no room for")
    secret = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULI_BITS), n_threads=1)
    secret.global_scale = SCALE
    key = secret.serialize(save_secret_key=False)
    public = tenseal.context_from(key)
    moments, messages = [time.perf_counter()], []
    for vector, size in zip(vectors, sizes, strict=True):
        pieces = np.split(size * vector, range(SLOTS, len(vector), SLOTS))
        messages.append([tenseal.ckks_vector(public, piece).serialize() for piece in pieces])
        moments.append(time.perf_counter())
    mean = []
    for pieces in zip(*messages, strict=True):
        first, *others = (tenseal.ckks_vector_from(public, piece) for piece in pieces)
        for other in others:
            first += other
        first *= 1 / sum(sizes)
        mean.append(first.serialize())
    moments.append(time.perf_counter())
    found = np.concatenate([tenseal.ckks_vector_from(secret, piece).decrypt() for piece in mean])
    *encrypted, added, decrypted = np.diff([*moments, time.perf_counter()]).tolist()
    sent = {"up_bytes": sum(map(len, messages[0])), "down_bytes": sum(map(len, mean)), "key_bytes": len(key)}
    return found, {"encrypt_s": sum(encrypted) / len(vectors), "add_s": added, "decrypt_s": decrypted, **sent}


def read_encrypted(folder: Path) -> pd.DataFrame:
    """The rows of the record in the folder `benchmarks`, none without one: a row per model (`split`), share of kept
    weights (`label`) and repetition (`seed`), with what `encrypted_mean` returns, `latency_s` of its three stages
    together, and `error`, the largest difference to the plain mean."""
    path = folder / RECORD
    known = [
        "split",
        "label",
        "seed",
        "numbers",
        "plain_bytes",
        *STAGES,
        "up_bytes",
        "down_bytes",
        "key_bytes",
        "error",
    ]
    rows = pd.DataFrame(json.loads(path.read_text())["rows"] if path.exists() else [], columns=known)
    return rows.assign(latency_s=rows[[*STAGES]].sum(axis=1))


@styled
def by_kept(rows: pd.DataFrame, title: str) -> Figure:
    """Seconds of each stage by how much is kept, a panel per model; names carry the bytes of a client's message."""
    figure, axes = style.grid(1, rows["split"].nunique(), 3.4)
    colours = zip(STAGES.values(), (BLUE, ORANGE, GREEN), "osD", strict=True)
    looks = {name: {"color": color, "marker": marker} for name, color, marker in colours}
    for panel, (split, own) in zip(axes[0], rows.groupby("split", sort=False), strict=True):
        sent = own.groupby("label")["up_bytes"].mean()
        named = own.assign(kept=[f"{label}\n{sent[label] / 2**20:.2g} MiB" for label in own["label"]])
        long = named.melt(["kept", "seed"], list(STAGES), "stage", "seconds")
        style.over_seeds(long.assign(name=long["stage"].map(STAGES)), "kept", "seconds", looks, panel, joined=True)
        panel.set(xlabel="weights sent, and the size of a client's message", ylabel="seconds", yscale="log")
        style.log_ticks(panel.yaxis)
        panel.set_title(split, loc="left")
    style.legend(figure, {name: {**look, "linestyle": "-"} for name, look in looks.items()})
    style.headed(figure, title, "bars: 95 % intervals over repetitions")
    return figure
