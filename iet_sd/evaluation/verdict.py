"""What the numbers say, in words."""

from collections.abc import Sequence

from iet_sd.evaluation.measures import Measure


def in_words(measures: Sequence[Measure]) -> str:
    """Does it memorize, in the first sentence; how sure that is, and does the loss agree."""
    first = {m.name: m for m in reversed(measures)}
    score = first["memorization_score"]
    if "excess_score" not in first:
        return (
            "Without held-out images nothing tells copying from chance. The memorization score is "
            f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}], by {score.embedder}."
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
        f"{score.value:.3f}, that of held-out images {baseline:.3f}: an excess of "
        f"{excess.value:+.3f} [{excess.low:+.3f}, {excess.high:+.3f}], by {score.embedder}.",
    ]
    if (auc := first.get("membership_auc")) is not None:
        told = "tells" if auc.low > 0.5 else "does not clearly tell"
        sentences.append(
            f"The denoising loss {told} training images from held-out ones: AUC {auc.value:.2f} "
            f"[{auc.low:.2f}, {auc.high:.2f}], where 0.5 is blind guessing."
        )
    return " ".join(sentences)
