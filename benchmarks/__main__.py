"""What is timed: `python -m benchmarks NAME [options]`, from the repository's root; `-h` after a NAME says more.

The record is printed or, with `--write`, kept in benchmarks/NAME_<device>.json, which feeds the README.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

from feddip_lite.records.store import plain

NAMES = ("engine", "growth", "precision", "masks", "codecs", "cost", "encrypted", "flower")


def main(arguments: list[str] | None = None) -> None:
    """Each benchmark is a module with `options(parser)`, which adds its own options, and `record(given)`, which
    measures, says how far it is, and returns the record, provenance included."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of this benchmark")
    first = parser.parse_args(arguments)
    name, module = first.name, import_module(f"benchmarks.{first.name}")
    raw = argparse.RawDescriptionHelpFormatter
    own = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=module.__doc__, formatter_class=raw)
    own.add_argument("--write", action="store_true", help=f"to benchmarks/{name}_<device>.json")
    module.options(own)
    given = own.parse_args(first.options)
    text = json.dumps(plain(module.record(given)), indent=1)
    if not given.write:
        print(text)
    else:
        (Path(__file__).parent / f"{name}_{getattr(given, 'device', 'cpu')}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
