"""Structure of the notebooks: what readers, papermill and nbmake rely on. Running them is nbmake's task."""

import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")

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
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags == ["parameters"]
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


def test_there_are_no_outputs_and_no_execution_counts(path):
    for cell in cells(path, "code"):
        assert cell.outputs == [] and cell.execution_count is None


def test_it_opens_with_a_question_a_table_and_links(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# .+\?\n", first.source)
    for row in ("reproduces", "reads", "writes", "time"):
        assert f"| {row} |" in first.source
    assert sum(source.startswith("# ") for source in (cell.source for cell in cells(path, "markdown"))) == 1


def test_versions_then_parameters_then_derived_values(path):
    notebook = nbformat.read(path, as_version=4)
    assert [cell.cell_type for cell in notebook.cells[:4]] == ["markdown", "code", "code", "code"]
    assert "torch.__version__" in notebook.cells[1].source and "import" in notebook.cells[1].source
    assert notebook.cells[2].metadata.tags == ["parameters"]
    assert "PROFILE" in notebook.cells[3].source


def test_the_parameters_cell_holds_profile_and_nothing_else(path):
    (cell,) = (cell for cell in cells(path, "code") if cell.metadata.get("tags"))
    (statement,) = ast.parse(cell.source).body
    assert [target.id for target in statement.targets] == ["PROFILE"]
    assert ast.literal_eval(statement.value) == "quick"


def test_code_cells_are_short(path):
    lengths = [len(source.splitlines()) for source in sources(path)]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 30


def test_cells_define_at_most_one_small_function_and_catch_nothing(path):
    for source in sources(path):
        assert not re.search(r"^[!%]", source, re.MULTILINE)
        nodes = list(ast.walk(ast.parse(source)))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(functions) <= 1
        assert all(node.end_lineno - node.lineno < 10 for node in functions)
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
