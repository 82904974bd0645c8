"""Tables of runs and methods, as data frames whose cells are for reading; notes and circumstances are sentences.

`tools/publish.py` writes them into README and docs.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from ..methods.registry import METHODS
from ..records.names import DAGGER, labels, splits, title_of, told_apart
from ..records.store import headline, read_run
from .statistics import mean_of, paired, quantity

NOTHING = "No recorded runs yet."
NOTE = (
    "Final accuracy: mean of the last ten evaluated rounds on the whole test set. `±`: half width of the 95 % Student "
    "t interval over seeds. Differences are paired by seed. n < 3: the values alone, no interval, no verdict. With a "
    "row per round and a mask every fifth, two of the ten choose one: there `memory` drops, to recover until the next."
)


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    """A row per partition and method; accuracies are shares of the whole test set. Runs of several settings are told
    apart by their labels."""
    results = told_apart(results)
    top5 = "top5_accuracy" in results and results["top5_accuracy"].notna().any()
    rows, runs = [], headline(results)
    for split in splits(results):
        group = runs[runs["split"] == split]
        for label in labels(group):
            own = group[group["label"] == label].sort_values("seed")
            share = paired(group, label, "FedAvg", "mib", ratio=True)
            row = {"method (preset)": label, "partition": split, "final accuracy": quantity(own["accuracy"])}
            row |= {"top-5 accuracy": quantity(own["top5_accuracy"])} if top5 else {}
            row |= {"measured sparsity": mean_of(own["sparsity"], 4), "total MiB": mean_of(own["mib"], 1)}
            row["share of FedAvg's bytes"] = f"{share.mean():.3f}" if len(share) else "-"
            difference = quantity(paired(group, label, "FedAvg"), sign="+")
            row["accuracy minus FedAvg's"] = "-" if label == "FedAvg" else difference
            rows.append(row)
    return pd.DataFrame(rows)


def circumstances(folder: Path, results: pd.DataFrame) -> str:
    """One line on where the numbers come from: seeds, data, device and versions, from the runs' provenance."""
    facts = pd.json_normalize([read_run(folder, run_id)[1]["provenance"] for run_id in results["run_id"].unique()])
    seeds = ", ".join(str(seed) for seed in sorted(results["seed"].unique()))
    data, device, torch = (", ".join(sorted(facts[name].unique())) for name in ("data.source", "device", "torch"))
    return f"Seeds: {seeds}. Data: {data}. Device: {device}, torch {torch}."


def methods_table() -> pd.DataFrame:
    """A row per method: what it is, how many lines its class has, its presets and its source."""
    order, rows = "name method family mask_from scope regrows step up down lines presets source", []
    for name, method in METHODS.items():
        own = {"name": name, "method": title_of(name), "lines": _lines_of(method), "presets": ", ".join(method.presets)}
        rows.append(asdict(method.about) | own)
    table = pd.DataFrame(rows)[order.split()].replace({"": "-"})
    table["regrows"] = table["regrows"].map({True: "yes", False: "no"})
    return table.rename(columns={"mask_from": "mask from", "step": "client step"})


def assumptions() -> str:
    """Markdown: what was assumed for each reconstruction, a line each."""
    abouts = {title_of(name): method.about.assumed for name, method in METHODS.items()}
    notes = [f"- {title}: {assumed}" for title, assumed in abouts.items() if assumed]
    return "\n".join([f"{DAGGER} A reconstruction: its source's details were not to be had. Assumed:", "", *notes])


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of a frame's cells, as they are; what is Markdown in them stays Markdown."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).to_numpy()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _lines_of(method: type) -> str:
    """Lines of the class that are not empty; none where its source is not at hand, as in an interactive session."""
    try:
        return str(sum(bool(line.strip()) for line in inspect.getsource(method).splitlines()))
    except (OSError, TypeError):
        return ""
