"""Statistics of similarities against their definitions."""

import math

import numpy as np
import pytest

from iet_sd.evaluation.similarity import summarize


def percentile(values, q):
    """Linear between the two values around position q (n - 1)."""
    ordered, position = sorted(values), q / 100 * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("count", [1, 2, 37, 500])
def test_equals_the_definitions(count):
    value_G = np.random.default_rng(count).random(count, dtype=np.float32)
    values = value_G.tolist()
    mean = sum(values) / count
    expected = {
        "mean": mean,
        "std": math.sqrt(sum((value - mean) ** 2 for value in values) / count),
        **{f"p{q}": percentile(values, q) for q in (75, 90, 95)},
        "share_above_0.5": sum(value > 0.5 for value in values) / count,
        "share_above_0.25": sum(value > 0.25 for value in values) / count,
    }
    result = summarize(value_G, thresholds=(0.5, 0.25))
    assert result == pytest.approx(expected, rel=1e-6)
    assert list(result) == list(expected)


def test_the_paper_s_threshold_is_the_default_and_strict():
    assert summarize(np.array([0.5, 0.5, 0.50001, 0.2]))["share_above_0.5"] == 0.25


def test_p95_of_a_hundred_and_one_steps():
    assert summarize(np.arange(101) / 100)["p95"] == pytest.approx(0.95)
