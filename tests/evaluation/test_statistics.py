"""Intervals and tests by how often they are right, over many draws from what is known.

Rates are over 200 draws, so that a true 95% varies by 1.5% (one standard deviation); intervals of
200 resamples, and of a p95, are themselves a little narrow.
"""

import math

import numpy as np
import pytest
from scipy import stats

from iet_sd.errors import UserError
from iet_sd.evaluation.statistics import (
    Estimate,
    bootstrap,
    difference_of_shares,
    exact_share,
    paired_difference,
    permutation_test,
)

REPEATS = 200
FAST = {"resamples": 200}


def p95(values):
    """`np.quantile(values, 0.95)`, faster for few values."""
    place = 0.95 * (len(values) - 1)
    low = int(place)
    values = np.partition(values, [low, low + 1])
    return values[low] + (place - low) * (values[low + 1] - values[low])


def mean_and_p95(values):
    return values.sum() / len(values), p95(values)


def excess(generated, heldout):
    (mean_G, p95_G), (mean_H, p95_H) = mean_and_p95(generated), mean_and_p95(heldout)
    return mean_G - mean_H, p95_G - p95_H


def coverage(make, truth, repeats=REPEATS):
    """Share of the intervals ``make(rng, seed)`` that hold the truth, for each number given."""
    hits = [
        [est.low <= true <= est.high for est, true in zip(found, truth, strict=True)]
        for found in (make(np.random.default_rng(seed), seed) for seed in range(repeats))
    ]
    return np.mean(hits, axis=0)


def clustered(rng, units, size, share=0.9):
    """Standard normal values (N,) and labels: the unit makes up ``share`` of the variance."""
    labels = np.repeat(np.arange(units), size)
    unit_part = rng.normal(size=units)[labels] * math.sqrt(share)
    order = rng.permutation(len(labels))
    values = unit_part + rng.normal(size=len(labels)) * math.sqrt(1 - share)
    return values[order], labels[order]


def is_nominal(rates):
    return np.all((np.asarray(rates) > 0.88) & (np.asarray(rates) < 0.99))


def alarms(test, repeats=REPEATS):
    """Share of ``test(rng)``'s p-values at or below 5%."""
    return np.mean([test(np.random.default_rng(seed)) <= 0.05 for seed in range(repeats)])


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


def paired_draw(rng, effect, units=60, size=2):
    """Values of two models that share what is due to the prompt, and the prompts."""
    prompts = np.repeat(np.arange(units), size)
    common = rng.normal(1, 0.3, units)[prompts]
    a, b = common + rng.normal(0, 0.1, (2, len(prompts)))
    return a, b - effect, prompts


def test_a_paired_difference_covers_the_planted_effect():
    effect = 0.1

    def make(rng, seed):
        a, b, prompts = paired_draw(rng, effect)
        found = paired_difference(np.mean, a, b, clusters=[prompts], seed=seed, **FAST)
        return found.difference, found.relative_reduction

    rates = coverage(make, (effect, effect / 1))
    assert is_nominal(rates), rates


def test_pairs_tell_what_two_separate_samples_do_not():
    a, b, _ = paired_draw(np.random.default_rng(0), 0.05, size=1)
    found = paired_difference(np.mean, a, b)
    assert found.difference.low > 0
    assert found.p_value < 0.05
    assert bootstrap(lambda x, y: np.mean(x) - np.mean(y), a, b).low < 0


def test_the_reduction_of_an_excess_is_over_the_shared_baseline():
    rng = np.random.default_rng(0)
    heldout = rng.normal(0.3, 0.05, 300)
    a, b = rng.normal(0.7, 0.05, 300), rng.normal(0.4, 0.05, 300)
    found = paired_difference(lambda x, h: x.mean() - h.mean(), a, b, [heldout])
    excess_a, excess_b = a.mean() - heldout.mean(), b.mean() - heldout.mean()
    assert found.difference.value == pytest.approx(a.mean() - b.mean())
    assert found.relative_reduction.value == pytest.approx(1 - excess_b / excess_a)
    assert found.relative_reduction.low < 0.75 < found.relative_reduction.high
    assert found.p_value == pytest.approx(1 / 2001)
    assert found.reason is None
    # The baseline is one draw for both, so it leaves their difference alone.
    wild = paired_difference(lambda x, h: x.mean() - h.mean(), a, b, [heldout * 100])
    assert wild.difference.low == pytest.approx(found.difference.low, abs=1e-9)


@pytest.mark.parametrize("centre", [0.0, -1.0])
def test_nothing_to_reduce_gives_no_reduction_but_a_reason(centre):
    rng = np.random.default_rng(0)
    a, b = rng.normal(centre, 0.1, (2, 100))
    found = paired_difference(np.mean, a, b)
    assert math.isnan(found.relative_reduction.value)
    assert math.isnan(found.relative_reduction.low)
    assert "too near 0" in found.reason
    assert math.isfinite(found.difference.low)


def test_a_reduction_of_what_may_be_nothing_is_none_even_where_its_own_interval_is_finite():
    a = np.random.default_rng(7).normal(size=60)
    a += 0.22 - a.mean()
    b = np.where(np.arange(60) % 2, 0, 0.8 * a)
    assert bootstrap(np.mean, a).low < 0
    found = paired_difference(np.mean, a, b)
    assert math.isnan(found.relative_reduction.value)
    assert found.difference.value == pytest.approx(a.mean() - b.mean())


def test_draws_without_anything_to_reduce_count_as_the_worst():
    a, b = np.zeros((2, 200))
    a[:4] = 1  # 1.8% of the draws have none of the four
    found = paired_difference(np.mean, a, b)
    assert (found.relative_reduction.value, found.relative_reduction.high) == (1, 1)
    assert found.relative_reduction.low == 1
    tight = paired_difference(np.mean, a, b, level=0.97)
    assert tight.reason is not None


@pytest.mark.parametrize("statistic", [np.mean, p95], ids=["mean", "p95"])
def test_two_equal_models_are_called_different_at_the_nominal_rate(statistic):
    def test(rng):
        a, b, prompts = paired_draw(rng, 0)
        return paired_difference(statistic, a, b, clusters=[prompts], resamples=99).p_value

    assert 0.01 < alarms(test) < 0.1


def test_the_exchange_is_by_unit():
    def p_value(rng, by_unit):
        prompts = np.repeat(np.arange(40), 5)
        b = rng.normal(size=200)
        a = b + rng.normal(size=40)[prompts]
        clusters = [prompts] if by_unit else None
        return paired_difference(np.mean, a, b, clusters=clusters, resamples=99).p_value

    assert 0.01 < alarms(lambda rng: p_value(rng, True)) < 0.1
    assert alarms(lambda rng: p_value(rng, False), 60) > 0.2


@pytest.mark.parametrize(
    "tenths", [[4, 9, -2, 7, 1, 12, -5, 8, 3, -6], [1, 1, 1, 1, 1, 1, 1, 1, -1, -1]]
)
def test_the_p_value_of_a_mean_is_that_of_all_sign_flips(tenths):
    flips = np.array(np.meshgrid(*[[1, -1]] * 10)).reshape(10, -1).T
    expected = np.mean(np.abs(flips @ tenths) >= abs(sum(tenths)))
    assert 0.02 < expected < 0.5
    b = np.random.default_rng(5).normal(size=10)
    found = paired_difference(np.mean, b + np.array(tenths) / 10, b, resamples=8000).p_value
    assert found == pytest.approx(expected, abs=0.02)


def test_models_of_equal_values_do_not_differ():
    values = np.random.default_rng(0).normal(size=50)
    found = paired_difference(np.mean, values, values.copy())
    assert (found.difference.low, found.difference.high, found.p_value) == (0, 0, 1)


@pytest.mark.parametrize(
    ("units", "size", "spread"),
    [(60, 1, 1.0), (60, 4, 1.0), (20, np.arange(20) % 6 + 1, 1.0), (25, 1, 3.0)],
    ids=["rows", "prompts", "few prompts of unequal size", "few of wider spread"],
)
def test_generated_images_like_held_out_ones_raise_the_alarm_at_the_nominal_rate(
    units, size, spread
):
    def test(rng):
        generated, prompts = clustered(rng, units, size)
        heldout, groups = clustered(rng, 90, np.arange(90) % 2 + 1)
        return permutation_test(
            generated * spread, heldout, clusters=[prompts, groups], resamples=199
        )

    assert 0.01 < alarms(test) < 0.1


def test_images_of_one_prompt_are_no_independent_evidence():
    def test(rng):
        generated, _ = clustered(rng, 40, 5)
        return permutation_test(generated, rng.normal(size=150), resamples=199)

    assert alarms(test) > 0.12


def test_planted_copies_raise_the_alarm_and_the_reverse_does_not():
    def test(rng, way=1):
        generated, heldout = rng.normal(0.3, 0.08, (2, 200))
        generated[:12] = 0.95
        return permutation_test(*(generated, heldout)[::way], resamples=199)

    assert alarms(test) > 0.9
    assert alarms(lambda rng: test(rng, -1), 60) == 0


def test_the_p_value_is_near_that_of_welchs_t_for_normal_values():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 3, 60), rng.normal(0, 1, 600)
    for aim in (0.3, 0.7):
        shifted = a - a.mean() + aim
        expected = stats.ttest_ind(shifted, b, equal_var=False, alternative="greater").pvalue
        assert 0.02 < expected < 0.3
        assert permutation_test(shifted, b) == pytest.approx(expected, abs=0.015)


def test_constant_values_are_told_apart_only_if_they_differ():
    assert permutation_test(np.ones(30), np.ones(20)) == 1
    assert permutation_test(np.ones(30), np.zeros(20)) < 0.001
    assert permutation_test(np.zeros(30), np.ones(20)) > 0.5


@pytest.mark.parametrize("values", [np.ones(1), np.ones((1, 8)), np.ones(0)])
def test_fewer_than_two_units_are_refused(values):
    with pytest.raises(UserError, match=r"at least 2 prompts or images"):
        bootstrap(np.mean, values)


def test_one_cluster_is_one_unit():
    with pytest.raises(UserError, match="got 1"):
        bootstrap(np.mean, np.ones(5), clusters=[np.zeros(5)])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="2 of 4 values are not finite"):
        permutation_test(np.ones(3), np.array([1, np.nan, np.inf, 2]))


def test_models_of_different_prompts_are_not_compared():
    with pytest.raises(UserError, match="same prompts and seeds"):
        paired_difference(np.mean, np.ones(5), np.ones(6))


def test_labels_must_fit():
    with pytest.raises(ValueError, match="3 cluster labels for 4 rows"):
        bootstrap(np.mean, np.arange(4.0), clusters=[np.arange(3)])


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("units", [2, 60, 1000])
def test_none_or_all_have_the_bound_of_clopper_and_pearson(units, level):
    """In closed form: the share of which none in so many units has a chance of (1 - level) / 2."""
    bound = 1 - ((1 - level) / 2) ** (1 / units)
    none = exact_share(Estimate(0.0, 0.0, 0.0, level), units)
    every = exact_share(Estimate(1.0, 1.0, 1.0, level), units)
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(bound))
    assert (every.value, every.low, every.high) == (1, pytest.approx(1 - bound), 1)
    between = Estimate(0.5, 0.4, 0.6, level)
    assert exact_share(between, units) is between


def test_a_rare_share_is_covered_where_the_bootstrap_alone_fails():
    """One in 50; of 60 images, 30% of the samples show none."""

    def make(rng, seed):
        rare = rng.random(60) < 0.02
        plain = bootstrap(np.mean, rare, seed=seed, **FAST)
        return plain, exact_share(plain, 60)

    plain, exact = coverage(make, (0.02, 0.02))
    assert plain < 0.75
    assert exact > 0.93


def test_where_images_of_a_prompt_are_alike_prompts_count():
    """One prompt in 10 is copied, by all of its 4 images; 20 prompts."""
    prompts = np.repeat(np.arange(20), 4)

    def make(rng, seed):
        copied = (rng.random(20) < 0.1)[prompts]
        share = bootstrap(np.mean, copied, clusters=[prompts], seed=seed, **FAST)
        return exact_share(share, 80), exact_share(share, 20)

    by_image, by_prompt = coverage(make, (0.1, 0.1))
    assert by_image < by_prompt
    assert by_prompt > 0.93


def test_a_difference_of_shares_by_newcombe():
    """His first example, 56 of 70 against 48 of 80, by Wilson's intervals."""
    wilson = [
        stats.binomtest(k, n).proportion_ci(0.95, method="wilson") for k, n in ((56, 70), (48, 80))
    ]
    first, second = (
        Estimate(share, ci.low, ci.high)
        for share, ci in zip((56 / 70, 48 / 80), wilson, strict=True)
    )
    found = difference_of_shares(first, second)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_difference_of_rare_shares_is_covered():
    """Both shown by few samples; the bootstrap alone takes none against none for surely equal."""

    def make(rng, seed):
        samples = [(rng.random(60) < 0.03), (rng.random(80) < 0.01)]
        apart = [exact_share(bootstrap(np.mean, s, seed=seed, **FAST), len(s)) for s in samples]
        return [difference_of_shares(*apart)]

    assert coverage(make, (0.02,))[0] > 0.93
