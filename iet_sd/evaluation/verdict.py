"""What the numbers say, in words."""

from collections.abc import Sequence

from iet_sd.evaluation.measures import Measure


def with_minus(numbers: str) -> str:
    """Numbers as text with the minus sign that the tables of a report have, not a hyphen."""
    return numbers.replace("-", "\N{MINUS SIGN}")


def in_words(measures: Sequence[Measure]) -> str:
    """Does it memorize, in the first sentence; how sure that is, and does the loss agree."""
    first = {m.name: m for m in reversed(measures)}
    score = first["memorization_score"]
    if "excess_score" not in first:
        return (
            "Without held-out images nothing tells copying from chance. The memorization score is "
            f"{_shown(score, 'z.3f')}, by {score.embedder}."
        )
    excess, baseline = first["excess_score"], first["heldout_p95"].value
    if excess.low > 0:
        finding = "Generations are closer to the training images than new images are: it copies."
    elif excess.high < 0:
        finding = (
            "No copying is seen: generations are farther from the training images than new "
            "images are."
        )
    else:
        finding = "No copying beyond chance is seen."
    sentences = [
        finding,
        "At the 95th percentile the similarity of generations to the nearest training image is "
        f"{with_minus(f'{score.value:z.3f}')}, that of held-out images "
        f"{with_minus(f'{baseline:z.3f}')}: an excess of {_shown(excess, '+z.3f')}, "
        f"by {score.embedder}.",
    ]
    if (auc := first.get("membership_auc")) is not None:
        told = "tells" if auc.low > 0.5 else "does not clearly tell"
        sentences.append(
            f"The denoising loss {told} training images from held-out ones: AUC "
            f"{_shown(auc, '.2f')}, where 0.5 is blind guessing."
        )
    return " ".join(sentences)


def _shown(measure: Measure, digits: str) -> str:
    """Value and interval, each in the format ``digits``."""
    value, low, high = (format(x, digits) for x in (measure.value, measure.low, measure.high))
    return with_minus(f"{value} [{low}, {high}]")
