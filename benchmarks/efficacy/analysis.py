"""Memorization at equal quality: functions of arrays, and intervals over prompts and seeds.

A curve is what a run goes through: quality and memorization at each reading, lower is better in
both (held-out loss, KID). Early stopping can have any point of it, so a curve is read as a
frontier: the least memorization at a quality of at most a level. Levels are shares of the gain,
from the model before training to the best quality that both curves reach: 1 is that, 0 no training.

Letters in shapes: S seeds, R readings, P prompts, H held-out images, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from iet_sd.evaluation.statistics import NO_REDUCTION, Estimate, bootstrap

LEVELS = (0.8, 0.9, 0.95, 1.0)
_HAIR = 1e-9
"""By which rounding may put the best quality above its own level."""
_AREA = np.linspace(0.5, 1.0, 26)
"""Levels whose mean is the area between two curves."""

Curve = tuple[np.ndarray, np.ndarray]
"""Quality and memorization at each reading: (R,) each."""


@dataclass(frozen=True)
class Curves:
    """A method's runs, one a seed; all see the same prompts and held-out images."""

    seeds: tuple[int, ...]
    quality_SRH: np.ndarray
    """Held-out loss of each image; or KID, of each prompt."""
    memory_SRP: np.ndarray
    """What is a sign of memorization where it is high."""
    against_heldout: bool = False
    """Memorization is ``memory`` over the quality: with minus the training loss, the gap."""
    by_prompt: bool = False
    """Quality is of the prompts, and drawn with them."""
    percentile: float | None = None
    """Memorization is this percentile over prompts, of each run, in place of the mean."""

    def of(self, seeds: Sequence[int]) -> "Curves":
        """The runs of some seeds, in their order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            quality_SRH=self.quality_SRH[rows],
            memory_SRP=self.memory_SRP[rows],
        )

    def means(
        self, seeds: np.ndarray | slice, prompts: np.ndarray | slice, heldout: np.ndarray | slice
    ) -> Curve:
        """Quality and memorization at each reading, over some of each."""
        images = prompts if self.by_prompt else heldout
        quality_R = self.quality_SRH[seeds][:, :, images].mean(axis=(0, 2))
        memory_SRP = self.memory_SRP[seeds][:, :, prompts]
        if self.percentile is None:
            memory_R = memory_SRP.mean(axis=(0, 2))
        else:
            memory_R = np.percentile(memory_SRP, self.percentile, axis=2).mean(axis=0)
        return quality_R, memory_R + quality_R if self.against_heldout else memory_R

    @property
    def mean(self) -> Curve:
        """Over all."""
        return self.means(slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Level:
    """Two methods at one quality."""

    share: float
    """Of the gain."""
    quality: float
    first: Estimate
    second: Estimate
    difference: Estimate
    """How much less the second memorizes."""
    reduction: Estimate | None
    """The same as a share of the first, all of it at most; None where the first is not surely
    above 0."""
    places: tuple[float, float]
    """Where on its curve each is there, in readings."""


@dataclass(frozen=True)
class Comparison:
    """Two methods at equal quality."""

    seeds: tuple[int, ...]
    """That both have; of one seed, the intervals are over prompts and images alone."""
    levels: tuple[Level, ...]
    area: Estimate
    """The difference, as a mean over levels from half of the gain to all of it."""
    best: Estimate
    """By how much the second's best quality is better than the first's."""


@dataclass(frozen=True)
class AtBudget:
    """Two methods that have spent as much."""

    places: tuple[float, float]
    """Where on its curve each is then, in readings."""
    first: Estimate
    second: Estimate
    difference: Estimate
    """How much less the second memorizes."""
    reduction: Estimate | None
    """The same as a share of the first; None where the first is not surely above 0."""
    better: Estimate
    """By how much the second's quality is better than the first's."""


def least_memory(
    quality_R: np.ndarray, memory_R: np.ndarray, level_L: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The least memorization of a curve where its quality is at most a level, and where: (L,) each.

    Readings are joined by straight lines; a place of 1.5 is half way from reading 1 to reading 2.
    NaN for a level below the best quality.
    """
    start_R, end_R = quality_R[:-1, None], quality_R[1:, None]
    from_R, to_R = memory_R[:-1, None], memory_R[1:, None]
    step_R = np.where(end_R == start_R, np.inf, end_R - start_R)
    # Where on its way, from 0 to 1, a line passes the level.
    crossing = np.clip((level_L - start_R) / step_R, 0, 1)
    passed = from_R + crossing * (to_R - from_R)
    crosses = (np.minimum(start_R, end_R) <= level_L) & (level_L <= np.maximum(start_R, end_R))
    candidates = np.concatenate(
        [
            np.where(quality_R[:, None] <= level_L, memory_R[:, None], np.inf),
            np.where(crosses, passed, np.inf),
        ]
    )
    reading_R = np.arange(len(quality_R))[:, None]
    places = np.concatenate([reading_R + 0 * level_L, reading_R[:-1] + crossing])
    best_L = candidates.argmin(axis=0)[None]
    least_L, place_L = (np.take_along_axis(x, best_L, axis=0)[0] for x in (candidates, places))
    found_L = np.isfinite(least_L)
    return np.where(found_L, least_L, np.nan), np.where(found_L, place_L, np.nan)


def common_levels(
    first_R: np.ndarray, second_R: np.ndarray, shares_L: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Qualities at shares of the gain that both curves reach: (L,).

    Both start at the same one, that of the model before training.
    """
    best = max(first_R.min(), second_R.min())
    return first_R[0] - np.asarray(shares_L) * (first_R[0] - best)


def compare(
    first: Curves,
    second: Curves,
    shares: Sequence[float] = LEVELS,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison | None:
    """How much less the second memorizes at equal quality, by the seeds that both have.

    None if one of them is never better than the model before training.

    Intervals: prompts, held-out images and seeds are drawn anew, the same for both methods; the
    levels follow from what is drawn. KID and the Fréchet distance are of each picture given the
    held-out images, which stay as they are in them.
    """
    first, second = paired(first, second)
    shares_L = np.array([*shares, *_AREA])
    means = first.mean, second.mean
    if any(quality_R.argmin() == 0 for quality_R, _ in means):
        return None

    def statistic(a: Curve, b: Curve) -> np.ndarray:
        level_L = common_levels(a[0], b[0], shares_L)
        a_L, b_L = (least_memory(*curve, level_L + _HAIR)[0] for curve in (a, b))
        count, difference_L = len(shares), a_L - b_L
        parts = [x[:count] for x in (a_L, b_L, difference_L, _reduction(a_L, b_L))]
        return np.concatenate([*parts, [difference_L[count:].mean(), a[0].min() - b[0].min()]])

    *found, area, best = _intervals(statistic, first, second, resamples, seed)
    level_L = common_levels(means[0][0], means[1][0], shares)
    place_2L = [least_memory(*curve, level_L + _HAIR)[1] for curve in means]
    count = len(shares)
    levels = []
    for i, share in enumerate(shares):
        a, b, difference, reduction = found[i::count]
        places = float(place_2L[0][i]), float(place_2L[1][i])
        sure = reduction if _is_sure(a, reduction) else None
        levels.append(Level(share, float(level_L[i]), a, b, difference, sure, places))
    return Comparison(first.seeds, tuple(levels), area, best)


def at_budget(
    first: Curves,
    second: Curves,
    spent_2R: Sequence[np.ndarray],
    resamples: int = 1000,
    seed: int = 0,
) -> AtBudget:
    """How much less the second memorizes where both have spent as much, and at what quality.

    ``spent_2R``: what each has spent at its readings (updates, samples, FLOP), rising. As much is
    all that the one spends which spends less in all; readings are joined by straight lines.

    By the seeds that both have; intervals as those of `compare`.
    """
    budget = min(spent_R[-1] for spent_R in spent_2R)
    places = tuple(float(np.interp(budget, s_R, np.arange(len(s_R)))) for s_R in spent_2R)

    def statistic(a: Curve, b: Curve) -> np.ndarray:
        quality_2, memory_2 = zip(
            *([between(v_R, place) for v_R in c] for c, place in zip((a, b), places, strict=True)),
            strict=True,
        )
        memory, quality = np.array(memory_2), np.array(quality_2)
        reduction = _reduction(*memory)
        return np.array([*memory, memory[0] - memory[1], reduction, quality[0] - quality[1]])

    a, b, difference, reduction, better = _intervals(
        statistic, *paired(first, second), resamples, seed
    )
    return AtBudget(places, a, b, difference, reduction if _is_sure(a, reduction) else None, better)


def between(values_R: np.ndarray, place: float) -> float:
    """A number at a place between readings."""
    return float(np.interp(place, np.arange(len(values_R)), values_R))


def paired(first: Curves, second: Curves) -> tuple[Curves, Curves]:
    """Those of the seeds that both have."""
    seeds = tuple(s for s in first.seeds if s in second.seeds)
    return first.of(seeds), second.of(seeds)


def _intervals(
    statistic: Callable[[Curve, Curve], np.ndarray],
    first: Curves,
    second: Curves,
    resamples: int,
    seed: int,
) -> list[Estimate]:
    """Of each number of ``statistic``, of two curves, with all drawn anew that varies."""

    def drawn(*given: np.ndarray) -> np.ndarray:
        # `bootstrap` draws floats.
        prompts, heldout, *rows = (index.astype(int) for index in given)
        chosen = rows[0] if rows else slice(None), prompts, heldout
        return statistic(first.means(*chosen), second.means(*chosen))

    units = [np.arange(first.memory_SRP.shape[2]), np.arange(first.quality_SRH.shape[2])]
    if len(first.seeds) > 1:
        units.append(np.arange(len(first.seeds)))
    return bootstrap(drawn, *units, resamples=resamples, seed=seed)


def _reduction(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How much less b is than a, as a share of a, all of it at most."""
    return np.where(a > 0, 1 - np.maximum(b, 0) / np.where(a > 0, a, 1), NO_REDUCTION)


def _is_sure(first: Estimate, reduction: Estimate) -> bool:
    """Whether there is something to take a share of."""
    return first.low > 0 and reduction.low > NO_REDUCTION


def best_reading(quality_R: np.ndarray) -> int:
    """The reading of the best quality after training began."""
    return 1 + int(quality_R[1:].argmin())


def verdict(difference: Estimate) -> str:
    """In a word, of how much less a method memorizes."""
    if difference.low > 0:
        return "less"
    return "more" if difference.high < 0 else "no difference shown"
