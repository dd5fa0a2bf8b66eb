"""Settings of a training run."""

import os
from dataclasses import dataclass
from typing import Literal

from iet_sd.config.checks import below_one, not_negative, positive, whole_characters
from iet_sd.errors import UserError

LR_SCHEDULERS = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation, precision, and what is written where."""

    output_dir: str = "sd-model-finetuned"
    """Folder of the result: the pipeline or LoRA, metrics.jsonl, logs and checkpoints."""
    overwrite_output_dir: bool = False
    """Allow --output_dir to hold the result of an earlier run, and replace it."""
    seed: int | None = None
    """Seed of everything random. Default: drawn once and written to training_config.yaml."""
    train_batch_size: int = 16
    """Images in a batch."""
    dataloader_num_workers: int = 0
    """Processes that load images. 0: the main process does it."""
    cache: Literal["auto", "on", "off"] = "auto"
    """Encode images and captions once and keep that under --cache_dir (by default beside what
    Hugging Face keeps): posteriors of the VAE, of which every visit draws a fresh latent, and text
    embeddings. auto: what gives the same training, pays, and fits into half of the disk's free
    space; on: both, or say why not."""
    cache_crops: int | None = None
    """Where crops are random: how many of each image are encoded, of which a visit draws one.
    Default: none, so that --cache auto leaves images that are cropped at random to the VAE."""
    num_train_epochs: int = 100
    """Passes over the data, if neither --max_train_steps nor --steps_per_round is given."""
    max_train_steps: int | None = None
    """Steps of all proxies together (--step_unit), split over shards and rounds."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    text_encoder_lr: float | None = None
    """Peak learning rate of the text encoder, if it is trained. Default: --learning_rate."""
    scale_lr: bool = False
    """Multiply the learning rates by batch size and gradient accumulation steps."""
    lr_scheduler: LR_SCHEDULERS = "constant"
    """Learning-rate schedule; it counts the updates of one proxy over all rounds."""
    lr_warmup_steps: int = 500
    """Updates of a proxy over which the learning rate rises from 0, if the schedule warms up."""
    lr_num_cycles: int = 1
    """Cosine waves of the schedule cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of the schedule polynomial."""
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
    fused_adamw: bool | None = None
    """AdamW in one kernel for all parameters: faster, and rounded differently. Default: on a CUDA
    GPU."""
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits (bitsandbytes, an optional package; needs a CUDA GPU)."""
    use_ema: bool = False
    """Keep a moving average of the weights (EMA). The result and validation images are of it; the
    weights themselves are saved beside it, as unet_non_ema/ or *_non_ema.safetensors."""
    offload_ema: bool = False
    """Keep the average in main memory, and take it to the GPU for its update: a tensor at a time,
    or all at once with --foreach_ema."""
    foreach_ema: bool = False
    """Update all tensors of the average in one call: faster, and rounded differently."""
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
    input_perturbation: float = 0.0
    """Scale of more noise in the UNet's input, which it is not to predict (arXiv 2301.11706); 0.1
    is usual."""
    dream_training: bool = False
    """Train on the UNet's own error added to input and target (DREAM, arXiv 2312.00210), by one
    more forward pass. For prediction type epsilon."""
    dream_detail_preservation: float = 1.0
    """DREAM: power of the noise level that scales the error (p); larger keeps more detail."""
    on_nonfinite: Literal["stop", "skip_batch"] = "stop"
    """A loss or gradient that is NaN or infinite: stop and name it, or leave out what it is of: the
    update, or a batch alone where losses are compared before."""
    proxy_store: Literal["memory", "disk"] = "memory"
    """Where proxies wait for their turn: in memory, or in files under --output_dir, so that memory
    does not grow with --num_shards."""
    checkpointing_rounds: int = 1
    """Save a checkpoint after every so many rounds (0: none at all)."""
    checkpointing_steps: int = 500
    """Save every so many steps within a round too; and when told to stop (Ctrl-C, SIGTERM), if the
    last round's end was saved."""
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
    validation_prompt: str | None = None
    """The same for a single prompt."""
    validation_epochs: int = 5
    """Draw --validation_prompts at the end of a round in which all proxies together have gone
    another so many times through the data. 0: only at the end of training."""
    validation_rounds: int | None = None
    """Draw them after every so many rounds instead."""
    num_validation_images: int = 4
    """Images per validation prompt."""
    validation_inference_steps: int = 25
    """Denoising steps of validation images."""
    validation_guidance_scale: float = 7.5
    """Classifier-free guidance of validation images."""
    local_rank: int = -1
    """Taken from launchers that give it; a process goes by the variable LOCAL_RANK."""
    ddp_timeout: int = 7200
    """Seconds that a process waits for the others at the end of a round before it gives up."""
    dry_run: bool = False
    """Print the resolved settings, shard sizes, updates, memory and time, then stop."""

    @property
    def dream(self) -> float | None:
        """DREAM's detail preservation, None without it."""
        return self.dream_detail_preservation if self.dream_training else None

    @property
    def samples_per_update(self) -> int:
        """Samples scored for one optimizer update."""
        return self.train_batch_size * self.gradient_accumulation_steps

    def __post_init__(self) -> None:
        positive(self, "num_train_epochs", "gradient_accumulation_steps", "num_validation_images")
        positive(self, "learning_rate", "max_grad_norm", "ddp_timeout", "checkpointing_steps")
        positive(self, "validation_inference_steps", "train_batch_size")
        not_negative(
            self, "dataloader_num_workers", "lr_warmup_steps", "adam_weight_decay", "noise_offset"
        )
        not_negative(self, "input_perturbation", "validation_epochs")
        positive(self, "dream_detail_preservation", "lr_num_cycles", "lr_power")
        not_negative(self, "checkpointing_rounds", "adam_epsilon", "validation_guidance_scale")
        below_one(self, "adam_beta1", "adam_beta2")
        positive(self, "max_train_steps", "snr_gamma", "text_encoder_lr", "cache_crops")
        positive(self, "validation_rounds", "checkpoints_total_limit")
        # No shell has done it after a =, nor in a file.
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))
        if self.resume_from_checkpoint:
            there = os.path.expanduser(self.resume_from_checkpoint)
            object.__setattr__(self, "resume_from_checkpoint", there)
        if self.fused_adamw and self.use_8bit_adam:
            raise UserError(
                "--fused_adamw is a way of PyTorch's AdamW, and --use_8bit_adam takes that of "
                "bitsandbytes, which is fused anyway: give one of them."
            )
        for flag in ("offload_ema", "foreach_ema"):
            if getattr(self, flag) and not self.use_ema:
                raise UserError(f"--{flag} says how --use_ema works, and that is not given.")
        if self.validation_prompt and self.validation_prompts:
            raise UserError(
                "--validation_prompt and --validation_prompts both name what is drawn: give one."
            )
        if self.validation_prompt:
            object.__setattr__(self, "validation_prompts", (self.validation_prompt,))
            object.__setattr__(self, "validation_prompt", None)
        whole_characters(self, "validation_prompts")
        if self.validation_rounds and not self.validation_prompts:
            raise UserError("--validation_rounds needs --validation_prompts.")
