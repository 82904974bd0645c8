"""Federated pruning, side by side: FedDIP (arXiv 2309.06805) reproduced, checked and extended."""

from ._version import __version__ as __version__
from .config import Config
from .records.store import load_results
from .train.run import run

__all__ = ["Config", "load_results", "run"]
