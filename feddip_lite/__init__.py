"""Federated pruning, side by side: FedDIP (arXiv 2309.06805) reproduced, checked and extended."""

__version__ = "0.1.0"

from .config import Config
from .engine import run
from .results import load_results

__all__ = ["Config", "load_results", "run"]
