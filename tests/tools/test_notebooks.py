"""Structure of the notebooks: what readers, papermill and nbmake rely on. Running them is nbmake's task.

Their outputs are those of their cells, and hold nothing of the machine that made them.
"""

import ast
import base64
import re
import statistics
from pathlib import Path

import nbformat
import pytest
from test_setup import tool

notebooks = tool("notebooks")
ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")

MACHINE = re.compile(r"/(?:home|root|tmp|usr|Users)/|\b\d\d:\d\d\b|\b20\d\d-\d\d-\d\d|torch \d|Python 3\.|x86_64")

pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def sources(path: Path) -> list[str]:
    return [cell.source for cell in cells(path, "code")]


def test_names_are_numbered(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert [other.stem[:2] for other in PATHS].count(path.stem[:2]) == 1


def test_format_is_valid_and_every_cell_has_a_readable_id(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", cell.id) for cell in notebook.cells)


def test_kernel_is_python3_and_no_metadata_hides_a_failure(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info", "executed"}
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags[0] == "parameters" and set(tags[1:]) <= {notebooks.MEASURED}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


def test_its_outputs_are_those_of_its_cells_and_of_the_recorded_runs(path):
    """`make notebooks` was run after the last change of a cell, and after the last recorded run."""
    notebook = nbformat.read(path, as_version=4)
    now = {"cells": notebooks.cells_sha256(notebook), "records": notebooks.records_sha256(ROOT / "results")}
    assert notebook.metadata.executed == now, "run make notebooks, then make figures"
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


def test_its_outputs_hold_nothing_of_the_machine(path):
    for cell in cells(path, "code"):
        if notebooks.MEASURED in cell.metadata.get("tags", []):
            assert cell.outputs == []
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            data = output.get("data", {})
            said = [output.get("text", ""), *(text for kind, text in data.items() if kind.startswith("text/"))]
            assert not MACHINE.search(" ".join(said)), MACHINE.search(" ".join(said))[0]


def test_its_figures_are_small_and_say_what_they_are(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(base64.b64decode(output.data["image/png"])) <= 60_000
                assert output.metadata["image/png"]["alt"]
    assert path.stat().st_size < 600_000 and sum(each.stat().st_size for each in PATHS) < 4_000_000


def test_it_ends_with_an_answer_and_two_exercises_with_folded_solutions(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(tool("report").answer_of(notebook)) > 40
    exercises = [cell.source for cell in notebook.cells if cell.source.startswith("## Exercises")]
    assert len(exercises) == 1 and len(re.findall(r"^\d\. ", exercises[0], re.MULTILINE)) == 2
    assert exercises[0].count("<details><summary>Solution</summary>\n\n") == exercises[0].count("\n</details>") == 2


def test_it_opens_with_a_question_a_table_and_links(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# .+\?\n", first.source)
    for row in ("reproduces", "reads", "writes", "time"):
        assert f"| {row} |" in first.source
    assert sum(source.startswith("# ") for source in (cell.source for cell in cells(path, "markdown"))) == 1


def test_parameters_come_first_and_are_used(path):
    first, *others = cells(path, "code")
    assert first.metadata.tags == ["parameters"]
    assert any("PROFILE" in cell.source for cell in others)


def test_the_parameters_cell_holds_profile_and_nothing_else(path):
    (cell,) = (cell for cell in cells(path, "code") if "parameters" in cell.metadata.get("tags", []))
    (statement,) = ast.parse(cell.source).body
    assert [target.id for target in statement.targets] == ["PROFILE"]
    assert ast.literal_eval(statement.value) == "quick"


def test_code_cells_are_short(path):
    lengths = [len(source.splitlines()) for source in sources(path)]
    assert statistics.median(lengths) <= 15 and max(lengths) <= 30


def test_cells_define_small_functions_and_catch_nothing(path):
    for source in sources(path):
        assert not re.search(r"^[!%]", source, re.MULTILINE)
        nodes = list(ast.walk(ast.parse(source)))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(functions) <= 3
        assert all(node.end_lineno - node.lineno < 16 for node in functions)
        assert not any(isinstance(node, ast.Try) for node in nodes)


def test_prose_accompanies_the_code(path):
    prose, code = len(cells(path, "markdown")), len(cells(path, "code"))
    assert 0.7 <= prose / code <= 2


def test_paths_do_not_depend_on_the_working_directory(path):
    text = "\n".join(sources(path))
    assert not re.search(r"""["'](\.\./|results/|figures/|params/|build/)""", text)
    assert "getcwd" not in text and "chdir" not in text


def test_links_resolve(path):
    for cell in cells(path, "markdown"):
        for link in LINK.findall(cell.source):
            assert link.startswith("https://") or (path.parent / link).exists(), link


def test_it_links_to_its_neighbours_and_ends_with_the_link_onward(path):
    place = PATHS.index(path)
    first, last = cells(path, "markdown")[0].source, nbformat.read(path, as_version=4).cells[-1]
    for neighbour in PATHS[max(place - 1, 0) : place] + PATHS[place + 1 : place + 2]:
        assert f"]({neighbour.name})" in first
    onward = PATHS[place + 1].name if place + 1 < len(PATHS) else "../README.md"
    assert last.cell_type == "markdown" and LINK.findall(last.source) == [onward]
