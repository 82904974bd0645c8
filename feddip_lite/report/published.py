"""Every figure in `figures/`, from what is recorded and nothing else: notebook 12 writes them, a test draws them again.

Each function yields pairs of a file name without suffix and its figure, for the checkout at `root`; where nothing is
recorded, none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from ..records.catalogue import RECORDED, comparable, main_runs, profile_queue, recorded, rows_choosing_masks
from ..records.names import HEADLINE, splits
from ..report import curves as figures
from ..report import diagrams as drawings
from ..studies import layers as anatomy
from ..studies import sparsity_sweep as extremes
from ..studies.bound import figures as bound_figures
from ..studies.bound import tables as bound_report
from ..studies.cost import figures as cost_figures
from ..studies.cost import tables as cost_report

Named = Iterator[tuple[str, Figure]]


def ideas(root: Path) -> Named:
    """The workflow, pruning, and the schedules in the slides' setting: these need no results."""
    slides = profile_queue("paper", method="feddip", preset="paper")[0].resolved()
    shape = (slides.rounds, slides.initial_sparsity, slides.target_sparsity, slides.penalty_max, slides.penalty_steps)
    yield "feddip_workflow", drawings.workflow()
    yield "pruning", drawings.before_after_pruning()
    yield "schedules", drawings.schedules(*shape)


def accuracies(root: Path) -> Named:
    """Accuracy against rounds and bytes, of the paper's own question and of every method; one set per comparison."""
    for profile, name, runs in _comparisons(root):
        title = f"Recorded, profile {profile}"
        own = runs[runs["method"].isin(HEADLINE)]
        yield f"{name}_{profile}_accuracy", figures.accuracy_curves({title: own[own["preset"] != "memory"]})
        readings = own[own["method"] == "feddip"]
        if readings["preset"].nunique() > 1:  # `memory` among them: beside all others its curve would hide the rest
            yield f"{name}_{profile}_presets", figures.accuracy_curves({title: readings}, x=["round"])
        if set(runs["method"]) <= set(HEADLINE):
            continue
        if len(comparable(runs)):
            yield f"{name}_{profile}_methods", figures.accuracy_for_bytes(runs, title)
        for split in splits(comparable(runs)):
            figure = figures.families(runs[runs["split"] == split], title)
            yield f"{name}_{profile}_families_{split.split()[0].lower()}", figure


def masks(root: Path) -> Named:
    """Overlap, regrown weights and pruning error in the rounds that choose a mask, for each comparison's first
    partition; and the sparsity of every tensor beside ERK's, for the runs that recorded it."""
    for profile, name, runs in _comparisons(root):
        title = f"Recorded, profile {profile}"
        pruning = runs[runs["method"].isin(["feddp", "feddip"]) & (runs["split"] == splits(runs)[0])]
        chosen = rows_choosing_masks(pruning)
        if len(chosen):
            columns = ["mask_overlap", "regrown", "pruning_error"]
            yield f"{name}_{profile}_masks", figures.column_panels(chosen, columns, title)
    for name, rows in anatomy.recorded_layers(root / "results").items():
        yield name, anatomy.layer_bars(rows, "Recorded")


def extreme(root: Path) -> Named:
    """Accuracy against target sparsity, and each of FedDIP's settings changed alone."""
    records = recorded("lite", root / "results", model="lenet5", dataset="fashionmnist", partition="iid")
    swept = extremes.recorded_sweep(records)
    if len(swept):
        yield "extreme_sparsity", extremes.sweep(swept, "Recorded, profile lite")
    for target in (0.9, 0.995):
        varied = extremes.ablations(records[records["target_sparsity"] == target])
        if varied["variant"].nunique() > 1:
            yield f"feddip_ablations_{target:g}", extremes.ablation(varied, "Recorded, profile lite")


def bound(root: Path) -> Named:
    """The terms of the convergence bound on the recorded paths."""
    records, title = bound_report.recorded_paths(root / "results"), "Recorded, profile lite"
    usual, varied = records[records["label"] == "FedDIP"], bound_report.interval_study(records)
    if len(usual):
        yield "bound_terms", bound_figures.terms(usual, title)
        yield "bound_path", bound_figures.path(usual, title)
        yield "bound_shares", bound_figures.shares(usual, title)
    if len(varied):
        yield "bound_pruning", bound_figures.pruning_term(varied, title)


def cost(root: Path) -> Named:
    """Bytes of the recorded runs; latency and size of pruned models as `python -m benchmarks cost` measured them."""
    runs = main_runs("lite", root / "results").get("lenet5_fashionmnist")
    if runs is not None:
        even = runs[runs["split"] == splits(runs)[0]]
        yield "cost_bytes", cost_figures.bytes_by_method(even, "Recorded, profile lite")
    record = cost_report.read_cost(root / "benchmarks")
    if record:
        source = cost_report.source(record)
        yield "cost_layers", cost_figures.latency(record["layers"], f"Each model's largest linear layer. {source}")
        yield "cost_latency", cost_figures.latency(record["times"], f"Whole models. {source}")
        yield "cost_files", cost_figures.file_sizes(record["models"], f"Size of pruned models, counted. {source}")


PARTS = (ideas, accuracies, masks, extreme, bound, cost)


def _comparisons(root: Path) -> Iterator[tuple]:
    for profile in RECORDED:
        for name, runs in main_runs(profile, root / "results").items():
            yield profile, name, runs
