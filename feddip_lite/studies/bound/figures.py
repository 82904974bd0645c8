"""Figures of the convergence bound, from recorded paths (`path.record_path`) as `records.names.describe` returns them.

A term has the same colour everywhere, a partition too. Every figure says on itself which data and how many rounds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...records.names import splits
from ...report import style
from ...report.style import BLUE, GREEN, INK, ORANGE, PURPLE, VERMILION, styled
from .tables import GAMMAS, SCHEDULES, TERMS, bound_of, checkpoints, each_run, gamma_of, removed_so_far, summary

TERM_LOOKS = dict(zip(TERMS, ((ORANGE, "D"), (VERMILION, "s"), (GREEN, "^"), (BLUE, "v")), strict=True))
FORMS = {"": {}, ", as printed": {"printed": True}, r", median $\gamma$": {"typical": True}}
SPLIT_COLOURS = (INK, VERMILION, BLUE, GREEN, PURPLE, ORANGE)
PRESETS = {"paper": ("", "o"), "repo": ((4, 1.5), "s"), "memory": ((1, 1), "^")}
SQUARES = r"squared gradient norm $[F^2/W^2]$"
PATH = {
    "dispersion": r"dispersion $\gamma$", "pruning_error": r"pruning error $\delta$",
    "pruning_distance": r"$\Vert w - w \odot m \Vert = \sqrt{\delta}\,\Vert w \Vert$  $[W]$",
}  # fmt: skip
TOTALS = {
    "removed": r"$\Sigma_t \sqrt{\delta_t}\,\Vert w_t \Vert$  $[W]$",
    "pruning": r"$2 L \mu\, \Sigma_t \sqrt{\delta_t}\,\Vert w_t \Vert$  $[F^2/W^2]$",
}


@styled
def terms(runs: pd.DataFrame, title: str) -> Figure:
    """Left side and terms against the number of rounds (`term_lines`), a panel per run; log axes. Solid: the consistent
    form; dashed: what is printed otherwise; dotted: drift with the median gamma."""
    each, names = each_run(runs), summary(runs)["name"]
    rows = pd.concat([term_lines(run).assign(panel=name) for run, name in zip(each, names, strict=True)])
    looks = {"left side: running mean": {"color": INK, "marker": "o", "dashes": ""}}
    for dashes, kind in zip(("", (4, 1.5), (1, 1)), FORMS, strict=True):
        looks |= {name + kind: {"color": c, "marker": m, "dashes": dashes} for name, (c, m) in TERM_LOOKS.items()}
    panels = style.line_panels(rows, looks, height=2.4, col="panel", col_wrap=min(2, rows["panel"].nunique()))
    for panel in panels.axes.flat:
        style.round_axis(panel)
        panel.set(yscale="log", ylabel=SQUARES)
    _headed(panels.figure, runs, title)
    return panels.figure


def term_lines(run: pd.DataFrame) -> pd.DataFrame:
    """What `terms` draws of one run: `name`, `x` (round), `y` [F²/W²], where it is positive.

    Constants are those of the whole run: the theorem's hold for all rounds, so only the left side and the pruning
    term move.
    """
    points, removed = checkpoints(run), removed_so_far(run)
    left = points["gradient_square"].expanding().mean()
    found = [pd.DataFrame({"name": "left side: running mean", "x": points["round"], "y": left})]
    for (kind, form), shown in zip(FORMS.items(), (TERMS, ("pruning", "noise"), ("drift",)), strict=True):
        for name in shown:
            growth = removed / removed.iloc[-1] if name == "pruning" else 1.0
            values = getattr(bound_of(run, **form), name) * growth
            found.append(pd.DataFrame({"name": name + kind, "x": run["round"], "y": values}))
    rows = pd.concat(found)
    return rows[rows["y"] > 0]


@styled
def path(runs: pd.DataFrame, title: str) -> Figure:
    """gamma, delta and sqrt(delta) ||w|| against rounds, a row per setting, a line per partition.

    The thin line is gamma's median. Estimates below 1, which noise allows, are drawn at 1; where noise hides gamma
    there is no point, and the legend says how often.
    """
    rows = runs.melt(["round", "split", "lr_schedule"], list(PATH), "column", "y").rename(columns={"round": "x"})
    gamma = rows["column"] == "dispersion"
    rows["y"] = rows["y"].where(~gamma, rows["y"].clip(lower=1)).where(np.isfinite(rows["y"]))
    rows = rows.dropna().assign(name=lambda own: own["split"])
    marks = zip(splits(runs), SPLIT_COLOURS, "osD^vP", strict=False)
    looks = {split: {"color": colour, "marker": marker, "dashes": ""} for split, colour, marker in marks}
    schedules = [name for name in SCHEDULES if (runs["lr_schedule"] == name).any()]
    by = {"row": "lr_schedule", "col": "column", "row_order": schedules, "col_order": list(PATH)}
    panels = style.line_panels(rows, looks, "", 2.5, **by)
    panels.figure.legends.clear()  # `_medians` has more to say
    for (_, column), panel in panels.axes_dict.items():
        style.round_axis(panel)
        panel.set_ylabel(PATH[column])
    for schedule in schedules:
        panel = panels.axes_dict[schedule, "dispersion"]
        panel.set(yscale="log", ylim=(0.8, max(10, 1.3 * panel.get_ylim()[1])))
        panel.set_title(SCHEDULES[schedule], loc="left")
        _medians(panel, runs[runs["lr_schedule"] == schedule], looks)
    _headed(panels.figure, runs, title)
    return panels.figure


def _medians(panel: Axes, runs: pd.DataFrame, looks: dict[str, dict]) -> None:
    """A line at each partition's median gamma, and a legend that says it and how often noise hides gamma."""
    named = {}
    for run in each_run(runs):
        split, points, median = run["split"].iloc[0], checkpoints(run), gamma_of(run, typical=True)
        hidden = int((~np.isfinite(points["dispersion"])).sum())
        panel.axhline(median, color=looks[split]["color"], linewidth=0.8)
        words = f", hidden at {hidden} of {len(points)}" if hidden else ""
        named[f"{split}: median {median:.3g}{words}"] = looks[split]
    style.legend(panel, named, loc="best", fontsize=7.5)


@styled
def pruning_term(runs: pd.DataFrame, title: str) -> Figure:
    """What pruning removes in a whole run, and the term the bound makes of it, against the rounds R between masks; a
    row per partition, a line per preset."""
    rows = summary(runs).melt(["split", "preset", "mask_interval"], list(TOTALS), "column", "y")
    rows = rows.groupby(["split", "preset", "mask_interval", "column"], as_index=False)["y"].mean()
    intervals = sorted(rows["mask_interval"].unique())
    rows = rows.assign(x=rows["mask_interval"].map(intervals.index), name="preset " + rows["preset"])
    looks = {f"preset {name}": {"color": VERMILION, "marker": m, "dashes": d} for name, (d, m) in PRESETS.items()}
    by = {"row": "split", "col": "column", "row_order": splits(runs), "col_order": list(TOTALS)}
    panels = style.line_panels(rows, looks, "{row_name}", **by)
    for (_, column), panel in panels.axes_dict.items():
        panel.set(yscale="log", ylabel=TOTALS[column], xlabel="rounds R between masks")
        panel.set_xticks(range(len(intervals)), [f"{r:g}" for r in intervals])
        panel.margins(x=0.1)
        style.log_ticks(panel.yaxis)
    _headed(panels.figure, runs, title)
    return panels.figure


@styled
def shares(runs: pd.DataFrame, title: str) -> Figure:
    """The share of each term of the right side in percent, consistent and as printed; two rows per run, for the largest
    gamma and for its median."""
    each = list(zip(each_run(runs), summary(runs)["name"], strict=True))
    figure, axes = style.grid(1, 2, 0.3 * len(GAMMAS) * len(each) + 0.6)
    for panel, printed in zip(axes[0], (False, True), strict=True):
        found = {
            f"{name}, {gamma} $\\gamma$": bound_of(run, typical=typical, printed=printed).shares()
            for run, name in each for gamma, typical in GAMMAS.items()
        }  # fmt: skip
        table = 100 * pd.DataFrame(found).T[list(TERMS)]
        words = table.map(lambda share: f"{share:.1f}" if share >= 0.05 else "< 0.1" if share else "-")
        look = {"cmap": "Blues", "cbar": False, "linewidths": 1, "yticklabels": False}
        sns.heatmap(table, vmin=0, vmax=100, annot=words, fmt="", ax=panel, **look)
        panel.set_title("as printed [%]" if printed else "consistent [%]", loc="left")
    axes[0][0].set_yticks(0.5 + np.arange(len(table)), table.index)
    _headed(figure, runs, title)
    return figure


def _headed(figure: Figure, runs: pd.DataFrame, title: str) -> None:
    words = runs["setting"].iloc[0].split(", ")  # panels say the schedule
    shown = [word for word in words if not word.startswith(("lr schedule", "smoothness"))]
    style.headed(figure, title, ", ".join(shown))
