"""Arrays become named numbers with intervals: what the report shows.

Letters in shapes: G generations, H held-out images, T training images, N images of either
kind whose loss was taken, S timesteps, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from iet_sd.errors import UserError
from iet_sd.evaluation import membership, quality
from iet_sd.evaluation.closeness import RATIO_NEIGHBOURS, Ratios
from iet_sd.evaluation.kid import kid_interval
from iet_sd.evaluation.ratio import mq
from iet_sd.evaluation.similarity import summarize
from iet_sd.evaluation.statistics import (
    Estimate,
    bootstrap,
    difference_of_shares,
    exact_share,
    permutation_test,
)
from iet_sd.evaluation.texts import TEXTS, Better

Section = Literal["Copying", "Membership", "Quality"]
# Cosine similarity of images that are the same, but for how they were saved.
ALIKE = 0.9999


@dataclass(frozen=True)
class Measure:
    """One number of the report."""

    section: Section
    name: str
    label: str
    value: float
    meaning: str
    better: Better | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    embedder: str | None = None
    headline: bool = False
    warning: str | None = None


@dataclass(frozen=True)
class Resampling:
    """How intervals are made, and what belongs together in them."""

    prompt_G: np.ndarray
    """The prompt of each generation."""
    group_H: np.ndarray
    """The near-duplicate group of each held-out image."""
    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def generated(
        self,
        statistic: Callable[[np.ndarray], Mapping[str, float]],
        value_G: np.ndarray,
        shares: Sequence[str] = (),
    ) -> dict[str, Estimate]:
        """Numbers of the generations alone, by name; ``shares`` as `exact_share`, of prompts."""
        found = self._by_name(statistic, [value_G], [self.prompt_G])
        return found | {name: exact_share(found[name], _count(self.prompt_G)) for name in shares}

    def excess(
        self,
        statistic: Callable[[np.ndarray], Mapping[str, float]],
        value_G: np.ndarray,
        value_H: np.ndarray,
        shares: Sequence[str] = (),
    ) -> dict[str, Estimate]:
        """Numbers of the generations minus those of the held-out images, by name.

        ``shares`` of which one is 0 or 1 have the intervals of `exact_share`, put together.
        """

        def difference(value_G: np.ndarray, value_H: np.ndarray) -> dict[str, float]:
            baseline = statistic(value_H)
            return {name: value - baseline[name] for name, value in statistic(value_G).items()}

        found = self._by_name(difference, [value_G, value_H], [self.prompt_G, self.group_H])
        values = statistic(value_G), statistic(value_H)
        rare = [name for name in shares if any(value[name] in (0.0, 1.0) for value in values)]
        if rare:
            generated = self.generated(statistic, value_G, rare)
            heldout = self._by_name(statistic, [value_H], [self.group_H])
            for name in rare:
                baseline = exact_share(heldout[name], _count(self.group_H))
                found[name] = difference_of_shares(generated[name], baseline)
        return found

    def images(
        self,
        statistic: Callable[..., Mapping[str, float]],
        train_N: np.ndarray,
        heldout_N: np.ndarray,
        index_N: np.ndarray,
    ) -> dict[str, Estimate]:
        """Numbers of some training and some held-out images, by name; ``index_N``: of the latter.

        Training images stand for themselves, held-out ones with their group.
        """
        return self._by_name(statistic, [train_N, heldout_N], [None, self.group_H[index_N]])

    def _by_name(self, statistic, samples: Sequence[np.ndarray], clusters) -> dict[str, Estimate]:
        estimates = bootstrap(
            lambda *drawn: np.array(list(statistic(*drawn).values())),
            *samples,
            clusters=clusters,
            resamples=self.resamples,
            level=self.level,
            seed=self.seed,
        )
        return dict(zip(statistic(*samples), estimates, strict=True))


def _count(labels: np.ndarray) -> int:
    return len(np.unique(labels))


def copying(
    similarity_G: np.ndarray,
    own_G: np.ndarray | None,
    train_T: np.ndarray,
    heldout_H: np.ndarray | None,
    thresholds: Sequence[float],
    by: Resampling,
) -> list[Measure]:
    """Similarity to the nearest training image: of generations, held-out images, and the excess.

    ``own_G``: to the prompt's own training image. ``train_T``: of training images to the nearest
    other one.
    """
    section, shown = "Copying", []
    statistic = lambda value: summarize(value, thresholds)  # noqa: E731
    shares = [name for name in statistic(similarity_G) if name.startswith("share_above_")]
    found = by.generated(statistic, similarity_G, shares)
    if heldout_H is not None:
        over = by.excess(statistic, similarity_G, heldout_H, shares)
        p_value = permutation_test(
            similarity_G, heldout_H, clusters=[by.prompt_G, by.group_H], seed=by.seed
        )
        shown += [
            measure(section, "excess_score", over["p95"]),
            measure(section, "excess_mean", over["mean"]),
            measure(section, "excess_p_value", p_value),
            *(measure(section, f"excess_{name}", over[name]) for name in shares),
            measure(section, "heldout_p95", statistic(heldout_H)["p95"]),
        ]
    shown.insert(1 if shown else 0, measure(section, "memorization_score", found["p95"]))
    for name in ("mean", "p75", "p90"):
        shown.append(measure(section, f"similarity_{name}", found[name]))
    shown += [measure(section, name, found[name]) for name in shares]
    if own_G is not None:
        shown.append(mean_of(section, "own_similarity", own_G, by))
    return [*shown, measure(section, "background_p95", statistic(train_T)["p95"])]


def distances(ratios: Mapping[str, Ratios], by: Resampling) -> list[Measure]:
    """The l2-ratio of Carlini et al. 2023 and MQ of the method's authors, of pixels.

    ``ratios``: of the sets generated and, if there is one, heldout.
    """
    generated, heldout = ratios["generated"], ratios.get("heldout")
    copies = lambda ratio: {"share": (ratio < 1).mean()}  # noqa: E731
    found = by.generated(copies, generated.ratio_Q, ["share"])
    shown = [measure("Copying", "l2_copies", found["share"])]
    if heldout is not None:
        excess = by.excess(copies, generated.ratio_Q, heldout.ratio_Q, ["share"])["share"]
        shown.append(measure("Copying", "excess_l2_copies", excess))
    counts = mq(generated.distance_QK)
    shown += [measure("Copying", f"mq_{cut}", count) for cut, count in counts.items()]
    neighbours = generated.distance_QK.shape[1]
    if neighbours < RATIO_NEIGHBOURS:
        warning = (
            f"made for the {RATIO_NEIGHBOURS} nearest training images, and there are only "
            f"{neighbours}: no number to rely on"
        )
        return [replace(m, warning=warning) for m in shown]
    return shown


def authenticity(authentic_G: np.ndarray, train_T: np.ndarray, by: Resampling) -> Measure:
    """AuthPct, as a share. ``train_T``: as in `copying`."""
    share = lambda value: {"share": value.mean()}  # noqa: E731
    found = by.generated(share, authentic_G.astype(float), ["share"])
    shown = measure("Copying", "authentic", found["share"])
    if twins := int((train_T > ALIKE).sum()):
        warning = (
            f"{twins} of {len(train_T)} training images are there more than once, or nearly: "
            "a copy of one is farther from it than its twin is, and passes for authentic"
        )
        return replace(shown, warning=warning)
    return shown


def losses(
    train_NS: np.ndarray, heldout_NS: np.ndarray, index_N: np.ndarray, by: Resampling
) -> list[Measure]:
    """The white-box pair: gap of the denoising loss, and membership told by that loss.

    ``index_N``: which of the held-out images they are.
    """

    def statistic(train_N: np.ndarray, heldout_N: np.ndarray) -> dict[str, float]:
        return {
            "membership_auc": membership.membership_auc(train_N, heldout_N),
            "membership_tpr": membership.tpr_at_fpr(train_N, heldout_N, fpr=0.01),
            "loss_gap": heldout_N.mean() - train_N.mean(),
            "heldout_loss": heldout_N.mean(),
        }

    found = by.images(statistic, train_NS.mean(axis=1), heldout_NS.mean(axis=1), index_N)
    found["membership_tpr"] = exact_share(found["membership_tpr"], len(train_NS))
    shown = [measure("Membership", name, estimate) for name, estimate in found.items()]
    if len(heldout_NS) < 100:
        warning = f"of {len(heldout_NS)} held-out images 1 % is less than one image"
        return [replace(m, warning=warning) if m.name == "membership_tpr" else m for m in shown]
    return shown


def fidelity(generated_GD: np.ndarray, heldout_HD: np.ndarray, by: Resampling) -> list[Measure]:
    """Quality against held-out images, since copies are near to training images and score well."""
    warnings = {
        "fid": quality.small_sample_warning(
            len(generated_GD), len(heldout_HD), generated_GD.shape[1]
        )
    }
    if (fewest := min(len(generated_GD), len(heldout_HD))) <= quality.KID_SUBSET:
        warnings["kid_spread"] = (
            f"small sample: a subset of up to {quality.KID_SUBSET} holds all {fewest} images, so "
            "the spread is too small; read KID's interval instead"
        )
    try:
        kid = kid_interval(generated_GD, heldout_HD, by.prompt_G, by.group_H, by.level)
    except UserError as error:  # too few prompts or groups for this one measure
        kid, warnings["kid"] = np.nan, str(error)
    found = {
        "kid": kid,
        "kid_spread": quality.kernel_distance(generated_GD, heldout_HD, seed=by.seed)[1],
        "fid": quality.frechet_distance(generated_GD, heldout_HD),
    }
    try:
        found |= quality.precision_recall_density_coverage(heldout_HD, generated_GD)
    except UserError as error:  # too few images for these
        few = ("precision", "recall", "density", "coverage")
        found |= dict.fromkeys(few, np.nan)
        warnings |= dict.fromkeys(few, str(error))
    found["vendi"] = quality.vendi_score(generated_GD)
    return [
        replace(measure("Quality", name, value), warning=warnings.get(name))
        for name, value in found.items()
    ]


def mean_of(section: Section, name: str, value_G: np.ndarray, by: Resampling) -> Measure:
    """The mean of a value of the generations."""
    found = by.generated(lambda value: {"mean": value.mean()}, value_G)
    return measure(section, name, found["mean"])


def measure(section: Section, name: str, found: Estimate | float) -> Measure:
    """A number, with its interval if it has one, and the text of its kind."""
    kind = name if name in TEXTS else next(key for key in TEXTS if name.startswith(f"{key}_"))
    text, of = TEXTS[kind], name[len(kind) + 1 :].replace("_", " ")
    label = f"{text.label} {of}".strip()
    if not isinstance(found, Estimate):
        return Measure(section, name, label, float(found), text.meaning, text.better)
    interval = (found.low, found.high, found.level)
    return Measure(section, name, label, found.value, text.meaning, text.better, *interval)
