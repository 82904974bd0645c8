"""Put outputs into notebooks/: `python tools/notebooks.py`, after `tools/reproduce.py` (`make notebooks` runs both).

What is kept are tables, figures and what cells print, as the executed copies in build/quick/ have them: the same
bytes whenever one machine runs the same cells. Nothing of the machine is kept: no warnings or progress, and of a cell
tagged `measured`, which takes times, no output at all. A notebook's metadata says of which cells its outputs are and
which recorded runs there were, so that a test can refuse those of other cells, and those that know fewer runs.
"""

import argparse
import base64
import hashlib
import io
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from report import readable

ROOT = Path(__file__).resolve().parents[1]
MEASURED = "measured"
TABLE = re.compile(r"T_[0-9a-f]{5}\b")  # pandas gives each styled table a random name
TIMES = re.compile(r"; about \d+ s left|, \d+ s$", re.MULTILINE)  # of queues
COLOURS = 128


def cells_sha256(notebook: NotebookNode) -> str:
    """The SHA-256 of a notebook's code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def records_sha256(results: Path) -> str:
    """The SHA-256 of which runs are recorded, by their names; what a record holds does not change."""
    names = sorted(path.relative_to(results).as_posix() for path in results.rglob("*.json"))
    return hashlib.sha256("\0".join(names).encode()).hexdigest()


def with_outputs(notebook: NotebookNode, executed: NotebookNode, records: str) -> NotebookNode:
    """`notebook` with the outputs of its `executed` copy, which knew the runs `records` (`records_sha256`).

    Raises:
        ValueError: the copy has other cells.
    """
    ran = readable(executed).cells
    if [cell.source for cell in ran] != [cell.source for cell in notebook.cells]:
        raise ValueError("the executed copy has other cells; run `make notebooks`")
    pairs = [pair for pair in zip(notebook.cells, ran, strict=True) if pair[0].cell_type == "code"]
    for number, (cell, own) in enumerate(pairs, 1):
        kept = [] if MEASURED in cell.metadata.get("tags", []) else own.outputs
        cell.execution_count = number
        cell.outputs = [clean(output, number) for output in kept if output.get("name") != "stderr"]
    notebook.metadata["executed"] = {"cells": cells_sha256(notebook), "records": records}
    return notebook


def clean(output: NotebookNode, number: int) -> NotebookNode:
    """An output of code cell `number` without what differs from run to run, and with small figures."""
    if "execution_count" in output:
        output.execution_count = number
    if "text" in output:
        output.text = TIMES.sub("", output.text)
    data = output.get("data", {})
    if "text/html" in data:
        for place, name in enumerate(dict.fromkeys(TABLE.findall(data["text/html"]))):
            data["text/html"] = data["text/html"].replace(name, f"T_{number}_{place}")
        data.pop("text/plain", None)  # a styled table's is its address in memory
    if "image/png" in data:
        data["image/png"] = smaller(data["image/png"])
        data["text/plain"] = "<Figure>"
    return output


def smaller(png: str) -> str:
    """A base64 PNG with COLOURS colours, and without the metadata that names versions."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", metavar="DIR")
    parser.add_argument("--executed", type=Path, default=ROOT / "build" / "quick", metavar="DIR")
    options = parser.parse_args(arguments)
    records = records_sha256(ROOT / "results")
    for path in sorted(options.notebooks.glob("[0-9][0-9]_*.ipynb")):
        try:
            executed = nbformat.read(options.executed / path.name, as_version=4)
            notebook = with_outputs(nbformat.read(path, as_version=4), executed, records)
        except (OSError, ValueError) as error:
            print(f"tools/notebooks.py: {path.stem}: {error}", file=sys.stderr)
            return 1
        nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
