"""How sure KID is: its interval, and that of the difference of two models.

Shapes: G generated and N real images, C clusters of generated images (prompts), D dimensions.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from iet_sd.evaluation.statistics import Estimate


def kid_interval(
    gen_GD: np.ndarray, real_ND: np.ndarray, cluster_G: np.ndarray, level: float = 0.95
) -> Estimate:
    """KID over all images, with the normal interval of the jackknife (Efron & Stein 1981).

    Prompts and real images are left out one at a time; it holds for U-statistics such as this one.
    """
    return _interval(_leave_out(gen_GD, real_ND, cluster_G), level)


def kid_difference(
    first_GD: np.ndarray,
    second_GD: np.ndarray,
    real_ND: np.ndarray,
    cluster_G: np.ndarray,
    level: float = 0.95,
) -> Estimate:
    """KID of the second model minus that of the first, drawn for the same prompts: rows are pairs.

    Prompts are left out of both, so what is common to both does not widen the interval.
    """
    first, second = (_leave_out(gen, real_ND, cluster_G) for gen in (first_GD, second_GD))
    return _interval(
        _LeftOut(
            second.value - first.value,
            second.without_C - first.without_C,
            second.without_N - first.without_N,
        ),
        level,
    )


@dataclass(frozen=True)
class _LeftOut:
    """A statistic, and what it is without each cluster, and without each real image."""

    value: float
    without_C: np.ndarray
    without_N: np.ndarray


def _interval(found: _LeftOut, level: float) -> Estimate:
    variance = sum(
        (len(without) - 1) * np.var(without) for without in (found.without_C, found.without_N)
    )
    reach = stats.norm.ppf((1 + level) / 2) * np.sqrt(variance)
    return Estimate(found.value, found.value - reach, found.value + reach, level)


def _leave_out(gen_GD: np.ndarray, real_ND: np.ndarray, cluster_G: np.ndarray) -> _LeftOut:
    gen_GD, real_ND = (np.asarray(each, np.float64) for each in (gen_GD, real_ND))
    label_G = np.unique(cluster_G, return_inverse=True)[1]
    C, N = label_G.max() + 1, len(real_ND)
    size_C = np.bincount(label_G)
    # Sums of the kernel over pairs of clusters, without the pairs of an image with itself.
    own_GG = _kernel(gen_GD, gen_GD)
    np.fill_diagonal(own_GG, 0)
    own_CC = _sum_rows(_sum_rows(own_GG, label_G, C).T, label_G, C)
    cross_CN = _sum_rows(_kernel(gen_GD, real_ND), label_G, C)
    real_NN = _kernel(real_ND, real_ND)
    np.fill_diagonal(real_NN, 0)
    own, cross, real, G = own_CC.sum(), cross_CN.sum(), real_NN.sum(), len(gen_GD)

    def kid(own, cross, real, G, N):
        return own / (G * (G - 1)) + real / (N * (N - 1)) - 2 * cross / (G * N)

    own_C = own - 2 * own_CC.sum(axis=1) + np.diag(own_CC)
    without_C = kid(own_C, cross - cross_CN.sum(axis=1), real, G - size_C, N)
    real_N = real - 2 * real_NN.sum(axis=1)
    without_N = kid(own, cross - cross_CN.sum(axis=0), real_N, G, N - 1)
    return _LeftOut(kid(own, cross, real, G, N), without_C, without_N)


def _kernel(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """KID's: (x.y / D + 1)^3."""
    return (a_ND @ b_MD.T / a_ND.shape[1] + 1) ** 3


def _sum_rows(matrix: np.ndarray, label_G: np.ndarray, C: int) -> np.ndarray:
    """Sums of the rows of one label."""
    total = np.zeros((C, matrix.shape[1]))
    np.add.at(total, label_G, matrix)
    return total
