"""Which runs there are: the queues of `params/`, the recorded runs of `results/`, and those that may be compared."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from ..config import Config
from .names import ADDED, FORMS, HEADLINE, NAMES, SHARED_START, any_of, describe, setting_of
from .profiles import load_profile
from .store import ROOT, load_results

PROFILES = ("quick", "lite", "paper")
"""The profiles that notebooks run under."""
RECORDED = ("lite", "long", "paper")
"""The profiles whose runs are recorded in `results/`."""


def data_root() -> Path:
    """Where data sets are looked for, from any working directory: $FEDDIP_DATA, else `data/` of the checkout."""
    return Path(os.environ.get("FEDDIP_DATA") or ROOT / "data").expanduser().absolute()


def profile_queue(profile: str, **wanted) -> list[Config]:
    """The runs of `params/<profile>.yaml` whose fields have the `wanted` values (or one of several), in order of value.

    Raises:
        ValueError: no such profile.
    """
    if profile not in {*PROFILES, *RECORDED}:
        raise ValueError(f"PROFILE: {profile!r} is not valid; expected one of {', '.join(PROFILES)}")
    queue = load_profile(ROOT / "params" / f"{profile}.yaml")
    return [config for config in queue if all(getattr(config, name) in any_of(of) for name, of in wanted.items())]


def recorded(profile: str, folder: Path | None = None, **wanted) -> pd.DataFrame:
    """The runs in `<folder>/<profile>/` (default: `results/`) whose configuration has the `wanted` values (or one of
    several), as `describe` returns them."""
    results = load_results((folder or ROOT / "results") / profile)
    for name, value in wanted.items():
        results = results[results[name].isin(any_of(value))] if name in results else results.iloc[:0]
    return describe(results)


def main_runs(profile: str, folder: Path | None = None) -> dict[str, pd.DataFrame]:
    """The recorded main comparisons of a profile: `<model>_<dataset>` -> runs, in the order of its queue.

    They share the setting of the first run of that model and data set in the queue. Ablations are left out, among them
    other presets than `paper` of methods that are not the paper's own (docs/deviations.md). Where FedDIP was not
    recorded with its own start yet, all are those of `shared_start`.
    """
    results, found, first = recorded(profile, folder), {}, {}
    for config in profile_queue(profile):
        first.setdefault(f"{config.model}_{config.dataset}", config)
    for name, config in first.items():
        settings = asdict(config.resolved())
        setting = setting_of(pd.Series(settings | {"initial_lr": settings["lr"]}))
        alike = results[(results["setting"] == setting) & (results["classes_dealt"] == config.classes_dealt)]
        if NAMES["feddip"] not in set(alike["label"]):
            alike = shared_start(alike)
        alike = alike[alike["changed"].isin(FORMS) & (alike["method"].isin(HEADLINE) | (alike["preset"] == "paper"))]
        if alike["method"].nunique() > 1:
            found[name] = alike
    return found


def shared_start(results: pd.DataFrame) -> pd.DataFrame:
    """`results` as if a shared random mask at the start were FedDP's and FedDIP's usual one (docs/deviations.md D7):
    those runs under their plain names, none of theirs that begins otherwise, and `SHARED_START` in every setting."""
    alike = results[_begins(results).isin(["shared", ""])]
    if alike.empty:
        return alike
    alike = alike.drop(columns=list(ADDED))
    options = alike["method_options"].map(json.loads)
    plain = options.map(lambda own: {name: value for name, value in own.items() if not name.startswith("erk")})
    runs = describe(alike.assign(method_options=plain.map(lambda own: json.dumps(own, sort_keys=True))))
    return runs.assign(setting=runs["setting"] + f", {SHARED_START}")


def own_start(results: pd.DataFrame) -> pd.DataFrame:
    """`results` without the runs of FedDP and FedDIP that begin with a shared random mask."""
    return results[_begins(results) != "shared"]


def _begins(results: pd.DataFrame) -> pd.Series:
    """The option `erk` of each row, empty for the methods that have none."""
    return results["method_options"].map(lambda text: json.loads(text).get("erk", ""))


def comparable(results: pd.DataFrame) -> pd.DataFrame:
    """The runs of those seeds that every method of a partition has, so that none is judged by luckier seeds. A run that
    diverged is none."""
    kept = []
    for _, own in results[results["diverged"] == ""].groupby("split", sort=False):
        methods = own.groupby("seed")["label"].nunique()
        kept.append(own[own["seed"].isin(methods.index[methods == own["label"].nunique()])])
    return pd.concat(kept) if kept else results.iloc[:0]


def rows_choosing_masks(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of FedDP and FedDIP in whose rounds, those since the row before, the server chose a mask: it does so in
    round 0 and in every `mask_interval`-th after it. Not those of runs that diverged."""
    results = results[results["diverged"] == ""]
    before = results.groupby("run_id")["round"].shift(fill_value=-1)
    interval = pd.to_numeric(results["mask_interval"])
    return results[results["round"] // interval > before // interval]
