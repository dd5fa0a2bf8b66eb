"""Settings of the model."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from iet_sd.config.checks import below_one, positive
from iet_sd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to start from, and what of it is trained."""

    pretrained_model_name_or_path: str
    """Stable Diffusion 1.x, 2.x or XL: a pipeline folder, or a model id on the Hub."""
    pretrained_vae_model_name_or_path: str | None = None
    """VAE to use instead of the model's own, for example one for XL that works in fp16: a folder
    or a model id on the Hub. --revision and --variant are not about it."""
    revision: str | None = None
    """Revision of the model on the Hub: branch, tag or commit."""
    non_ema_revision: str | None = None
    """Revision of the UNet that training starts from, where a model keeps the weights that are no
    moving average in a branch of its own. Default: --revision."""
    variant: str | None = None
    """Variant of the model files, for example fp16."""
    train_mode: Literal["full", "lora"] = "full"
    """Train all weights of the UNet, or a low-rank adapter (LoRA) on its attention."""
    train_text_encoder: bool = False
    """Train the text encoder too, as the UNet: all weights, or a LoRA on its attention."""
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
    use_dora: bool = False
    """LoRA: train the length of each row of W + BA apart from its direction (DoRA)."""
    save_kohya_lora: bool = False
    """LoRA: also save it for kohya, A1111 and ComfyUI (pytorch_lora_weights_kohya.safetensors)."""
    merge_lora: bool = False
    """LoRA: also save a whole pipeline with the LoRA folded in, under merged/."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts. Default: what the model's own scheduler says."""
    rescale_betas_zero_snr: bool = False
    """Change the noise schedule so that its last step is pure noise (arXiv 2305.08891), in training
    and in the result's scheduler. For prediction type v_prediction."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    attention_backend: Literal["auto", "xformers", "sdpa", "flash", "math"] = "auto"
    """Kernels of the UNet's attention. auto: those of xformers on a CUDA GPU where they work, else
    PyTorch's (sdpa), which choose among flash, math and others at each call."""
    enable_xformers_memory_efficient_attention: bool = False
    """The same as --attention_backend xformers (needs a CUDA GPU and requirements-xformers.txt)."""
    channels_last: bool | None = None
    """Keep UNet and VAE in the memory format that convolutions are fastest in on a GPU; rounded
    differently. Default: on a CUDA GPU, but for --use_8bit_adam, which cannot go with it."""
    torch_compile: bool = False
    """Compile the UNet (torch.compile): minutes at the start, faster steps, rounded differently, so
    that on a CPU too a resumed run is the same to rounding only. Needs a C++ compiler, on a GPU
    also Triton."""
    torch_compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """How torch.compile goes about it: max-autotune-no-cudagraphs tries out kernels, which takes
    longer to start. Modes with CUDA graphs would write over a gradient where an update has several
    backward passes."""

    def __post_init__(self) -> None:
        positive(self, "rank", "lora_alpha")
        if not self.lora_target_modules:
            raise UserError("--lora_target_modules must name at least one layer.")
        below_one(self, "lora_dropout")
        if self.non_ema_revision is not None and self.train_mode != "full":
            raise UserError(
                "--non_ema_revision is for --train_mode full: a LoRA would not fit the UNet that "
                "users load. For another UNet use --revision."
            )
        if self.enable_xformers_memory_efficient_attention:
            if self.attention_backend not in ("auto", "xformers"):
                raise UserError(
                    "--enable_xformers_memory_efficient_attention is --attention_backend xformers, "
                    f"and --attention_backend {self.attention_backend} is given: use one of them."
                )
            object.__setattr__(self, "attention_backend", "xformers")
        if self.torch_compile_mode != "default" and not self.torch_compile:
            raise UserError(
                "--torch_compile_mode says how --torch_compile works, and that is not given."
            )
        # Else a LoRA script's command would fine-tune all weights.
        if self.train_mode != "lora" and (given := self._lora_settings()):
            raise UserError(f"--{given[0]} needs --train_mode lora; got {self.train_mode}.")
        if self.use_dora and self.lora_aggregation == "product":
            raise UserError(
                "--lora_aggregation product averages what adapters add to a layer, BA; with "
                "--use_dora that is not all they do. Use --lora_aggregation factors."
            )
        if self.use_dora and self.save_kohya_lora:
            raise UserError(
                "--save_kohya_lora cannot hold a DoRA: readers of that format scale rows by other "
                "lengths, or columns, or leave it out. Train without --use_dora, or fold the "
                "adapter into the model by --merge_lora."
            )

    def _lora_settings(self) -> list[str]:
        """What is set of an adapter, and not as it is by default."""
        about = ("rank", "use_dora", "save_kohya_lora", "merge_lora")
        found = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = tuple(value) if isinstance(value, list) else value  # a list of a YAML file
            if (field.name in about or field.name.startswith("lora_")) and value != field.default:
                found.append(field.name)
        return found
