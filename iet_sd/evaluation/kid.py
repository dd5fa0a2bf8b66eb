"""How sure KID is: its interval, and that of the difference of two models.

Units are what varies on its own: clusters of generated images (prompts), and groups of real ones
(near-duplicates). Shapes: G generated and N real images, C clusters and M groups of them, U units
of either kind, D dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

from iet_sd.errors import UserError
from iet_sd.evaluation.statistics import Estimate

CHUNK_ROWS = 1024


def kid_interval(
    gen_GD: np.ndarray,
    real_ND: np.ndarray,
    cluster_G: np.ndarray,
    group_N: np.ndarray,
    level: float = 0.95,
) -> Estimate:
    """KID over all images, with the normal interval of the jackknife (Efron & Stein 1981).

    Of generated images, and of real ones, only pairs of different units count: those within a unit
    resemble each other, and would make KID too large. Where every unit is one image it is the usual
    KID. Units are left out one at a time, which holds for U-statistics such as this one.
    Errors: `UserError` for fewer than three units of a kind.
    """
    return _interval(_leave_out(gen_GD, real_ND, cluster_G, group_N), level)


def kid_difference(
    first_GD: np.ndarray,
    second_GD: np.ndarray,
    real_ND: np.ndarray,
    cluster_G: np.ndarray,
    group_N: np.ndarray,
    level: float = 0.95,
) -> Estimate:
    """KID of the second model minus that of the first, drawn for the same prompts: rows are pairs.

    Prompts are left out of both, so what is common to both does not widen the interval.
    Errors: as `kid_interval`.
    """
    first, second = (_leave_out(gen, real_ND, cluster_G, group_N) for gen in (first_GD, second_GD))
    return _interval(
        _LeftOut(
            second.value - first.value,
            second.without_C - first.without_C,
            second.without_M - first.without_M,
        ),
        level,
    )


@dataclass(frozen=True)
class _LeftOut:
    """A statistic, and what it is without each cluster, and without each group of real images."""

    value: float
    without_C: np.ndarray
    without_M: np.ndarray


@dataclass(frozen=True)
class _Within:
    """The kernel among images of one kind, over the pairs of each unit with all the others."""

    total_U: np.ndarray
    pairs_U: np.ndarray

    @classmethod
    def of(cls, features_ND: np.ndarray, unit_N: np.ndarray) -> "_Within":
        total_N = np.zeros(len(features_ND))
        for rows, columns, kernel in _blocks(features_ND, features_ND):
            kernel[unit_N[rows, None] == unit_N[columns]] = 0
            total_N[rows] += kernel.sum(axis=1)
        size_U = np.bincount(unit_N)
        return cls(np.bincount(unit_N, total_N), size_U * (len(unit_N) - size_U))

    def mean(self) -> float:
        return self.total_U.sum() / self.pairs_U.sum()

    def without(self) -> np.ndarray:
        """The mean without each unit, whose pairs are counted from both of their ends: (U,)."""
        return (self.total_U.sum() - 2 * self.total_U) / (self.pairs_U.sum() - 2 * self.pairs_U)


def _interval(found: _LeftOut, level: float) -> Estimate:
    variance = sum(
        (len(without) - 1) * np.var(without) for without in (found.without_C, found.without_M)
    )
    reach = stats.norm.ppf((1 + level) / 2) * np.sqrt(variance)
    return Estimate(found.value, found.value - reach, found.value + reach, level)


def _leave_out(
    gen_GD: np.ndarray, real_ND: np.ndarray, cluster_G: np.ndarray, group_N: np.ndarray
) -> _LeftOut:
    unit_G, unit_N = (np.unique(each, return_inverse=True)[1] for each in (cluster_G, group_N))
    _require_units(unit_G.max() + 1, unit_N.max() + 1)
    gen, real = _Within.of(gen_GD, unit_G), _Within.of(real_ND, unit_N)
    size_C, size_M = np.bincount(unit_G), np.bincount(unit_N)
    cross_G, cross_N = np.zeros(len(gen_GD)), np.zeros(len(real_ND))
    for rows, columns, kernel in _blocks(gen_GD, real_ND):
        cross_G[rows] += kernel.sum(axis=1)
        cross_N[columns] += kernel.sum(axis=0)
    cross, G, N = cross_G.sum(), len(gen_GD), len(real_ND)
    cross_C, cross_M = np.bincount(unit_G, cross_G), np.bincount(unit_N, cross_N)
    return _LeftOut(
        gen.mean() + real.mean() - 2 * cross / (G * N),
        gen.without() + real.mean() - 2 * (cross - cross_C) / ((G - size_C) * N),
        gen.mean() + real.without() - 2 * (cross - cross_M) / (G * (N - size_M)),
    )


def _require_units(clusters: int, groups: int) -> None:
    if min(clusters, groups) < 3:
        raise UserError(
            "The interval of KID leaves out prompts, and groups of held-out images, one at a time, "
            f"so it needs at least 3 of each; got {clusters} and {groups}. Use more."
        )


def _blocks(a_ND: np.ndarray, b_MD: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """KID's kernel, (x.y / D + 1)^3, a block of rows and columns at a time, in float64.

    The features may be mapped files, and the whole of the kernel larger than memory.
    """
    for rows in _chunks(len(a_ND)):
        a = np.asarray(a_ND[rows], np.float64)
        for columns in _chunks(len(b_MD)):
            b = np.asarray(b_MD[columns], np.float64)
            yield rows, columns, (a @ b.T / a.shape[1] + 1) ** 3


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK_ROWS) for start in range(0, count, CHUNK_ROWS)]
