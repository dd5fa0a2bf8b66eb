"""Distance ratios against their formulas, one generation after another."""

import re

import numpy as np
import pytest

from iet_sd.errors import UserError
from iet_sd.evaluation.neighbours import nearest
from iet_sd.evaluation.ratio import MQ_CUTOFFS, l2_ratio, mq


def sorted_distances(rows, columns, seed=0):
    return np.sort(np.random.default_rng(seed).random((rows, columns), dtype=np.float32), axis=1)


@pytest.mark.parametrize(("columns", "n"), [(60, 50), (50, 50), (7, 50), (2, 50), (60, 10)])
def test_equal_the_formulas(columns, n):
    distance_GK = sorted_distances(200, columns) + np.float32(0.2)
    ratios, percents = [], []
    for row in distance_GK.tolist():
        near = row[: min(n, columns)]
        ratios.append(row[0] / (0.5 * sum(near) / len(near)))
        percents.append(100 * row[0] ** 2 / (sum(d * d for d in near) / len(near)))
    np.testing.assert_allclose(l2_ratio(distance_GK, n), ratios, rtol=1e-12)
    expected = {cutoff: sum(p < cutoff for p in percents) for cutoff in MQ_CUTOFFS}
    assert mq(distance_GK, n=n) == expected
    assert len(set(expected.values())) > 1 or columns == 2


def test_defaults_are_those_of_the_papers():
    distance_GK = sorted_distances(50, 80)
    assert MQ_CUTOFFS == (15, 20, 30, 40, 50, 60, 70, 80, 90)
    np.testing.assert_array_equal(l2_ratio(distance_GK), l2_ratio(distance_GK, n=50, alpha=0.5))
    np.testing.assert_allclose(l2_ratio(distance_GK, alpha=1), l2_ratio(distance_GK) / 2)


def test_mq_is_strict():
    assert mq(np.array([[1.0, 3.0]]), (20, 21)) == {20: 0, 21: 1}  # 100 / mean(1, 9)


def as_the_authors_count(percents, cutoff):
    """The ratio is written into a file name and read back with a pattern that knows no exponent."""
    names = [f"{percent}.jpg" for percent in percents]
    return sum(float(re.search(r"\d+\.\d+", name)[0]) < cutoff for name in names)


def test_a_copy_counts_where_the_authors_file_names_lose_it():
    distance_GK = np.ones((4, 50))
    distance_GK[:, 0] = [3e-5, 0.3, 0.9, 0.1]
    percents = [100 * row[0] ** 2 / np.mean(row**2) for row in distance_GK]
    assert as_the_authors_count(percents[1:], 5) == mq(distance_GK[1:], (5,))[5] == 1
    assert as_the_authors_count(percents, 5) == 1
    assert mq(distance_GK, (5,)) == {5: 2}


def test_copies_found_in_pixels_have_ratio_zero_and_always_count():
    train = np.random.default_rng(0).random((60, 3, 8, 8), dtype=np.float32)
    gen = np.concatenate([train[:2], train[2:4, ..., ::-1], 1 - train[:2]])
    flat, mirrored = gen.reshape(6, -1), gen[..., ::-1].reshape(6, -1)
    found = nearest(flat, train.reshape(60, -1), 50, "l2", flipped_QD=mirrored)
    ratio_G = l2_ratio(found.value_QK)
    assert (ratio_G == 0).tolist() == [True] * 4 + [False] * 2
    assert (ratio_G[4:] > 1).all()
    assert mq(found.value_QK, (1, 15)) == {1: 4, 15: 4}


def test_a_copy_of_an_image_with_many_duplicates_has_ratio_zero():
    assert l2_ratio(np.zeros((1, 50))).tolist() == [0]
    assert mq(np.zeros((1, 50)), (15,)) == {15: 1}


@pytest.mark.parametrize("measure", [l2_ratio, mq])
def test_one_neighbour_is_too_few(measure):
    with pytest.raises(UserError, match=r"at least 2 training images.*there is 1"):
        measure(np.ones((3, 1)))
