"""What runs are called: notebooks, figures and tables all name them through `describe`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields

import pandas as pd

from ..config import UNHASHED, Config
from ..methods.registry import METHODS

DAGGER = "†"
SHARED_START = "shared random start"
"""What the setting of runs says that `shared_start` made comparable."""


def title_of(name: str) -> str:
    """A method as the literature spells it, with a dagger if it is a reconstruction; one that is not registered here,
    whose runs may be read all the same, by its name."""
    if name not in METHODS:
        return name
    about = METHODS[name].about
    return (about.title or name) + DAGGER * bool(about.assumed)


def family_of(name: str) -> str:
    """The family of a method, one of FAMILIES; "own" if it is not registered or says nothing of these."""
    family = METHODS[name].about.family if name in METHODS else "own"
    return family if family in FAMILIES else "own"


NAMES = {name: title_of(name) for name in METHODS} | {
    "digits": "digits", "fashionmnist": "Fashion-MNIST", "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100", "lenet5": "LeNet-5", "alexnet": "AlexNet", "resnet18": "ResNet-18",
}  # fmt: skip
"""How methods (in the order of legends and tables), data sets and models are written."""
FAMILIES = ("dense to dense", "dense to sparse", "sparse to sparse", "own")
"""How the slides sort methods: what the model is at the start and at the end; and methods of your own."""
HEADLINE = ("fedavg", "feddp", "feddip")
"""The methods of the paper's own question, which figures and tables of a data set show first."""
_SCHEDULES = ("initial_sparsity", "mask_interval", "penalty_max", "penalty_steps")
SENDING = ("down", "up", "up_pruned", "up_feedback", "mask_cache")
"""Fields that say how a model travels, not what is computed."""
_OWN = (*_SCHEDULES, *SENDING)
"""What a run is called after, beside its method's options."""
SPLIT = ("partition", "classes_per_client", "classes_dealt", "alpha")
UNEVEN = "classes per client"
"""What the name of a split by class says."""
IN_ORDER = ", in order"
"""How a split's name ends whose pairs of classes are dealt as the published code does (D27)."""
_ALONE = {"method", "preset", "method_options", "seed", "on_client_failure", "eval_every", *_OWN, *SPLIT, *UNHASHED}
_FIELDS = ["initial_lr" if item.name == "lr" else item.name for item in fields(Config)]
SHARED = [name for name in _FIELDS if name not in _ALONE]
_IN_WORDS = {"dataset", "model", "rounds", "clients", "clients_per_round", "target_sparsity"}
ADDED = ("label", "split", "setting", "changed", "mib")
"""The columns that `describe` adds."""
FORMS = ("", "upload", "variant")
"""What `changed` says of a method, or of another form of it; anything else is an ablation."""


def computed(changed: str) -> str:
    """What `changed` says without how the model travels."""
    return ", ".join(name for name in changed.split(", ") if name not in SENDING)


def describe(results: pd.DataFrame) -> pd.DataFrame:
    """`load_results` with the columns that people read.

    `label` names the method with its preset and whatever differs from it, `changed` the names of that, `split` the
    partition, `setting` all that runs must share to be compared; `mib` is what has travelled up to and including the
    round, in MiB, both ways.
    """
    if results.empty:
        return results.reindex(columns=[*dict.fromkeys([*results.columns, "diverged", *_FIELDS, *ADDED])])
    first = results.drop_duplicates("run_id").set_index("run_id")
    words = {"label": _label, "split": _split, "setting": setting_of, "changed": lambda row: ", ".join(_changed(row))}
    named = {name: results["run_id"].map(first.apply(function, axis=1)) for name, function in words.items()}
    travelled = (results["up_bytes"] + results["down_bytes"]).groupby(results["run_id"]).cumsum()
    return results.assign(**named, mib=travelled / 2**20)


def label_of(config: Config) -> str:
    """The `label` of a run of this configuration."""
    settings = asdict(config.resolved())
    return _label(pd.Series({**settings, "method_options": json.dumps(settings["method_options"])}))


def labels(results: pd.DataFrame) -> list[str]:
    """The methods that occur, in the order of `METHODS`, by name those that are not among them."""
    order = {title_of(name): place for place, name in enumerate(METHODS)}
    return sorted(results["label"].unique(), key=lambda label: (order.get(label.split(" (")[0], len(order)), label))


def splits(results: pd.DataFrame) -> list[str]:
    """The partitions that occur, IID first."""
    return sorted(results["split"].unique(), key=lambda split: (split != "IID", split))


def told_apart(results: pd.DataFrame) -> pd.DataFrame:
    """Results of one setting as they are; of several, so that no difference is hidden: `setting` is what all share, and
    each `label` says what else its run's setting says."""
    words = {setting: setting.split(", ") for setting in results["setting"].unique()}
    if len(words) < 2:
        return results
    first = next(iter(words.values()))
    shared = [word for word in first if all(word in own for own in words.values())]
    more = {setting: ", ".join(word for word in own if word not in shared) for setting, own in words.items()}
    labels = [_with(label, more[setting]) for label, setting in zip(results["label"], results["setting"], strict=True)]
    return results.assign(label=labels, setting=", ".join(shared))


def _with(label: str, note: str) -> str:
    if not note:
        return label
    return f"{label[:-1]}; {note})" if label.endswith(")") else f"{label} ({note})"


def any_of(value) -> list | tuple:
    return value if isinstance(value, list | tuple) else [value]


def _changed(row: pd.Series) -> dict[str, object]:
    """The method's settings that differ from those of its preset; none are known of a method that is not registered."""
    if row["method"] not in METHODS:
        return {}
    usual = Config(method=row["method"], preset=row["preset"], target_sparsity=row["target_sparsity"]).resolved()
    differing = {name: row[name] for name in _OWN if _differs(row[name], getattr(usual, name))}
    options = json.loads(row["method_options"])
    return differing | {name: value for name, value in options.items() if value != usual.method_options[name]}


def _label(row: pd.Series) -> str:
    notes = [] if row["preset"] == "paper" else [row["preset"]]
    notes += [f"{name} = {_short(value)}" for name, value in _changed(row).items()]
    name = title_of(row["method"])
    return f"{name} ({', '.join(notes)})" if notes else name


def _split(row: pd.Series) -> str:
    if row["partition"] == "pathological":
        order = IN_ORDER if row["classes_dealt"] == "in_order" else ""
        return f"{row['classes_per_client']} {UNEVEN}{order}"
    return "IID" if row["partition"] == "iid" else f"Dirichlet({row['alpha']:g})"


def setting_of(row: pd.Series) -> str:
    decay = 0.998 ** (1000 / row["rounds"])  # the authors' 0.998 per round of 1000, in T rounds
    usual = asdict(Config()) | {"initial_lr": Config().lr, "lr_decay": decay}
    words = [NAMES.get(row["dataset"], row["dataset"]), NAMES.get(row["model"], row["model"])]
    words += [f"T = {row['rounds']} rounds", f"{row['clients_per_round']} of {row['clients']} clients per round"]
    words += [f"target sparsity {row['target_sparsity']:g}"]
    others = [name for name in SHARED if name not in _IN_WORDS and _differs(row[name], usual[name])]
    return ", ".join(words + [f"{name.replace('_', ' ')} {_short(row[name])}" for name in others])


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differs(value, usual) -> bool:
    if isinstance(value, float) and isinstance(usual, float):
        return not math.isclose(value, usual, rel_tol=1e-9)
    return value != usual and not (usual is None and pd.isna(value))
