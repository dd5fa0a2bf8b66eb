"""The numbers of the efficacy study on curves whose frontier is known."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.efficacy.analysis import (
    Curves,
    at_budget,
    best_reading,
    common_levels,
    compare,
    least_memory,
    verdict,
)
from iet_sd.evaluation.statistics import Estimate

# Held-out loss falls, then rises; memorization rises all the way.
QUALITY = np.array([10.0, 6.0, 4.0, 5.0, 8.0])
MEMORY = np.array([0.0, 1.0, 3.0, 6.0, 9.0])
UPDATES = np.arange(5) * 100


def curves(memory_R, quality_R=QUALITY, seeds=(0, 1, 2), noise=0.0, units=200, draw=7):
    """Seeds, prompts and images around the means, the same noise for all readings."""
    rng = np.random.default_rng(draw)
    S, R = len(seeds), len(quality_R)
    around = noise * rng.standard_normal((S, 1, units))
    around -= around.mean()
    shape = np.ones((S, R, units))
    return Curves(
        tuple(seeds),
        shape * np.asarray(quality_R)[None, :, None] + around,
        shape * np.asarray(memory_R)[None, :, None] + around[:, :, ::-1],
    )


def test_least_memory_is_that_of_the_way_down():
    level_L = np.array([10.0, 8.0, 6.0, 5.0, 4.0, 3.9])
    least_L, place_L = least_memory(QUALITY, MEMORY, level_L)
    np.testing.assert_allclose(least_L, [0, 0.5, 1, 2, 3, np.nan], equal_nan=True)
    np.testing.assert_allclose(place_L, [0, 0.5, 1, 1.5, 2, np.nan], equal_nan=True)


def test_least_memory_is_that_of_a_dense_search():
    rng = np.random.default_rng(0)
    for _ in range(20):
        quality, memory = rng.random((2, 6))
        place = np.linspace(0, 5, 50_001)
        dense = [np.interp(place, np.arange(6), each) for each in (quality, memory)]
        level_L = quality.min() + rng.random(7)
        expected = [dense[1][dense[0] <= level].min() for level in level_L]
        least_L, place_L = least_memory(quality, memory, level_L)
        np.testing.assert_allclose(least_L, expected, atol=2e-3)
        np.testing.assert_allclose(np.interp(place_L, np.arange(6), memory), least_L)


def test_least_memory_of_a_flat_stretch():
    least_L, place_L = least_memory(np.array([5.0, 5.0]), np.array([2.0, 1.0]), np.array([5.0]))
    assert (least_L, place_L) == ([1.0], [1.0])


def test_levels_are_shares_of_the_gain_that_both_reach():
    better = np.array([10.0, 2.0])
    np.testing.assert_allclose(common_levels(QUALITY, better, [0, 0.5, 1]), [10, 7, 4])
    np.testing.assert_allclose(common_levels(better, QUALITY, [1]), [4])


def test_half_as_much_at_every_reading_is_a_reduction_of_a_half():
    found = compare(curves(MEMORY), curves(MEMORY / 2), resamples=50)
    assert found.seeds == (0, 1, 2)
    for level in found.levels:
        assert level.reduction.value == pytest.approx(0.5)
        assert level.reduction.low == pytest.approx(0.5)
        assert level.difference.value == pytest.approx(level.first.value / 2)
    assert [level.first.value for level in found.levels] == pytest.approx([1.8, 2.4, 2.7, 3.0])
    # Levels from half of the gain (loss 7) to all (4): 0.75 to 1 above 6, then to 3.
    share = np.linspace(0.5, 1, 26)
    loss = 10 - 6 * share
    expected = np.where(loss > 6, (10 - loss) / 4, 1 + (6 - loss))
    assert found.area.value == pytest.approx(expected.mean() / 2)


def test_a_slower_run_on_the_same_curve_is_no_gain():
    """Training less memorizes less: at equal held-out loss it is the same."""
    place = np.linspace(0, 2, 9)
    slower = [np.interp(place, np.arange(5), each) for each in (MEMORY, QUALITY)]
    found = compare(curves(MEMORY, noise=1), curves(*slower, noise=1, draw=8), resamples=200)
    for level in found.levels:
        assert level.difference.value == pytest.approx(0, abs=1e-6)
        assert verdict(level.difference) == "no difference shown"


def test_a_method_that_never_gets_as_good_is_compared_where_it_gets():
    poor = compare(
        curves(MEMORY), curves([0.0, 0.5], quality_R=np.array([10.0, 7.0])), resamples=50
    )
    top = poor.levels[-1]
    assert top.quality == pytest.approx(7)
    assert poor.best.value == pytest.approx(QUALITY.min() - 7)
    assert (top.first.value, top.second.value) == pytest.approx((0.75, 0.5))


def test_no_share_is_given_of_what_is_not_above_zero():
    found = compare(curves(MEMORY - 5), curves(MEMORY - 6), resamples=50)
    assert all(level.reduction is None for level in found.levels)
    assert all(level.difference.value == pytest.approx(1) for level in found.levels)


def test_a_reduction_is_of_all_at_most():
    """What is below the held-out baseline is no memorization, and not less than none."""
    top = compare(curves(MEMORY), curves(MEMORY - 20), shares=(1.0,), resamples=50).levels[0]
    assert top.difference.value == pytest.approx(20)
    assert top.reduction.value == 1


def test_what_never_gets_better_than_before_training_is_not_compared():
    worse = curves(MEMORY, quality_R=QUALITY[0] + MEMORY)
    assert compare(curves(MEMORY), worse, resamples=20) is None
    assert compare(worse, curves(MEMORY), resamples=20) is None


def test_the_gap_counts_the_heldout_loss():
    gap = replace(curves(-MEMORY), against_heldout=True)
    quality_R, memory_R = gap.mean
    np.testing.assert_allclose(memory_R, quality_R - MEMORY)


def test_a_percentile_is_of_each_run_over_the_prompts_drawn():
    rng = np.random.default_rng(5)
    memory = rng.standard_normal((2, 4, 40))
    runs = Curves((0, 1), np.ones((2, 4, 6)), memory, percentile=95)
    prompts = np.array([3, 3, 7, 21, 39])
    _, memory_R = runs.means(slice(None), prompts, slice(None))
    expected = [
        np.mean([np.percentile(memory[s, r, prompts], 95) for s in (0, 1)]) for r in range(4)
    ]
    np.testing.assert_allclose(memory_R, expected)


def test_quality_of_prompts_is_drawn_with_them():
    """A measure that is the quality itself is at its level in every draw."""
    rng = np.random.default_rng(3)
    quality = QUALITY[None, :, None] + rng.standard_normal((1, 1, 50))
    same = Curves((0,), quality, quality, by_prompt=True)
    found = compare(same, same, shares=(1.0,), resamples=50).levels[0]
    assert found.first.value == pytest.approx(found.quality)
    apart = replace(same, by_prompt=False)
    prompts, heldout = np.arange(10), np.arange(10, 20)
    rows = [each.means(slice(None), prompts, heldout) for each in (same, apart)]
    np.testing.assert_array_equal(*rows[0])
    assert (rows[1][0] != rows[1][1]).all()


def test_only_seeds_that_both_have_count_and_pairs_keep_their_order():
    first, second = curves(MEMORY, seeds=(0, 1, 2)), curves(MEMORY / 2, seeds=(2, 0))
    assert compare(first, second, resamples=20).seeds == (0, 2)
    swapped = second.of((0, 2))
    np.testing.assert_array_equal(swapped.memory_SRP[0], second.memory_SRP[1])


def test_intervals_cover_a_planted_difference():
    """Over draws of prompts and seeds, 95 % intervals hold the truth about as often."""
    rng = np.random.default_rng(1)
    covered, rounds, S, P = 0, 60, 6, 60
    for number in range(rounds):
        prompts, seeds = rng.standard_normal((1, 1, P)), rng.standard_normal((S, 1, 1))
        own = rng.standard_normal((2, S, 1, P))
        sets = [
            Curves(
                tuple(range(S)),
                np.ones((S, 1, P)) * QUALITY[None, :, None],
                (MEMORY * factor)[None, :, None] + prompts + seeds + noise,
            )
            for factor, noise in zip((1.0, 0.8), own, strict=True)
        ]
        top = compare(*sets, shares=(1.0,), resamples=200, seed=number).levels[0]
        covered += top.difference.low <= 0.6 <= top.difference.high
    assert covered / rounds > 0.85


def test_after_as_many_updates_memory_and_quality_are_those_of_the_last_readings():
    better = curves(MEMORY / 3, quality_R=QUALITY - 0.5)
    found = at_budget(curves(MEMORY), better, (UPDATES, UPDATES), resamples=50)
    ends = found.first, found.second, found.difference, found.better
    assert [each.value for each in ends] == pytest.approx([9.0, 3.0, 6.0, 0.5])
    assert found.reduction.value == pytest.approx(2 / 3)
    none = at_budget(curves(MEMORY - 10), better, (UPDATES, UPDATES), resamples=50)
    assert none.reduction is None


def test_after_as_many_updates_a_planted_reduction_is_covered_and_prompts_are_paired():
    """The noise of prompts is the same in both, so the difference has none of it."""
    first, second = (curves(memory, noise=3, units=60) for memory in (MEMORY, MEMORY - 4))
    found = at_budget(first, second, (UPDATES, UPDATES), resamples=400)
    assert found.first.high - found.first.low > 0.5
    assert found.difference.low == pytest.approx(4) == found.difference.high
    assert found.reduction.low < 4 / 9 < found.reduction.high


@pytest.mark.parametrize(
    ("dear", "cheap", "places", "first", "second"),
    [
        # The second has spent 300 at its end, which the first has between its last readings.
        (UPDATES, 0.75 * UPDATES, (3.0, 4.0), (6.0, 5.0), (4.5, 8.0)),
        (UPDATES, 0.625 * UPDATES, (2.5, 4.0), (4.5, 4.5), (4.5, 8.0)),
        # The other way round it is the second that goes on.
        (0.25 * UPDATES, UPDATES, (4.0, 1.0), (9.0, 8.0), (0.5, 6.0)),
    ],
    ids=["a reading", "between two", "the first spends less"],
)
def test_as_much_is_what_the_one_that_spends_less_spends_in_all(dear, cheap, places, first, second):
    found = at_budget(curves(MEMORY), curves(MEMORY / 2), (dear, cheap), resamples=50)
    assert found.places == pytest.approx(places)
    memory, quality = zip(first, second, strict=True)
    assert (found.first.value, found.second.value) == pytest.approx(memory)
    assert found.better.value == pytest.approx(quality[0] - quality[1])


def test_the_best_reading_is_after_training_began():
    assert best_reading(QUALITY) == 2
    assert best_reading(np.array([1.0, 3.0, 2.0])) == 2


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 0.3, "less"), (-0.3, -0.1, "more"), (-0.1, 0.1, "no difference shown")],
)
def test_verdicts(low, high, word):
    assert verdict(Estimate((low + high) / 2, low, high)) == word
