"""Federated pruning, side by side: FedDIP (arXiv 2309.06805) reproduced, checked and extended."""

from ._version import __version__ as __version__
from .config import Config
from .core.own_model import register_model
from .data.own import own_dataset, register_dataset
from .records.plain_model import export_model, load_model
from .records.store import load_results
from .train.run import run

__all__ = [
    "Config", "export_model", "load_model", "load_results", "own_dataset", "register_dataset", "register_model", "run",
]  # fmt: skip
