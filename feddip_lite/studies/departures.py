"""What the choices are worth in which this package departs from published code (docs/deviations.md).

Results come as `records.names.describe` returns them; a departure's published form is a run of the same setting.
"""

from __future__ import annotations

import pandas as pd

from ..records.names import FORMS, HEADLINE, IN_ORDER, computed, labels, splits, title_of
from ..records.store import headline
from ..report.statistics import paired, quantity


def departures_table(results: pd.DataFrame) -> pd.DataFrame:
    """A row per recorded form that another code has: what is compared, the partition, the difference in final accuracy.

    Baselines' variants stand against the method as it is here, paired by seed; the pairs of classes in order against
    those that are drawn, by what FedDIP loses against FedAvg. Values are text, with intervals over seeds.
    """
    runs = headline(results)
    rows = []
    for split in splits(runs):
        own = runs[runs["split"] == split]
        departs = (own["preset"] != "paper") | ~own["changed"].map(computed).isin(FORMS)
        variants = own[~own["method"].isin(HEADLINE) & departs]
        for label in labels(variants):
            usual = title_of(variants.loc[variants["label"] == label, "method"].iloc[0])
            rows.append((label, usual, split, paired(own, label, usual)))
        if split.endswith(IN_ORDER):
            for each in (split.removesuffix(IN_ORDER), split):
                rows.append(("FedDIP", "FedAvg", each, paired(runs[runs["split"] == each], "FedDIP", "FedAvg")))
    columns = ["form", "compared with", "partition", "final accuracy, difference"]
    return pd.DataFrame([(*row, quantity(values, sign="+")) for *row, values in rows if len(values)], columns=columns)
