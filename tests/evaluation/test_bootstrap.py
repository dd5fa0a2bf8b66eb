"""Intervals by how often they are right over many draws from what is known, and scipy's."""

import math

import numpy as np
import pytest
from scipy import stats

from iet_sd.errors import UserError
from iet_sd.evaluation.statistics import bootstrap
from tests.evaluation.rates import FAST, clustered, coverage, is_nominal, p95


def mean_and_p95(values):
    return values.sum() / len(values), p95(values)


def excess(generated, heldout):
    (mean_G, p95_G), (mean_H, p95_H) = mean_and_p95(generated), mean_and_p95(heldout)
    return mean_G - mean_H, p95_G - p95_H


NORMAL = (0.0, stats.norm.ppf(0.95))


@pytest.mark.parametrize("law", [stats.norm(), stats.gamma(2)], ids=["normal", "gamma"])
def test_intervals_of_mean_and_p95_cover_at_their_rate(law):
    def make(rng, seed):
        return bootstrap(mean_and_p95, law.rvs(200, random_state=rng), seed=seed, **FAST)

    rates = coverage(make, (law.mean(), law.ppf(0.95)))
    assert is_nominal(rates), rates


@pytest.mark.parametrize("size", [4, np.arange(100) % 5 + 1], ids=["equal", "unequal"])
def test_clusters_matter(size):
    def make(rng, seed, by_unit):
        values, labels = clustered(rng, 100, size)
        clusters = [labels if by_unit else None]
        return bootstrap(mean_and_p95, values, clusters=clusters, seed=seed, **FAST)

    rates = coverage(lambda *draw: make(*draw, True), NORMAL)
    assert is_nominal(rates), rates
    assert np.all(coverage(lambda *draw: make(*draw, False), NORMAL, 60) < 0.85)


def test_the_excess_over_held_out_images_holds_zero_where_there_is_none():
    def make(rng, seed):
        generated, prompts = clustered(rng, 80, 3)
        return bootstrap(
            excess, generated, rng.normal(size=200), clusters=[prompts, None], seed=seed, **FAST
        )

    rates = coverage(make, (0, 0))
    assert is_nominal(rates), rates


def test_the_excess_over_held_out_images_is_found_where_there_is_some():
    rng = np.random.default_rng(0)
    heldout, generated = rng.normal(0.3, 0.08, 400), rng.normal(0.3, 0.08, 500)
    generated[:40] = 0.95
    mean, p95 = bootstrap(excess, generated, heldout)
    assert (mean.low > 0, p95.low > 0.3) == (True, True)
    assert (mean.value, p95.value) == pytest.approx(tuple(excess(generated, heldout)))


def spread(x, axis=-1):
    return np.std(x, axis=axis)


def product(x, y, axis=-1):
    return np.var(x, axis=axis) * np.mean(y, axis=axis)


@pytest.mark.parametrize(("statistic", "sizes"), [(spread, [30]), (product, [40, 30])])
def test_an_interval_equals_that_of_scipy(statistic, sizes):
    rng = np.random.default_rng(1)
    samples = [rng.gamma(2, size=size) for size in sizes]
    options = {"n_resamples": 8000, "confidence_level": 0.9, "rng": 2}
    expected = stats.bootstrap(samples, statistic, method="BCa", **options).confidence_interval
    found = bootstrap(statistic, *samples, resamples=8000, level=0.9)
    assert (found.value, found.level) == (statistic(*samples), 0.9)
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=0.03)
    plain = stats.bootstrap(samples, statistic, method="percentile", **options).confidence_interval
    assert tuple(plain) != pytest.approx(tuple(expected), rel=0.1)


def test_rows_of_one_label_are_drawn_together_and_units_as_often_as_each_other():
    labels = np.array([7, 3, 7, 1, 3, 7, 9])
    values = np.arange(7.0)
    drawn_units = []

    def spy(drawn):
        rows = drawn.astype(int)
        times = [np.sum(rows == row) for row in range(7)]
        of_unit = {
            label: {times[row] for row in np.flatnonzero(labels == label)} for label in labels
        }
        assert all(len(each) == 1 for each in of_unit.values())
        drawn_units.append([next(iter(of_unit[label])) for label in (1, 3, 7, 9)])
        return 0.0

    bootstrap(spy, values, clusters=[labels], resamples=2000)
    assert {sum(units) for units in drawn_units[:2000]} == {4}
    assert np.mean(drawn_units[:2000], axis=0) == pytest.approx([1, 1, 1, 1], abs=0.1)


def test_a_row_of_many_values_is_a_unit():
    values_PI = np.random.default_rng(0).normal(size=(50, 3))
    as_rows = bootstrap(np.mean, values_PI)
    as_cluster = bootstrap(np.mean, values_PI.ravel(), clusters=[np.repeat(np.arange(50), 3)])
    assert (as_rows.low, as_rows.high) == pytest.approx((as_cluster.low, as_cluster.high))


def test_samples_are_drawn_apart():
    values = np.random.default_rng(0).normal(size=300)
    apart = bootstrap(lambda x, y: np.mean(x) - np.mean(y), values, values)
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * math.sqrt(2 / 300), rel=0.1)


def test_the_seed_decides():
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap(np.mean, values, seed=3) == bootstrap(np.mean, values, seed=3)
    assert bootstrap(np.mean, values, seed=3) != bootstrap(np.mean, values, seed=4)


@pytest.mark.parametrize("values", [np.ones(1), np.ones((1, 8)), np.ones(0)])
def test_fewer_than_two_units_are_refused(values):
    with pytest.raises(UserError, match=r"at least 2 prompts or images"):
        bootstrap(np.mean, values)


def test_one_cluster_is_one_unit():
    with pytest.raises(UserError, match="got 1"):
        bootstrap(np.mean, np.ones(5), clusters=[np.zeros(5)])


def test_labels_must_fit():
    with pytest.raises(ValueError, match="3 cluster labels for 4 rows"):
        bootstrap(np.mean, np.arange(4.0), clusters=[np.arange(3)])
