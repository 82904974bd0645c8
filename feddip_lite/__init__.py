"""Federated pruning, side by side: FedDIP (arXiv 2309.06805) reproduced, checked and extended."""

__version__ = "0.1.0"

from .config import Config
from .records.store import load_results
from .train.run import run

__all__ = ["Config", "load_results", "run"]
