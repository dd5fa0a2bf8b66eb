"""The charts of the efficacy study."""

import numpy as np
import pytest

from benchmarks.efficacy.chart import Line, draw_lines


@pytest.mark.parametrize("name", ["plain", "a method, 2 x updates, and settings of it, " * 3])
def test_names_of_lines_are_whole(name):
    """The page ends in white beside the names, and is as it was where they are short."""
    picture = draw_lines([Line(name, [0.0, 1.0], [1.0, 0.0])], "title", "x", "y")
    assert (np.asarray(picture)[:, -4:] == 255).all()
    assert (picture.width == 960) == (name == "plain")
    assert picture.height == 560
