"""The methods that are compared, as data: a name, flags of ``train_iet_sd.py``, and a swap.

``swap`` names a function of `benchmarks.efficacy.controls` that replaces a part of the training
loop inside the cell's process, or of `benchmarks.efficacy.beyond`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to train."""

    text: str
    """For the report."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    num_shards: int = 4
    tuned_as: str = "iet"
    """The method whose tuning says the learning rate."""
    swap: str | None = None


BEFORE = {"taa_min_batch": 0.0, "taa_operations": "randaugment"}
"""What was done before there were flags for it: older results are of the same settings."""

_OFF = {"agc": False, "taa": False, "msr": False}
_AGC = _OFF | {"agc": True}
_AGC_TAA = _AGC | BEFORE | {"taa": True}
_ALL = _AGC_TAA | {"msr": True}
_GENTLE = {"taa_operations": "gentle"}
_READ_ANEW = {"cache": "off"}  # a cache has no caption that a swap makes up
_CALIBRATED = {"agc_threshold": 0.86, "bank_bins": 10}
_PLAIN, _PLUS = {"num_shards": 1, "tuned_as": "plain"}, {"tuned_as": "iet_agc_plus"}

METHODS: dict[str, Method] = {
    "plain": Method("plain fine-tuning; its curve is early stopping", _OFF, **_PLAIN),
    "weight_decay": Method(
        "plain, weight decay 1 instead of 0.01", _OFF | {"adam_weight_decay": 1.0}, **_PLAIN
    ),
    "dropout": Method("plain, dropout 0.1 in the UNet", _OFF, swap="dropout", **_PLAIN),
    "ema": Method("plain, moving average of the weights", _OFF | {"use_ema": True}, **_PLAIN),
    "agc": Method("AGC alone, one model", _AGC, **_PLAIN),
    "agc_taa": Method("AGC and TAA with RandAugment, one model", _AGC_TAA, **_PLAIN),
    "iet": Method("IET alone: shards, averaged", _OFF),
    "iet_agc": Method("IET-AGC: shards and skipping", _AGC),
    "iet_agc_msr": Method("IET-AGC with MSR, no TAA", _AGC | {"msr": True}),
    "iet_agc_plus": Method("IET-AGC+ with RandAugment", _ALL, **_PLUS),
    "iet_agc_plus_paper": Method("IET-AGC+, preset paper", _ALL | {"preset": "paper"}, **_PLUS),
    "iet_agc_plus_colour": Method(
        "IET-AGC+, augmenting by colour operations alone, which leave no marks",
        _ALL,
        swap="colour_taa",
        **_PLUS,
    ),
    # Beyond the paper.
    "agc_taa_told": Method(
        "AGC and TAA, one model, captions of augmented images say that they are",
        _AGC_TAA | _READ_ANEW,
        swap="told_taa",
        **_PLAIN,
    ),
    "agc_taa_gentle": Method(
        "AGC and TAA, one model, augmenting by what leaves no marks: mirrored edges, no black",
        _AGC_TAA | _GENTLE,
        **_PLAIN,
    ),
    "agc_taa_whole_pixel": Method(
        "AGC and TAA, one model, by shifts of whole pixels and saturation: edges stay sharp",
        _AGC_TAA | _GENTLE,
        swap="whole_pixel_taa",
        **_PLAIN,
    ),
    "constant_gentle": Method(
        "AGC, and every kept sample so augmented at TAA's mean strength, one model",
        _AGC_TAA | _GENTLE,
        swap="constant_taa",
        **_PLAIN,
    ),
    "taa_gentle": Method(
        "TAA alone, so augmented, one model: nothing is skipped",
        _AGC_TAA | _GENTLE,
        swap="no_skip",
        **_PLAIN,
    ),
    "agc_taa_gentle_ema": Method(
        "AGC and TAA, so augmented, and a moving average of the weights, one model",
        _AGC_TAA | _GENTLE | {"use_ema": True},
        **_PLAIN,
    ),
    "iet_agc_taa_gentle": Method("IET-AGC with TAA, so augmented, no MSR", _AGC_TAA | _GENTLE),
    "iet_agc_plus_gentle": Method(
        "IET-AGC+, augmenting by what leaves no marks: mirrored edges, no black", _ALL | _GENTLE
    ),
    "agc_calibrated": Method(
        "one model, skipping what has fallen 14 % more than the loss of unseen images has",
        _AGC | _CALIBRATED,
        swap="calibrated_agc",
        **_PLAIN,
    ),
    "agc_calibrated_taa_gentle": Method(
        "the same, and TAA near that threshold, by what leaves no marks",
        _AGC_TAA | _CALIBRATED | _GENTLE,
        swap="calibrated_agc",
        **_PLAIN,
    ),
    # Controls: the side effect without the rule.
    "random_skip": Method(
        "IET, skipping as many of a batch as AGC would, at random", _AGC, swap="random_skip"
    ),
    "agc_random_skip": Method(
        "one model, skipping as many of a batch as AGC would, at random",
        _AGC,
        swap="random_skip",
        **_PLAIN,
    ),
    "random_exchange_gentle": Method(
        "IET-AGC+, so augmented, moving as many samples as MSR would, at random",
        _ALL | _GENTLE,
        swap="random_exchange",
    ),
    "shuffled_gentle": Method(
        "AGC and TAA, so augmented, strengths dealt out at random within a batch, one model",
        _AGC_TAA | _GENTLE,
        swap="shuffled_taa",
        **_PLAIN,
    ),
}

COMMANDS = {
    "plain": "--method none",
    "ema": "--method none --use_ema",
    "agc": "--method iet_agc --num_shards 1",
    "agc_taa": "--method agc_taa --taa_operations randaugment",
    "agc_taa_gentle": "--method agc_taa",
    "agc_taa_gentle, agc_threshold 0.9": "--method agc_taa --preset strict",
    "agc_taa_gentle_ema, agc_threshold 0.9": "--method agc_taa --preset strict --use_ema",
    "iet": "--method iet",
    "iet_agc": "--method iet_agc",
    "iet_agc_plus": "--method iet_agc_plus --taa_operations randaugment",
    "iet_agc_plus_gentle": "--method iet_agc_plus",
}
"""What a user sets for a method, by label. The study differs in ``taa_min_batch``: 0, so that no
sample waits."""
