"""Settings: frozen dataclasses, each field with its type, default and text, checked when made.

Every field is one flag of the same name and one key of the YAML file (`iet_sd.arguments`). Names
and defaults are those of diffusers' ``train_text_to_image.py`` and ``train_text_to_image_lora.py``
where they exist there.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from iet_sd.errors import UserError

LR_SCHEDULERS = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to start from, and what of it is trained."""

    pretrained_model_name_or_path: str
    """Stable Diffusion 1.x or 2.x: a pipeline folder, or a model id on the Hub."""
    revision: str | None = None
    """Revision of the model on the Hub: branch, tag or commit."""
    variant: str | None = None
    """Variant of the model files, for example fp16."""
    train_mode: Literal["full", "lora"] = "full"
    """Train all weights of the UNet, or a low-rank adapter (LoRA) on its attention."""
    rank: int = 4
    """LoRA: rank of the adapter."""
    lora_alpha: float | None = None
    """LoRA: scale is alpha / rank. Default: alpha = rank."""
    lora_dropout: float = 0.0
    """LoRA: dropout on the adapter's input."""
    lora_target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    """LoRA: names of the layers that get an adapter."""
    lora_aggregation: Literal["factors", "product"] = "factors"
    """LoRA: average A and B apart, or average BA and factor it again (SVD, same rank)."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts. Default: what the model's own scheduler says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use the attention kernels of xformers (needs a CUDA GPU and requirements-xformers.txt)."""

    def __post_init__(self) -> None:
        _positive(self, "rank", "lora_alpha")
        if not self.lora_target_modules:
            raise UserError("--lora_target_modules must name at least one layer.")
        _below_one(self, "lora_dropout")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images and captions, and how an image becomes pixels."""

    dataset_name: str | None = None
    """A data set on the Hub, or a local folder that `datasets.load_dataset` reads."""
    dataset_config_name: str | None = None
    """Configuration of the data set, if it has several."""
    train_data_dir: str | None = None
    """Local data: images with metadata.jsonl, metadata.csv or .txt / .caption files; parquet; or a
    data set saved to disk."""
    dataset_split: str = "train"
    """Split of the data set to train on."""
    image_column: str = "image"
    """Column with the image."""
    caption_column: str = "text"
    """Column with the caption, or a list of captions of which each visit draws one."""
    sample_id_column: str | None = None
    """Column with a stable name per sample. Default: sample_id or file name, else position."""
    group_column: str | None = None
    """Column whose equal values mark near-duplicates, kept in one shard by the seeded split."""
    cache_dir: str | None = None
    """Where downloaded models and data sets are kept."""
    max_train_samples: int | None = None
    """Use only the first so many samples."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image: stop and name it, or leave it out and name it."""
    on_missing_caption: Literal["error", "empty", "skip"] = "error"
    """An image without a caption: stop and name it, use an empty one, or leave the image out."""
    resolution: int = 512
    """Images are resized (shorter edge) and cropped to this many pixels."""
    center_crop: bool = False
    """Crop the centre. Default: a random place."""
    random_flip: bool = False
    """Flip images left to right at random."""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = (
        "lanczos"
    )
    """Interpolation of the resize."""
    check_images: Literal["all", "none"] = "all"
    """Decode every image once before training, so a bad one is found now and not in an hour."""
    train_batch_size: int = 16
    """Images in a batch."""
    dataloader_num_workers: int = 0
    """Processes that load images. 0: the main process does it."""

    def __post_init__(self) -> None:
        _positive(self, "resolution", "train_batch_size", "max_train_samples")
        _not_negative(self, "dataloader_num_workers")
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UserError(
                "Name the training data once: --dataset_name for the Hub, or --train_data_dir "
                f"for local files; got {self.dataset_name!r} and {self.train_data_dir!r}."
            )
        if self.on_bad_image == "skip" and self.check_images == "none":
            raise UserError("--on_bad_image skip needs --check_images all, which finds them.")
        if self.resolution % 8:
            raise UserError(f"--resolution must be a multiple of 8; got {self.resolution}.")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The method (IET-AGC+, arXiv 2502.09434), every rule of it a setting.

    ``method`` says which parts are on and ``preset`` how they are read; both only fill in values
    of the other fields, which win when given.
    """

    method: Literal["iet_agc_plus", "iet_agc", "iet", "none"] = "iet_agc_plus"
    """iet_agc_plus: all parts. iet_agc: shards and skipping. iet: shards alone. none: plain."""
    preset: Literal["corrected", "paper"] = "corrected"
    """corrected: the method with the accidents of the authors' code repaired. paper: as theirs."""
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
    """A batch with nothing to train: no update, or an optimizer step with zero gradient."""
    taa: bool = True
    """Train samples near the threshold on an augmented image (TAA)."""
    taa_sharpness: float = 5.0
    """Strength is exp(-sharpness * distance from the threshold)."""
    taa_magnitude: float = 5.0
    """RandAugment magnitude at strength 1, on its scale of 31 steps."""
    taa_num_ops: int = 2
    """RandAugment operations per image."""
    taa_strength: Literal["sample", "batch"] = "sample"
    """Each sample's own strength, or the mean over the batch cut to a whole magnitude."""
    taa_min_strength: float = 0.1
    """Below this strength a sample is trained from the scoring pass itself, not augmented."""
    taa_redraw_timestep: bool = False
    """Draw a new timestep for the augmented image (the noise is always new)."""
    taa_leftovers: Literal["train", "drop"] = "train"
    """Train all kept samples, or wait for a full batch of them and drop what exceeds it."""
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
        _positive(self, "num_shards", "num_rounds", "bank_bins", "aggregate_every", "msr_every")
        _positive(self, "taa_num_ops", "steps_per_round")
        _not_negative(self, "agc_threshold", "taa_sharpness", "taa_magnitude", "taa_min_strength")
        _not_negative(self, "msr_min_skips")
        _below_one(self, "bank_decay", "msr_fraction")
        if self.taa_magnitude > 30:
            raise UserError(
                "--taa_magnitude must be at most 30, the end of RandAugment's scale; "
                f"got {self.taa_magnitude}."
            )
        if self.bank_bins > 1000:
            raise UserError(f"--bank_bins must be at most 1000 (timesteps); got {self.bank_bins}.")
        if self.taa and not self.agc:
            raise UserError(
                "--taa needs --agc: its strength is the distance from AGC's threshold. "
                "Switch AGC on, or use --no-taa."
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
        if self.method == "none" and (self.num_shards > 1 or self.agc):
            raise UserError(
                "--method none is plain fine-tuning: one shard, no AGC, TAA or MSR. For shards "
                "alone use --method iet, with skipping --method iet_agc."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation, precision, and what is written where."""

    output_dir: str = "sd-model-finetuned"
    """Folder of the result: the pipeline or LoRA, metrics.jsonl, logs and checkpoints."""
    overwrite_output_dir: bool = False
    """Allow --output_dir to hold the result of an earlier run, and replace it."""
    seed: int | None = None
    """Seed of everything random. Default: drawn once and written to training_config.yaml."""
    num_train_epochs: int = 100
    """Passes over the data, if neither --max_train_steps nor --steps_per_round is given."""
    max_train_steps: int | None = None
    """Steps of all proxies together (--step_unit), split over shards and rounds."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    scale_lr: bool = False
    """Multiply the learning rate by batch size and gradient accumulation steps."""
    lr_scheduler: LR_SCHEDULERS = "constant"
    """Learning-rate schedule; it counts the updates of one proxy over all rounds."""
    lr_warmup_steps: int = 500
    """Updates of a proxy over which the learning rate rises from 0, if the schedule warms up."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer update."""
    adam_beta1: float = 0.9
    """AdamW: decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW: decay of the second moment."""
    adam_weight_decay: float = 1e-2
    """AdamW: weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW: epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of forward passes; trained weights are always fp32. Default: accelerate's."""
    allow_tf32: bool = False
    """Allow TF32 matrix products on Ampere GPUs: faster, less exact."""
    snr_gamma: float | None = None
    """Min-SNR weight of the loss (arXiv 2303.09556); 5.0 is usual. AGC compares the unweighted."""
    noise_offset: float = 0.0
    """Scale of an offset of the noise, one number per image and channel."""
    checkpointing_rounds: int = 1
    """Save a checkpoint after every so many rounds (0: none at all)."""
    checkpointing_steps: int = 500
    """Save every so many steps within a round too; and when told to stop (Ctrl-C, SIGTERM)."""
    checkpoints_total_limit: int | None = None
    """Keep only so many checkpoints."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint: its folder, or "latest" for the newest one in --output_dir."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = "tensorboard"
    """Tracker for curves and images. metrics.jsonl is always written."""
    logging_dir: str = "logs"
    """Folder of the tracker's files, under --output_dir."""
    tracker_project_name: str = "iet-sd-fine-tune"
    """Project name in the tracker."""
    validation_prompts: tuple[str, ...] | None = None
    """Prompts drawn during training and for the sample grid at the end."""
    validation_rounds: int | None = None
    """Draw --validation_prompts after every so many rounds. Default: only at the end."""
    num_validation_images: int = 4
    """Images per validation prompt."""
    validation_inference_steps: int = 25
    """Denoising steps of validation images."""
    validation_guidance_scale: float = 7.5
    """Classifier-free guidance of validation images."""
    ddp_timeout: int = 7200
    """Seconds that a process waits for the others at the end of a round before it gives up."""
    dry_run: bool = False
    """Print the resolved settings, shard sizes, updates, memory and time, then stop."""

    def __post_init__(self) -> None:
        _positive(self, "num_train_epochs", "gradient_accumulation_steps", "num_validation_images")
        _positive(self, "learning_rate", "max_grad_norm", "ddp_timeout", "checkpointing_steps")
        _positive(self, "validation_inference_steps")
        _not_negative(self, "lr_warmup_steps", "adam_weight_decay", "noise_offset")
        _not_negative(self, "checkpointing_rounds", "adam_epsilon", "validation_guidance_scale")
        _below_one(self, "adam_beta1", "adam_beta2")
        _positive(self, "max_train_steps", "snr_gamma")
        _positive(self, "validation_rounds", "checkpoints_total_limit")
        if self.validation_rounds and not self.validation_prompts:
            raise UserError("--validation_rounds needs --validation_prompts.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a training run."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    training: TrainingConfig

    def __post_init__(self) -> None:
        given = self.method.steps_per_round is not None, self.training.max_train_steps is not None
        if all(given):
            raise UserError(
                "--steps_per_round and --max_train_steps both set the length of training: "
                "give one of them."
            )
        drops = self.method.taa and self.method.taa_leftovers == "drop"
        if drops and self.training.gradient_accumulation_steps > 1:
            raise UserError(
                "--taa_leftovers drop (preset paper) makes a batch of its own for every update "
                "and does not go with --gradient_accumulation_steps above 1."
            )

    def as_dict(self) -> dict[str, Any]:
        """All settings as one flat mapping, as the YAML file has them."""
        return {
            f.name: list(value) if isinstance(value := getattr(part, f.name), tuple) else value
            for part in (self.model, self.data, self.method, self.training)
            for f in dataclasses.fields(part)
        }


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": MethodConfig,
    "training": TrainingConfig,
}


def _positive(config: Any, *names: str) -> None:
    """Every value that is given must be above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0; got {value}.")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name} must not be negative; got {getattr(config, name)}.")


def _below_one(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} must lie in [0, 1); got {getattr(config, name)}.")
