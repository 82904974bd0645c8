"""Laws of the set-up files and tools: environment, Makefile and the notebook runner."""

import contextlib
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}  # all other names are the same on conda-forge
TARGETS = (
    "setup doctor test reproduce notebooks figures sweep compare test-slow flower flower-test bench lint lab clean"
).split()


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements(*extras):
    texts = PYPROJECT["dependencies"] + [t for extra in extras for t in PYPROJECT["optional-dependencies"][extra]]
    return [need for need in map(Requirement, texts) if need.name != PYPROJECT["name"]]


def make(*arguments):
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True)


# --- the environment


def test_environment_yml_has_the_names_and_bounds_of_pyproject():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {
        str(Requirement(item)) for item in listed if isinstance(item, str) and item != "pip" and "python=" not in item
    }
    assert conda == {
        f"{CONDA_NAMES.get(need.name, need.name)}{need.specifier}"
        for need in requirements("notebooks", "dev", "onnx", "tensorboard")
    }


def test_environment_yml_uses_conda_forge_only_and_no_build_strings():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert PYPROJECT["requires-python"] == f">={python.removeprefix('python=')}"
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.split("==", line)[0].replace("_", "-").lower() for line in lines if "==" in line}
    direct = {need.name for need in requirements(*PYPROJECT["optional-dependencies"])}
    assert direct - pinned == set()


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "environment.yml", "Makefile"])
def test_no_index_address_or_local_path_stands_in_a_set_up_file(name):
    text = (ROOT / name).read_text()
    for word in ("index-url", "find-links", "file:", " @ ", "--trusted-host", "https://download"):
        assert word not in text, f"{name} holds {word!r}"


def test_constraints_are_exact_versions_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; .+)?", line)]
    assert wrong == []


# --- Makefile and .ci/run


def test_make_alone_lists_every_target():
    listed = re.findall(r"^  make (\S+) +\S", make().stdout, re.MULTILINE)
    assert set(TARGETS) <= set(listed)


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_exists(target):
    assert make("-n", target).returncode == 0


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "clean"])
def test_every_make_target_sets_the_environment_up_when_it_is_missing(target, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    planned = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "-m venv --clear .venv" in planned and '-c constraints.txt  -e ".[dev]"' in planned


def test_the_torch_backend_reaches_uv():
    assert "--torch-backend cpu" in make("-n", "-W", "pyproject.toml", "setup", "TORCH_BACKEND=cpu").stdout


def test_ci_runs_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("\nmake test")
    assert re.search(r"^\s*make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


# --- tools/reproduce.py


def notebook(path, *cells, parameter='PROFILE = "quick"'):
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    book.cells = [
        nbformat.v4.new_markdown_cell("# What is $1 + 1$?\n\n[next](01_next.ipynb)"),
        nbformat.v4.new_code_cell(parameter, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    nbformat.write(book, path)


WAIT = "import time; time.sleep(600)"


def command_of(folder, *arguments):
    script = ROOT / "tools" / "reproduce.py"
    return [sys.executable, script, "--notebooks", folder, "--out", folder / "out", *arguments]


def reproduce(folder, *arguments):
    return subprocess.run(command_of(folder, *arguments), capture_output=True, text=True)


def test_an_unknown_parameter_is_refused(tmp_path):
    notebook(tmp_path / "00_typo.ipynb", "1", parameter='PROFIL = "quick"')
    with pytest.raises(ValueError, match="00_typo: no parameter 'PROFILE', its tagged cell has PROFIL"):
        tool("reproduce").check_parameters(tmp_path / "00_typo.ipynb", {"PROFILE": "quick"})


@pytest.mark.parametrize("arguments", [["--profile", "qick"], ["--only", "77"]])
def test_an_unknown_profile_or_notebook_is_refused(tmp_path, arguments):
    notebook(tmp_path / "00_fine.ipynb")
    done = reproduce(tmp_path, *arguments)
    assert done.returncode == 2 and arguments[1] in done.stderr and not (tmp_path / "out").exists()


def test_notebooks_run_in_number_order_whatever_the_directory_says(tmp_path):
    for name in ("10_b", "02_a", "00_c"):
        notebook(tmp_path / f"{name}.ipynb")
    assert [path.stem for path in tool("reproduce").select(tmp_path, [])] == ["00_c", "02_a", "10_b"]
    assert [path.stem for path in tool("reproduce").select(tmp_path, ["10", "02_a"])] == ["02_a", "10_b"]


def test_a_failing_notebook_is_named_kept_and_shown_and_ends_the_run(tmp_path):
    notebook(tmp_path / "00_fine.ipynb", "print(PROFILE * 2)")
    notebook(tmp_path / "01_broken.ipynb", "raise ValueError('sparsity ran away')", "print('unreachable')")
    notebook(tmp_path / "02_next.ipynb")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "02_next.ipynb").write_text((tmp_path / "02_next.ipynb").read_text())  # of an earlier run
    done = reproduce(tmp_path, "--profile", "lite", "--jobs", "1")
    assert done.returncode == 1
    line = done.stderr.rstrip("\n")  # one line, and nothing beside it
    assert re.fullmatch(r"stopped: 01_broken failed: cell \[\d+\]: ValueError: sparsity ran away", line)
    assert "sparsity ran away" in (tmp_path / "out" / "01_broken.ipynb").read_text()
    assert "litelite" in (tmp_path / "out" / "00_fine.html").read_text()
    index = (tmp_path / "out" / "index.html").read_text()
    assert "failed" in index and 'href="00_fine.html"' in index
    assert "02_next" not in index and not (tmp_path / "out" / "02_next.ipynb").exists()


def test_two_notebooks_run_at_a_time_and_none_starts_after_a_failure(tmp_path):
    wait = "import pathlib, time\nwhile not pathlib.Path('seen').exists(): time.sleep(0.1)"
    notebook(tmp_path / "00_waits.ipynb", wait, "raise ValueError('no')")
    notebook(tmp_path / "01_ends.ipynb", "import pathlib; pathlib.Path('seen').touch()", "import time; time.sleep(5)")
    notebook(tmp_path / "02_next.ipynb")
    done = reproduce(tmp_path)
    assert done.stderr.startswith("stopped: 00_waits failed") and len(done.stderr.splitlines()) == 1
    assert [line.split()[1] for line in done.stdout.splitlines()[:-1]] == ["00_waits", "01_ends"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.ipynb")) == ["00_waits.ipynb", "01_ends.ipynb"]


def test_an_interrupted_reproduction_ends_at_once_with_its_kernels(tmp_path):
    notebook(tmp_path / "00_long.ipynb", "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))", WAIT)
    pid = tmp_path / "pid"
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(command_of(tmp_path), stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        while process.poll() is None and not (pid.exists() and pid.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert "stopped; what was executed lies in" in process.communicate(timeout=120)[1]
    assert process.returncode == 130
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid.read_text())).wait(60)


@pytest.mark.parametrize(
    "clashes, outcome", [(1, None), (2, "RuntimeError: Kernel died before replying to kernel_info")]
)
def test_a_kernel_whose_port_was_taken_is_started_once_more(tmp_path, monkeypatch, clashes, outcome):
    module, starts = tool("reproduce"), []

    def start(*_, **__):
        starts.append(1)
        if len(starts) <= clashes:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(module.papermill, "execute_notebook", start)
    assert module.execute(tmp_path / "00_a.ipynb", tmp_path / "out" / "00_a.ipynb", {}, None) == outcome
    assert len(starts) == 2


@pytest.fixture
def report(tmp_path):
    """`report(*cells)`: the folder of the report of a checkout whose notebooks are two with these cells."""

    def made(*cells):
        folder, out = tmp_path / "notebooks", tmp_path / "build" / "quick"
        for path in (folder, out, tmp_path / "docs"):
            path.mkdir(parents=True)
        for name in ("00_sum", "01_next"):
            notebook(folder / f"{name}.ipynb", *cells)
            (out / f"{name}.ipynb").write_text((folder / f"{name}.ipynb").read_text())
        (tmp_path / "rules.yaml").write_text("a: 1")
        (tmp_path / "README.md").write_text(
            "# Read\n\n[docs](docs/laws.md#two) [00](notebooks/00_sum.ipynb) [b](build/)"
        )
        images = "![a dot](dot.png) ![another](../dot.png) ![of the web](https://a.org/dot.png)"
        (tmp_path / "docs" / "laws.md").write_text(
            f"[rules](../rules.yaml) [gone](../gone.md) [web](https://a.org) {images}"
        )
        for folder_of_dot in (tmp_path, tmp_path / "docs"):
            Image.new("RGB", (1, 1)).save(folder_of_dot / "dot.png")
        tool("report").write_report(out, folder, "quick", {})
        return out

    return made


def test_the_report_loads_nothing_from_elsewhere(report):
    out = report()
    page = (out / "00_sum.html").read_text()
    assert "<script" not in page and '<link rel="stylesheet"' not in page
    assert "<math" in page and 'href="01_next.html"' in page  # formulas drawn by the browser, links between pages
    assert "What is $1 + 1$?" in (out / "index.html").read_text()


def test_all_links_of_the_report_resolve_in_it(report):
    out = report()
    assert 'href="docs_laws.html#two"' in (out / "README.html").read_text()
    assert (out / "files" / "rules.yaml").read_text() == "a: 1"
    assert "gone" in (out / "docs_laws.html").read_text()  # as a word
    for page in out.glob("*.html"):
        for link in re.findall(r'<a href="([^"]*)"', page.read_text()):
            assert link.startswith(("https://", "#")) or (out / link.partition("#")[0]).exists(), (page.name, link)


def test_images_of_pages_lie_in_them(report):
    page = (report() / "docs_laws.html").read_text()
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert [source.startswith("data:image/png;base64,") for source in sources] == [True, True, False]


def test_the_index_has_the_answers_and_folded_parts_stay_folded(report):
    answer = nbformat.v4.new_output("display_data", {"text/markdown": "**Answer:** `w` is **2**. More."})
    out = report("1")
    copy = nbformat.read(out / "00_sum.ipynb", as_version=4)
    copy.cells[0].source += "\n\n<details><summary>Solution</summary>\n\n`x = 2`\n\n</details>"
    copy.cells[-1].outputs = [answer]
    nbformat.write(copy, out / "00_sum.ipynb")
    tool("report").write_report(out, out.parents[1] / "notebooks", "quick", {})
    assert "<code>w</code> is <strong>2</strong>. More." in (out / "index.html").read_text()
    page = (out / "00_sum.html").read_text()
    assert page.index("<details>") < page.index("<code>x = 2</code>") < page.index("</details>")
