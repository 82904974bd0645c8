"""What is in `figures/` follows from `results/` and `benchmarks/`: every figure is drawn again and compared."""

import importlib.metadata
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from feddip_lite.records.store import ROOT
from feddip_lite.report import published
from feddip_lite.report.style import save_figure

PINNED = re.search(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
NAMES = re.compile(r'(?<=id=")[^"]*|(?<=href="#)[^"]*|(?<=url\(#)[^)]*')  # some are hashes of coordinates

pytestmark = [
    pytest.mark.usefixtures("agg"),
    pytest.mark.skipif(
        importlib.metadata.version("matplotlib") != PINNED, reason=f"figures are drawn with matplotlib {PINNED}"
    ),
]
drawn = {}


@pytest.mark.parametrize("part", published.PARTS, ids=lambda part: part.__name__)
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


def test_there_is_no_other_figure():
    if set(drawn) != set(published.PARTS):
        pytest.skip("not all figures were drawn again in this process")
    for suffix in ("svg", "png"):
        assert {path.stem for path in (ROOT / "figures").glob(f"*.{suffix}")} == set.union(*drawn.values())
