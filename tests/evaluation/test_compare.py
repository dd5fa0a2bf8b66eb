"""Comparisons of shares; all else of `compare` is tested from end to end in tests/cli."""

import pytest

from iet_sd.evaluation.compare import _with_exact_shares
from iet_sd.evaluation.statistics import Estimate, PairedResult

NOWHERE = PairedResult(Estimate(0, 0, 0), Estimate(float("nan"), 0, 0), 1.0, None)


def test_no_copy_by_either_model_is_no_proof_that_they_do_not_differ():
    """0 of n has the upper bound 1 - (alpha / 2)^(1 / n) (Clopper & Pearson)."""
    difference = _with_exact_shares(NOWHERE, [0.0, 0.0], 40, 0.95).difference
    bound = 1 - 0.025 ** (1 / 40)
    assert (difference.low, difference.value, difference.high) == pytest.approx((-bound, 0, bound))


def test_what_can_be_resampled_is_left_alone():
    assert _with_exact_shares(NOWHERE, [0.0, 0.1], 40, 0.95) is NOWHERE
