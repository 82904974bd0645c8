"""The same run in one process, on Flower's simulation and on its deployment: are they the same, to the bit?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..config import Config
from ..records.store import read_run
from ..train.run import run
from .processes import ENGINES, Federation

HERE = "one process"
PLACES = (HERE, *ENGINES)
TIME_LIMIT = 3600.0  # seconds for a run


def side_by_side(configs: Sequence[Config], folder: Path, places: Sequence[str] = PLACES) -> pd.DataFrame:
    """Run each configuration in each of the `places`; all must have the same number of clients.

    Returns:
        A row per run: `method`, `place`, and `fingerprint` of its record below `folder`/<place>. Runs that are recorded
        there already are not made again.
    """
    rows = []
    for place in places:
        results = Path(folder).resolve() / place.replace(" ", "_")
        missing = [config for config in configs if not read_run(results, config.run_id)]
        if missing and place == HERE:
            for config in missing:
                run(config, results_dir=results, progress=False)
        elif missing:
            with Federation(results / ".flower", configs[0].clients, place) as federation:
                for config in missing:
                    federation.wait(federation.submit(config, results), TIME_LIMIT)
        for config in configs:
            rows.append({"method": config.method, "place": place, **fingerprint(results, config.run_id)})
    return pd.DataFrame(rows)


def fingerprint(results: Path, run_id: str) -> dict:
    """SHA-256 of a recorded run's final weights, mask, buffers, server memory, client memories, and of its history
    without `seconds`; and its bytes, up and down."""
    history, record = read_run(results, run_id)
    parts = dict(record["provenance"]["state_sha256"])
    parts["clients"] = hashlib.sha256(json.dumps(parts["clients"], sort_keys=True).encode()).hexdigest()
    parts["history"] = hashlib.sha256(history.drop(columns="seconds").to_csv(index=False).encode()).hexdigest()
    return {**parts, **{name: int(history[name].sum()) for name in ("up_bytes", "down_bytes")}}


def same_bits(table: pd.DataFrame) -> bool:
    """Whether each method of `side_by_side` came out the same everywhere."""
    return len(table.drop(columns="place").drop_duplicates()) == table["method"].nunique()


def shown(table: pd.DataFrame) -> str:
    """The table in Markdown, a column per run, with the first 12 digits of each checksum."""
    texts = table.astype(str).map(lambda text: text[:12]).to_numpy().T
    lines = [f"| {' | '.join([name, *row])} |" for name, row in zip(table.columns, texts, strict=True)]
    return "\n".join([lines[0], "|---" * (len(table) + 1) + "|", *lines[1:]])
