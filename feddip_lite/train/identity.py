"""What a run's numbers came from, beside its configuration: its data, and a model or method of one's own.

A name says nothing of what is behind it. So records and checkpoints hold fingerprints, and what differs is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..config import Config
from ..core.models import MODELS, build_model, built
from ..core.own_model import OwnModel, fingerprint, own_model, source_of
from ..data.datasets import DATASETS, Dataset, load_dataset
from ..data.files import files_here
from ..methods.registry import METHODS
from .setup import fitting


def fingerprints(config: Config, data: Dataset) -> dict[str, str]:
    """SHA-256 of `data`, and of the configuration's `model` and `method` where these are one's own."""
    found = {"data": data.sha256}
    if (own := own_model(config.model)) is not None:
        found["model"] = fingerprint(own.make, build_model(config.model, **fitting(data, config)[1]))
    return found | _own_method(config)


def refuse_other(path: Path, config: Config, record: Mapping) -> None:
    """Refuse a stored run that came from other data, or from another model or method of the same name. Data that is not
    here is not looked for: who only reads results needs none.

    Raises:
        ValueError: names the record, what differs and the remedy.
    """
    facts = record["provenance"]
    there = {"data": facts.get("data", {}).get("sha256"), **facts.get("own", {})}
    here = {"data": _data_sha256(config.dataset), **_own_method(config)}
    if callable(DATASETS.get(config.dataset)) or (here["data"] and own_model(config.model) is not None):
        here = fingerprints(config, load_dataset(config.dataset))
    refuse_differing(path, "recorded", there, here, "use another results folder, or another name")


def refuse_differing(path: Path, what: str, there: Mapping, here: Mapping, remedy: str) -> None:
    """Raise ValueError, naming `path` and the first part whose fingerprints, where both are known, differ."""
    for name in sorted({*there} & {*here}):
        if there[name] and here[name] and there[name] != here[name]:
            words = f"other {name}" if name in ("data", "split") else f"another {name} of this name"
            raise ValueError(
                f"{path}: {what} with {words} ({there[name][:12]}... there, {here[name][:12]}... here); {remedy}"
            )


def _own_method(config: Config) -> dict[str, str]:
    method = METHODS[config.method]
    if method.__module__.startswith("feddip_lite."):
        return {}
    return {"method": hashlib.sha256(source_of(method).encode()).hexdigest()}


def _data_sha256(name: str) -> str | None:
    """Checksum of one of the data sets that are always known, if it is here."""
    root = Path(os.environ.get("FEDDIP_DATA") or "data").expanduser()
    always = name in DATASETS and not callable(DATASETS[name])
    paths = files_here(name, root) if always else None
    if paths is None:
        return None
    return _sha256_of_files(name, root, tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in paths))


@lru_cache(maxsize=16)
def _sha256_of_files(name: str, root: Path, state: tuple) -> str:
    return load_dataset(name, root).sha256


def known_model(make: object, config: Config, data: Dataset) -> str:
    """Make the model `make` (`own_model.Make`) known under a name of its own, `own-` and the first 8 hex digits of its
    fingerprint. Returns the name.

    Raises:
        ValueError: it is no model, or cannot be made.
    """
    if not callable(make):
        raise ValueError(f"model: a {type(make).__name__}; expected an nn.Module, or what makes one")
    own = OwnModel(make)
    name = f"own-{fingerprint(make, built(own, 0, **data.model_shape, width=config.width))[:8]}"
    MODELS[name] = own
    return name
