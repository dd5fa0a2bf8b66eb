"""Memorization against held-out quality by round: the rule that says what round to keep.

A round is out if another one has a held-out loss significantly below its own (the 95% interval of
the mean difference over the same images and noise lies above 0), or is at least as good in held-out
loss and in excess similarity. Of those left, the round of the lowest excess similarity is to be
kept.

Both conditions are about two rounds alone, so what is out stays out, whatever comes later: the
weights of a round can be deleted then. One is always left, that of the lowest held-out loss. Round
0, the model before training, takes no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iet_sd.evaluation.probe import Reading
from iet_sd.evaluation.statistics import bootstrap

RESAMPLES = 2000


@dataclass(frozen=True)
class Recommendation:
    """The round to keep, and why."""

    round: int
    left: tuple[int, ...]
    """Rounds that none is better than, by the rule: the one to keep among them."""
    text: str

    def line(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        kind = {"kind": "recommendation", "round": self.round}
        return kind | {"candidates": list(self.left), "text": self.text}


def candidates(readings: Sequence[Reading], group_N: np.ndarray | None = None) -> list[Reading]:
    """Rounds that none is better than, in order. ``group_N``: near-duplicates among the images."""
    rounds = [reading for reading in readings if reading.round > 0]
    return [mine for mine in rounds if not _is_out(mine, rounds, group_N)]


def recommend(
    readings: Sequence[Reading], group_N: np.ndarray | None = None
) -> Recommendation | None:
    """The round to keep; None if no round of training was measured."""
    left = candidates(readings, group_N)
    if not left:
        return None
    best = min(left, key=lambda reading: reading.excess_score.value)
    lowest = min(left, key=lambda reading: reading.heldout_loss.value)
    loss, excess = best.heldout_loss.value, best.excess_score
    if best is lowest:
        why = f"its held-out loss, {loss:.4f}, is the lowest"
    else:
        why = (
            f"its held-out loss, {loss:.4f}, is within noise of the lowest "
            f"({lowest.heldout_loss.value:.4f}, round {lowest.round}), and it memorizes less"
        )
    text = (
        f"Keep round {best.round}: {why} (excess similarity {excess.value:+.3f} "
        f"[{excess.low:+.3f}, {excess.high:+.3f}])."
    )
    start = next((reading for reading in readings if reading.round == 0), None)
    if start is not None and not _surely_above(start, [best], group_N)[0]:
        text += (
            " But training has not lowered the held-out loss: before it, that was "
            f"{start.heldout_loss.value:.4f}."
        )
    return Recommendation(best.round, tuple(reading.round for reading in left), text)


def _is_out(mine: Reading, rounds: Sequence[Reading], group_N: np.ndarray | None) -> bool:
    numbers = _numbers(mine)
    for other in rounds:
        as_good = all(a <= b for a, b in zip(_numbers(other), numbers, strict=True))
        # Of two that are equal in both, the earlier stays.
        if as_good and (_numbers(other) != numbers or other.round < mine.round):
            return True
    lower = [other for other in rounds if _numbers(other)[0] < numbers[0]]
    return any(_surely_above(mine, lower, group_N))


def _surely_above(
    mine: Reading, others: Sequence[Reading], group_N: np.ndarray | None
) -> list[bool]:
    """Whether the held-out loss of a round is significantly above that of each other one."""
    if not others:
        return []
    theirs_NR = np.transpose([other.heldout_loss_N for other in others])
    above_NR = np.array(mine.heldout_loss_N)[:, None] - theirs_NR
    found = bootstrap(
        lambda above: above.mean(axis=0), above_NR, clusters=[group_N], resamples=RESAMPLES
    )
    return [estimate.low > 0 for estimate in found]


def _numbers(reading: Reading) -> tuple[float, float]:
    """What is better when lower."""
    return reading.heldout_loss.value, reading.excess_score.value
