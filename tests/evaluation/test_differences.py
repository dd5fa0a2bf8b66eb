"""Paired differences of models by how often they are right, and p-values by all sign flips."""

import math

import numpy as np
import pytest

from iet_sd.errors import UserError
from iet_sd.evaluation.statistics import bootstrap, paired_difference
from tests.evaluation.rates import FAST, alarms, coverage, is_nominal, p95


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


def test_models_of_different_prompts_are_not_compared():
    with pytest.raises(UserError, match="same prompts and seeds"):
        paired_difference(np.mean, np.ones(5), np.ones(6))
