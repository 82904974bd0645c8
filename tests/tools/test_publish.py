"""Laws of `tools/publish.py`: figures and texts follow from what is recorded; writing twice changes nothing."""

import importlib.metadata
import json
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import FAST, tiny_config
from test_setup import tool

from feddip_lite.records import catalogue
from feddip_lite.records.store import ROOT
from feddip_lite.report.style import save_figure
from feddip_lite.report.tables import NOTHING, markdown, results_table
from feddip_lite.studies.cost.tables import circumstances, read_cost
from feddip_lite.train.run import train

publish = tool("publish")
PINNED = re.search(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
NAMES = re.compile(r'(?<=id=")[^"]*|(?<=href="#)[^"]*|(?<=url\(#)[^)]*')  # some are hashes of coordinates
BEGIN, END = publish.markers("part")

pytestmark = pytest.mark.usefixtures("agg")
as_pinned = pytest.mark.skipif(
    importlib.metadata.version("matplotlib") != PINNED, reason=f"figures are drawn with matplotlib {PINNED}"
)
drawn = {}


# ---- figures


@as_pinned
@pytest.mark.parametrize("part", publish.PARTS, ids=lambda part: part.__name__)
def test_published_figures_follow_from_what_is_recorded(part, tmp_path):
    """As text, numbers and pixels, so that another processor's last bits do not count."""
    names = set()
    for name, figure in part(ROOT):
        image, again = save_figure(figure, name, tmp_path)
        plt.close(figure)
        pixels, drawn_now = (plt.imread(path) for path in (ROOT / "figures" / image.name, image))
        assert pixels.shape == drawn_now.shape, f"{name}: run make figures"
        assert (np.abs(pixels - drawn_now) > 0.05).any(-1).mean() < 1e-4, f"{name}: run make figures"
        kept, fresh = (NAMES.sub("", path.read_text()) for path in (ROOT / "figures" / again.name, again))
        assert NUMBER.sub("", kept) == NUMBER.sub("", fresh), f"{name}: run make figures"
        numbers = (np.array(NUMBER.findall(text), float) for text in (kept, fresh))
        np.testing.assert_allclose(*numbers, atol=1e-3, err_msg=f"{name}: run make figures")
        names.add(name)
    drawn[part] = names


@as_pinned
def test_there_is_no_other_figure():
    if set(drawn) != set(publish.PARTS):
        pytest.skip("not all figures were drawn again in this process")
    for suffix in ("svg", "png"):
        assert {path.stem for path in (ROOT / "figures").glob(f"*.{suffix}")} == set.union(*drawn.values())


# ---- the whole, on a checkout where hardly anything is recorded


@pytest.fixture
def checkout(tmp_path):
    """A README, docs and rules, and no results."""
    for name in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "params/claims.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_writing_twice_gives_the_same_bytes(checkout):
    assert publish.main([f"--root={checkout}"]) == 0
    once = contents(checkout)
    assert publish.main([f"--root={checkout}"]) == 0
    assert contents(checkout) == once
    assert {path.stem for path in (checkout / "figures").iterdir()} == {"feddip_workflow"}
    readme, results, cost, speed, page = (
        (checkout / name).read_text()
        for name in ("README.md", "docs/results.md", "docs/cost.md", "docs/speed.md", "docs/claims.md")
    )
    assert readme.count(NOTHING) == 3 and results.count(NOTHING) == cost.count(NOTHING) == 1
    assert "Nothing measured yet." in speed
    rules = yaml.safe_load((checkout / "params" / "claims.yaml").read_text())["claims"]
    ours, asked = [rule for rule in rules if rule["source"] == "ours"], [rule for rule in rules if "question" in rule]
    assert page.count("| not tested at this scale |") == len(rules) - len(ours)
    assert (checkout / "docs" / "findings.md").read_text().count("not measured yet") == len(asked) > len(ours) > 5
    assert (checkout / "docs" / "findings.md").read_text().count(NOTHING) == 1


def test_a_page_without_its_markers_is_one_line_and_status_1(checkout, capsys):
    (checkout / "docs" / "claims.md").write_text("no markers")
    assert publish.main([f"--root={checkout}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools/publish.py: claims.md: needs the lines <!-- claims:begin -->")


# ---- README and docs


def test_the_section_replaces_what_stands_between_the_markers_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        publish.write_section(readme, "part", "new")
    assert readme.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


@pytest.mark.parametrize("content", ["", BEGIN, END + BEGIN, BEGIN * 2 + END])
def test_missing_or_doubled_markers_are_refused(tmp_path, content):
    readme = tmp_path / "README.md"
    readme.write_text(content)
    with pytest.raises(ValueError, match="README.md: needs the lines"):
        publish.write_section(readme, "part", "new")
    assert readme.read_text() == content


def test_results_stand_by_setting_with_their_circumstances(tmp_path, monkeypatch):
    queue = [tiny_config(method=method, **{**FAST, "rounds": 2}) for method in ("fedavg", "feddip")]
    runs = train(queue, tmp_path / "results" / "lite")
    monkeypatch.setattr(catalogue, "profile_queue", lambda profile: queue)
    section = publish.results_part(tmp_path)
    assert "digits, LeNet-5, T = 2 rounds" in section and "profile `lite`" in section
    assert markdown(results_table(runs)) in section
    assert "Seeds: 0. Data: Handwritten digits" in section and "n < 3" in section


def test_a_rehearsal_of_costs_is_named_and_not_quoted(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    assert publish.cost_part(tmp_path) == NOTHING
    record = json.loads((ROOT / "benchmarks" / "cost_cpu.json").read_text())
    for rehearsal in (False, True):
        record["provenance"] |= {"rehearsal": rehearsal, "load": {"before": 0.0}}
        (tmp_path / "benchmarks" / "cost_cpu.json").write_text(json.dumps(record))
        said = publish.cost_part(tmp_path)
        assert said.endswith(circumstances(read_cost(tmp_path / "benchmarks")))
        assert ("| LeNet-5 | 0.900 |" in said) is not rehearsal


def test_a_question_is_answered_in_sentences_under_its_heading_in_the_first_setting(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "findings.md").write_text(
        "# Findings\n## 1. Start: dense or not\n## 2. Bytes\n## 10. Nothing yet\n"
    )
    columns = ["claim", "measured", "question", "answer", "unlike"]
    rows = [["a", "x", 1, "a dense start is worth +1.0 points", ""], ["a", "x", 1, "elsewhere -9.0 points", "AlexNet"]]
    rows += [["b", "y", 1, "a random one +0.5 points", "width 0.5"], ["c", "z", 2, "it takes 5 %", ""]]
    rows += [["d", "z", 10, "", ""]]
    monkeypatch.setattr(publish, "claims", lambda root: pd.DataFrame(rows, columns=columns))
    first, second = publish.answers_part(tmp_path).splitlines()
    assert first == "- **Start.** A dense start is worth +1.0 points. A random one +0.5 points, width 0.5."
    assert second == "- **Bytes.** It takes 5 %."
    monkeypatch.setattr(publish, "claims", lambda root: pd.DataFrame(rows[-1:], columns=columns))
    assert publish.answers_part(tmp_path) == NOTHING
