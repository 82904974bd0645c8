"""The same run in one process, on Flower's simulation and on its deployment: are they the same, to the bit?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd

from .config import Config
from .engine import run
from .flower_run import ENGINES, Federation
from .results import read_run

HERE = "one process"


def side_by_side(configs: Sequence[Config], folder: Path, engines: Sequence[str] = ENGINES) -> pd.DataFrame:
    """Run each configuration in one process and on each of the `engines`; all with the same number of clients.

    Returns:
        A row per run: `method`, `engine`, and `fingerprint` of its record below `folder`/<engine>.
    """
    rows = []
    for engine in (HERE, *engines):
        results = Path(folder).resolve() / engine.replace(" ", "-")
        open_ = nullcontext() if engine == HERE else Federation(results / ".flower", configs[0].clients, engine)
        with open_ as federation:
            for config in configs:
                if federation is None:
                    run(config, results_dir=results, progress=False)
                else:
                    federation.wait(federation.submit(config, results), 3600)
                rows.append({"method": config.method, "engine": engine, **fingerprint(results, config.run_id)})
    return pd.DataFrame(rows)


def fingerprint(results: Path, run_id: str) -> dict:
    """SHA-256 of a recorded run's final weights, mask, buffers, server memory, client memories, and of its history
    without `seconds`; and its bytes, up and down."""
    history, record = read_run(results, run_id)
    parts = dict(record["provenance"]["state_sha256"])
    parts["clients"] = hashlib.sha256(json.dumps(parts["clients"], sort_keys=True).encode()).hexdigest()
    parts["history"] = hashlib.sha256(history.drop(columns="seconds").to_csv(index=False).encode()).hexdigest()
    return {**parts, **{name: int(history[name].sum()) for name in ("up_bytes", "down_bytes")}}
