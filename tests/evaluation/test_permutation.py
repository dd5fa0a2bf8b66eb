"""The permutation test by how often it raises the alarm, and against Welch's t."""

import numpy as np
import pytest
from scipy import stats

from iet_sd.errors import UserError
from iet_sd.evaluation.statistics import permutation_test
from tests.evaluation.rates import alarms, clustered


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


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="2 of 4 values are not finite"):
        permutation_test(np.ones(3), np.array([1, np.nan, np.inf, 2]))
