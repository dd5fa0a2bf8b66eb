"""Which images AGC skips: those that are easy anyway, or those that training memorizes?

By rank correlations (Spearman 1904) over images. Letters in shapes: P prompts, each of a training
image of its own, whose losses are taken too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from benchmarks.efficacy.places import Place
from benchmarks.efficacy.results import Result
from benchmarks.efficacy.tables import Seeds, as_table, interval, is_often
from iet_sd.evaluation.statistics import Estimate, bootstrap

WITH: Mapping[str, Callable[[Result], np.ndarray]] = {
    "its loss before training": lambda plain: plain.column("train_loss")[0],
    "how far plain training lowers its loss, as a ratio": lambda plain: (
        -np.log(plain.column("train_loss")[-1] / plain.column("train_loss")[0])
    ),
    "how much more plain's picture of its caption resembles it in the end": lambda plain: np.diff(
        plain.column("own_similarity_pixels")[[0, -1]], axis=0
    )[0],
}
"""What may go with how often an image is skipped: of a plain run, (P,)."""


class Skips(NamedTuple):
    """What a method skips at a place, and what goes with that."""

    place: Place
    label: str
    runs: Seeds
    """Those that it is known of, with plain runs of the same seeds."""
    correlations: dict[str, Estimate]
    """With each of `WITH`."""


def known_skips(places: Sequence[Place]) -> list[Skips]:
    """Of all methods that skip, as far as it is kept whom."""
    found = []
    for place in places:
        for label in place.paired:
            runs = {seed: place.others[label][seed] for seed in place.seeds(label)}
            runs = {seed: run for seed, run in runs.items() if any(run.about.get("skipped", ()))}
            if runs:
                found.append(Skips(place, label, runs, correlations(runs, place.plain)))
    return found


def skipped_of(runs: Seeds) -> np.ndarray:
    """How often the image of each prompt is skipped, as a share of its visits: (P,), a mean."""
    found = []
    for run in runs.values():
        shares = dict(zip(run.about["train_ids"], run.about["skipped"], strict=True))
        found.append([shares[name] for name in run.about["prompt_ids"]])
    return np.mean(found, axis=0)


def correlations(runs: Seeds, plain: Seeds) -> dict[str, Estimate]:
    """With each of `WITH`, means over seeds, and intervals over images."""
    skipped_P, found = skipped_of(runs), {}
    for title, of in WITH.items():
        beside_P = np.mean([of(plain[seed]) for seed in runs], axis=0)
        found[title] = bootstrap(_rank_correlation, np.column_stack([skipped_P, beside_P]))
    return found


def skipped_table(skips: Sequence[Skips]) -> str:
    """A row a method."""
    head = ["data", "method", "n", "skipped, of all visits", "of images: 5th to 95th percentile"]
    head += ["images shown once, and often", *WITH]
    rows = [head, ["---"] * len(head)]
    for each in skips:
        runs = each.runs.values()
        all_N = np.mean([run.about["skipped"] for run in runs], axis=0)
        low, high = np.percentile(all_N, [5, 95])
        last = [run.rows[-1] for run in runs]
        share = sum(row["skipped"] for row in last) / sum(row["scored"] for row in last)
        rows.append(
            [
                f"{each.place.setting}, {each.place.mode}",
                each.label,
                str(len(runs)),
                f"{share:.0%}",
                f"{low:.0%} to {high:.0%}",
                by_copies(each.runs),
                *(interval(number, "{:+.2f}") for number in each.correlations.values()),
            ]
        )
    return as_table(rows)


def by_copies(runs: Seeds) -> str:
    """Shares skipped of images that are there once, and of those that are often, if any are."""
    first = next(iter(runs.values()))
    often_P = is_often(first)
    if not often_P.any():
        return ""
    skipped_P = skipped_of(runs)
    return f"{skipped_P[~often_P].mean():.0%}, {skipped_P[often_P].mean():.0%}"


def _rank_correlation(pairs_P2: np.ndarray) -> float:
    """0 where one of the two is the same for all."""
    ranks_P2 = rankdata(pairs_P2, axis=0)
    if not np.ptp(ranks_P2, axis=0).all():
        return 0.0
    return float(np.corrcoef(ranks_P2.T)[0, 1])
