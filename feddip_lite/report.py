"""What is said about recorded runs: which belong together, what they are called, how they compare, and the README's table.

The notebooks and `figures.py` share these names, so that a run is called the same everywhere. Statistics: 95 % Student t
intervals over seeds, differences paired by seed; with fewer than three seeds the values alone, no interval, no verdict.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd

from .config import UNHASHED, Config
from .data import DATASETS
from .engine import run
from .profiles import load_profile
from .results import ROOT, atomic_write, headline, interval, load_results, read_run

PROFILES = ("quick", "lite", "paper")
NAMES = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "feddp": "FedDP", "feddip": "FedDIP", "feddst": "FedDST",
    "prunefl": "PruneFL", "snip": "SNIP", "prunetrain": "PruneTrain", "fedsparsify_global": "FedSparsify-Global",
    "fedsparsify_local": "FedSparsify-Local", "mpfl": "MPFL", "fedmap": "FedMap", "fedlp": "FedLP", "fedx": "FedX",
    "fedtiny": "FedTiny", "digits": "digits", "fashionmnist": "Fashion-MNIST", "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100", "lenet5": "LeNet-5", "alexnet": "AlexNet", "resnet18": "ResNet-18",
}  # fmt: skip
MARKERS = "<!-- results:begin -->", "<!-- results:end -->"

_OWN = (
    "initial_sparsity",
    "mask_interval",
    "penalty_max",
    "penalty_steps",
    "method_options",
)  # a method's own settings
_SPLIT = ("partition", "classes_per_client", "alpha")
_ALONE = {"method", "preset", "seed", "on_client_failure", "eval_every", *_OWN, *_SPLIT, *UNHASHED}
_SHARED = ["initial_lr" if item.name == "lr" else item.name for item in fields(Config) if item.name not in _ALONE]
_IN_WORDS = {"dataset", "model", "rounds", "clients", "clients_per_round", "target_sparsity", "lr_decay"}


def data_root() -> Path:
    """Where data sets are looked for, from any working directory: $FEDDIP_DATA, else `data/` of the checkout."""
    return Path(os.environ.get("FEDDIP_DATA") or ROOT / "data").absolute()


def profile_queue(profile: str, **wanted) -> list[Config]:
    """The runs of `params/<profile>.yaml` whose fields have the `wanted` values, in order of value.

    Raises:
        ValueError: no such profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"PROFILE: {profile!r} is not valid; expected one of {', '.join(PROFILES)}")
    queue = load_profile(ROOT / "params" / f"{profile}.yaml")
    return [config for config in queue if all(getattr(config, name) == value for name, value in wanted.items())]


def train(configs: Iterable[Config], folder: Path) -> pd.DataFrame:
    """Run what `folder` does not hold yet, a printed line for each run; returns these runs as `describe` does."""
    os.environ["FEDDIP_DATA"] = str(data_root())
    configs, start = list(configs), time.monotonic()
    for number, config in enumerate(configs, 1):
        history = run(config, results_dir=folder, progress=config.rounds > 100)
        left = (time.monotonic() - start) / number * (len(configs) - number)
        more = f"; about {left:.0f} s left" if left >= 1 else ""
        print(
            f"[{number}/{len(configs)}] {config.run_id}: accuracy {history['accuracy'].iloc[-1]:.4f}{more}", flush=True
        )
    results = load_results(folder)
    return describe(results[results["run_id"].isin([config.run_id for config in configs])])


def recorded(profile: str, **wanted) -> pd.DataFrame:
    """The runs in `results/<profile>/` whose configuration has the `wanted` values, as `describe` returns them."""
    results = load_results(ROOT / "results" / profile)
    for name, value in wanted.items():
        results = results[results[name] == value] if name in results else results.iloc[:0]
    return describe(results)


def describe(results: pd.DataFrame) -> pd.DataFrame:
    """`load_results` with the columns that people read.

    `label` names the method with its preset and whatever differs from it, `split` the partition, `setting` all that
    runs must share to be compared; `mib` is what has travelled up to and including the round, in MiB, both ways.
    """
    if results.empty:
        return results.reindex(columns=[*results.columns, "label", "split", "setting", "mib"])
    first = results.drop_duplicates("run_id").set_index("run_id")
    words = {"label": _label, "split": _split, "setting": _setting}
    named = {name: results["run_id"].map(first.apply(function, axis=1)) for name, function in words.items()}
    travelled = (results["up_bytes"] + results["down_bytes"]).groupby(results["run_id"]).cumsum()
    return results.assign(**named, mib=travelled / 2**20)


def _label(row: pd.Series) -> str:
    own = asdict(Config(method=row["method"], preset=row["preset"], target_sparsity=row["target_sparsity"]).resolved())
    options = json.loads(row["method_options"])
    differing = {name: row[name] for name in _OWN[:-1] if _differs(row[name], own[name])}
    differing |= {name: value for name, value in options.items() if value != own["method_options"][name]}
    notes = [] if row["preset"] == "paper" else [row["preset"]]
    notes += [
        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}" for name, value in differing.items()
    ]
    name = NAMES.get(row["method"], row["method"])
    return f"{name} ({', '.join(notes)})" if notes else name


def _split(row: pd.Series) -> str:
    if row["partition"] == "pathological":
        return f"{row['classes_per_client']} classes per client"
    return "IID" if row["partition"] == "iid" else f"Dirichlet({row['alpha']:g})"


def _setting(row: pd.Series) -> str:
    usual = asdict(Config()) | {"initial_lr": Config().lr}
    words = [
        NAMES.get(row["dataset"], row["dataset"]),
        NAMES.get(row["model"], row["model"]),
        f"T = {row['rounds']} rounds",
    ]
    words += [
        f"{row['clients_per_round']} of {row['clients']} clients per round",
        f"sparsity {row['target_sparsity']:g}",
    ]
    words += [f"{name} {row[name]}" for name in _SHARED if name not in _IN_WORDS and _differs(row[name], usual[name])]
    return ", ".join(words)


def _differs(value, usual) -> bool:
    return value != usual and not (usual is None and pd.isna(value))


def headlines(results: pd.DataFrame) -> pd.DataFrame:
    """One row per run: `results.headline` with the total `mib`; empty for no runs."""
    return headline(results) if len(results) else results


def paired(runs: pd.DataFrame, label: str, reference: str, column: str = "accuracy", ratio: bool = False) -> np.ndarray:
    """`label` minus `reference` (or divided by it) in a column of `headlines`, for every seed that has both; (n,)."""
    by_seed = runs.pivot_table(index="seed", columns="label", values=column)
    if label not in by_seed or reference not in by_seed:
        return np.empty(0)
    both = by_seed[[label, reference]].dropna()
    own, other = both[label].to_numpy(), both[reference].to_numpy()
    return own / other if ratio else own - other


def quantity(values, digits: int = 4, sign: str = "") -> str:
    """Values over seeds in words: `mean ± half width (n = 3)`, or the values themselves below three; "-" for none."""
    if len(values) == 0:
        return "-"
    mean, half = interval(values)
    if np.isnan(half):
        return f"{', '.join(f'{value:{sign}.{digits}f}' for value in values)} (n = {len(values)})"
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f} (n = {len(values)})"


CLAIMS = (  # column, method, reference, claim of the slides, which side of no difference (0, or share 1) supports it
    ("accuracy", "FedDIP", "FedAvg", "sparse training keeps up with FedAvg", +1),
    ("accuracy", "FedDIP", "FedDP", "the growing penalty helps", +1),
    ("mib", "FedDIP", "FedAvg", "fewer bytes travel than with FedAvg", -1),
)


def agreement(results: pd.DataFrame) -> str:
    """Markdown: what agrees and what disagrees with the slides' claims, a list per setting and partition.

    The rule: a verdict needs three seeds and a 95 % interval of the paired differences (or shares of bytes) that lies
    wholly on one side of no difference.
    """
    parts = []
    runs = headlines(results)
    for setting in results["setting"].unique():
        for split in splits(results[results["setting"] == setting]):
            group = runs[(runs["setting"] == setting) & (runs["split"] == split)]
            lines = [_claim_line(group, *claim) for claim in CLAIMS]
            parts.append("\n".join([f"**{setting}; {split}**\n", *lines]))
    return "\n\n".join(parts) or "No recorded runs yet."


def _claim_line(group: pd.DataFrame, column: str, label: str, reference: str, claim: str, side: int) -> str:
    share = column == "mib"
    values = paired(group, label, reference, column, ratio=share)
    what = f"{label} / {reference}, total bytes" if share else f"{label} - {reference}, accuracy"
    if len(values) == 0:
        return f'- {what}: not run. Claim "{claim}": no verdict.'
    mean, half = interval(values)
    distance = side * (mean - share)
    if np.isnan(half):
        verdict = "no verdict for n < 3"
    elif abs(distance) > half:
        verdict = "agrees" if distance > 0 else "disagrees"
    else:
        verdict = "not reproduced, the interval includes no difference"
    return f'- {what}: {quantity(values, sign="" if share else "+")}. Claim "{claim}": {verdict}.'


def splits(results: pd.DataFrame) -> list[str]:
    """The partitions that occur, IID first."""
    return sorted(results["split"].unique(), key=lambda split: (split != "IID", split))


def labels(results: pd.DataFrame) -> list[str]:
    """The methods that occur, in the order of `NAMES`."""
    order = list(NAMES.values())
    return sorted(results["label"].unique(), key=lambda label: (order.index(label.split(" (")[0]), label))


def results_table(results: pd.DataFrame) -> str:
    """The Markdown table of one setting: a row per method and partition, in the order of the runs' partitions."""
    heads = "method (preset) | partition | final accuracy | measured sparsity | total MiB | share of FedAvg's bytes"
    lines = [f"| {heads} | accuracy minus FedAvg's |", "|" + " --- |" * 7]
    runs = headlines(results)
    for split in splits(results):
        group = runs[runs["split"] == split]
        for label in labels(group):
            own = group[group["label"] == label].sort_values("seed")
            cells = [
                label,
                split,
                quantity(own["accuracy"]),
                f"{own['sparsity'].mean():.4f}",
                f"{own['mib'].mean():.1f}",
            ]
            if label == "FedAvg":
                cells += ["1", "-"]
            else:
                share = paired(group, label, "FedAvg", "mib", ratio=True)
                cells += [
                    f"{share.mean():.3f}" if len(share) else "-",
                    quantity(paired(group, label, "FedAvg"), sign="+"),
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def circumstances(folder: Path, results: pd.DataFrame) -> str:
    """One sentence on where the numbers come from: seeds, data, device and versions, from the runs' provenance."""
    facts = [read_run(folder, run_id)[1]["provenance"] for run_id in results["run_id"].unique()]

    def each(get):
        return ", ".join(sorted({str(get(fact)) for fact in facts}))

    seeds = ", ".join(str(seed) for seed in sorted(results["seed"].unique()))
    data, device, torch = each(lambda f: f["data"]["source"]), each(lambda f: f["device"]), each(lambda f: f["torch"])
    return f"Seeds {seeds}. Data: {data}. Device: {device}; torch {torch}."


def results_section(folder: Path) -> str:
    """Everything between the README's markers: one table per profile and setting, with circumstances and verdicts."""
    parts = []
    for profile in PROFILES:
        for setting, group in describe(load_results(folder / profile)).groupby("setting", sort=False):
            parts += [f"**{setting}** (profile `{profile}`)", results_table(group)]
            parts += [circumstances(folder / profile, group), agreement(group)]
    note = (
        "Final accuracy: mean of the last ten evaluated rounds on the whole test set. `±`: half width of the 95 % Student t "
        "interval over seeds; for n < 3 the values are given without interval and without verdict."
    )
    return "\n\n".join([*parts, note]) if parts else "No recorded runs yet."


def write_section(path: Path, text: str) -> None:
    """Put `text` between the markers of a Markdown file.

    Raises:
        ValueError: the file lacks a marker, or has one twice or in the wrong order.
    """
    begin, end = MARKERS
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{path.name}: needs the lines {begin} and {end}, once each and in this order")
    before, after = content.split(begin)[0], content.split(end)[1]
    atomic_write(path, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())
