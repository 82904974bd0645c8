"""Markdown tables of what `benchmarks/` measured, each record in the words of docs/speed.md or docs/bytes.md.

`tools/publish.py` writes them into these pages.
"""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from feddip_lite.records.catalogue import recorded
from feddip_lite.records.store import headline
from feddip_lite.report.statistics import interval, paired, quantity
from feddip_lite.report.tables import NOTHING, markdown
from feddip_lite.studies import encrypted

PLACE = {"one process": "in one process", "simulation": "on Flower's simulation"}
ENGINES = {"a": "total_s", "b": "total_s", "c": "total_s", "d": "train_s", "d+": "train_s"}  # d evaluates nothing
CONTENDERS = (
    "**a** the published procedure, rebuilt from its description; **b** a careful PyTorch loop, one client after the "
    "other; **c** this package; **d** the bare forward and backward of stock operators on the same batches, clients "
    "side by side, and **d+** the same where malloc keeps freed memory, as under c. Seconds per round, training "
    "and evaluation: median (minimum to maximum), or the one round measured; d evaluates nothing, so **c/d** and "
    "**c/d+** compare training alone."
)


def benchmark_part(root: Path) -> str:
    """The recorded tables of `benchmarks/`, a row per model, and how cost grows."""
    words = {"engine_cpu": _engine, "engine_cuda": _engine, "growth_cpu": _growth, "masks_cpu": _masks}
    words |= {"codecs_cpu": _codecs, "flower_cpu": _flower, "gpu_cuda": _gpu}
    paths = {root / "benchmarks" / f"{name}.json": said for name, said in words.items()}
    parts = [said(json.loads(path.read_text())) for path, said in paths.items() if path.exists()]
    parts += filter(None, [precision_part(root)])
    return "\n\n".join([*parts, CONTENDERS] if parts else ["Nothing measured yet."])


def _engine(record: dict) -> str:
    rows = []
    for model, row in record["table"].items():
        epochs = row["settings"].get("local_epochs", 5)
        cells = {"model": f"{model}, {epochs} epoch{'s' * (epochs > 1)}"}
        cells |= {name: _spread(row[name][of]) if name in row else "-" for name, of in ENGINES.items()}
        for upper, lower in (("a", "c"), ("b", "c"), ("c", "d"), ("c", "d+")):
            known, of = {upper, lower} <= set(row), ENGINES[lower]
            cells[f"{upper}/{lower}"] = f"{row[upper][of]['median'] / row[lower][of]['median']:.2f}" if known else "-"
        rows.append({**cells, "peak MiB of c": f"{row['c']['peak_mb']:.0f}"})
    facts = record["provenance"]
    where = f"{facts['device']}, {facts['cpus']} cores, torch {facts['torch']}, Python {facts['python']}"
    return f"{markdown(pd.DataFrame(rows))}\n\nMeasured in one run, taking turns: {where}, {facts['precision']}."


def _spread(value: dict) -> str:
    spread = f" ({value['min']:.2f} to {value['max']:.2f})" if value["min"] < value["max"] else ""
    return f"{value['median']:.2f}{spread}"


def _growth(record: dict) -> str:
    """A row per number of clients; what a step costs, in words."""
    by_clients = [row for row in record["rows"] if "clients" in row]
    per_step = [1e3 * row["train_s"] / row["steps"] for row in record["rows"] if "clients" not in row]
    table = pd.DataFrame(
        {
            "clients": [f"{row['clients']}" for row in by_clients],
            "start-up, s": [f"{row['start_s']:.2f}" for row in by_clients],
            "training, s a round": [f"{row['train_s']:.2f}" for row in by_clients],
            "steps a round": [f"{row['steps']}" for row in by_clients],
            "peak, MiB": [f"{row['peak_mb']:.0f}" for row in by_clients],
        }
    )
    return (
        f"LeNet-5 on Fashion-MNIST's 60000 images, divided among ever more clients:\n\n{markdown(table)}\n\n"
        f"Training costs {min(per_step):.2f} to {max(per_step):.2f} ms a step, whether clients per round go from 5 to "
        "20 or local epochs from 1 to 10."
    )


def precision_part(root: Path) -> str:
    """What bf16 gains in time, and what it costs in accuracy; a row per model."""
    path, rows = root / "benchmarks" / "precision_cpu.json", []
    if not path.exists():
        return ""
    record, finals = json.loads(path.read_text()), headline(recorded("precision", root / "results"))
    for (model, width), (plain, short) in groupby(record["rows"], lambda row: (row["model"], row["width"])):
        gains = np.divide(plain["train_s"], short["train_s"])
        mean, half = interval(gains)
        own = finals[(finals["model"] == model) & (finals["width"] == width)]
        own = own.assign(label=own["precision"])
        cells = {"model": f"{model} {width:g}", "float32, s": f"{np.median(plain['train_s']):.2f}"}
        cells |= {"bf16, s": f"{np.median(short['train_s']):.2f}", "float32 / bf16": f"{mean:.2f} ± {half:.2f}"}
        for name in ("float32", "bf16"):
            cells[f"accuracy, {name}"] = quantity(own.loc[own["label"] == name, "accuracy"])
        rows.append(cells | {"bf16 - float32": quantity(paired(own, "bf16", "float32"), sign="+")})
    facts, samples = record["provenance"], record["rows"][0]["samples"]
    return (
        f"`--precision bf16` on a CPU, weights and their update in float32:\n\n{markdown(pd.DataFrame(rows))}\n\n"
        f"Seconds of a client's training, {samples} images, medians of turns on {facts['device']}, one thread, torch "
        f"{facts['torch']}; accuracy of short runs (`params/precision.yaml`), differences paired by seed."
    )


def _gpu(record: dict) -> str:
    """What `make gpu` found: seconds of a round of each way, how near gradients and rounds are, convolutions."""
    ways = pd.DataFrame(record["ways"])
    table = pd.DataFrame(
        {
            "model": ways["model"],
            "five clients": ways["way"],
            "training, s a round": ways["train_s"].map("{:.3f}".format),
            "evaluation, s": ways["evaluate_s"].map("{:.3f}".format),
            "peak, MiB": ways["memory_mib"].map("{:.0f}".format),
        }
    )
    exact = [row for row in record["correctness"] if row["arithmetic"] == "fastest here"]
    errors = {precision: [row for row in exact if row["precision"] == precision] for precision in ("float32", "tf32")}
    said = [
        f"{precision} " + ", ".join(f"{row['model']} {row['gradient']:.0e}" for row in rows)
        for precision, rows in errors.items()
    ]
    lenet = max(row["largest_weight_difference"] for row in record["three_rounds"] if row["model"] == "lenet5")
    convolutions = "; ".join(
        f"{row['way']} {1e3 * row['rounds_s'][-1]:.0f} ms"
        + (f" ({1e3 * row['gpu_s']:.0f} of kernels)" if row["gpu_s"] else "")
        for row in record["convolutions"]
    )
    facts = record["provenance"]
    return (
        f"On a GPU, at full width, {facts['device']}, torch {facts['torch']} (`make gpu`):\n\n{markdown(table)}\n\n"
        f"Relative error of a batch's gradient against float64 on a CPU: {'; '.join(said)}. After three rounds "
        f"LeNet-5's weights differ from the CPU's by at most {lenet:.0e}; AlexNet's dropout draws other numbers on a "
        "GPU, and ResNet-18's BatchNorm amplifies rounding. The table is of LeNet-5's convolutions as one in K groups; "
        "since then they are products of windows. The last of four rounds of its training, tried on the same card, by "
        f"how they are taken (in brackets what a profiler counts): {convolutions}."
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


def _codecs(record: dict) -> str:
    """A row per codec: seconds of a core, of a dense message and of a sparse one."""
    rows = []
    for codec, own in groupby(sorted(record["rows"], key=lambda row: row["codec"]), lambda row: row["codec"]):
        cells = {"codec": f"`{codec}`"}
        for row in own:
            what = f"at sparsity {row['sparsity']:g}" if row["sparsity"] else "dense"
            cells |= {f"{verb}, {what}": f"{row[f'{verb}_cpu_s']:.3f}" for verb in ("encode", "decode")}
        rows.append(cells)
    millions = max(row["numbers"] for row in record["rows"]) / 1e6
    return f"Coding AlexNet's {millions:.1f} million values, seconds of a core:\n\n{markdown(pd.DataFrame(rows))}"


def encryption_part(root: Path) -> str:
    """Bytes and seconds of a round under encryption, means over repetitions, and how far the mean is from the plain."""
    rows = encrypted.read_encrypted(root / "benchmarks")
    if not len(rows):
        return NOTHING
    means = rows.groupby(["split", "label"], sort=False).mean(numeric_only=True)
    dense = means.xs("dense", level="label")
    table = pd.DataFrame(
        {
            "model, sent": [f"{model}, {label}" for model, label in means.index],
            "numbers": [f"{count:.0f}" for count in means["numbers"]],
            "message, MiB": [f"{sent / 2**20:.2f}" for sent in means["up_bytes"]],
            "times the plain": [f"{each:.0f}" for each in means["up_bytes"] / means["plain_bytes"]],
            **{f"{words}, s": [f"{each:.3f}" for each in means[name]] for name, words in encrypted.STAGES.items()},
            "all three, dense = 1": [f"{each:.3f}" for each in means["latency_s"] / dense["latency_s"]],
        }
    )
    error = f"The mean differs from the plain one by at most {rows['error'].max():.0e}."
    return f"{markdown(table)}\n\n{error}"
