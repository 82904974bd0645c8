"""The circumstances of a run: what made its numbers."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from pathlib import Path

import torch

from .._version import __version__

COMMIT = "FEDDIP_COMMIT"


def provenance(device: torch.device, workers: int, **facts) -> dict:
    """The circumstances of a run: versions, commit, hardware, worker threads (one intra-op thread each), `facts`."""
    return {
        "package": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "cpus": os.cpu_count(),
        "threads": workers,
        **facts,
    }


def commit() -> str | None:
    """The commit of the checkout this package lies in, with "+" if the package has changes that it lacks, or None.
    Where the checkout came without its history, the environment variable FEDDIP_COMMIT may say it."""
    if told := os.environ.get(COMMIT):
        return told
    package = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):  # no git here, no checkout, or a stuck network drive
        return None


def device_name() -> str:
    """The GPU that torch can use, with its memory, or "no GPU"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver too old for this torch warns here; the doctor says it in words
        if not torch.cuda.is_available():
            return "no GPU"
    gpu = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
