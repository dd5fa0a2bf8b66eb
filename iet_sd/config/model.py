"""Settings of the model."""

from dataclasses import dataclass
from typing import Literal

from iet_sd.config.checks import below_one, positive
from iet_sd.errors import UserError


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
        positive(self, "rank", "lora_alpha")
        if not self.lora_target_modules:
            raise UserError("--lora_target_modules must name at least one layer.")
        below_one(self, "lora_dropout")
