"""KID's interval: its value is KID's, it leaves out by the book, and covers at the nominal rate."""

import numpy as np
import pytest

from iet_sd.evaluation.kid import kid_difference, kid_interval
from iet_sd.evaluation.quality import kernel_distance

RNG = np.random.default_rng(0)
GEN, REAL = RNG.random((36, 8), np.float32), RNG.random((30, 8), np.float32) + 0.1
PROMPT = np.repeat(np.arange(12), 3)


def test_the_value_is_that_of_torch_fidelity():
    a = RNG.random((30, 8), np.float32)
    value = kid_interval(a, REAL, np.arange(30)).value
    assert value == pytest.approx(kernel_distance(a, REAL, subsets=2)[0], rel=1e-4)


def test_the_interval_is_the_jackknife_by_hand():
    """Each prompt, then each real image, is left out and KID taken anew."""
    values = [
        [kid_interval(GEN[p != PROMPT], REAL, PROMPT[p != PROMPT]).value for p in range(12)],
        [kid_interval(GEN, np.delete(REAL, n, axis=0), PROMPT).value for n in range(30)],
    ]
    variance = sum((len(v) - 1) / len(v) * np.sum((v - np.mean(v)) ** 2) for v in values)
    found = kid_interval(GEN, REAL, PROMPT)
    assert found.high - found.value == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_a_difference_of_a_model_with_itself_is_nothing():
    found = kid_difference(GEN, GEN.copy(), REAL, PROMPT)
    assert (found.low, found.value, found.high) == (0, 0, 0)


def test_a_difference_is_surer_than_its_parts():
    second = GEN + np.float32(0.05)
    found = kid_difference(GEN, second, REAL, PROMPT)
    parts = [kid_interval(each, REAL, PROMPT) for each in (GEN, second)]
    assert found.value == pytest.approx(parts[1].value - parts[0].value)
    assert found.high - found.low < 0.7 * (parts[0].high - parts[0].low)


def test_the_interval_covers_the_true_distance():
    """Of a shift whose KID is known from very many images."""
    rng = np.random.default_rng(1)
    many = [rng.normal(0, 1, (4000, 4)), rng.normal(0.5, 1, (4000, 4))]
    true = kid_interval(*many, np.arange(4000)).value
    covered = 0
    for _ in range(200):
        a, b = rng.normal(0, 1, (80, 4)), rng.normal(0.5, 1, (80, 4))
        found = kid_interval(a, b, np.arange(80))
        covered += found.low <= true <= found.high
    assert 176 <= covered <= 199  # 95 % of 200, less four standard deviations
