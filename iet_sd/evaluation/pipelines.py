"""The model under evaluation: checked, identified by its content, and loaded to draw images."""

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from iet_sd.config import ModelConfig
from iet_sd.config.evaluation import PipelineConfig
from iet_sd.errors import UserError
from iet_sd.models.family import PARTS
from iet_sd.models.finding import check_model, find_folder
from iet_sd.models.fingerprint import fingerprint
from iet_sd.models.layout import INDEX, family_in
from iet_sd.models.loading import load_vae

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def check_pipeline(config: PipelineConfig) -> None:
    """`UserError` for what can be known to fail before weights are loaded; asks no network."""
    check_model(_model(config))
    if config.lora_weights is not None:
        _lora_file(config.lora_weights)


def model_fingerprint(config: PipelineConfig, cache_dir: str | None) -> str:
    """SHA-256 over all files that an image depends on: of the pipeline, and the LoRA.

    What lies beside them doesn't count, such as checkpoints or a model card, nor does the place: a
    model from the Hub and a copy of it are the same. Downloads the model if need be.
    """
    folder = find_folder(_model(config), cache_dir)
    # The index names the class of the scheduler that draws.
    digest = hashlib.sha256((folder / INDEX).read_bytes())
    digest.update(fingerprint(folder, config.variant).encode())
    if config.lora_weights is not None:
        file = _lora_file(config.lora_weights)
        digest.update(file.read_bytes())
        if own := _scheduler_beside(file):
            digest.update(own.read_bytes())
    return digest.hexdigest()


def load_pipeline(
    config: PipelineConfig, cache_dir: str | None, device: torch.device, dtype: torch.dtype
) -> DiffusionPipeline:
    """The pipeline as diffusers loads it, in ``dtype`` and with the LoRA, in eval mode.

    It draws with its own scheduler, or with the one beside the LoRA, and without what would hide
    images or mark them.
    Errors: `UserError` for a model or a LoRA that isn't there or doesn't fit.
    """
    folder = find_folder(_model(config), cache_dir)
    family = family_in(folder, config.pretrained_model_name_or_path)
    pipeline = family.pipeline.from_pretrained(
        folder,
        variant=config.variant,
        use_safetensors=True,
        dtype=dtype,
        vae=load_vae(family, folder, config.variant, dtype),
        **family.drawing,
    )
    pipeline.set_progress_bar_config(disable=True)
    if config.lora_weights is not None:
        _add_lora(pipeline, config)
    for module in (pipeline.unet, pipeline.vae, *family.encoders(pipeline)):
        # An adapter arrives in train mode, and maybe with the dropout it was trained with.
        module.requires_grad_(False).eval()
    return pipeline.to(device)


def _model(config: PipelineConfig) -> ModelConfig:
    return ModelConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
    )


def _lora_file(lora_weights: str) -> Path:
    """The file of a LoRA given as file or folder; `UserError` unless it looks like one."""
    path = Path(lora_weights).expanduser()
    file = path / LORA_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"--lora_weights: there is no file {file}. Expected a .safetensors file, or a folder "
            f"with {LORA_WEIGHTS}, such as --output_dir of training with --train_mode lora."
        )
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"--lora_weights: {file} is not a whole safetensors file ({error}). Copy it again."
        ) from error
    if not any("lora" in name for name in names):
        raise UserError(
            f"--lora_weights: {file} holds no LoRA, its first weights are {names[:3]}. A whole "
            "model is given as --pretrained_model_name_or_path."
        )
    return file


def _add_lora(pipeline: DiffusionPipeline, config: PipelineConfig) -> None:
    """Load the LoRA; `UserError` if it doesn't fit, which diffusers would only log."""
    file = _lora_file(config.lora_weights)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
        problem = None if pipeline.get_list_adapters() else "none of its layers is in the model"
    except (ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
    if problem:
        raise UserError(
            f"--lora_weights: {file} does not fit {config.pretrained_model_name_or_path}: "
            f"{problem}. A LoRA needs the model that it was trained on."
        )
    if _scheduler_beside(file):
        own = type(pipeline.scheduler).from_pretrained(file.parent, subfolder="scheduler")
        pipeline.scheduler = own


def _scheduler_beside(lora: Path) -> Path | None:
    """Settings of the scheduler that training has changed, as it writes them beside a LoRA."""
    file = lora.parent / "scheduler" / PARTS["scheduler"].config
    # The file of a whole pipeline may lie there too.
    return file if file.is_file() and not (lora.parent / INDEX).is_file() else None


class Model:
    """The model under evaluation, which is loaded when it is first needed."""

    def __init__(
        self,
        config: PipelineConfig,
        cache_dir: str | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """As `load_pipeline`."""
        self.config = config
        self.cache_dir = cache_dir
        self.device = device
        self.dtype = dtype

    @property
    def name(self) -> str:
        """The LoRA, or the pipeline."""
        return self.config.lora_weights or self.config.pretrained_model_name_or_path

    @cached_property
    def fingerprint(self) -> str:
        """Of `model_fingerprint`."""
        return model_fingerprint(self.config, self.cache_dir)

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """Of `load_pipeline`."""
        return load_pipeline(self.config, self.cache_dir, self.device, self.dtype)
