"""Write what the repository shows of its recorded runs: `python tools/publish.py`

Every figure in figures/, and the generated parts of README.md and docs/, which stand between their markers. All of it
follows from results/, benchmarks/ and params/: nothing is trained, and writing twice gives the same bytes.
"""

import argparse
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from feddip_lite import Config
from feddip_lite.records.catalogue import RECORDED, comparable, main_runs, recorded
from feddip_lite.records.names import HEADLINE, SHARED_START, splits, title_of
from feddip_lite.records.store import ROOT, atomic_write, headline
from feddip_lite.report import curves, diagrams
from feddip_lite.report.statistics import interval, paired
from feddip_lite.report.style import grid, headed, name_points, save_figure, style
from feddip_lite.report.tables import NOTE, NOTHING, assumptions, circumstances, markdown, methods_table, results_table
from feddip_lite.studies import (
    chosen,
    encrypted,
    equal_bytes,
    ingredients,
    recipes,
    second_order,
    sparsity_sweep,
    start,
)
from feddip_lite.studies.claims import RULE, claims_table
from feddip_lite.studies.cost import figures as cost_figures
from feddip_lite.studies.cost import tables as cost_tables
from feddip_lite.studies.departures import departures_table

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_tables import benchmark_part, encryption_part
from report import answer_of

MAIN = ("lite", "lenet5_fashionmnist")
"""The main comparison: profile and name."""
EVEN = {"model": "lenet5", "dataset": "fashionmnist", "partition": "iid"}
RECIPE = "FedDIP X4"
RIVAL = "FedSparsify-Global, 8 bits"
"""Of all ways to send a model, the one that the README shows, and the best other method so sent."""
Named = Iterator[tuple[str, Figure]]
"""File names without suffix, and their figures; none where nothing is recorded."""


def publish(root: Path) -> None:
    """Write all of it into the checkout at `root`.

    Raises:
        ValueError: a damaged record, or a page without its markers; names the file.
    """
    for part in PARTS:
        for name, figure in part(root):
            save_figure(figure, name, root / "figures")
            plt.close(figure)
    for (file, name), text in generated_parts(root).items():
        write_section(root / file, name, text)


@functools.cache
def comparisons(root: Path) -> dict[tuple[str, str], pd.DataFrame]:
    """(profile, name) -> runs of every recorded main comparison."""
    return {(each, name): runs for each in RECORDED for name, runs in main_runs(each, root / "results").items()}


# ---- figures


def workflow(root: Path) -> Named:
    """One round in a picture: this needs no results."""
    yield "feddip_workflow", diagrams.workflow()


def first_look(root: Path) -> Named:
    """The README's figure: accuracy against bytes, of methods, RECIPE and RIVAL, and accuracy where hardly anything is
    left."""
    runs = every_form(root)
    swept = sparsity_sweep.recorded_sweep(recorded("lite", root / "results", **EVEN))
    if runs is None or not len(comparable(runs)) or not len(swept):
        return
    runs = runs[~runs["label"].isin({*recipes.RECIPES} - {RECIPE, RIVAL})]
    with style():
        figure, ((left, right),) = grid(1, 2, 4.0)
        points = curves.bytes_panel(left, runs, splits(runs)[0])
        sparsity_sweep.accuracy_panel(right, swept)
        left.set_title("Accuracy against bytes, a point per method", loc="left")
        where = f", {SHARED_START}" if SHARED_START in swept["setting"].iloc[0] else ""
        right.set_title(f"Towards extreme sparsity{where}", loc="left")
        headed(figure, f"{', '.join(runs['setting'].iloc[0].split(', ')[:4])}; {splits(runs)[0]}")
        name_points(left, points)
    yield "first_look", figure


def accuracies(root: Path) -> Named:
    """Accuracy against rounds and bytes, of the paper's own question and of every method; one set per comparison."""
    for (profile, name), runs in comparisons(root).items():
        title = f"Recorded, profile {profile}"
        own = runs[runs["method"].isin(HEADLINE)]
        yield f"{name}_{profile}_accuracy", curves.accuracy_curves(own[own["preset"] != "memory"], title)
        if len(comparable(runs)) and not set(runs["method"]) <= set(HEADLINE):
            yield f"{name}_{profile}_methods", curves.accuracy_for_bytes(runs, title)


def extreme(root: Path) -> Named:
    """Accuracy against target sparsity, and FedDIP minus FedDP."""
    records = recorded("lite", root / "results", **EVEN)
    swept = sparsity_sweep.recorded_sweep(records)
    if len(swept):
        yield "extreme_sparsity", sparsity_sweep.sweep(swept, "Recorded, profile lite")


def cost(root: Path) -> Named:
    """Bytes of the recorded runs."""
    runs = comparisons(root).get(MAIN)
    if runs is not None:
        even = runs[runs["split"] == splits(runs)[0]]
        yield "cost_bytes", cost_figures.bytes_by_method(even, "Recorded, profile lite")


@functools.cache
def every_form(root: Path) -> pd.DataFrame | None:
    """The main comparison, and what only travels otherwise; None before anything is recorded."""
    runs = comparisons(root).get(MAIN)
    return None if runs is None else recipes.forms(recorded(MAIN[0], root / "results"), runs)


def coded(root: Path) -> Named:
    """Accuracy against bytes of every method and every way to send it, as soon as one of these is recorded. Named are
    the ways, and what they are ways of."""
    runs = every_form(root)
    if runs is not None and set(recipes.RECIPES) & set(runs["label"]):
        named = {*recipes.RECIPES, *(title_of(config.method) for config in recipes.RECIPES.values())}
        yield "recipes", curves.accuracy_for_bytes(runs, "Recorded, profile lite", named)


def encryption(root: Path) -> Named:
    """What a round costs under encryption, by how much is kept."""
    rows = encrypted.read_encrypted(root / "benchmarks")
    if len(rows):
        yield "encryption", encrypted.by_kept(rows, "One round of 5 clients under CKKS, on one core")


def findings(root: Path) -> Named:
    """The questions of docs/findings.md, each as soon as what it compares is recorded."""
    drawn = Config().classes_dealt
    records = recorded("lite", root / "results", model="lenet5", dataset="fashionmnist", classes_dealt=drawn)
    title, usual = "Recorded, profile lite", comparisons(root).get(MAIN)
    varied = ingredients.ingredients(records)
    if set(ingredients.FEEDBACK) <= set(varied["fed_back"]):
        yield "ingredients", ingredients.crossed(varied, f"{title}: feedback and penalty")
    if len(chosen.candidates_table(records, "penalty_max")):
        yield "strengths", chosen.strengths(records[records["partition"] == "iid"], f"{title}: how strong a penalty")
    networks = {"LeNet-5, Fashion-MNIST": records[records["partition"] == "iid"]}
    networks["AlexNet (0.25), CIFAR-10"] = recorded("start", root / "results", model="alexnet", partition="iid")
    begun = {name: start.starts(runs) for name, runs in networks.items()}
    begun = {name: rows for name, rows in begun.items() if start.STARTS["none"] in set(rows["start"])}
    if begun:
        yield "start", start.by_start(begun, f"{title}: what round 0 sees; T = 200")
    curvatures = second_order.read_second_order(root / "benchmarks")
    if len(curvatures):
        yield "second_order", second_order.second_order(curvatures, f"{title}: magnitude and second order")
    forms = equal_bytes.equal_bytes(records, usual) if usual is not None else pd.DataFrame(columns=["label"])
    if {equal_bytes.SHORTER, equal_bytes.NARROWER} <= set(forms["label"]):
        yield "equal_bytes", equal_bytes.for_equal_bytes(forms, f"{title}: dense models for FedDIP's bytes")


PARTS = (workflow, first_look, accuracies, extreme, cost, coded, encryption, findings)


# ---- README and docs, of recorded runs


def generated_parts(root: Path) -> dict[tuple[str, str], str]:
    """(file, name in its markers) -> Markdown, for the checkout at `root`."""
    return {
        ("README.md", "found"): found_part(root),
        ("README.md", "headline"): headline_part(root),
        ("README.md", "notebooks"): notebooks_part(root),
        ("docs/methods.md", "methods"): methods_part(),
        ("docs/results.md", "results"): results_part(root),
        ("docs/claims.md", "claims"): claims_part(root),
        ("docs/deviations.md", "departures"): departures_part(root),
        ("docs/cost.md", "cost"): cost_part(root),
        ("docs/bytes.md", "recipes"): recipes_part(root),
        ("docs/bytes.md", "encryption"): encryption_part(root),
        ("docs/speed.md", "benchmark"): benchmark_part(root),
        ("docs/findings.md", "answers"): answers_part(root),
        **{("docs/findings.md", f"question-{number}"): text for number, text in questions(root).items()},
    }


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a generated part."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `name` of a Markdown file; every other byte stays.

    Raises:
        ValueError: the file lacks a marker, or has one twice or in the wrong order.
    """
    begin, end = markers(name)
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{path.name}: needs the lines {begin} and {end}, once each and in this order")
    before, after = content.split(begin)[0], content.split(end)[1]
    atomic_write(path, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())


def found_part(root: Path) -> str:
    """What was found: accuracy for bytes, the growing penalty, RECIPE, the best other method, and RIVAL."""
    runs = comparisons(root).get(MAIN)
    if runs is None:
        return NOTHING
    finals = headline(runs[runs["split"] == splits(runs)[0]])
    dense, plain = (_points(paired(finals, "FedDIP", other)) for other in ("FedAvg", "FedDP"))
    left = 1 - finals.loc[finals["label"] == "FedDIP", "sparsity"].mean()
    share = paired(finals, "FedDIP", "FedAvg", "mib", ratio=True).mean()
    said = [
        f"With {left:.0%} of LeNet-5's weights, FedDIP's accuracy on Fashion-MNIST minus FedAvg's is {dense}, for "
        f"{share:.0%} of the bytes. Minus FedDP's, which is the same without the growing penalty, it is {plain}."
    ]
    every = every_form(root)
    sent = headline(every[every["split"] == splits(runs)[0]])
    if RECIPE in set(sent["label"]):
        more, share = (paired(sent, RECIPE, *to) for to in (("FedDIP",), ("FedAvg", "mib", True)))
        said += [
            f"Sending kept weights alone, in 8 bits both ways ([X4](docs/bytes.md)), takes {share.mean():.0%} of "
            f"FedAvg's bytes, at {_points(more)} against FedDIP."
        ]
    if other := best_other(finals):
        more = _points(paired(finals, other, "FedDIP"))
        fewer = paired(finals, other, "FedDIP", "mib", ratio=True).mean()
        said += [
            f"The best other method that prunes as far, {other}, is at {more} against it, for {fewer:.0%} of its bytes."
        ]
    if {RECIPE, RIVAL} <= set(sent["label"]):
        more, share = (paired(sent, RIVAL, *to) for to in ((RECIPE,), (RECIPE, "mib", True)))
        name = RIVAL.removesuffix(", 8 bits")
        said += [f"In 8 bits, too, {name} is at {_points(more)} against X4, for {share.mean():.0%} of its bytes."]
    told = f"({splits(runs)[0]}, 95 % intervals over seeds; what that says of the paper's claims: "
    return " ".join([*said, told + "[docs/claims.md](docs/claims.md).)"])


def _points(differences: np.ndarray) -> str:
    mean, half = (100 * value for value in interval(differences))
    return f"{mean:+z.1f} points (n={len(differences)})" if np.isnan(half) else f"{mean:+z.1f} ± {half:.1f} points"


def best_other(finals: pd.DataFrame) -> str:
    """The label of the method beside the paper's own, of those that end as sparse, that is furthest above FedDIP,
    paired by seed; empty without any."""
    as_sparse = finals["sparsity"] > finals.loc[finals["label"] == "FedDIP", "sparsity"].min() - 0.001
    sparse = finals[as_sparse & ~finals["method"].isin(HEADLINE)]
    gains = {label: paired(finals, label, "FedDIP").mean() for label in sparse["label"].unique()}
    return max(gains, key=gains.get, default="")


def headline_part(root: Path) -> str:
    """The paper's own question in a table: FedAvg, FedDP, FedDIP and the best other method of each comparison."""
    tables = []
    for runs in comparisons(root).values():
        finals, table, words = headline(runs), results_table(runs), runs["setting"].iloc[0].split(", ")
        where = ", ".join([*words[:3], *(word for word in words if word.startswith("width"))])
        if SHARED_START in words:  # not FedDIP's own start: docs/results.md has it
            continue
        for split in splits(runs):
            shown = ["FedAvg", "FedDP", "FedDIP", best_other(finals[finals["split"] == split])]
            rows = table[(table["partition"] == split) & table["method (preset)"].isin(shown)]
            tables.append(rows.assign(partition=f"{where}; {split}").rename(columns={"partition": "experiment"}))
    if not tables:
        return NOTHING
    columns = ["experiment", "method (preset)", "final accuracy", "accuracy minus FedAvg's", "share of FedAvg's bytes"]
    table = pd.concat(tables)[columns].rename(columns={"method (preset)": "method"})
    table.loc[table.duplicated("experiment"), "experiment"] = ""
    return markdown(table)


def notebooks_part(root: Path) -> str:
    """A row per notebook: its question, and the answer that its outputs give."""
    rows = []
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        question = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        link = f"[{path.stem[:2]} {path.stem[3:].replace('_', ' ')}](notebooks/{path.name})"
        rows.append({"notebook": link, "question": question, "answer": first_sentences(answer_of(notebook))})
    return markdown(pd.DataFrame(rows)) if rows else NOTHING


def first_sentences(text: str, least: int = 60) -> str:
    """As many sentences of the beginning as have `least` letters together; in a table's cell."""
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", text.replace("|", "\\|").strip())
    count = next((n for n in range(1, len(sentences)) if len(" ".join(sentences[:n])) >= least), len(sentences))
    return " ".join(sentences[:count])


def methods_part() -> str:
    """What each method is, and what was assumed for the reconstructions."""
    table = methods_table().astype(str).replace(r"([|*])", r"\\\1", regex=True)
    as_code = {"name": "`" + table["name"] + "`", "presets": "`" + table["presets"].str.replace(", ", "`, `") + "`"}
    return f"{markdown(table.assign(**as_code))}\n\n{assumptions()}"


def results_part(root: Path) -> str:
    """A table per recorded comparison, with its circumstances."""
    parts = []
    for (profile, _), runs in comparisons(root).items():
        parts += [f"**{runs['setting'].iloc[0]}** (profile `{profile}`)", markdown(results_table(runs))]
        parts += [circumstances(root / "results" / profile, runs)]
    return "\n\n".join([*parts, NOTE] if parts else [NOTHING])


@functools.cache
def claims(root: Path) -> pd.DataFrame:
    """Every claim and its verdict; `unlike` is what its setting says beyond the main comparison's, on IID data."""
    table, main = claims_table(root / "results", root / "params" / "claims.yaml"), comparisons(root).get(MAIN)
    usual = {"-", "IID", *("" if main is None else main["setting"].iloc[0]).split(", ")}
    unlike = [", ".join(word for word in words.split(", ") if word not in usual) for words in table["setting"]]
    return table.assign(unlike=unlike)


def claims_part(root: Path) -> str:
    """The settings, what the sources claim and the verdicts, and the rule behind these."""
    table = claims(root)
    table = table[table["source"] != "ours"].drop(columns=["question", "answer", "unlike"])
    links = [f"[{name[:2]}](../notebooks/{name}.ipynb)" for name in table["notebook"]]
    again = table.duplicated(["claim", "source", "notebook"])  # a claim's further settings
    table = table.assign(notebook=links)
    table.loc[again, ["claim", "source", "notebook"]] = ""
    settings = "\n".join(
        f"- {runs['setting'].iloc[0]} (profile `{profile}`)" for (profile, _), runs in comparisons(root).items()
    )
    return "\n\n".join(part for part in (settings, markdown(table), RULE) if part)


def departures_part(root: Path) -> str:
    """What is recorded of forms that other codes have, in the setting of the main comparison."""
    runs = comparisons(root).get(MAIN)
    if runs is None:
        return NOTHING
    records = recorded(MAIN[0], root / "results")
    table = departures_table(records[records["setting"].isin(runs["setting"])])
    return f"{runs['setting'].iloc[0]} (profile `{MAIN[0]}`):\n\n{markdown(table)}" if len(table) else NOTHING


def questions(root: Path) -> dict[int, str]:
    """Of each question that docs/findings.md asks: its figure, as soon as it is drawn, what is measured, and the
    verdicts in sentences."""
    table, found = claims(root), {}
    figures = {1: "ingredients", 2: "strengths", 3: "start", 4: "extreme_sparsity", 5: "second_order", 6: "equal_bytes"}
    for number, own in table[table["question"] > 0].groupby("question"):
        figure = root / "figures" / f"{figures.get(number)}.png"
        shown = [f"![{own['claim'].iloc[0]}](../figures/{figure.name})"] * figure.exists()
        where = own["unlike"].map(lambda words: f"; {words}" if words else "")
        rows = own.assign(where=where).rename(columns={"ours, n seeds": "values"})
        said = [
            f"- {row.claim}{row.where}: **{row.verdict}**. {row.measured}: {row.values}." if row.values != "-" else
            f"- {row.claim}: not measured yet."
            for row in rows.itertuples()
        ]  # fmt: skip
        found[number] = "\n\n".join([*shown, "\n".join(said)])
    return found


def answers_part(root: Path) -> str:
    """Of each question of docs/findings.md that anything answers yet, the answers under the heading's first words."""
    table = claims(root)
    table = table[(table["answer"] != "") & ~table.duplicated(["claim", "measured"])]  # in its first setting
    table = table.assign(answer=table["answer"] + table["unlike"].map(lambda words: f", {words}" if words else ""))
    sentences = table["answer"].str[:1].str.upper() + table["answer"].str[1:] + "."
    said = sentences.groupby(table["question"]).agg(" ".join)
    headings = re.findall(
        r"^## (\d+)\. ([^:\n]+)", (root / "docs" / "findings.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    answers = [(name, said[int(n)]) for n, name in headings if int(n) in said]
    return "\n".join(f"- **{name}.** {text}" for name, text in answers) or NOTHING


def cost_part(root: Path) -> str:
    """Sizes at sparsity 0.9, and what sparsity buys; of measurements that are not to be quoted only that."""
    record = cost_tables.read_cost(root / "benchmarks")
    if record is None:
        return NOTHING
    if cost_tables.reservation(record):
        return cost_tables.circumstances(record)
    sizes = cost_tables.models_table(record["models"][record["models"]["target"] == 0.9])
    said = cost_tables.reading(record["clients"], record["times"])
    return "\n\n".join([markdown(sizes), said, cost_tables.circumstances(record)])


def recipes_part(root: Path) -> str:
    """The most accurate form for each budget of bytes, with its figure as soon as it is drawn."""
    runs, figure = every_form(root), root / "figures" / "recipes.png"
    if runs is None:
        return NOTHING
    shown = [f"![Final accuracy of every form against its bytes](../figures/{figure.name})"] * figure.exists()
    return "\n\n".join([*shown, markdown(recipes.advice_table(runs))])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the checkout; default: this one")
    matplotlib.use("Agg")
    try:
        publish(parser.parse_args(arguments).root.resolve())
    except (ValueError, OSError) as error:
        print(f"tools/publish.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
