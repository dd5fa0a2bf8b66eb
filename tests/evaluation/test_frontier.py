"""The round to keep: the rule on planted tables, and its picture."""

import numpy as np
import pytest
from scipy import stats

from iet_sd.evaluation import picture
from iet_sd.evaluation.drawing import Axis
from iet_sd.evaluation.frontier import candidates, recommend
from iet_sd.evaluation.picture import draw_frontier
from iet_sd.evaluation.probe import Reading
from iet_sd.evaluation.statistics import Estimate

IMAGES = 60
SPREAD = np.random.default_rng(0).gamma(4.0, 0.02, IMAGES)
SPREAD -= SPREAD.mean()


def reading(number, excess, loss, noise=0.0, seed=0):
    """A round of that mean loss, whose images differ from other rounds' by ``noise``."""
    own = np.random.default_rng([number, seed]).normal(0, 1, IMAGES)
    own -= own.mean()
    loss_N = loss + SPREAD + noise * own
    nothing = Estimate(0.0, 0.0, 0.0)
    return Reading(
        number,
        nothing,
        Estimate(excess, excess - 0.02, excess + 0.02),
        Estimate(float(loss_N.mean()), loss - 0.02, loss + 0.02),
        nothing,
        nothing,
        nothing,
        tuple(loss_N.tolist()),
        seconds=1.0,
    )


def rounds(found):
    return [each.round for each in found]


# Excess and held-out loss by round, from 1 on; the rounds left, and the one to keep. Images differ
# by 0.005, so a difference of means is known to about 0.0018 (twice the standard error).
TABLES = {
    "one round": ([(0.1, 0.2)], [1], 1),
    "better and better": ([(0.3, 0.3), (0.2, 0.2), (0.1, 0.1)], [3], 3),
    "surely worse, however little it memorizes": ([(0.0, 0.11), (0.1, 0.10)], [2], 2),
    "within noise, and memorizes less": ([(0.0, 0.1005), (0.1, 0.10)], [1, 2], 1),
    "within noise, and memorizes more": ([(0.2, 0.1005), (0.1, 0.10)], [2], 2),
    "a plateau after the fall": (
        [(0.0, 0.20), (0.02, 0.1008), (0.05, 0.1004), (0.1, 0.10), (0.2, 0.1002)],
        [2, 3, 4],
        2,
    ),
    "overfitting": ([(0.0, 0.13), (0.1, 0.10), (0.2, 0.12), (0.3, 0.14)], [2], 2),
    "equal in all": ([(0.1, 0.1), (0.1, 0.1)], [1], 1),
    "equal in loss": ([(0.1, 0.1), (0.05, 0.1)], [2], 2),
}


@pytest.mark.parametrize(("table", "left", "kept"), TABLES.values(), ids=TABLES)
def test_the_rule(table, left, kept):
    noise = 0.0 if table[0][1] == table[-1][1] else 0.005
    readings = [reading(i, *numbers, noise) for i, numbers in enumerate(table, 1)]
    assert rounds(candidates(readings)) == left
    advice = recommend(readings)
    assert (advice.round, list(advice.left)) == (kept, left)
    assert advice.text.startswith(f"Keep round {kept}: ")
    assert advice.line() == {
        "kind": "recommendation",
        "round": kept,
        "candidates": left,
        "text": advice.text,
    }


def test_the_model_before_training_takes_no_part():
    """It memorizes nothing; a training that has not helped is told of."""
    start = reading(0, -0.5, 0.05)
    assert recommend([start]) is None
    advice = recommend([start, reading(1, 0.1, 0.10, 0.005), reading(2, 0.2, 0.2, 0.005)])
    assert (advice.round, advice.left) == (1, (1,))
    assert "training has not lowered the held-out loss: before it, that was 0.0500" in advice.text
    helped = recommend([reading(0, -0.5, 0.2), reading(1, 0.1, 0.10, 0.005)])
    assert "has not" not in helped.text


def random_table(seed, count=7):
    rng = np.random.default_rng(seed)
    means = 0.1 + rng.normal(0, 0.001, count)
    excesses = rng.choice([0.0, 0.02, 0.05, 0.07], count)
    numbers = zip(excesses, means, strict=True)
    return [reading(i, *pair, 0.005, seed) for i, pair in enumerate(numbers, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_out_stays_out_and_one_is_always_left(seed):
    """So weights can be deleted as rounds come, and nothing else would be recommended."""
    readings = random_table(seed)
    kept = set()
    for number in range(1, len(readings) + 1):
        left = set(rounds(candidates(readings[:number])))
        assert left
        assert left <= kept | {number}
        kept = left
    assert recommend(readings).round in kept
    lowest = min(readings, key=lambda each: each.heldout_loss.value)
    assert lowest.round in kept


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_by_brute_force(seed):
    """With scipy's bootstrap, but where that is near the line."""
    readings = random_table(seed, count=5)
    left = set(rounds(candidates(readings)))
    for mine in readings:
        out = near = False
        for other in readings:
            if other is mine:
                continue
            above_N = np.subtract(mine.heldout_loss_N, other.heldout_loss_N)
            low = stats.bootstrap(
                [above_N], np.mean, rng=np.random.default_rng(1), n_resamples=2000
            ).confidence_interval.low
            near |= abs(low) < 5e-5
            out |= low > 0
            out |= above_N.mean() >= 0 and mine.excess_score.value >= other.excess_score.value
        assert near or (mine.round not in left) == out


def test_near_duplicates_count_once():
    """Each image of 20 three times: what 60 would show, 20 do not."""
    group_N = np.arange(IMAGES) // 3
    own = np.repeat(np.random.default_rng(3).normal(0, 0.005, 20), 3)
    own -= own.mean()
    first, second = reading(1, 0.0, 0.1017), reading(2, 0.1, 0.10)
    first = first.__class__(
        **vars(first) | {"heldout_loss_N": tuple(np.add(first.heldout_loss_N, own).tolist())}
    )
    assert rounds(candidates([first, second])) == [2]
    assert rounds(candidates([first, second], group_N)) == [1, 2]


def spots(image, color):
    """Where a picture has a colour: the mean place (x, y), and how many pixels."""
    rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    rows, columns = np.nonzero((np.asarray(image) == rgb).all(axis=2))
    return (columns.mean(), rows.mean()), len(rows)


def test_the_picture_shows_each_round_where_it_is():
    readings = [reading(0, -0.1, 0.2), reading(1, 0.3, 0.15), reading(2, 0.1, 0.1)]
    advice = recommend(readings)
    assert advice.round == 2
    image = draw_frontier(readings, advice, "pixels")
    assert image.size == (960, 640)
    best, _ = spots(image, picture._BEST)
    other, _ = spots(image, picture._OUT)
    across = Axis.over([-0.12, 0.32], picture._LEFT, 960 - picture._RIGHT, picture._ROOM)
    up = Axis.over([0.1, 0.2], 640 - picture._BOTTOM, picture._TOP, picture._ROOM)
    assert best == pytest.approx((across.place(0.1), up.place(0.1)), abs=3)
    # Round 1, and the outline of round 0.
    assert across.place(-0.1) < other[0] < across.place(0.3)
    assert up.place(0.2) < other[1] <= up.place(0.15) + 1


@pytest.mark.parametrize("same", [0.0, 0.1, -1e-9])
def test_a_picture_of_rounds_that_do_not_differ(same):
    alone = [reading(0, same, 0.1)]
    draw_frontier(alone, None, "pixels")
    both = [*alone, reading(1, same, 0.1)]
    draw_frontier(both, recommend(both), "pixels")


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (-0.13, 0.12, ["-0.10", "-0.05", "0.00", "0.05", "0.10"]),
        (0.0561, 0.0823, ["0.06", "0.07", "0.08"]),
        (0.0, 10.0, ["0", "2", "4", "6", "8", "10"]),
    ],
)
def test_ticks_are_round_and_have_their_digits(low, high, texts):
    ticks = Axis(low, high, 0, 100).ticks()
    assert [text for _, text in ticks] == texts
    assert [value for value, _ in ticks] == pytest.approx([float(text) for text in texts])
