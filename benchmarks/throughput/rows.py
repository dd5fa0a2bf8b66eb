"""What is compared, as data: each row's script and flags.

All rows train the same model on the same images at the same batch, and a length is a number of
rounds: (K shards) x (steps) updates of all proxies together in each, and as many of the others.

On weights that no training has touched the losses of samples differ by their noise alone, which is
less than a trained model's do. So AGC's threshold and TAA's sharpness are set by that spread: such
that the shares of skipped and of augmented samples are those that training meets. The bank has few
bins, so that it is filled before what is measured begins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = ROOT / "train_iet_sd.py"
PEERS = {"full": "train_text_to_image.py", "lora": "train_text_to_image_lora.py"}

RESOLUTION = 128
"""At which the pipeline's proportions are those of Stable Diffusion 1.5."""
SKIPPED = 0.26
"""Share of scored samples that AGC skips."""
AUGMENTED = 0.6
"""Share of kept samples near enough to the threshold to be augmented, as on the demo."""
BANK_DECAY, TAA_MIN_STRENGTH, BANK_BINS = 0.8, 0.1, 4
_NEVER = 10**9


@dataclass(frozen=True)
class Row:
    """One way of training."""

    title: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Of ours, beside those that all rows have."""
    peer: bool = False
    """diffusers' script instead of ours."""

    @property
    def skips(self) -> bool:
        """Whether AGC is on."""
        return self.flags.get("method") in ("iet_agc", "iet_agc_plus")

    @property
    def cached(self) -> bool:
        """Whether latents and embeddings are looked up."""
        return not self.peer and self.flags["cache"] != "off"


_NONE = {"method": "none"}
_CORRECTED = {"method": "iet_agc_plus", "preset": "corrected"}
_PAPER = {"method": "iet_agc_plus", "preset": "paper"}
# Not auto, which would do without caches in runs that are too short for them to pay.
_ON, _OFF, _TWO = {"cache": "on"}, {"cache": "off"}, {"taa_variants": 2}
ROWS = {
    "a": Row("diffusers' script", peer=True),
    "b": Row("none", _NONE | _ON),
    "b_off": Row("none, no cache", _NONE | _OFF),
    "c": Row("iet_agc", {"method": "iet_agc"} | _ON),
    "d": Row("iet_agc_plus, corrected", _CORRECTED | _ON),
    "d_kept": Row("the same, 2 augmentations of each image kept", _CORRECTED | _ON | _TWO),
    "d_full": Row(
        "the same, and batches filled up", _CORRECTED | _ON | _TWO | {"refill_skipped": ""}
    ),
    "d_off": Row("iet_agc_plus, corrected, no cache", _CORRECTED | _OFF),
    "e": Row("iet_agc_plus, paper", _PAPER | _ON),
    "e_off": Row("iet_agc_plus, paper, no cache", _PAPER | _OFF),
}
COMPARED = ("a", "b", "b_off", "c", "d", "d_kept", "e")
SCALED = ("b", "d")
PROFILED = ("a", "b", "c", "d", "e")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of one measurement share."""

    model: Path
    data: Path
    resolution: int
    batch: int = 8
    train_mode: str = "full"
    num_shards: int = 4
    steps: int = 8
    """Of each proxy in a round."""
    seed: int = 0
    ours: tuple[str, ...] = ()
    """Further flags of all rows of ours."""

    def updates(self, rounds: int) -> int:
        """Of all proxies together, or of a script without any."""
        return rounds * self.num_shards * self.steps


def method_flags(resolution: int) -> dict[str, Any]:
    """Threshold and sharpness at which the shares are `SKIPPED` and `AUGMENTED`.

    A sample's loss over the mean loss is normal with mean 1: that of n squared normal numbers, over
    a running mean of them that weighs the newest by 1 - decay.
    """
    numbers = 4 * (resolution // 8) ** 2
    of_mean = (1 - BANK_DECAY) / (1 + BANK_DECAY)
    ratio = NormalDist(1, math.sqrt(2 / numbers * (1 + of_mean)))
    threshold = ratio.inv_cdf(SKIPPED)
    farthest = ratio.inv_cdf(SKIPPED + AUGMENTED * (1 - SKIPPED))
    return {
        "agc_threshold": threshold,
        "taa_sharpness": math.log(1 / TAA_MIN_STRENGTH) / (farthest / threshold - 1),
        "bank_decay": BANK_DECAY,
        "bank_bins": BANK_BINS,
    }


def argv_of(row: Row, setting: Setting, rounds: int, output: Path, cache: Path) -> list[str]:
    """The flags of a run of ``rounds`` rounds into ``output``."""
    flags = {
        "pretrained_model_name_or_path": setting.model,
        "train_data_dir": setting.data,
        "image_column": "image",
        "caption_column": "text",
        "output_dir": output,
        "cache_dir": cache,
        "resolution": setting.resolution,
        "center_crop": "",
        "random_flip": "",
        "train_batch_size": setting.batch,
        "max_train_steps": setting.updates(rounds),
        # So low that losses keep their spread; speed does not depend on it.
        "learning_rate": 1e-6,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpointing_steps": _NEVER,
        "mixed_precision": "no",
        "report_to": "tensorboard",
        "seed": setting.seed,
    }
    if setting.train_mode == "lora":
        flags["rank"] = 4
    if not row.peer:
        flags |= {"train_mode": setting.train_mode, "num_rounds": rounds, "checkpointing_rounds": 0}
        flags |= row.flags
    if row.skips:
        flags |= {"num_shards": setting.num_shards, **method_flags(setting.resolution)}
    argv = [str(p) for name, v in flags.items() for p in (f"--{name}", v) if p != ""]
    return argv if row.peer else [*argv, *setting.ours]


def script_of(row: Row, train_mode: str, peers: Path | None) -> Path:
    """The script that a row runs. Errors: `FileNotFoundError` for a peer that is not there."""
    if not row.peer:
        return OURS
    name = PEERS[train_mode]
    if peers is None or not (peers / name).is_file():
        where = f"{peers} has no {name}" if peers else "it has not been said where that is"
        raise FileNotFoundError(
            f"row a runs diffusers' own script, and {where}. Name its folder with "
            "--diffusers_scripts: examples/text_to_image of a clone of "
            "https://github.com/huggingface/diffusers (not part of the package diffusers). Or "
            "leave row a out with --rows."
        )
    return peers / name
