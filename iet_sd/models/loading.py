"""Loading: from the files of a model to its parts, each in the precision that training wants.

Frozen parts are loaded in the dtype of the forward pass; weights that will be trained as they are
(in full mode) in fp32. Every call names its dtype: the libraries' own defaults differ
(transformers takes the stored one, diffusers fp32).
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.family import PARTS, Family
from iet_sd.models.finding import find_folder, find_unet, find_vae
from iet_sd.models.layout import INDEX, family_in, locate, parts_of, read_json
from iet_sd.models.tokens import Tokenize

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=torch.nn.Module)


def load_components(
    config: ModelConfig, weight_dtype: torch.dtype, cache_dir: str | None
) -> "Components":
    """Fetch the pipeline where it is on the Hub, check it, and load its UNet on the CPU.

    Other networks are loaded when they are first used.

    ``weight_dtype`` is the precision of forward passes (fp16 or bf16 under mixed precision, else
    fp32): that of all frozen parts but a VAE that needs more. Every part comes frozen and in eval
    mode.
    Errors: `UserError` for a model that isn't there, can't be reached, or is of no family of ours.
    """
    folder = find_folder(config, cache_dir)
    vae_folder = find_vae(config, folder, cache_dir)
    unet_folder, unet_variant = find_unet(config, folder, cache_dir)
    noise_scheduler = _load_noise_scheduler(folder, config)
    family = family_in(folder, config.pretrained_model_name_or_path)
    unet_dtype = torch.float32 if config.train_mode == "full" else weight_dtype
    text_dtype = unet_dtype if config.train_text_encoder else weight_dtype
    load = partial(_load_part, variant=config.variant)
    loaders = {
        name: partial(load, cls, folder / name, dtype=text_dtype)
        for name, cls in family.text_encoders.items()
    }
    loaders["vae"] = partial(load_vae, family, folder, config.variant, weight_dtype, vae_folder)
    tokenizers = {
        name: CLIPTokenizer.from_pretrained(folder, subfolder=name) for name in family.tokenizers
    }
    return Components(
        family=family,
        **tokenizers,
        loaders=loaders,
        unet=_load_part(UNet2DConditionModel, unet_folder, variant=unet_variant, dtype=unet_dtype),
        noise_scheduler=noise_scheduler,
        source=config.pretrained_model_name_or_path,
        folder=folder,
        variant=config.variant,
        vae_folder=vae_folder,
    )


def load_vae(
    family: Family,
    folder: Path,
    variant: str | None,
    weight_dtype: torch.dtype,
    vae_folder: Path | None = None,
) -> AutoencoderKL:
    """The VAE of the pipeline in ``folder``, or that in ``vae_folder``; frozen, in eval mode."""
    path, variant = locate("vae", folder, variant, vae_folder)
    dtype = family.vae_dtype(read_json(path / PARTS["vae"].config), weight_dtype)
    cls = AutoencoderKL if dtype == weight_dtype else FullPrecisionVae
    return _load_part(cls, path, variant=variant, dtype=dtype)


def latent_size(vae_config: Mapping[str, Any], resolution: int, source: str) -> int:
    """Height and width of the latents of images of ``resolution`` pixels.

    Errors: `UserError`, naming the model's ``source``, if the VAE cannot halve them so often.
    """
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if resolution % factor:
        raise UserError(
            f"--resolution must be a multiple of {factor} for {source}; got {resolution}."
        )
    return resolution // factor


def as_pipeline(
    components: "Components", scheduler: SchedulerMixin | None = None
) -> DiffusionPipeline:
    """A pipeline around the live modules, for drawing images during training; nothing is copied.

    ``scheduler`` defaults to the one that the source pipeline samples with. Modules of several
    dtypes (mixed precision) need a call under autocast; train or eval mode is left as it is.
    """
    family = components.family
    accepted = inspect.signature(family.pipeline.__init__).parameters
    index = read_json(components.folder / INDEX)
    settings = {k: v for k, v in index.items() if k in accepted and k not in family.parts}
    parts = {name: getattr(components, name, None) for name in family.required}
    parts["scheduler"] = scheduler or _load_sampling_scheduler(components)
    pipeline = family.pipeline(**settings | parts | dict(family.drawing))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_part(cls: type[Model], folder: Path, *, variant: str | None, dtype: torch.dtype) -> Model:
    """The network in ``folder``: frozen, in eval mode."""
    model = cls.from_pretrained(folder, variant=variant, use_safetensors=True, dtype=dtype)
    return model.requires_grad_(False).eval()


def scheduler_config(components: "Components") -> dict[str, Any]:
    """That of the source, with what training has changed: the result samples by it."""
    config = read_json(components.folder / "scheduler" / PARTS["scheduler"].config)
    config["prediction_type"] = components.prediction_type
    zero_snr = components.noise_scheduler.config.rescale_betas_zero_snr
    if zero_snr and not config.get("rescale_betas_zero_snr"):
        # Sampling must begin at the last step, the one that was trained on pure noise.
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def changes_scheduler(components: "Components") -> bool:
    """Whether the result samples otherwise than the source: a LoRA of it needs more than itself."""
    own = read_json(components.folder / "scheduler" / PARTS["scheduler"].config)
    return scheduler_config(components) != {"prediction_type": "epsilon"} | own


def prediction_type(config: ModelConfig, cache_dir: str | None) -> str:
    """What the model predicts, or is told to; no weights are needed."""
    folder = find_folder(config, cache_dir, weights=False)
    own = read_json(folder / "scheduler" / PARTS["scheduler"].config)
    return config.prediction_type or own.get("prediction_type", "epsilon")


def _load_noise_scheduler(folder: Path, config: ModelConfig) -> DDPMScheduler:
    """The DDPM scheduler that adds the noise in training, with the settings registered."""
    zero_snr = {"rescale_betas_zero_snr": True} if config.rescale_betas_zero_snr else {}
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **zero_snr)
    own = scheduler.config.prediction_type
    if config.prediction_type not in (None, own):
        logger.warning(
            "--prediction_type %s replaces the %s of the model's own scheduler",
            config.prediction_type,
            own,
        )
        scheduler.register_to_config(prediction_type=config.prediction_type)
    if zero_snr:
        _check_zero_snr(folder, scheduler)
    return scheduler


def _check_zero_snr(folder: Path, scheduler: DDPMScheduler) -> None:
    """Errors: `UserError` for a model that could not be sampled from at a last step of noise."""
    if scheduler.config.prediction_type != "v_prediction":
        raise UserError(
            "--rescale_betas_zero_snr makes the last step pure noise, of which a model that "
            "predicts the noise learns nothing. Use it with --prediction_type v_prediction."
        )
    name = parts_of(folder)["scheduler"]
    if "rescale_betas_zero_snr" not in inspect.signature(getattr(diffusers, name)).parameters:
        raise UserError(
            f"--rescale_betas_zero_snr: the model samples by {name}, which has no such schedule. "
            "Name another in its model_index.json and scheduler/scheduler_config.json, such as "
            "DDIMScheduler."
        )


def _load_sampling_scheduler(components: "Components") -> SchedulerMixin:
    """The scheduler that the source pipeline names, told what the UNet was trained to predict."""
    cls = getattr(diffusers, parts_of(components.folder)["scheduler"])
    return cls.from_config(scheduler_config(components))


class FullPrecisionVae(AutoencoderKL):
    """A VAE in fp32 in the midst of fp16: it works in fp32 under autocast too."""

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """As that of the base class."""
        with torch.autocast(x.device.type, enabled=False):
            return super().encode(x.to(self.dtype), return_dict)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """As that of the base class."""
        with torch.autocast(z.device.type, enabled=False):
            return super().decode(z.to(self.dtype), return_dict, generator)


@dataclass(kw_only=True)
class Components:
    """The loaded parts of a Stable Diffusion pipeline."""

    family: Family
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer | None = None
    """Of XL alone, as is its text encoder."""
    loaders: Mapping[str, Callable[[], torch.nn.Module]]
    """How VAE and text encoders are loaded, by part: each when it is first used."""
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    source: str
    """Name or path, as the user gave it."""
    folder: Path
    """Where the source's files lie: the result takes all that wasn't trained from here."""
    variant: str | None = None
    """Variant of the weights in ``folder``."""
    vae_folder: Path | None = None
    """Where the files of the VAE lie, if it is not the source's own."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where networks go when they are loaded, and where those are that are."""
    memory_format: torch.memory_format = torch.preserve_format
    """How weights of convolutions lie in memory, of all networks likewise."""
    _loaded: dict[str, Any] = field(default_factory=dict)

    def to(
        self, device: torch.device, memory_format: torch.memory_format = torch.preserve_format
    ) -> None:
        """Move all networks and lay them out so, now or when they are loaded."""
        self.device, self.memory_format = device, memory_format
        for network in (self.unet, *self._loaded.values()):
            self._place(network)

    def release(self, *parts: str) -> None:
        """Free the memory of networks; they are loaded again where they are used again.

        Not for one that is trained.
        """
        for part in parts:
            self._loaded.pop(part, None)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """What has to be loaded meanwhile, as for drawing, is freed at the end."""
        before = set(self._loaded)
        try:
            yield
        finally:
            self.release(*set(self._loaded) - before)

    def _part(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._place(self.loaders[name]())
        return self._loaded[name]

    def _place(self, network: Model) -> Model:
        return network.to(device=self.device, memory_format=self.memory_format)

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self._part("vae")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's config, for which its weights need not be loaded."""
        folder, _ = locate("vae", self.folder, self.variant, self.vae_folder)
        given = inspect.signature(AutoencoderKL.__init__).parameters.values()
        defaults = {p.name: p.default for p in given if p.default is not p.empty}
        return defaults | read_json(folder / PARTS["vae"].config)

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder, in XL the first."""
        return self._part("text_encoder")

    @property
    def text_encoder_2(self) -> CLIPTextModelWithProjection | None:
        """The second text encoder of XL."""
        return self._part("text_encoder_2") if "text_encoder_2" in self.loaders else None

    @property
    def tokenize(self) -> Tokenize:
        """From a caption to its tokens."""
        return self.family.tokenize(self)

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        """The text encoders, in order."""
        return self.family.encoders(self)

    @property
    def num_train_timesteps(self) -> int:
        """Diffusion timesteps T."""
        return self.noise_scheduler.config.num_train_timesteps

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon or v_prediction."""
        return self.noise_scheduler.config.prediction_type

    def latent_size(self, resolution: int) -> int:
        """Height and width of the latents of images of ``resolution`` pixels."""
        return latent_size(self.vae_config, resolution, self.source)
