"""Which runs there are and what they are called: profiles, fresh runs, recorded runs.

Notebooks, figures and tables all name runs through `describe`, so that a run is called the same everywhere.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from .config import UNHASHED, Config
from .engine import run
from .methods import METHODS
from .overview import title_of
from .profiles import load_profile
from .results import ROOT, load_results

PROFILES = ("quick", "lite", "paper")
"""The profiles that notebooks run under."""
RECORDED = ("lite", "long", "paper")
"""The profiles whose runs are recorded in `results/`."""
SHARED_START = "shared random start"
"""What the setting of runs says that `shared_start` made comparable."""
NAMES = {name: title_of(name) for name in METHODS} | {
    "digits": "digits", "fashionmnist": "Fashion-MNIST", "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100", "lenet5": "LeNet-5", "alexnet": "AlexNet", "resnet18": "ResNet-18",
}  # fmt: skip
"""How methods (in the order of legends and tables), data sets and models are written."""

FAMILIES = ("dense to dense", "dense to sparse", "sparse to sparse")
"""How the slides sort methods: what the model is at the start and at the end."""
HEADLINE = ("fedavg", "feddp", "feddip")
"""The methods of the paper's own question, which figures and tables of a data set show first."""

_OWN = ("initial_sparsity", "mask_interval", "penalty_max", "penalty_steps")  # settings that belong to the method
SPLIT = ("partition", "classes_per_client", "classes_dealt", "alpha")
_ALONE = {"method", "preset", "method_options", "seed", "on_client_failure", "eval_every", *_OWN, *SPLIT, *UNHASHED}
_FIELDS = ["initial_lr" if item.name == "lr" else item.name for item in fields(Config)]
SHARED = [name for name in _FIELDS if name not in _ALONE]
_IN_WORDS = {"dataset", "model", "rounds", "clients", "clients_per_round", "target_sparsity"}
_LONG = 100  # rounds from which on a run shows its own progress
ADDED = ("label", "split", "setting", "changed", "mib")
"""The columns that `describe` adds."""
FORMS = ("", "upload", "variant")
"""What `changed` says of a method, or of another form of it; anything else is an ablation."""


def data_root() -> Path:
    """Where data sets are looked for, from any working directory: $FEDDIP_DATA, else `data/` of the checkout."""
    return Path(os.environ.get("FEDDIP_DATA") or ROOT / "data").absolute()


def profile_queue(profile: str, **wanted) -> list[Config]:
    """The runs of `params/<profile>.yaml` whose fields have the `wanted` values (or one of several), in order of value.

    Raises:
        ValueError: no such profile.
    """
    if profile not in {*PROFILES, *RECORDED}:
        raise ValueError(f"PROFILE: {profile!r} is not valid; expected one of {', '.join(PROFILES)}")
    queue = load_profile(ROOT / "params" / f"{profile}.yaml")
    return [config for config in queue if all(getattr(config, name) in _any(of) for name, of in wanted.items())]


def train(configs: Iterable[Config], folder: Path) -> pd.DataFrame:
    """Run what `folder` does not hold yet, a printed line for each run; returns these runs as `describe` does."""
    os.environ["FEDDIP_DATA"] = str(data_root())
    configs, start = list(configs), time.monotonic()
    for number, config in enumerate(configs, 1):
        last = run(config, results_dir=folder, progress=config.rounds > _LONG).iloc[-1]
        left = (time.monotonic() - start) / number * (len(configs) - number)
        more = f"; about {left:.0f} s left" if left >= 1 else ""
        print(f"[{number}/{len(configs)}] {config.run_id}: accuracy {last['accuracy']:.4f}{more}", flush=True)
    results = load_results(folder)
    return describe(results[results["run_id"].isin([config.run_id for config in configs])])


def recorded(profile: str, folder: Path | None = None, **wanted) -> pd.DataFrame:
    """The runs in `<folder>/<profile>/` (default: `results/`) whose configuration has the `wanted` values (or one of
    several), as `describe` returns them."""
    results = load_results((folder or ROOT / "results") / profile)
    for name, value in wanted.items():
        results = results[results[name].isin(_any(value))] if name in results else results.iloc[:0]
    return describe(results)


def main_runs(profile: str, folder: Path | None = None) -> dict[str, pd.DataFrame]:
    """The recorded main comparisons of a profile: `<model>_<dataset>` -> runs, in the order of its queue.

    They share the setting of the first run of that model and data set in the queue; ablations are left out. Where
    FedDIP was not recorded with its own start yet, all are those of `shared_start`.
    """
    results, found, first = recorded(profile, folder), {}, {}
    for config in profile_queue(profile):
        first.setdefault(f"{config.model}_{config.dataset}", config)
    for name, config in first.items():
        settings = asdict(config.resolved())
        setting = _setting(pd.Series(settings | {"initial_lr": settings["lr"]}))
        alike = results[(results["setting"] == setting) & results["changed"].isin(FORMS)]
        if NAMES["feddip"] not in set(alike["label"]):
            alike = shared_start(results[results["setting"] == setting])
            alike = alike[alike["changed"].isin(FORMS)]
        if alike["method"].nunique() > 1:
            found[name] = alike
    return found


def shared_start(results: pd.DataFrame) -> pd.DataFrame:
    """`results` as if a shared random mask at the start were FedDP's and FedDIP's usual one (docs/deviations.md D7):
    those runs under their plain names, none of theirs that begins otherwise, and `SHARED_START` in every setting."""
    if results.empty:
        return results
    alike = results[_begins(results).isin(["shared", ""])].drop(columns=list(ADDED))
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


def describe(results: pd.DataFrame) -> pd.DataFrame:
    """`load_results` with the columns that people read.

    `label` names the method with its preset and whatever differs from it, `changed` the names of that, `split` the
    partition, `setting` all that runs must share to be compared; `mib` is what has travelled up to and including the
    round, in MiB, both ways.
    """
    if results.empty:
        return results.reindex(columns=[*dict.fromkeys([*results.columns, "diverged", *_FIELDS, *ADDED])])
    first = results.drop_duplicates("run_id").set_index("run_id")
    words = {"label": _label, "split": _split, "setting": _setting, "changed": lambda row: ", ".join(_changed(row))}
    named = {name: results["run_id"].map(first.apply(function, axis=1)) for name, function in words.items()}
    travelled = (results["up_bytes"] + results["down_bytes"]).groupby(results["run_id"]).cumsum()
    return results.assign(**named, mib=travelled / 2**20)


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


def labels(results: pd.DataFrame) -> list[str]:
    """The methods that occur, in the order of `NAMES`."""
    order = {name: place for place, name in enumerate(NAMES.values())}
    return sorted(results["label"].unique(), key=lambda label: (order.get(label.split(" (")[0], len(order)), label))


def splits(results: pd.DataFrame) -> list[str]:
    """The partitions that occur, IID first."""
    return sorted(results["split"].unique(), key=lambda split: (split != "IID", split))


def _any(value) -> list | tuple:
    return value if isinstance(value, list | tuple) else [value]


def _changed(row: pd.Series) -> dict[str, object]:
    """The method's settings that differ from those of its preset."""
    usual = Config(method=row["method"], preset=row["preset"], target_sparsity=row["target_sparsity"]).resolved()
    differing = {name: row[name] for name in _OWN if _differs(row[name], getattr(usual, name))}
    options = json.loads(row["method_options"])
    return differing | {name: value for name, value in options.items() if value != usual.method_options[name]}


def _label(row: pd.Series) -> str:
    notes = [] if row["preset"] == "paper" else [row["preset"]]
    notes += [f"{name} = {_short(value)}" for name, value in _changed(row).items()]
    name = NAMES.get(row["method"], row["method"])
    return f"{name} ({', '.join(notes)})" if notes else name


def _split(row: pd.Series) -> str:
    if row["partition"] == "pathological":
        order = ", in order" if row["classes_dealt"] == "in_order" else ""
        return f"{row['classes_per_client']} classes per client{order}"
    return "IID" if row["partition"] == "iid" else f"Dirichlet({row['alpha']:g})"


def _setting(row: pd.Series) -> str:
    usual = asdict(Config()) | {"initial_lr": Config().lr, "lr_decay": _usual_decay(row["rounds"])}
    words = [NAMES.get(row["dataset"], row["dataset"]), NAMES.get(row["model"], row["model"])]
    words += [f"T = {row['rounds']} rounds", f"{row['clients_per_round']} of {row['clients']} clients per round"]
    words += [f"target sparsity {row['target_sparsity']:g}"]
    others = [name for name in SHARED if name not in _IN_WORDS and _differs(row[name], usual[name])]
    return ", ".join(words + [f"{name.replace('_', ' ')} {_short(row[name])}" for name in others])


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _usual_decay(rounds: int) -> float:
    """The authors' 0.998 per round of 1000, in T rounds."""
    return 0.998 ** (1000 / rounds)


def _differs(value, usual) -> bool:
    if isinstance(value, float) and isinstance(usual, float):
        return not math.isclose(value, usual, rel_tol=1e-9)
    return value != usual and not (usual is None and pd.isna(value))
