"""Results: `load_results` of a folder as one table, `fingerprint` of a run to compare it bit by bit."""

from feddip_lite.flower.parity import fingerprint
from feddip_lite.records.store import load_results

__all__ = ["fingerprint", "load_results"]
