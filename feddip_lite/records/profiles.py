"""Profiles: `params/<name>.yaml`, a queue of runs in order of value.

    defaults: {dataset: fashionmnist, rounds: 200, ...}
    queue:
      - {method: [fedavg, feddip], partition: [iid, pathological], seed: [0, 1, 2]}

An entry stands for every combination of its lists, the last list varying fastest; entries run from top to bottom.
Values are read as on the command line: `1e-1` is a number, `none` is none.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import yaml

from ..config import Config
from ..core.settings import read_value, refuse_unknown


def load_profile(path: str | Path) -> list[Config]:
    """The configurations of a profile in order; one that occurs twice is kept at its first place.

    Raises:
        ValueError: not a profile, or a wrong configuration; names the file and the entry.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("queue"), list):
        raise ValueError(f"{path}: expected a mapping with a list `queue`")
    refuse_unknown(content, ["defaults", "queue"], str(path))
    configs = {}
    for number, entry in enumerate(content["queue"], 1):
        try:
            for config in _expand(read_value({**(content.get("defaults") or {}), **entry})):
                configs.setdefault(config.run_id, config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, entry {number}: {error}") from error
    return list(configs.values())


def _expand(entry: dict) -> list[Config]:
    choices = [value if isinstance(value, list) else [value] for value in entry.values()]
    return [Config.from_dict(dict(zip(entry, values, strict=True))) for values in product(*choices)]
