"""The same three rounds three ways: in one process, on Flower's simulation, on its deployment (make flower).

    python tools/flower.py [--engines simulation deployment] [--folder build/flower]

Prints what came out of each; exit status 1 if any two differ.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from feddip_lite import Config
from feddip_lite.core.errors import ClientFailure
from feddip_lite.flower.parity import HERE, same_bits, shown, side_by_side
from feddip_lite.flower.processes import ENGINES
from feddip_lite.records.store import atomic_write

SMALL = {"width": 0.3, "rounds": 3, "clients": 3, "clients_per_round": 2, "local_epochs": 1, "workers": 1}
METHODS = {"fedavg": {}, "feddip": {"mask_interval": 1}, "feddst": {"preset": "repo", "mask_interval": 1}}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("build/flower"))
    parser.add_argument("--table", type=Path, help="write the comparison there as CSV, too (results/flower.csv is one)")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    configs = [Config(method=method, device="cpu", **SMALL, **METHODS[method]) for method in given.methods]
    try:
        table = side_by_side(configs, given.folder, (HERE, *given.engines))
    except (ClientFailure, ValueError) as error:
        print(f"tools/flower.py: {error}", file=sys.stderr)
        return 1
    if given.table:
        atomic_write(given.table, table.to_csv(index=False, lineterminator="\n").encode())
    print(shown(table))
    print(f"{len(configs)} methods: {'the same bits' if same_bits(table) else 'NOT the same bits'}")
    return int(not same_bits(table))


if __name__ == "__main__":
    sys.exit(main())
