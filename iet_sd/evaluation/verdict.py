"""What the numbers say, in words."""

from collections.abc import Sequence

from iet_sd.evaluation.measures import Measure


def in_words(measures: Sequence[Measure]) -> str:
    """One to three sentences: does it memorize, is that sure, and does the loss agree."""
    first = {m.name: m for m in reversed(measures)}
    score = first["memorization_score"]
    if "excess_score" not in first:
        return (
            f"The memorization score is {score.value:.3f} [{score.low:.3f}, {score.high:.3f}] by "
            f"{score.embedder}. Without held-out images nothing tells how much of it is chance."
        )
    excess, baseline = first["excess_score"], first["heldout_p95"].value
    if excess.low > 0:
        finding = "Generations are more similar to training images than held-out images are"
    elif excess.high < 0:
        finding = "Generations are less similar to training images than held-out images are"
    else:
        finding = (
            "Generations are about as similar to training images as held-out images are, so no "
            "copying beyond chance is seen"
        )
    sentences = [
        f"{finding}: at the 95th percentile {score.value:.3f} against {baseline:.3f}, an excess of "
        f"{excess.value:+.3f} [{excess.low:+.3f}, {excess.high:+.3f}], by {score.embedder}."
    ]
    if (auc := first.get("membership_auc")) is not None:
        told = "tells" if auc.low > 0.5 else "does not clearly tell"
        sentences.append(
            f"The denoising loss {told} training images from held-out ones: AUC {auc.value:.2f} "
            f"[{auc.low:.2f}, {auc.high:.2f}], where 0.5 is blind guessing."
        )
    return " ".join(sentences)
