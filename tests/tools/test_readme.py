"""What the README and the docs say is run, followed and compared."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_setup import tool

from feddip_lite.__main__ import parser
from feddip_lite.methods import METHODS

publish = tool("publish")
ROOT = Path(__file__).resolve().parents[2]
GENERATED = publish.generated_parts(ROOT)
README = (ROOT / "README.md").read_text()
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", *DOCS, "CONTRIBUTING.md", "CHANGELOG.md"]
SHOWN = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/running.md"))
OWN = (ROOT / "docs" / "own.md").read_text()
OF_README = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SNIPPETS = re.findall(r"```python\n(.*?)```", SHOWN, re.DOTALL) + re.findall(r"```python\n(.*?)```", OWN, re.DOTALL)[:1]
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", SHOWN, re.DOTALL)
    for line in block.splitlines()
]


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 150
    assert set(re.findall(r"\]\((docs/\w+\.md)\)", README)) >= {"docs/index.md", "docs/results.md", "docs/claims.md"}
    index = (ROOT / "docs" / "index.md").read_text()
    assert {f"docs/{page}" for page in re.findall(r"\]\((\w+\.md)\)", index)} == set(DOCS) - {"docs/index.md"}


def test_there_are_snippets_and_commands_to_check():
    assert len(SNIPPETS) == 4
    assert {"make reproduce", "make test"} <= set(COMMANDS)


@pytest.fixture
def folder(tmp_path):
    """A folder with `photos`: eight of each of two kinds."""
    for kind, shade in (("cat", 60), ("dog", 190)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 36), (shade, 3 * number, shade)).save(tmp_path / "photos" / kind / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, folder):
    command = [sys.executable, "-c", snippet.replace("rounds=20", "rounds=2")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert (folder / "model.onnx").exists() == ("model.onnx" in snippet)


DRAWN = """
from feddip_lite.records.names import describe
from feddip_lite.records.store import load_results
from feddip_lite.report.curves import accuracy_curves, accuracy_for_bytes
from feddip_lite.report.tables import results_table
for method in ("fedavg", "oneshot"):
    run(Config(method=method, rounds=6, clients=10, batch_size=16), results_dir="results", progress=False)
runs = describe(load_results("results"))
figure = accuracy_curves(runs)
assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FedAvg (n = 1)", "One Shot (n = 1)"]
assert {text.get_text() for text in accuracy_for_bytes(runs, "").axes[0].texts} == {"FedAvg", "One Shot"}
print(results_table(runs)["method (preset)"].tolist())
"""


def test_the_own_method_is_in_figures_and_tables_by_its_name(tmp_path):
    command = [sys.executable, "-W", "error", "-c", OF_README[-1] + DRAWN]
    environment = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "One Shot" in done.stdout


def test_the_own_method_takes_at_most_twenty_five_lines():
    assert sum(bool(line.strip()) for line in OF_README[-1].splitlines()) <= 25


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python")])
def test_command_line_is_understood(command):
    parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_make_target_exists(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http", "#")):
            name, _, anchor = target.partition("#")
            assert (path.parent / name).exists(), target
            headings = re.findall(r"^#+ (.*)$", (path.parent / name).read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, target


def test_every_method_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)) == set(METHODS)


@pytest.mark.parametrize(("place", "text"), GENERATED.items(), ids=lambda value: "-".join(value)[:30])
def test_generated_parts_say_what_is_recorded(place, text):
    """Numbers in README and docs are generated: `make figures` was run after the last recorded run."""
    (file, name), content = place, (ROOT / place[0]).read_text()
    begin, end = publish.markers(name)
    assert content.split(begin)[1].split(end)[0].strip() == text.strip(), file
