"""Settings of generation, evaluation and comparison."""

from dataclasses import dataclass
from typing import Literal

from iet_sd.config.checks import below_one, not_negative, positive, whole_characters
from iet_sd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The fine-tuned model. What its training_config.yaml says of the data need not be repeated."""

    pretrained_model_name_or_path: str
    """Stable Diffusion pipeline: a folder, such as --output_dir of training, or a Hub id."""
    revision: str | None = None
    """Revision of the model on the Hub: branch, tag or commit."""
    variant: str | None = None
    """Variant of the model files, for example fp16."""
    lora_weights: str | None = None
    """LoRA to load into the model: a folder or .safetensors file."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the model on a GPU. Default: accelerate's."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The images that are drawn."""

    output_dir: str | None = None
    """Folder of the result. Default: evaluation, in the folder of the model or LoRA."""
    prompts: tuple[str, ...] | None = None
    """Prompts to draw. Default: captions of the training set."""
    num_prompts: int = 1000
    """Captions of the training set to draw, chosen by --seed if there are more."""
    images_per_prompt: int = 1
    """Images of each prompt."""
    seed: int = 0
    """Seed of the choice of prompts, of every image, and of the resampling."""
    num_inference_steps: int = 50
    """Denoising steps, by the pipeline's own scheduler."""
    guidance_scale: float = 7.5
    """Classifier-free guidance."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    generation_batch_size: int = 8
    """Images drawn at a time; changes nothing but speed and memory."""

    def __post_init__(self) -> None:
        positive(self, "num_prompts", "images_per_prompt", "num_inference_steps")
        positive(self, "generation_batch_size")
        not_negative(self, "guidance_scale")
        whole_characters(self, "prompts")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured."""

    embedders: tuple[str, ...] = ("sscd_disc_mixup",)
    """What similarity is measured by, first the one of the headline: pixels, sscd_disc_mixup,
    sscd_disc_large, dinov2=ID, clip=ID, torchscript=FILE, python=MODULE:FUNCTION; NAME=FILE for
    weights on disk."""
    preprocessing: Literal["recommended", "legacy_dcr"] = "recommended"
    """How images are prepared for --embedders: as their authors say, or as DCR and IET-AGC do, for
    numbers that compare with theirs."""
    thresholds: tuple[float, ...] = (0.5,)
    """Similarities above which a generation counts as a copy."""
    quality_embedder: str = "inception"
    """Features for FID, KID, precision and recall against held-out images; none: left out."""
    clip_score: str | None = None
    """CLIP for the fit of image and prompt: a Hub id or folder. Default: not measured."""
    membership_samples: int = 256
    """Training and held-out images whose denoising loss is compared; 0: not measured."""
    membership_timesteps: int = 10
    """Timesteps, spread evenly, at which that loss is taken."""
    without_heldout: bool = False
    """Leave out all that compares with held-out images, if there are none."""
    neighbour_engine: Literal["exact", "faiss"] = "exact"
    """What searches for the nearest images: numpy, or faiss (an optional package: pip install
    faiss-cpu). The results are the same; on one CPU core numpy is faster."""
    embedding_batch_size: int = 64
    """Images embedded at a time."""
    bootstrap_resamples: int = 2000
    """Resamples of a confidence interval."""
    confidence_level: float = 0.95
    """Level of the confidence intervals."""
    pairs_shown: int = 200
    """Closest pairs shown in report.html."""
    evaluation_cache_dir: str | None = None
    """Where images drawn and their features are kept. Default: cache, in --output_dir."""

    def __post_init__(self) -> None:
        positive(self, "membership_timesteps", "embedding_batch_size", "bootstrap_resamples")
        positive(self, "pairs_shown", "confidence_level")
        below_one(self, "confidence_level")
        not_negative(self, "membership_samples")
        if self.membership_samples == 1:
            raise UserError(
                "--membership_samples must be 0 or at least 2, as its intervals are over images; "
                "got 1."
            )
        if not self.embedders:
            raise UserError("--embedders must name at least one, for example pixels.")
        if len(set(self.embedders)) < len(self.embedders):
            raise UserError(f"--embedders names one twice: {' '.join(self.embedders)}.")


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Two folders made by evaluate, with the same data, prompts and seeds."""

    first: str
    """Evaluation of the model to compare with, such as plain fine-tuning."""
    second: str
    """Evaluation of the other model."""
    output_dir: str | None = None
    """Folder of comparison.json. Default: none is written."""
    seed: int = 0
    """Seed of the resampling."""
    bootstrap_resamples: int = 2000
    """Resamples of a confidence interval."""
    confidence_level: float = 0.95
    """Level of the confidence intervals."""

    def __post_init__(self) -> None:
        positive(self, "bootstrap_resamples", "confidence_level")
        below_one(self, "confidence_level")
