"""What recorded paths say of the bound: its terms from a record, a table of its constants, and a reading in words.

Runs come as `records.names.describe` returns them (`recorded_paths`), with the columns of `path.record_path`.
"Typical" is said of the bound with the median gamma in place of the largest, which one checkpoint may decide.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd

from ...records.catalogue import own_start, recorded, shared_start
from ...records.names import splits
from .estimators import Bound, Estimates, assemble
from .path import ESTIMATES

SCHEDULES = {"theory": "theorem's setting", "exponential": "experiments' setting"}
"""What a run's `lr_schedule` makes of it."""
TERMS = tuple(item.name for item in fields(Bound))[1:]
CONSTANTS = {
    "sharpness": "L [F/W²]",
    "lipschitz": "μ [F/W]",
    "variance": "Σρσ² [F²/W²]",
    "second_moment": "G² [F²/W²]",
    "typical_gamma": "γ: median",
    "gamma": "γ: largest",
}
"""Columns of `summary`, and what they are called in `estimates_table`."""
REMOVED = "Σ√δ‖w‖ [W]"
GAMMAS = {"largest": False, "median": True}  # what `bound_of` is told


def each_run(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """The runs one by one: the theorem's setting first, IID first, then by preset and by R."""
    places = {"lr_schedule": list(SCHEDULES).index, "split": splits(runs).index}
    first = runs.drop_duplicates("run_id")
    first = first.assign(**{name: first[name].map(place) for name, place in places.items()})
    first = first.sort_values([*places, "preset", "mask_interval", "seed", "run_id"])
    return [runs[runs["run_id"] == run_id] for run_id in first["run_id"]]


def checkpoints(run: pd.DataFrame) -> pd.DataFrame:
    """The rows of a recorded path that have estimates."""
    return run[run["loss"].notna()]


def gamma_of(run: pd.DataFrame, typical: bool) -> float:
    """gamma of a run, without unit: the largest finite estimate, as the theorem asks for, or the median of these if
    `typical`; never below 1. Infinite estimates, where sampling noise hides the mean gradient, are left out."""
    found = run["dispersion"][np.isfinite(run["dispersion"])]
    return max(1.0, float(found.median() if typical else found.max()))


def bound_of(run: pd.DataFrame, *, typical: bool = False, printed: bool = False) -> Bound:
    """The bound of one run, for the largest gamma or a `typical` one, consistent or as `printed`.

    What pruning removed before round 0 is not in its sum: the theorem starts at the pruned model. In the theorem's
    setting L is that of the learning rate 1/(tL), unless a larger one was found.
    """
    first, removed = run.iloc[0], run["pruning_distance"].iloc[1:]
    path = [Estimates(**row) for row in checkpoints(run)[list(ESTIMATES)].to_dict("records")]
    sizes = {"participants": int(first["clients_per_round"]), "steps": int(first["local_steps"])}
    sizes |= {"smooth": first["smoothness"]} if first["lr_schedule"] == "theory" else {}
    return assemble(path, removed, **sizes, gamma=gamma_of(run, typical), printed=printed)


def recorded_paths(folder: Path | None = None) -> pd.DataFrame:
    """The recorded runs with estimates; where FedDIP's own start was not recorded yet, those of `shared_start`. Never
    both."""
    records = recorded("bound/lite", folder)
    own = own_start(records)
    return own if (own["label"] == "FedDIP").any() else shared_start(records)


def removed_so_far(run: pd.DataFrame) -> pd.Series:
    """The sum of sqrt(delta) ||w|| [W] up to each state after the first, which has 0."""
    return run["pruning_distance"].where(run["round"] > 0, 0.0).cumsum()


def overtaking(run: pd.DataFrame, *, typical: bool) -> pd.Series | None:
    """The first row at which the consistent pruning term, summed so far, exceeds drift; None if none does."""
    bound, removed = bound_of(run, typical=typical), removed_so_far(run)
    above = bound.pruning * removed / removed.iloc[-1] > bound.drift
    return run.loc[above.idxmax()] if above.any() else None


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per run: its name, the largest value of each constant, the sum of sqrt(delta) ||w|| (`removed`), how often
    noise hides gamma, what pruning is charged over what it costs, and the consistent bound for the largest gamma."""
    rows = []
    for run in each_run(runs):
        first, points = run.iloc[0], checkpoints(run)
        row = {name: first[name] for name in ("run_id", "label", "split", "preset", "mask_interval", "lr_schedule")}
        row |= {"name": f"{first['split']}, {SCHEDULES[first['lr_schedule']]}"}
        row |= {"rate": first["smoothness"], "sharpness": points[["sharpness", "secant"]].max(axis=None)}
        row |= {"lipschitz": points[["lipschitz", "pruning_lipschitz"]].max(axis=None)}
        row |= {name: points[name].max() for name in ("variance", "second_moment")}
        row |= {"gamma": gamma_of(run, False), "typical_gamma": gamma_of(run, True)}
        row |= {"hidden": int(np.isinf(points["dispersion"]).sum()), "checkpoints": len(points)}
        row |= {"removed": removed_so_far(run).iloc[-1], "accuracy": points["accuracy"].iloc[-1]}
        row |= {"overcharged": (row["lipschitz"] / points["pruning_lipschitz"]).median()}
        rows.append(row | asdict(bound_of(run)))
    return pd.DataFrame(rows)


def estimates_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per run, the largest value of each constant. Units: F of the loss, W of the weights."""
    rows = []
    for row in summary(runs).to_dict("records"):
        rate = f" ({row['rate']:g} in the rate)" if row["lr_schedule"] == "theory" else ""
        cells = {"run": f"{row['label']}: {row['name']}"}
        cells |= {head: f"{row[name]:.3g}" for name, head in CONSTANTS.items()}
        cells[CONSTANTS["sharpness"]] += rate
        cells["γ hidden by noise at"] = f"{row['hidden']} of {row['checkpoints']}"
        cells |= {REMOVED: f"{row['removed']:.3g}", "left side [F²/W²]": f"{row['left']:.3g}"}
        rows.append(cells | {"final accuracy": f"{row['accuracy']:.4f}"})
    return pd.DataFrame(rows)


def interval_study(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs at the experiments' learning rate, of those partitions in which R, rounds between masks, varies."""
    usual = runs[runs["lr_schedule"] == "exponential"]
    return usual[usual.groupby("split")["mask_interval"].transform("nunique") > 1]


def removed_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What pruning removes in a whole run: a row per partition, preset and R, the rounds between masks."""
    if runs.empty:
        return pd.DataFrame()
    rows = []
    for (split, preset, interval), own in summary(runs).groupby(["split", "preset", "mask_interval"]):
        row = {"partition": split, "preset": preset, "R [rounds]": f"{interval:g}"}
        rows.append(row | {REMOVED: f"{own['removed'].mean():.3g}"})
    return pd.DataFrame(rows)


def reading(runs: pd.DataFrame) -> str:
    """Markdown: which term dominates the consistent bound in each run, and from which sparsity on it is pruning."""
    lines = []
    for run, row in zip(each_run(runs), summary(runs).to_dict("records"), strict=True):
        right = sum(row[name] for name in TERMS)
        line = f"- **{row['label']}: {row['name']}**: the right side is {right / row['left']:.3g} times the left, its "
        line += f"first term alone {row['initial'] / row['left']:.3g} times. "
        line += "".join(_shares(run, kind) for kind in GAMMAS)
        lines.append(line + f"μ charges {row['overcharged']:.3g} times what pruning really does to f (median).")
    return "\n\n".join(["\n".join(lines), _dominance(runs), *_pace(runs)])


def _pace(runs: pd.DataFrame) -> list[str]:
    """A sentence per partition that has both settings: how far the theorem's learning rate lets the model go."""
    steps = {(run["split"].iloc[0], run["lr_schedule"].iloc[0]): run for run in each_run(runs)}
    said = []
    for split in splits(runs):
        theory, usual = (steps.get((split, schedule)) for schedule in SCHEDULES)
        if theory is not None and usual is not None:
            reached = [checkpoints(run)["accuracy"].iloc[-1] for run in (theory, usual)]
            share = theory["lr"].sum() / usual["lr"].sum()
            said += [
                f"{split}: the theorem's learning rates sum to {share:.2g} of the experiments'. The model ends at "
                f"accuracy {reached[0]:.3f}, against {reached[1]:.3f}; L on its path is "
                f"{summary(theory)['sharpness'].iloc[0]:.3g}, where the rate assumes {theory['smoothness'].iloc[0]:g}."
            ]
    return said


def _shares(run: pd.DataFrame, kind: str) -> str:
    typical = GAMMAS[kind]
    shares, passed = bound_of(run, typical=typical).shares(), overtaking(run, typical=typical)
    said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in sorted(shares.items(), key=lambda own: -own[1]))
    crossing = "pruning stays below drift" if shares["drift"] else "nothing drifts"
    if passed is not None and shares["drift"]:
        crossing = f"pruning exceeds drift from round {passed['round']:.0f} on, at sparsity {passed['sparsity']:.3f}"
    return f"With the {kind} γ ({gamma_of(run, typical):.3g}): {said}; {crossing}. "


def _dominance(runs: pd.DataFrame) -> str:
    each, said = each_run(runs), []
    for kind, typical in GAMMAS.items():
        shares = [bound_of(run, typical=typical).shares() for run in each]
        first = [max(own, key=own.get) for own in shares]
        counts = ", ".join(f"{name} in {first.count(name)}" for name in TERMS if name in first)
        said.append(f"with the {kind} γ {counts}")
    return f"The largest term of {len(each)} runs: {'; '.join(said)}. Drift is what heterogeneity costs."
