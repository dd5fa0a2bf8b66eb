"""Settings of the method."""

from dataclasses import dataclass, fields
from typing import Literal

from iet_sd.config.checks import below_one, not_negative, positive
from iet_sd.errors import UserError
from iet_sd.presets import PRESETS

_READ_BY = {"agc_": "agc", "bank_": "agc", "taa_": "taa", "msr_": "msr"}
"""Settings, by how they begin, and the part that alone reads them."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The method (IET-AGC+, arXiv 2502.09434), every rule of it a setting.

    ``method`` says which parts are on and ``preset`` how they are read; both only fill in values
    of the other fields, which win when given beside them. Given as flags they also replace what a
    --config file writes out. Defaults below are those of iet_agc_plus and corrected.
    """

    method: Literal["iet_agc_plus", "iet_agc", "agc_taa", "iet", "none"] = "iet_agc_plus"
    """iet_agc_plus: all parts. iet_agc: shards and skipping. agc_taa: skipping and augmentation in
    one model. iet: shards alone. none: plain."""
    preset: Literal["corrected", "strict", "paper"] = "corrected"
    """corrected: the method with the accidents of the authors' code repaired. paper: as theirs.
    strict: corrected, skipping more (--agc_threshold 0.9)."""
    num_shards: int = 4
    """Shards of the data, each with a proxy of the model (K)."""
    num_rounds: int = 10
    """Rounds of training; proxies are averaged at their end (R)."""
    steps_per_round: int | None = None
    """Steps of each proxy in a round. Default: so that all together make --max_train_steps."""
    step_unit: Literal["update", "batch"] = "update"
    """What a step counts: optimizer updates, or batches scored (some of which update nothing)."""
    shard_split: Literal["seeded", "contiguous"] = "seeded"
    """Split by seed with every sample used and groups kept together, or slices in file order
    with the remainder left out."""
    aggregate_every: int = 2
    """Average the proxies after every so many rounds (and always after the last)."""
    aggregation_weights: Literal["size", "uniform"] = "size"
    """Weight of a proxy: share of the samples its shard holds, or 1/K."""
    proxy_optimizer: Literal["keep", "average", "reset"] = "keep"
    """AdamW's moments when proxies are averaged: each keeps its own, they are averaged like the
    weights, or start again from zero."""
    outer_learning_rate: float = 1.0
    """Share of a round's averaged change that is made (DiLoCo, arXiv 2311.08105)."""
    outer_momentum: float = 0.0
    """Nesterov momentum of the averaged changes. 0: off."""
    agc: bool = True
    """Skip samples whose loss is below --agc_threshold times the bank's mean (AGC)."""
    agc_threshold: float = 0.8
    """Threshold (lambda) of AGC, a share of the mean loss at that timestep."""
    bank_decay: float = 0.8
    """Decay (gamma) of the running mean of losses per timestep."""
    bank_bins: int = 50
    """Bins of neighbouring timesteps in the bank."""
    bank_bias: Literal["corrected", "raw"] = "corrected"
    """The running mean starts at 0: divide by its total weight, or leave it too low at first."""
    empty_batch: Literal["skip", "step"] = "skip"
    """A batch with nothing to train: no update, or (AGC without TAA) an optimizer step with zero
    gradient."""
    score_pass: Literal["auto", "train", "separate"] = "auto"
    """How samples that are not augmented are trained. train: by a backward pass of all that were
    scored. separate: in a second pass of the kept ones. auto: whichever is less work for the batch
    at hand; where by the round so far it is the second one, the first has no gradient. Dropout of
    LoRA is drawn anew in a second pass."""
    refill_skipped: bool = False
    """Score up to 4 batches for each that is trained, until it is full of kept samples."""
    taa: bool = True
    """Train samples near the threshold on an augmented image (TAA)."""
    taa_sharpness: float = 5.0
    """Strength is exp(-sharpness * distance from the threshold)."""
    taa_magnitude: float = 5.0
    """RandAugment magnitude at strength 1, on its scale of 31 steps."""
    taa_num_ops: int = 2
    """Operations per image."""
    taa_operations: Literal["gentle", "randaugment"] = "gentle"
    """gentle: shifts, shears, turns, saturation and sharpness, with mirrored edges. randaugment:
    all of RandAugment's 14, as in the paper; a model learns to draw the black wedges, gray pages
    and solarized colours that some leave."""
    taa_variants: int = 0
    """Augment each image in one of so many ways at each whole magnitude, which are encoded once
    (--cache): training then needs no VAE. 0: in a new way in every visit."""
    taa_strength: Literal["sample", "batch"] = "sample"
    """Each sample's own strength, or the mean over the batch cut to a whole magnitude."""
    taa_min_strength: float = 0.1
    """Below this strength a sample is trained as it was scored, not augmented."""
    taa_redraw_timestep: bool = False
    """Draw a new timestep for the augmented image (the noise is always new)."""
    taa_leftovers: Literal["train", "drop"] = "train"
    """Train all kept samples, or wait for a full batch of them and drop what exceeds it."""
    taa_min_batch: float = 0.5
    """Augmented images wait, at most to the end of the round, until they fill this share of a
    batch. Not with --score_pass separate, where they join the others. 0: none waits."""
    msr: bool = True
    """Move the most skipped samples to the next shard (MSR)."""
    msr_every: int = 2
    """Move samples in the first of every so many rounds."""
    msr_fraction: float = 0.25
    """Share of a shard that moves."""
    msr_min_skips: int = 1
    """Only samples skipped at least so often move."""
    msr_ties: Literal["seed", "index"] = "seed"
    """Samples skipped equally often: order by seed, or the authors' order of positions."""

    def __post_init__(self) -> None:
        positive(self, "num_shards", "num_rounds", "bank_bins", "aggregate_every", "msr_every")
        positive(self, "taa_num_ops", "steps_per_round", "outer_learning_rate")
        not_negative(self, "agc_threshold", "taa_sharpness", "taa_magnitude", "taa_min_strength")
        not_negative(self, "msr_min_skips", "taa_min_batch", "taa_variants")
        below_one(self, "bank_decay", "msr_fraction", "outer_momentum")
        if self.taa_magnitude > 30:
            raise UserError(
                "--taa_magnitude must be at most 30, the end of RandAugment's scale; "
                f"got {self.taa_magnitude}."
            )
        if self.bank_bins > 1000:
            raise UserError(f"--bank_bins must be at most 1000 (timesteps); got {self.bank_bins}.")
        if self.method == "none" and (self.num_shards > 1 or self.agc or self.taa or self.msr):
            raise UserError(
                "--method none is plain fine-tuning: one shard, no AGC, TAA or MSR. For shards "
                "alone use --method iet, with skipping --method iet_agc."
            )
        if self.taa_min_batch > 1:
            raise UserError(
                f"--taa_min_batch is a share of a batch, at most 1; got {self.taa_min_batch}."
            )
        if not self.agc and (self.score_pass == "separate" or self.refill_skipped):
            raise UserError(
                "--score_pass separate and --refill_skipped need --agc: without it no sample is "
                "skipped, and one pass scores and trains. Switch AGC on, or leave them out."
            )
        if self.refill_skipped and self.score_pass == "train":
            raise UserError(
                "--refill_skipped scores batches apart from training, and --score_pass train "
                "trains in the same pass. Use --score_pass separate or auto."
            )
        if self.refill_skipped and self.taa and self.taa_leftovers == "drop":
            raise UserError(
                "--refill_skipped fills every batch with kept samples, and --taa_leftovers drop "
                "(preset paper) throws some away. Use --taa_leftovers train."
            )
        if self.taa and not self.agc:
            raise UserError(
                "--taa needs --agc: its strength is the distance from AGC's threshold. "
                "Switch AGC on, or use --no-taa."
            )
        if self.taa and self.empty_batch == "step":
            raise UserError(
                "--empty_batch step is a rule of AGC without TAA, and TAA is on. "
                "Use --empty_batch skip, or --no-taa."
            )
        if self.msr and not self.agc:
            raise UserError(
                "--msr needs --agc: it moves the samples that AGC skips most. "
                "Switch AGC on, or use --no-msr."
            )
        if self.msr and self.num_shards == 1:
            raise UserError(
                "--msr moves samples between shards, and --num_shards is 1. "
                "Use more shards, or --no-msr."
            )

    def unused(self) -> list[str]:
        """Settings of a part that is off, where they are not what they would be anyway."""
        anyway = {f.name: f.default for f in fields(self)} | PRESETS[self.preset]
        return [
            name
            for name, value in anyway.items()
            for prefix, part in _READ_BY.items()
            if name.startswith(prefix) and not getattr(self, part) and getattr(self, name) != value
        ]
