"""Schedules: plain floats of the round index t = 0 .. rounds-1."""

import math


def sparsity_at(t: int, initial: float, final: float, rounds: int) -> float:
    """Cubic sparsity s_t = final + (initial - final) * (1 - t/rounds)^3.

    Starts at `initial` and stays below `final` by (initial - final) * (1/rounds)^3 in the last round; one round
    gives `initial`. Source: published FedDIP code `fl_server.py`, `client.py:train_model` (docs/deviations.md D24).
    """
    return final + (initial - final) * (1 - t / rounds) ** 3


def cosine_at(t: int, peak: float, end: float) -> float:
    """Cosine annealing peak/2 * (1 + cos(pi t / end)): `peak` in round 0, 0 from round `end` > 0 on.

    Source: the share of weights replaced in a mask update of FedDST and FedTiny.
    """
    return peak / 2 * (1 + math.cos(math.pi * t / end)) if t < end else 0.0


def penalty_at(t: int, peak: float, steps: int, rounds: int) -> float:
    """Incremental regularisation lambda_t = peak * floor(steps * t / rounds) / steps (slides, Eq. 3).

    0 in the first segment, peak * (steps - 1) / steps in the last; `steps` = 1 is 0 throughout.
    """
    return peak * (steps * t // rounds) / steps


def published_penalty_at(t: int, peak: float, steps: int, rounds: int, start: float = 5e-4) -> float:
    """lambda_t as the published code computes it (docs/deviations.md D1, D2).

    Segment 0 is 0; segment 1 jumps to `start`, from where equal steps lead up to segment `steps - 1`, which stays one
    step below `peak`. With fewer rounds than steps a segment has length 0 and lambda is its last value throughout.
    Source: published FedDIP code `client.py:lambda_shrink_cur`.
    """
    length = rounds // steps
    segment = min(t // length, steps - 1) if length else steps - 1
    return 0.0 if segment == 0 else start + (segment - 1) * (peak - start) / (steps - 1)
