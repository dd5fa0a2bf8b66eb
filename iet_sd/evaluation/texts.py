"""What people read of each kind of number in a report."""

from typing import Literal, NamedTuple

Better = Literal["lower", "higher", "zero"]


class Text(NamedTuple):
    """What people read of a kind of number."""

    label: str
    better: Better | None
    meaning: str


# A name may go on with _ and what it is of: share_above_0.5, mq_15, similarity_p90.
TEXTS = {
    "excess_score": Text(
        "Excess similarity",
        "zero",
        "The memorization score minus the same statistic of held-out images, which resemble "
        "training images by chance alone.",
    ),
    "memorization_score": Text(
        "Memorization score",
        "lower",
        "95th percentile, over generations, of the similarity to the nearest training image.",
    ),
    "excess_mean": Text(
        "Excess similarity, mean", "zero", "The same excess for the mean instead of the percentile."
    ),
    "excess_p_value": Text(
        "p-value of the excess",
        None,
        "Chance of a mean excess this large if generations were as new as held-out images.",
    ),
    "similarity": Text(
        "Similarity", "lower", "Similarity of generations to the nearest training image."
    ),
    "excess_share_above": Text(
        "Excess share above", "zero", "The share above the threshold minus that of held-out images."
    ),
    "share_above": Text(
        "Share above", "lower", "Share of generations that count as copies at this similarity."
    ),
    "own_similarity": Text(
        "Similarity to the own image",
        "lower",
        "Mean similarity of a generation to the training image whose caption it was drawn for.",
    ),
    "background": Text(
        "Train-train background",
        None,
        "The same statistic for training images and their nearest other training image; "
        "duplicates raise it.",
    ),
    "heldout": Text(
        "Held-out baseline",
        None,
        "The same statistic for held-out images: what a model that copies nothing may reach.",
    ),
    "excess_l2_copies": Text(
        "Excess l2-ratio copies",
        "zero",
        "The share of l2-ratio copies minus that of held-out images.",
    ),
    "l2_copies": Text(
        "l2-ratio copies",
        "lower",
        "Share of generations nearer to a training image, in pixels, than half the mean distance "
        "of the 50 nearest (Carlini et al. 2023).",
    ),
    "mq": Text(
        "MQ",
        "lower",
        "Generations whose squared distance ratio, in percent, is below this (Liu et al. 2024).",
    ),
    "authentic": Text(
        "AuthPct",
        "higher",
        "Share of generations farther from their nearest training image than that image is from "
        "its own neighbour (Alaa et al. 2022).",
    ),
    "c_t": Text(
        "C_T",
        "zero",
        "Z-score of generations lying nearer to the training set than held-out images do; below "
        "-3 is copying (Meehan et al. 2020).",
    ),
    "loss_gap": Text(
        "Loss gap", "zero", "Denoising loss of held-out images minus that of training images."
    ),
    "heldout_loss": Text(
        "Held-out loss",
        "lower",
        "Denoising loss of held-out images: quality that copying cannot buy.",
    ),
    "membership_auc": Text(
        "Membership AUC",
        None,
        "Chance that the loss tells a training image from a held-out one; 0.5 is blind guessing.",
    ),
    "membership_tpr": Text(
        "Membership TPR at 1 % FPR",
        "lower",
        "Training images found by their loss when 1 % of held-out ones may be accused; 0.01 is "
        "blind guessing.",
    ),
    "kid": Text(
        "KID",
        "lower",
        "Kernel distance of generations and held-out images, over pairs of different prompts and "
        "of different groups; unbiased in their numbers.",
    ),
    "kid_spread": Text(
        "KID, spread",
        None,
        "Standard deviation over 100 random subsets of up to 1,000 images, as usually given; pairs "
        "within a prompt or group count.",
    ),
    "fid": Text("FID", "lower", "Distance of Gaussians fitted to generations and held-out images."),
    "precision": Text("Precision", "higher", "Generations that look like a held-out image."),
    "recall": Text("Recall", "higher", "Held-out images that look like a generation."),
    "density": Text("Density", "higher", "Held-out neighbourhoods that a generation lies in."),
    "coverage": Text("Coverage", "higher", "Held-out images with a generation near by."),
    "vendi": Text("Vendi score", "higher", "How many wholly different images would be as diverse."),
    "clip_score": Text("CLIP score", "higher", "Cosine of image and prompt, by the CLIP named."),
}
