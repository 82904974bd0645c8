"""Colours are told apart by every kind of colour vision: simulated, and measured in CIELAB."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from feddip_lite.methods import METHODS
from feddip_lite.records.names import family_of
from feddip_lite.report.style import FAMILY_COLOURS, MARKERS

# What an eye without one kind of cone sees, linear RGB to linear RGB (Machado et al. 2009, severity 1).
VISIONS = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])
APART = 10.0  # a just noticeable difference is about 2.3


def seen(colour, vision):
    """CIELAB (L, a, b) of a colour as that eye sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(np.array(VISIONS[vision]) @ linear, 0, 1) / WHITE
    root = lambda t: np.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116  # noqa: E731, the standard's f
    return np.array([116 * root(y) - 16, 500 * (root(x) - root(y)), 200 * (root(y) - root(z))])


def test_the_measure_knows_white_black_and_what_a_colour_blind_eye_confuses():
    assert np.allclose(seen("white", "usual"), [100, 0, 0], atol=0.1) and np.allclose(seen("black", "usual"), 0)
    red_and_green = [
        np.linalg.norm(seen("#b30000", vision) - seen("#5c7a00", vision)) for vision in ("usual", "deuteranopia")
    ]
    assert red_and_green[1] < red_and_green[0] / 3


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("family", FAMILY_COLOURS)
def test_the_colours_of_a_family_are_apart_and_so_are_they_from_fedavg_and_feddip(family, vision):
    colours = dict.fromkeys([*FAMILY_COLOURS[family], "#222222", "#d55e00"])  # in each panel of the families' figure
    for one, other in combinations(colours, 2):
        assert np.linalg.norm(seen(one, vision) - seen(other, vision)) > APART, (one, other)


def test_methods_that_share_a_colour_have_other_markers():
    for family, colours in FAMILY_COLOURS.items():
        members = [name for name in METHODS if family_of(name) == family]
        looks = {(colours[k % len(colours)], MARKERS[k % len(MARKERS)]) for k in range(len(members))}
        assert len(looks) == len(members)
