"""The generated parts of README and docs: what they must say, and how they are put there."""

from __future__ import annotations

from pathlib import Path

from ..records.store import atomic_write
from ..studies.claims import claims_table
from ..studies.cost.tables import cost_section
from .overview import benchmark_section, methods_table
from .statistics import results_section


def generated_parts(root: Path) -> dict[tuple[str, str], str]:
    """(file, name in its markers) -> Markdown, for the checkout at `root`."""
    results = root / "results"
    claims = claims_table(results, root / "params" / "claims.yaml")
    return {
        ("README.md", "methods"): methods_table(),
        ("README.md", "results"): results_section(results),
        ("README.md", "claims"): claims,
        ("README.md", "cost"): cost_section(root / "benchmarks"),
        ("README.md", "benchmark"): benchmark_section(root / "benchmarks"),
        ("docs/claims.md", "claims"): claims.replace("](notebooks/", "](../notebooks/"),
    }


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a generated part."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `name` of a Markdown file; every other byte stays.

    Raises:
        ValueError: the file lacks a marker, or has one twice or in the wrong order.
    """
    begin, end = markers(name)
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{path.name}: needs the lines {begin} and {end}, once each and in this order")
    before, after = content.split(begin)[0], content.split(end)[1]
    atomic_write(path, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())
