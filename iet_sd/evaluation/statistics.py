"""How sure a number is: bootstrap intervals, and tests of two models or two sets of images.

The training set is taken as given. What is drawn anew are units of the other images: prompts, or
groups of near-duplicates. Shapes: N rows of a sample, U units, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from iet_sd.errors import UserError

# For each sample None, or labels (N,): rows of one label are one unit.
Clusters = Sequence[np.ndarray | None] | None
JACKKNIFE_GROUPS = 200
NO_REDUCTION = np.finfo(np.float32).min  # below any, and finite


@dataclass(frozen=True)
class Estimate:
    """A number, and the interval that covers the true one at rate ``level``."""

    value: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class PairedResult:
    """Two models on the same prompts and seeds, by `paired_difference`."""

    difference: Estimate
    relative_reduction: Estimate
    p_value: float
    reason: str | None  # why relative_reduction is NaN, where it is


def bootstrap(
    statistic: Callable[..., float | Sequence[float] | np.ndarray],
    *samples: np.ndarray,
    clusters: Clusters = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate | list[Estimate]:
    """The BCa interval (Efron 1987) of ``statistic(*samples)``; a list if it gives several numbers.

    Each sample is drawn anew along its first axis, apart from the others; rows that ``clusters``
    puts together are drawn together (Field & Welsh 2007). Fewer than two units, or a value that is
    not finite, is a `UserError`.

    At 95%, the interval of a p95 covers it at 95% for 500 units and at 92% for 60. That of a share
    of which the sample shows none is 0 to 0, however few the units: see `exact_share`.
    """
    units = _units_of(samples, clusters)
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(*(unit.draw(rng) for unit in units)) for _ in range(resamples)])
    value = np.asarray(statistic(*(unit.sample for unit in units)))
    low, high = _ends(drawn, value, _acceleration(statistic, units), level)
    if value.ndim == 0:
        return Estimate(float(value), float(low), float(high), level)
    return [Estimate(*map(float, each), level) for each in zip(value, low, high, strict=True)]


def exact_share(share: Estimate, units: int) -> Estimate:
    """The same share; where it is 0 or 1, with the interval of Clopper & Pearson 1934.

    A sample that shows none of a thing has nothing to resample. ``units`` vary on their own: where
    several images of a prompt all lack it, prompts count, and the bound holds for the share of
    prompts of which any image has it, which is no smaller.
    """
    if share.value not in (0.0, 1.0):
        return share
    interval = stats.binomtest(round(share.value * units), units).proportion_ci(share.level)
    return Estimate(share.value, float(interval.low), float(interval.high), share.level)


def difference_of_shares(first: Estimate, second: Estimate) -> Estimate:
    """First - second, of samples drawn apart, from the interval of each (Newcombe 1998)."""
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above, first.level)


def paired_difference(
    statistic: Callable[..., float],
    a: np.ndarray,
    b: np.ndarray,
    shared: Sequence[np.ndarray] = (),
    *,
    clusters: Clusters = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedResult:
    """How much lower model b is than model a, on the same prompts and seeds: rows are pairs.

    With S(x) = ``statistic(x, *shared)``: ``difference`` is S(a) - S(b), ``relative_reduction``
    1 - S(b) / S(a), NaN unless the whole interval of S(a) is above 0. Pairs, and each shared
    sample, are drawn as in `bootstrap`, and a draw of the shared ones serves both models;
    ``clusters`` is for the pairs, then for each shared sample.

    ``p_value``, two-sided, that the models do not differ: a permutation test that exchanges a and b
    by unit (Fisher 1935), which for a mean is the sign-flip test.
    """
    if a.shape != b.shape:
        raise UserError(
            "Two models are compared on the same prompts and seeds, so their values must have one "
            f"shape; got {a.shape} and {b.shape}. Evaluate both with the same settings."
        )
    pairs = np.stack([a, b], axis=1)

    def both(pairs_N2: np.ndarray, *shared: np.ndarray) -> tuple[float, float]:
        return statistic(pairs_N2[:, 0], *shared), statistic(pairs_N2[:, 1], *shared)

    def compare(*drawn: np.ndarray) -> tuple[float, float, float]:
        first, second = both(*drawn)
        # A draw in which there is nothing to reduce counts as the worst one, not as a gain.
        return first, first - second, 1 - second / first if first > 0 else NO_REDUCTION

    first, difference, reduction = bootstrap(
        compare, pairs, *shared, clusters=clusters, resamples=resamples, level=level, seed=seed
    )
    reason = None
    if not (first.low > 0 and reduction.low > NO_REDUCTION):
        interval = f"{first.low:.3g} to {first.high:.3g}"
        reason = (
            f"the first model's value is too near 0 for a share of it: its interval is {interval}"
        )
        reduction = Estimate(np.nan, np.nan, np.nan, level)

    p_value = _exchange_test(both, _units_of([pairs, *shared], clusters), resamples, seed)
    return PairedResult(difference, reduction, p_value, reason)


def _exchange_test(
    both: Callable[..., tuple[float, float]], units: Sequence["_Units"], resamples: int, seed: int
) -> float:
    """Share of exchanges whose difference is at least as large as that of the pairs as they are."""
    pairs, *shared = units
    shared = [sample.sample for sample in shared]
    rng = np.random.default_rng(seed)
    scores = [both(pairs.exchanged(rng), *shared) for _ in range(resamples)]
    difference, *null = np.abs(np.subtract(*np.transpose([both(pairs.sample, *shared), *scores])))
    # A tie counts, also where rounding hides it; and so do the pairs themselves.
    return float(1 + np.sum(null >= difference * (1 - 1e-9))) / (1 + resamples)


def permutation_test(
    a: np.ndarray,
    b: np.ndarray,
    *,
    clusters: Clusters = None,
    resamples: int = 9999,
    seed: int = 0,
) -> float:
    """One-sided p-value that a is no larger than b in the mean; the samples are not paired.

    Welch's t by permutation, which holds where the two differ in spread too (Chung & Romano 2013).
    The values of a unit are averaged first, so that units are exchanged and not rows.
    """
    means = [unit.means() for unit in _units_of([a, b], clusters)]
    test = stats.permutation_test(
        means,
        _welch_t,
        permutation_type="independent",
        alternative="greater",
        n_resamples=resamples,
        batch=100,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _welch_t(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    squared_errors = [each.var(axis=axis, ddof=1) / each.shape[axis] for each in (a, b)]
    # Finite for constant values too: all the same, t is 0; copies alone, very large.
    return (a.mean(axis=axis) - b.mean(axis=axis)) / (np.sqrt(sum(squared_errors)) + 1e-30)


def _ends(
    drawn_R: np.ndarray, value: np.ndarray, acceleration: np.ndarray, level: float
) -> np.ndarray:
    """The two draws at the ends of the interval (2, ...).

    They are further up than plain percentiles if more draws than half are below the value, and if
    the statistic varies more where it is larger, as one of a long tail does.
    """
    resamples = len(drawn_R)
    below = np.mean(drawn_R < value, axis=0) + np.mean(drawn_R == value, axis=0) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    ends = np.array([bias + stats.norm.ppf(tail) for tail in ((1 - level) / 2, (1 + level) / 2)])
    share = stats.norm.cdf(bias + ends / (1 - acceleration * ends))
    rank = np.rint(share * (resamples - 1)).astype(int)
    return np.take_along_axis(np.sort(drawn_R, axis=0), rank, axis=0)


def _acceleration(statistic: Callable, units: Sequence["_Units"]) -> np.ndarray:
    """A sixth of the skewness of what the units add to the statistic, by leaving some out.

    The sum over independent parts is the same in expectation for units and for groups of them.
    """
    samples = [unit.sample for unit in units]
    added = []
    for i, unit in enumerate(units):
        groups = min(len(unit.size_U), JACKKNIFE_GROUPS)
        found = np.array(
            [
                statistic(*samples[:i], unit.without(group, groups), *samples[i + 1 :])
                for group in range(groups)
            ]
        )
        added.append(np.mean(found, axis=0) - found)
    added = np.concatenate(added)
    with np.errstate(invalid="ignore"):  # 0 / 0, taken as 0, where nothing changes the statistic
        return np.nan_to_num(np.sum(added**3, axis=0) / (6 * np.sum(added**2, axis=0) ** 1.5))


class _Units(NamedTuple):
    """A sample whose rows stand together by unit, where each unit starts, and its rows' number."""

    sample: np.ndarray
    start_U: np.ndarray
    size_U: np.ndarray

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of as many units as there are, drawn with replacement."""
        drawn = rng.integers(len(self.size_U), size=len(self.size_U))
        size = self.size_U[drawn]
        # From the places in the result to those in the sample, the same for all rows of a unit.
        shift = self.start_U[drawn] - (size.cumsum() - size)
        return self.sample[np.arange(size.sum()) + np.repeat(shift, size)]

    def without(self, group: int, groups: int) -> np.ndarray:
        """The rows that are left without the units ``group``, ``group + groups``, ..."""
        return self.sample[np.repeat(np.arange(len(self.size_U)) % groups != group, self.size_U)]

    def exchanged(self, rng: np.random.Generator) -> np.ndarray:
        """Pairs (N, 2, ...), those of every other unit, by chance, the other way round."""
        flip_N = np.repeat(rng.random(len(self.size_U)) < 0.5, self.size_U)
        pairs = self.sample.copy()
        pairs[flip_N] = pairs[flip_N, ::-1]
        return pairs

    def means(self) -> np.ndarray:
        """The mean of each unit: (U,)."""
        row_means = self.sample.reshape(len(self.sample), -1).mean(axis=1)
        return np.add.reduceat(row_means, self.start_U) / self.size_U


def _units_of(samples: Sequence[np.ndarray], clusters: Clusters) -> list[_Units]:
    """Each sample by its clusters; without any, every row is a unit."""
    return [
        _group(np.asarray(sample, dtype=np.float64), labels)
        for sample, labels in zip(samples, clusters or [None] * len(samples), strict=True)
    ]


def _group(sample: np.ndarray, labels: np.ndarray | None) -> _Units:
    labels = np.arange(len(sample)) if labels is None else np.asarray(labels)
    if len(labels) != len(sample):
        raise ValueError(f"{len(labels)} cluster labels for {len(sample)} rows")
    if not np.isfinite(sample).all():
        raise UserError(
            f"{np.sum(~np.isfinite(sample))} of {sample.size} values are not finite: an interval "
            "needs numbers. Look for broken images or weights."
        )
    order = np.argsort(labels, kind="stable")
    _, start_U, size_U = np.unique(labels[order], return_index=True, return_counts=True)
    if len(size_U) < 2:
        raise UserError(
            f"An interval needs at least 2 prompts or images that vary on their own; got "
            f"{len(size_U)}. Use more."
        )
    return _Units(sample[order], start_U, size_U)
