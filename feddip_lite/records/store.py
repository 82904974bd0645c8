"""Recorded runs: a CSV of rounds, a JSON of circumstances, the last mask and model; written whole, and checked."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..config import Config, is_known
from ..core.errors import Held
from .kept_model import KeptModel, read_model_file

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout: notebooks find `params/`, `results/` and `figures/` below it from any working directory."""

COLUMNS = (
    "round accuracy loss local_accuracy train_loss sparsity lr penalty up_bytes down_bytes mask_overlap regrown "
    "returned pruning_error seconds"
).split()
"""Columns of a results file, in order; `top5_accuracy` follows `accuracy` with 100 classes. See docs/design.md."""

INTEGER_COLUMNS = ("round", "up_bytes", "down_bytes", "regrown", "returned")

_SEAL = b',\n "sha256": "'  # at the end of a record stands the SHA-256 of all before it
METRICS = ("accuracy", "top5_accuracy", "loss", "local_accuracy")
HEADLINE_ROWS = 10  # the headline value is the mean of the last ten evaluated rounds


def atomic_write(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: after a crash `path` holds the old bytes or the new, never a part.

    Raises:
        OSError: the disk is full or the folder read-only; names the file, and nothing but the old one is left.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        with suppress(OSError):  # the name is safe where the file system can sync folders; some cannot
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        with suppress(OSError):  # on a read-only disk there is nothing to remove
            part.unlink()
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}; not written, what was there is intact"
            raise OSError(error.errno, reason, str(path)) from error
        raise


@contextmanager
def run_lock(folder: Path, run_id: str, wait: bool = True):
    """Hold the run's lock; a second process says so and waits, or not. The lock falls with its holder, also on kill -9.

    What a killed holder had half written is removed.

    Raises:
        Held: another process has the lock, and `wait` is False.
    """
    lock = FileLock(folder / ".locks" / f"{run_id}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise Held(f"{run_id}: another process is computing this run") from None
        print(f"{run_id}: another process is computing this run; waiting for it", flush=True)
        lock.acquire()
    try:
        for part in folder.glob(f".{run_id}.*.part"):
            part.unlink()
        yield
    finally:
        lock.release()


def save_run(
    folder: Path,
    config: Config,
    history: pd.DataFrame,
    provenance: Mapping,
    skipped: list,
    layers: Sequence[dict] = (),
    mask: Tensor | None = None,
    model: bytes | None = None,
    diverged: Mapping | None = None,
) -> None:
    """Record a run's history with its headline values, as `save_table` does, and what is left of the final model.

    Args:
        layers: a {name, shape, kept} per prunable tensor, `kept` of its weights not zero.
        mask: (P,) bool, written to `<run_id>.mask` unless it keeps everything; `read_mask` has it back.
        model: written to `<run_id>.safetensors`; `read_model` has it back.
        diverged: {round, reason} of a run that broke down there: the rows so far are kept, and it has no headline.
    """
    tail = history.tail(HEADLINE_ROWS)
    metrics = [name for name in METRICS if name in history]
    final = {
        "last": history.iloc[-1].to_dict() if len(history) else None,
        f"mean_last_{HEADLINE_ROWS}": dict.fromkeys(metrics) if diverged else tail[metrics].mean().to_dict(),
        "best_accuracy": history["accuracy"].max(),
    }
    facts = {"provenance": provenance, "final": final, "skipped": skipped, "layers": layers}
    if diverged:
        facts["diverged"] = diverged
    if mask is not None and not mask.all():
        bits = zlib.compress(np.packbits(mask.cpu().numpy()).tobytes(), 9)
        atomic_write(folder / f"{config.run_id}.mask", bits)
        facts["mask_sha256"] = hashlib.sha256(bits).hexdigest()
    if model is not None:
        atomic_write(folder / f"{config.run_id}.safetensors", model)
        facts["model_sha256"] = hashlib.sha256(model).hexdigest()
    save_table(folder, config, history, **facts)


def save_table(folder: Path, config: Config, rows: pd.DataFrame, **facts) -> None:
    """Write `<run_id>.csv`, then `<run_id>.json` with `facts`, which says that the run is complete."""
    table = rows.to_csv(index=False, lineterminator="\n").encode()
    record = {"run_id": config.run_id, "config": asdict(config), **facts}
    record["csv_sha256"] = hashlib.sha256(table).hexdigest()
    text = json.dumps(plain(record), indent=1, allow_nan=False).removesuffix("\n}").encode()
    atomic_write(folder / f"{config.run_id}.csv", table)
    atomic_write(folder / f"{config.run_id}.json", sealed(text))


def sealed(text: bytes) -> bytes:
    """A record's JSON `text` up to its closing brace, and its SHA-256 as the last entry."""
    return text + _SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def read_run(folder: Path, run_id: str) -> tuple[pd.DataFrame, dict] | None:
    """(history, record) of a complete run, or None if there is none.

    Raises:
        ValueError: the files are damaged, or the record is that of another run: its configuration has another id, as
            after a changed default; names the file and the remedy.
    """
    path = Path(folder) / f"{run_id}.json"
    if not path.exists():
        return None
    record, table_path = read_record(path), path.with_suffix(".csv")
    table = table_path.read_bytes() if table_path.exists() else b""
    if record["run_id"] != run_id or hashlib.sha256(table).hexdigest() != record["csv_sha256"]:
        raise ValueError(f"{table_path}: does not match {path.name}; {advice(path, 'delete both to run again')}")
    if (right := right_id(path, record)) != run_id:
        raise ValueError(
            f"{path}: a record of another run, since its configuration has the id {right} in this version; "
            f"`python tools/rename_records.py {folder}` gives it that"
        )
    # Text first: Python's own float is exact, pandas' parser only from some version on.
    history = pd.read_csv(io.BytesIO(table), dtype=str)
    return history.astype({name: int if name in INTEGER_COLUMNS else float for name in history}), record


def advice(path: Path, otherwise: str) -> str:
    """What to do about a damaged file: what git can restore is restored, never deleted."""
    kept = ROOT / "results" in path.resolve().parents
    return f"`git checkout -- {path.with_suffix('')}.*` restores it" if kept else otherwise


def read_record(path: Path) -> dict:
    """The JSON of a complete run, with all that was written.

    Raises:
        ValueError: it is damaged; names the file and the remedy.
    """
    try:
        text = path.read_bytes()
        record = json.loads(text)
        if text != sealed(text.partition(_SEAL)[0]):
            raise ValueError("not what was written")
        del record["sha256"]
        for name in ("run_id", "config", "csv_sha256"):
            record[name]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: damaged result ({error}); {advice(path, 'delete it to run again')}") from error
    return record


def right_id(path: Path, record: Mapping) -> str:
    """The id that the stored configuration has in this version; the stored one for a method, model or data set that is
    not known here.

    Raises:
        ValueError: a setting that this version does not have; names the file and the remedy.
    """
    if not is_known(record["config"]):
        return record["run_id"]
    try:
        return Config.from_dict(record["config"]).run_id
    except ValueError as error:
        raise ValueError(
            f"{path}: a record of another version ({error}); {advice(path, 'delete it to run again')}"
        ) from error


def read_mask(folder: Path, run_id: str) -> Tensor | None:
    """The mask (P,) bool a recorded run ended with, all True for a dense one; None if its record is older than masks,
    or that of a run that diverged.

    Raises:
        ValueError: the file is missing or damaged; names it and the remedy.
        FileNotFoundError: there is no such run.
    """
    stored, path = read_run(folder, run_id), Path(folder) / f"{run_id}.mask"
    if stored is None:
        raise FileNotFoundError(f"{path.with_suffix('.json')}: no such run")
    record = stored[1]
    if not record.get("layers"):
        return None
    count = sum(math.prod(layer["shape"]) for layer in record["layers"])
    if "mask_sha256" not in record:
        return torch.ones(count, dtype=torch.bool)
    bits = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(bits).hexdigest() != record["mask_sha256"]:
        raise ValueError(f"{path}: does not match {run_id}.json; {advice(path, 'delete that to run again')}")
    return torch.from_numpy(np.unpackbits(np.frombuffer(zlib.decompress(bits), np.uint8), count=count).view(np.bool_))


def read_model(folder: Path, run_id: str) -> KeptModel:
    """The sparse model that a recorded run ended with.

    Raises:
        ValueError: the file is damaged; names it and the remedy.
        FileNotFoundError: there is no such run, or no file of its model: models above 100 KiB are not in the
            repository, and runs recorded before there were model files left none.
    """
    stored, path = read_run(folder, run_id), Path(folder) / f"{run_id}.safetensors"
    if stored is None:
        raise FileNotFoundError(f"{path.with_suffix('.json')}: no such run")
    if not path.exists():
        remedy = "delete the record, or use another folder, and run its configuration again to have it"
        raise FileNotFoundError(f"{path}: the model of this run is not here; {remedy}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != stored[1].get("model_sha256"):
        raise ValueError(f"{path}: does not match {run_id}.json; {advice(path, 'delete that to run again')}")
    return read_model_file(path)


def config_of(record: Mapping) -> dict:
    """The configuration of a stored run; fields and options that are younger than it have the default, which it ran
    under."""
    if not is_known(record["config"]):
        return {**asdict(Config()), **record["config"]}
    return asdict(Config.from_dict(record["config"]).resolved())


def load_results(folder: str | Path) -> pd.DataFrame:
    """All complete runs of a folder: a row per evaluated round, with the run's id and configuration in columns.

    The configuration's `lr` is called `initial_lr`, because `lr` is the value used in the round; `method_options` is
    JSON text. `diverged` says why a run broke down, and is empty for all others; the last row of such a run is the
    round in which it did, without an accuracy. An absent or empty folder gives an empty frame.

    Raises:
        ValueError: a run is damaged.
    """
    frames = []
    for path in sorted(Path(folder).glob("*.json")):
        history, record = read_run(path.parent, path.stem)
        config = config_of(record)
        config["initial_lr"] = config.pop("lr")
        config["method_options"] = json.dumps(config["method_options"], sort_keys=True)
        broken = record.get("diverged")
        if broken:
            end = {name: 0 if name in INTEGER_COLUMNS else math.nan for name in history} | {"round": broken["round"]}
            history = pd.DataFrame([*history.to_dict("records"), end], columns=history.columns)
        reason = broken["reason"] if broken else ""
        frames.append(history.assign(run_id=record["run_id"], diverged=reason, **config))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*COLUMNS, "run_id", "diverged"])


def headline(results: pd.DataFrame) -> pd.DataFrame:
    """One row per run of `load_results`: the configuration, `accuracy` as the mean of the last ten evaluated rounds,
    the last measured `sparsity`, and `up_bytes`, `down_bytes` in total. No rows for no runs. Of a run that diverged
    all these are NaN, so that no mean takes it in."""
    if results.empty:
        return results
    rows = []
    for _, run in results.groupby("run_id", sort=False):
        last = run.sort_values("round").iloc[-1].to_dict()
        means = run.sort_values("round").tail(HEADLINE_ROWS)[[name for name in METRICS if name in run]].mean()
        totals = {name: int(run[name].sum()) for name in ("up_bytes", "down_bytes")}
        measured = means.to_dict() | totals
        if last["diverged"]:  # its last row has no other numbers
            measured = dict.fromkeys([*measured, "regrown", "mib"], math.nan)
        rows.append(last | measured)
    return pd.DataFrame(rows)


def plain(value):
    """The value for JSON: numpy scalars as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
