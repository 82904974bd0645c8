"""The README's tables that do not come from runs: what the methods are, and how fast a round is."""

from __future__ import annotations

import inspect
import json
import re
from itertools import groupby
from pathlib import Path

import yaml

from ..methods.registry import METHODS
from ..records.names import DAGGER, title_of
from .markdown import table

PLACE = {"one process": "in one process", "simulation": "on Flower's simulation"}
WHAT_D_PLUS_IS = (
    "**a** the published procedure, rebuilt from its description; **b** a careful PyTorch loop, one client after the "
    "other; **c** this package; **d** the bare forward and backward of stock operators on the same batches, clients "
    "side by side, and **d+** the same where malloc keeps freed memory, as under c. Seconds per round, training "
    "and evaluation: median (minimum to maximum), or the one round measured; d evaluates nothing, so **c/d** and "
    "**c/d+** compare training alone."
)


def settings_table(path: Path) -> str:
    """Markdown: each method's own settings, their values and sources, from `params/methods.yaml`."""
    rows = []
    for name, presets in yaml.safe_load(path.read_text()).items():
        for preset, settings in presets.items():
            for setting, (value, source) in settings.items():
                shown = "from another" if value is None else f"`{value}`"
                rows.append([title_of(name), f"`{preset}`", f"`{setting}`", shown, source])
    return table(["method", "preset", "setting", "value", "source"], rows)


def methods_table() -> str:
    """Markdown: a row per method, and below it what was assumed for each reconstruction."""
    heads = ["name", "method", "family", "mask from", "scope", "regrows", "client step", "up", "down", "lines"]
    rows, notes = [], []
    for name, method in METHODS.items():
        about = method.about
        lines = sum(bool(line.strip()) for line in inspect.getsource(method).splitlines())
        words = [about.family, about.mask_from, about.scope, "yes" if about.regrows else "no"]
        words += [about.step, about.up, about.down, str(lines), ", ".join(f"`{p}`" for p in method.presets)]
        rows.append([f"`{name}`", title_of(name), *words, about.source])
        if about.assumed:
            notes.append(f"- {title_of(name)}: {about.assumed}")
    escaped = ([re.sub(r"([|*])", r"\\\1", cell) for cell in row] for row in rows)
    intro = f"{DAGGER} A reconstruction: its source's details were not to be had. Assumed:"
    return "\n".join([table([*heads, "presets", "source"], escaped), "", intro, "", *notes])


def benchmark_section(folder: Path) -> str:
    """Markdown: the recorded tables of `benchmarks/`, a row per model, and how cost grows."""
    tables = {"engine_cpu": _engine_table, "engine_cuda": _engine_table, "growth_cpu": _growth, "masks_cpu": _masks}
    tables["flower_cpu"] = _flower
    paths = {folder / f"{name}.json": words for name, words in tables.items()}
    parts = [words(json.loads(path.read_text())) for path, words in paths.items() if path.exists()]
    return "\n\n".join([*parts, WHAT_D_PLUS_IS] if parts else ["Nothing measured yet."])


def _engine_table(record: dict) -> str:
    names, rows = ("a", "b", "c", "d", "d+"), []
    for model, row in record["table"].items():
        total = {name: row[name]["total_s" if name in "abc" else "train_s"] for name in names if name in row}
        train = {name: row[name]["train_s"]["median"] for name in total}
        cells = [_spread(total[name]) if name in total else "-" for name in names]
        for upper, lower, of in (("a", "c", total), ("b", "c", total), ("c", "d", train), ("c", "d+", train)):
            known = upper in of and lower in of
            cells.append(f"{_median(of[upper]) / _median(of[lower]):.2f}" if known else "-")
        epochs = row["settings"].get("local_epochs", 5)
        rows.append([f"{model}, {epochs} epoch{'s' * (epochs > 1)}", *cells, f"{row['c']['peak_mb']:.0f}"])
    facts = record["provenance"]
    where = f"{facts['device']}, {facts['cpus']} cores, torch {facts['torch']}, Python {facts['python']}"
    heads = ["model", *names, "a/c", "b/c", "c/d", "c/d+", "peak MiB of c"]
    return f"{table(heads, rows)}\n\nMeasured in one run, taking turns: {where}, {facts['precision']}."


def _median(value) -> float:
    return value["median"] if isinstance(value, dict) else value


def _spread(value: dict) -> str:
    spread = f" ({value['min']:.2f} to {value['max']:.2f})" if value["min"] < value["max"] else ""
    return f"{value['median']:.2f}{spread}"


def _growth(record: dict) -> str:
    rows = record["rows"]
    by_clients = [row for row in rows if "clients" in row]
    clients = ", ".join(str(row["clients"]) for row in by_clients)
    peaks = ", ".join(f"{row['peak_mb']:.0f}" for row in by_clients)
    per_step = [1e3 * row["train_s"] / row["steps"] for row in rows if "clients" not in row]
    return (
        f"LeNet-5 on Fashion-MNIST over {clients} clients: peak memory {peaks} MiB; start-up with "
        f"{by_clients[-1]['clients']} clients {by_clients[-1]['start_s']:.1f} s. Training costs {min(per_step):.2f} to "
        f"{max(per_step):.2f} ms a step, whether clients per round go from 5 to 20 or local epochs from 1 to 10."
    )


def _flower(record: dict) -> str:
    """What a round costs on Flower's simulation, beside the same round in one process."""
    said = []
    for model, rows in groupby(record["rows"], lambda row: row["model"]):
        seconds = " and ".join(f"{_spread(row['seconds'])} s {PLACE[row['place']]}" for row in rows)
        said.append(f"{model} {seconds}")
    return (
        f"A round of FedAvg on digits, one local step per client, 5 of {record['provenance']['clients']} clients, "
        f"takes: {'; '.join(said)} (median, minimum to maximum, after the first)."
    )


def _masks(record: dict) -> str:
    rows = record["rows"]
    millions = rows[0]["prunable"] / 1e6
    each = ", ".join(f"{row['per_round_s']:.2f} s at sparsity {row['sparsity']:g}" for row in rows)
    return (
        f"Choosing and coding a mask of AlexNet's {millions:.1f} million prunable weights every fifth round costs the "
        f"server, per round: {each}."
    )
