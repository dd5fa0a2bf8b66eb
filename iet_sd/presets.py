"""Methods and presets as data: values of `MethodConfig` fields, nothing else.

``METHODS`` switches parts on and off; ``PRESETS`` reads the rules as the authors' code does
(``paper``), with its accidents repaired (``corrected``), or so and skipping more (``strict``).
There is one implementation.
"""

from collections.abc import Mapping
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    # Odd rounds redistribute, even rounds average: two local rounds lie between two averages.
    "iet_agc_plus": {"agc": True, "taa": True, "msr": True, "aggregate_every": 2},
    "iet_agc": {"agc": True, "taa": False, "msr": False, "aggregate_every": 1},
    "agc_taa": {"agc": True, "taa": True, "msr": False, "aggregate_every": 1, "num_shards": 1},
    "iet": {"agc": False, "taa": False, "msr": False, "aggregate_every": 1},
    "none": {"agc": False, "taa": False, "msr": False, "aggregate_every": 1, "num_shards": 1},
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "agc_threshold": 0.8,
        "aggregation_weights": "uniform",
        "bank_bias": "raw",
        "bank_bins": 1000,
        "taa_strength": "batch",
        "taa_operations": "randaugment",
        "taa_leftovers": "drop",
        "step_unit": "batch",
        "taa_min_strength": 0.0,
        "taa_redraw_timestep": True,
        "taa_min_batch": 0.0,
        "score_pass": "train",
        "msr_min_skips": 0,
        "msr_ties": "index",
        "empty_batch": "step",
        "shard_split": "contiguous",
    },
    "corrected": {
        "agc_threshold": 0.8,
        "aggregation_weights": "size",
        "bank_bias": "corrected",
        "bank_bins": 50,
        "taa_strength": "sample",
        # By measurement: what RandAugment leaves on pictures is learnt and drawn.
        "taa_operations": "gentle",
        "taa_leftovers": "train",
        "step_unit": "update",
        "taa_min_strength": 0.1,
        "taa_redraw_timestep": False,
        "taa_min_batch": 0.5,
        "score_pass": "auto",
        "msr_min_skips": 1,
        "msr_ties": "seed",
        "empty_batch": "skip",
        "shard_split": "seeded",
    },
}
PRESETS["strict"] = PRESETS["corrected"] | {"agc_threshold": 0.9}


def stand_for(written: Mapping[str, Any], preset: str, method: str) -> dict[str, Any]:
    """The values that ``preset`` and ``method`` stand for, beside those that are written out."""
    values = PRESETS[preset] | METHODS[method]
    if {**values, **written}["taa"]:
        # A rule of AGC alone: with TAA the authors update only when a batch of kept ones is full.
        values["empty_batch"] = "skip"
    return values
