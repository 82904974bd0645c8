"""What pruning saves, in tables and sentences: bytes of recorded runs, and the measurements of `measure.py`.

Runs come as `names.describe` returns them, of one setting and partition. Measurements come as data frames: those
of `benchmarks/cost_cpu.json` (`read_cost`), or fresh ones of the same columns. Read next: `figures.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ...core.flat import Layout
from ...core.schedules import sparsity_at
from ...records.names import HEADLINE, NAMES
from ...report.statistics import paired, quantity
from .measure import BOTH, CSR, DENSE, SHRUNK, crossing, untrained

RECORD = "cost_cpu.json"
DENSE_CLIENT = NAMES["fedavg"]
PUBLISHED = [NAMES[name] for name in HEADLINE]
"""The forms of methods that the published formula was written for: dense uploads, downloads at the target sparsity."""
WHY_NO_TIME = (
    "In training every multiplication with a pruned weight is still done: forward and backward run dense kernels, "
    "which save none of the FLOPs that the count leaves out."
)


def read_cost(folder: Path) -> dict | None:
    """The record in the folder `benchmarks`: `clients`, `layers`, `models` and `times` as data frames, `settings` and
    `provenance` as they are; None without one."""
    path = folder / RECORD
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    frames = {name: pd.DataFrame(record[name]) for name in ("clients", "layers", "models", "times")}
    return {**record, **frames}


def judged_clients(folder: Path) -> pd.DataFrame:
    """The rows `clients` of the record, if there is one that may be quoted: what claims are judged by."""
    record = read_cost(folder)
    if record is None or reservation(record):
        return pd.DataFrame(columns=["split", "label", "seed"])
    return record["clients"]


def reservation(record: dict) -> str:
    """Why the record's numbers are not to be quoted; empty if they may be."""
    facts = record["provenance"]
    if facts["rehearsal"]:
        return "A rehearsal: few sparsities and repeats. Not to be quoted."
    busy = max(facts["load"].values()) > facts["cpus"]
    return "The machine was busy: times are not to be quoted." if busy else ""


def circumstances(record: dict) -> str:
    """Where the numbers were taken, how busy the machine was, and whether they are meant to be quoted."""
    facts, how, doubt = record["provenance"], record["settings"], reservation(record)
    load = max(facts["load"].values())
    words = f"Measured on {facts['device']} with {facts['cpus']} cores, one thread, torch {facts['torch']}"
    words += f", load {load:.1f}; {how['repeats']} forward passes, {how['client_turns']} trainings each."
    return f"**{doubt}** {words}" if doubt else words


def published_bytes(run: pd.DataFrame) -> pd.DataFrame:
    """`up_bytes` and `down_bytes` (T rows, indexed by round) of a run by the published formula, evaluated or not:
    4 n K (1 - share of zeros) for the model's n weights and K participants. Uploads are dense, of a download the share
    s_t is zero, the target of the round; without `initial_sparsity` it is dense, too.

    The published files hold the same in bits / 2^20 (D21): times 8 / 2^20. Unlike the bytes of our messages it counts
    no mask, applies the sparsity to weights that are never pruned, and charges the download at the target of the
    present round although the mask is older (D22).

    Source: published code `functions_new.comm_costs_in_mb`, `fl_server.py`.
    """
    first = run.iloc[0]
    size = Layout.of(untrained(first["dataset"], first["model"], first["width"])).size
    initial = pd.to_numeric(first["initial_sparsity"])
    ends = (0.0, 0.0) if pd.isna(initial) else (initial, first["target_sparsity"])
    shares = [sparsity_at(t, *ends, int(first["rounds"])) for t in range(int(first["rounds"]))]
    dense = 4.0 * size * int(first["clients_per_round"])
    return pd.DataFrame({"up_bytes": dense, "down_bytes": [dense * (1 - share) for share in shares]})


def models_table(models: pd.DataFrame) -> pd.DataFrame:
    """What a pruned model weighs, a row per model and target sparsity; shares are of the dense one's."""
    shares = {
        "forward FLOPs": models["flops"] / models["dense_flops"],
        "training FLOPs, error feedback": models["training_feedback"] / models["training_dense"],
        "training FLOPs, masked SGD": models["training_masked"] / models["training_dense"],
        "weights left without dead channels": models["left"] / models["weights"],
    }
    table = models[["model"]].assign(sparsity=models["sparsity"].map("{:.3f}".format))
    for part in ("file", "message"):
        sizes = zip(models[part], models[f"dense_{part}"], strict=True)
        table[f"{part}, KiB (share)"] = [f"{sparse / 2**10:.1f} ({sparse / dense:.3f})" for sparse, dense in sizes]
    for head, share in shares.items():
        table[head] = share.map("{:.3f}".format).where(share.notna(), "-")
    return table


def crossings(rows: pd.DataFrame) -> str:
    """Markdown: from which sparsity on a sparse form is faster than the dense one, in a list; `rows` of layers, with
    the column `layer`, or of whole models."""
    lines = []
    for (model, batch), group in rows.groupby(["model", "batch"], sort=False):
        what = f"its linear layer {group['layer'].iloc[0]}" if "layer" in group else "the whole model"
        found, top = crossing(group), group["sparsity"].max()
        said = f"at no sparsity up to {top:g} is a sparse form faster"
        if found is not None:
            at = group[group["sparsity"] == top].set_index("form")["median"]
            best = at.drop(DENSE).idxmin()
            words = {CSR: "CSR", SHRUNK: "removing dead channels", BOTH: "CSR without dead channels"}[best]
            share = at[best] / at[DENSE]
            said = f"faster from sparsity {found:g} on; at {top:g} {words} takes {share:.2f} of the dense time"
        lines.append(f"- **{model}**, {what}, {_images(batch)}: {said}.")
    return "\n".join(lines)


def reading(clients: pd.DataFrame, times: pd.DataFrame) -> str:
    """Markdown: what sparsity buys, in sentences: training time and memory of clients, and inference."""
    lines = [WHY_NO_TIME, ""]
    for model, group in clients.groupby("split", sort=False):
        said = []
        for label in group.loc[group["label"] != DENSE_CLIENT, "label"].unique():
            time, memory = (_times_dense(group, label, column) for column in ("seconds", "peak_mib"))
            said.append(f"{label} takes {time} times FedAvg's time and {memory} times its peak memory")
        lines.append(f"- **{model}**, training: {'; '.join(said)}.")
    never = [
        f"{model} with {_images(batch)}"
        for (model, batch), group in times.groupby(["model", "batch"], sort=False)
        if crossing(group) is None
    ]
    lines += [crossings(times), ""]
    lines += [f"Unstructured sparsity buys no time on this machine for {', '.join(never)}." if never else ""]
    return "\n".join(lines).strip()


def _times_dense(clients: pd.DataFrame, label: str, column: str) -> str:
    """A column's ratio to that of FedAvg's client, turn by turn."""
    return "1" if label == DENSE_CLIENT else quantity(paired(clients, label, DENSE_CLIENT, column, ratio=True), 3)


def _images(batch: int) -> str:
    return f"{batch} image{'s' * (batch > 1)} at a time"
