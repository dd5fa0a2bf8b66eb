"""Comparisons of shares and losses; more of `compare` is tested from end to end in tests/cli."""

from pathlib import Path

import numpy as np
import pytest

from iet_sd.config.evaluation import ComparisonConfig
from iet_sd.evaluation.compare import Evaluation, _losses, _with_exact_shares
from iet_sd.evaluation.statistics import Estimate, PairedResult, paired_difference

NOWHERE = PairedResult(Estimate(0, 0, 0), Estimate(float("nan"), 0, 0), 1.0, None)


def test_no_copy_by_either_model_is_no_proof_that_they_do_not_differ():
    """0 of n has the upper bound 1 - (alpha / 2)^(1 / n) (Clopper & Pearson)."""
    difference = _with_exact_shares(NOWHERE, [0.0, 0.0], 40, 0.95).difference
    bound = 1 - 0.025 ** (1 / 40)
    assert (difference.low, difference.value, difference.high) == pytest.approx((-bound, 0, bound))


def test_what_can_be_resampled_is_left_alone():
    assert _with_exact_shares(NOWHERE, [0.0, 0.1], 40, 0.95) is NOWHERE


def evaluation(loss_N, group_N):
    """Of held-out images with losses, NaN for none, in groups."""
    images = {
        "set": ["heldout"] * len(loss_N),
        "group": [f"group {group}" for group in group_N],
        "loss": [None if np.isnan(loss) else loss for loss in loss_N],
    }
    return Evaluation(Path(), {"losses": {}}, {}, images)


def test_heldout_images_of_a_group_are_one_in_the_difference_of_losses():
    """Where they have one loss, as their groups alone; those not measured change nothing."""
    rng = np.random.default_rng(0)
    group_N = np.append(np.tile(np.arange(20), 5), [3, 20, 21])
    of_group = rng.normal(1, 0.1, (2, 22))
    of_image = of_group[:, group_N]
    of_image[:, -3:] = np.nan
    config = ComparisonConfig(first="a", second="b", bootstrap_resamples=200)
    found = _losses(*(evaluation(loss_N, group_N) for loss_N in of_image), config)["heldout_loss"]
    alone = paired_difference(np.mean, *of_group[:, :20], resamples=200, seed=config.seed)
    for end in ("value", "low", "high"):
        assert getattr(found.difference, end) == pytest.approx(getattr(alone.difference, end)), end
    assert found.p_value == alone.p_value
