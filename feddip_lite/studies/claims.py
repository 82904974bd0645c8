"""What the sources claim, and what came out: `params/claims.yaml` says how each is judged, recorded runs judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ..config import Config
from ..records.catalogue import RECORDED, main_runs, recorded, shared_start
from ..records.names import SHARED_START, UNEVEN, any_of, splits
from ..records.store import ROOT
from ..report.statistics import by_seed, interval, quantity, summaries
from ..studies import merging
from .chosen import WORDS as CHOSEN
from .chosen import chosen
from .cost.tables import judged_clients
from .encrypted import read_encrypted
from .equal_bytes import equal_bytes
from .ingredients import by_sparsity
from .layers import across_seeds
from .second_order import read_second_order
from .sparsity_sweep import recorded_sweep

RULES = ROOT / "params" / "claims.yaml"
RULE = (
    "Verdict: a claim holds in a partition if the 95 % interval over seeds (differences and ratios paired by seed) "
    "lies wholly on the good side of its threshold. Reproduced: in every partition; partly: in some; not reproduced: "
    "in none, which does not say that the opposite was shown. Fewer than three seeds: the values, no verdict. Not "
    "tested at this scale: no recorded run measures it yet. For time and memory, a model stands for a partition and a "
    "repetition for a seed; where sparsities are compared, each stands for a partition; where masks of two seeds are, "
    "each pair for a seed, so that interval is only a guide. ‡ This rule was written down when its runs were known."
)
COLUMNS = ("setting", "measured", "ours, n seeds", "verdict", "answer")
_UNITS = {
    ("accuracy", "difference"): (100, 1, " points"), ("dip_at_choice", "difference"): (100, 1, " points"),
    ("stay_rounds", "value"): (1, 1, " rounds"), ("regrown", "value"): (1, 0, " times"),
    "ratio": (100, 1, " %"), "difference": (1, 3, ""), "value": (1, 3, ""),
}  # fmt: skip
"""Scale, digits and unit in which a measure is spoken of: of a column compared so, or else of any so compared."""
Source = tuple[str, pd.DataFrame]
"""What a source holds, in words, and its rows: `split`, `seed`, `label`, and the columns that measures name."""


def claims_table(folder: Path, path: Path = RULES) -> pd.DataFrame:
    """Each claim of the file `path`, a row per setting and method that measure it, from the recorded runs under
    `folder`; `RULE` is behind the verdicts. Of a claim that nothing measures yet there is one row. `question` is that
    of docs/findings.md which the claim answers, 0 for none, and `answer` the words in which it does, if it is to be
    among the answers on top of that page."""
    document = yaml.safe_load(path.read_text())
    comparisons = {(name, each): runs for each in RECORDED for name, runs in main_runs(each, folder).items()}
    sources, rows = _sources(folder, document["profile"], comparisons), []
    for claim in document["claims"]:
        said = {"claim": claim["claim"] + " ‡" * claim.get("known", False), "source": claim["source"]}
        said["question"] = claim.get("question", 0)
        untested = ("-", in_words(claim["measure"], claim["good"]), "-", "not tested at this scale", "")
        for row in list(_judge(claim, sources)) or [dict(zip(COLUMNS, untested, strict=True))]:
            rows.append({**said, **row, "notebook": claim["notebook"]})
    return pd.DataFrame(rows)


def judged(runs: pd.DataFrame, profile: str, path: Path = RULES) -> pd.DataFrame:
    """The claims that these runs, of one model and data set as `main_runs(profile)` gives them, judge: a row each."""
    document, rows = yaml.safe_load(path.read_text()), []
    name = _source_name("_".join(runs[["model", "dataset"]].iloc[0]), profile, document["profile"])
    sources = {name: ("", summaries(runs))}
    for claim in document["claims"]:
        rows += [{"claim": claim["claim"], **row} for row in _judge(claim, sources)]
    return pd.DataFrame(rows).drop(columns=["setting", "answer"], errors="ignore")


def _source_name(name: str, profile: str, usual: str) -> str:
    """What `from` in the rules calls a main comparison: `<model>_<dataset>`, of another profile with that after it."""
    return name if profile == usual else f"{name}_{profile}"


def _sources(folder: Path, profile: str, comparisons: Mapping[tuple[str, str], pd.DataFrame]) -> dict[str, Source]:
    drawn = {"classes_dealt": Config().classes_dealt}  # the other way is for docs/deviations.md (D27)
    everything, found = recorded(profile, folder, **drawn), {}
    for (name, each), runs in comparisons.items():
        records = everything if each == profile else recorded(each, folder, **drawn)
        if runs["setting"].iloc[0].endswith(SHARED_START):
            records = shared_start(records)
        alike = records[records["setting"].isin(runs["setting"])]  # with its ablations
        found[_source_name(name, each, profile)] = (_briefly(runs), summaries(alike))
    lenet = everything[(everything["model"] == "lenet5") & (everything["dataset"] == "fashionmnist")]
    even, merged = lenet[lenet["partition"] == "iid"], recorded(f"merging/{profile}", folder)
    swept, variants = recorded_sweep(even), by_sparsity(lenet)
    where = f"{_briefly(swept)}, IID" if len(swept) else ""
    found["sweep"] = (where, swept.assign(split=[f"s = {target:g}" for target in swept["target_sparsity"]]))
    found["across_seeds"] = (where, _pairs(folder / profile, swept))
    found["by_sparsity"] = (_briefly(variants) if len(variants) else "", variants)
    preferred = pd.concat([*(chosen(even, name) for name in CHOSEN), variants[variants["label"] == "FedDP"]])
    found["chosen"] = found["by_sparsity"][0], preferred
    for name, each, runs in (("equal_bytes", ("lenet5_fashionmnist", profile), lenet),
                             ("equal_bytes_long", ("alexnet_cifar10", "long"), recorded("long", folder))):  # fmt: skip
        usual = comparisons.get(each)
        found[name] = ("", even.iloc[:0]) if usual is None else (_briefly(usual), equal_bytes(runs, usual))
    found["second_order"] = found["by_sparsity"][0], read_second_order(folder.parent / "benchmarks")
    found["merging"] = (_briefly(merged) if len(merged) else "", merging.per_run(merged))
    found["cost_cpu"] = ("one client's training", judged_clients(folder.parent / "benchmarks"))
    found["encrypted_cpu"] = ("one round, 5 clients, CKKS", read_encrypted(folder.parent / "benchmarks"))
    return found


def _briefly(runs: pd.DataFrame) -> str:
    words = runs["setting"].iloc[0].split(", ")
    return ", ".join([*words[:2], *(word for word in words if word.startswith(("width", "T =", "shared")))])


def _pairs(folder: Path, swept: pd.DataFrame) -> pd.DataFrame:
    """`layers.across_seeds` of whole masks as claims read it: a pair stands for a seed, a sparsity for a partition."""
    pairs = across_seeds(folder, swept)
    whole = pairs[pairs["layer"] == "all"].rename(columns={"seeds": "seed"})
    names = [f"s = {target:g}" for target in whole["target_sparsity"]]
    return whole.assign(split=names, overlap_beyond_chance=whole["overlap"] - whole["chance"])


def _judge(claim: dict, sources: Mapping[str, Source]) -> Iterator[dict[str, str]]:
    """A row for each of the claim's sources and methods that has values."""
    measure, answers = claim["measure"], any_of(claim.get("answer", []))
    digits, sign = measure.get("digits", 4), "+" * (measure["by"] == "difference")
    for name in measure["from"]:
        words, rows = sources.get(name, ("", pd.DataFrame(columns=["split"])))
        for label, begun in zip_longest(measure["of"], answers):
            one = {**measure, "of": label}
            by_split = {split: measured(rows[rows["split"] == split], one) for split in splits(rows)}
            by_split = {split: values for split, values in by_split.items() if len(values)}
            if by_split:
                said = [f"{split}: {quantity(values, digits, sign)}" for split, values in by_split.items()]
                what = in_words({**measure, "of": [label]}, claim["good"])
                judgement = verdict(by_split.values(), **claim["good"])
                answer = f"{begun} {_spoken(by_split, measure)}" if begun else ""
                yield dict(zip(COLUMNS, (words, what, "; ".join(said), judgement, answer), strict=True))


def _spoken(by_split: Mapping[str, np.ndarray], measure: dict) -> str:
    """Means with their intervals in the units that people speak in, of evenly dealt data: the first and the last."""
    scale, digits, unit = _UNITS.get((measure["column"], measure["by"])) or _UNITS[measure["by"]]
    sign, said = "+" * (measure["by"] == "difference"), []
    for split, values in by_split.items():
        mean, half = interval(scale * values)
        spread, where = ("", f"n={len(values)}, {split}") if np.isnan(half) else (f" ± {half:.{digits}f}", split)
        said.append(f"{mean:{sign}z.{digits}f}{spread}{unit} ({where})")
    even = [words for words, split in zip(said, by_split, strict=True) if UNEVEN not in split] or said
    return " and ".join(dict.fromkeys([even[0], even[-1]]))


def measured(rows: pd.DataFrame, measure: dict) -> np.ndarray:
    """The values (n,) of a measure over the seeds that have all labels it names, in order of seeds.

    `rows` have `label`, `seed` and the measure's `column`: runs as `summaries` gives them, or a benchmark's record;
    `of` is one label. Of several names in `to` the best counts, the largest value of the column, seed by seed.
    """
    names, others = [measure["of"], *measure.get("to", [])], measure.get("to", [])
    if rows.empty or not set(names) <= set(rows["label"]):
        return np.empty(0)
    values = by_seed(rows[rows["label"].isin(names)], measure["column"]).dropna()
    own = values[measure["of"]].to_numpy()
    if measure["by"] == "value":
        return own
    best = values[others].max(axis=1).to_numpy()
    return own / best if measure["by"] == "ratio" else own - best


def verdict(by_partition: Iterable[np.ndarray], side: str, threshold: float | list[float]) -> str:
    """What `RULE` says of the values of each partition; `side` is "above" or "below" a threshold, or "between" two."""
    low, high = {"above": (threshold, np.inf), "below": (-np.inf, threshold)}.get(side) or threshold
    intervals = [interval(values) for values in by_partition]
    if any(np.isnan(half) for _, half in intervals):
        return "no verdict for n < 3"
    holds = [low < mean - half and mean + half < high for mean, half in intervals]
    return "reproduced" if all(holds) else "partly" if any(holds) else "not reproduced"


def in_words(measure: dict, good: dict) -> str:
    """A measure and its threshold, as a reader would say them."""
    words = {
        "mib": "total bytes",
        "peak_mib": "peak memory in training",
        "seconds": "seconds of local training",
        "latency_s": "seconds to encrypt, add and decrypt",
        "dip_at_choice": "accuracy in rounds that choose a mask minus that in the others, of the last ten",
        "regrown": "returns in a run",
        "stay_rounds": "rounds that a weight which returned stays",
    }
    column = words.get(measure["column"], measure["column"].replace("_", " "))
    of, to = " or ".join(measure["of"]), measure.get("to", [])
    other = to[0] if len(to) == 1 else f"the best of {', '.join(to)}"
    what = {"difference": f"{of} - {other}", "ratio": f"{of} / {other}", "value": of}[measure["by"]]
    limit = " and ".join(f"{value:g}" for value in np.atleast_1d(good["threshold"]))
    return f"{column}: {what}, {good['side']} {limit}"
