"""In place of a strategy: `serve`, one loop over `run_round`; what is pruned, and when, is a method's (`METHODS`)."""

from feddip_lite.flower.server import serve
from feddip_lite.methods import METHODS
from feddip_lite.train.round import run_round

__all__ = ["METHODS", "run_round", "serve"]
