"""Rare shares and their differences: intervals in closed form, and how often they are right."""

import numpy as np
import pytest
from scipy import stats

from iet_sd.evaluation.statistics import Estimate, bootstrap, difference_of_shares, exact_share
from tests.evaluation.rates import FAST, coverage


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
