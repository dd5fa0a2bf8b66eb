"""Loading: from the name of a model to its parts, each in the precision that training wants.

Frozen parts are loaded in the dtype of the forward pass; weights that will be trained as they are
(the UNet in full mode) in fp32. Every call names its dtype: the libraries' own defaults differ
(transformers takes the stored one, diffusers fp32).
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import CLIPTextModel, CLIPTokenizer

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.layout import (
    SINGLE_FILE,
    check_folder,
    convert_hint,
    download_patterns,
    parts_of,
)
from iet_sd.models.tokens import Tokenize

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=torch.nn.Module)


def check_model(config: ModelConfig, weights: bool = True) -> None:
    """`UserError` for what can be known to fail before weights are loaded; asks no network.

    Without ``weights`` they need not even be there.
    """
    name = config.pretrained_model_name_or_path
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path, config, weights)
    elif path.is_file() or name.endswith(SINGLE_FILE):
        problem = "is a single file" if path.is_file() else "is no folder, and no such file exists"
        raise UserError(f"{name} {problem}. {convert_hint(name)}")
    elif name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise UserError(
            f"There is no folder {name}. Expected a pipeline folder, or a model id on the Hub "
            "such as name/model."
        )
    else:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(
                f"{name!r} is neither a folder here nor a valid model id on the Hub: {error}"
            ) from error


def find_folder(config: ModelConfig, cache_dir: str | None, weights: bool = True) -> Path:
    """Where the checked pipeline lies; fetched where it is on the Hub and not here yet.

    Without ``weights`` all but these.
    Errors: `UserError` for a model that isn't there, can't be reached, or isn't SD 1.x or 2.x.
    """
    check_model(config, weights)
    folder = Path(config.pretrained_model_name_or_path).expanduser()
    if not folder.is_dir():
        folder = _download(config, cache_dir, weights)
        check_folder(folder, config, weights)
    return folder


def load_components(
    config: ModelConfig, weight_dtype: torch.dtype, cache_dir: str | None
) -> "Components":
    """Fetch the pipeline where it is on the Hub, check it, and load its parts on the CPU.

    ``weight_dtype`` is the precision of forward passes (fp16 or bf16 under mixed precision, else
    fp32): that of all frozen parts. Every part comes frozen and in eval mode.
    Errors: `UserError` for a model that isn't there, can't be reached, or isn't SD 1.x or 2.x.
    """
    folder = find_folder(config, cache_dir)
    unet_dtype = torch.float32 if config.train_mode == "full" else weight_dtype
    load = partial(_load_part, folder=folder, variant=config.variant)
    return Components(
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        text_encoder=load(CLIPTextModel, "text_encoder", dtype=weight_dtype),
        vae=load(AutoencoderKL, "vae", dtype=weight_dtype),
        unet=load(UNet2DConditionModel, "unet", dtype=unet_dtype),
        noise_scheduler=_load_noise_scheduler(folder, config),
        source=config.pretrained_model_name_or_path,
        folder=folder,
        variant=config.variant,
    )


def latent_size(vae: AutoencoderKL, resolution: int, source: str) -> int:
    """Height and width of the latents of images of ``resolution`` pixels.

    Errors: `UserError`, naming the model's ``source``, if the VAE cannot halve them so often.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor:
        raise UserError(
            f"--resolution must be a multiple of {factor} for {source}; got {resolution}."
        )
    return resolution // factor


def as_pipeline(
    components: "Components", scheduler: SchedulerMixin | None = None
) -> StableDiffusionPipeline:
    """A pipeline around the live modules, for drawing images during training; nothing is copied.

    ``scheduler`` defaults to the one that the source pipeline samples with. Modules of several
    dtypes (mixed precision) need a call under autocast; train or eval mode is left as it is.
    """
    pipeline = StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=scheduler or _load_sampling_scheduler(components),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _download(config: ModelConfig, cache_dir: str | None, weights: bool) -> Path:
    """The Hub's files of the pipeline, from the cache where they are there already."""
    name = config.pretrained_model_name_or_path
    try:
        folder = snapshot_download(
            name,
            revision=config.revision,
            cache_dir=cache_dir,
            allow_patterns=download_patterns(config.variant, weights),
        )
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms on its page on the Hub, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is neither a folder here nor a model on the Hub. Check the name; for a "
            "private model run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {config.revision!r} on the Hub.") from error
    except (OSError, HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not a folder here, and the Hub cannot be reached for it, nor is all of it "
            f"in the cache ({reason}). Check the connection, or give the path of a pipeline folder."
        ) from error
    return Path(folder)


def _load_part(
    cls: type[Model], part: str, *, folder: Path, variant: str | None, dtype: torch.dtype
) -> Model:
    """One network of the pipeline in ``folder``: frozen, in eval mode."""
    model = cls.from_pretrained(
        folder, subfolder=part, variant=variant, use_safetensors=True, dtype=dtype
    )
    return model.requires_grad_(False).eval()


def _load_noise_scheduler(folder: Path, config: ModelConfig) -> DDPMScheduler:
    """The DDPM scheduler that adds the noise in training, with --prediction_type registered."""
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    own = scheduler.config.prediction_type
    if config.prediction_type not in (None, own):
        logger.warning(
            "--prediction_type %s replaces the %s of the model's own scheduler",
            config.prediction_type,
            own,
        )
        scheduler.register_to_config(prediction_type=config.prediction_type)
    return scheduler


def _load_sampling_scheduler(components: "Components") -> SchedulerMixin:
    """The scheduler that the source pipeline names, told what the UNet was trained to predict."""
    cls = getattr(diffusers, parts_of(components.folder)["scheduler"])
    return cls.from_pretrained(
        components.folder, subfolder="scheduler", prediction_type=components.prediction_type
    )


@dataclass
class Components:
    """The loaded parts of a Stable Diffusion pipeline."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    source: str
    """Name or path, as the user gave it."""
    folder: Path
    """Where the source's files lie: the result takes all that wasn't trained from here."""
    variant: str | None = None
    """Variant of the weights in ``folder``."""

    @property
    def tokenize(self) -> Tokenize:
        """From a caption to its tokens."""
        return Tokenize((self.tokenizer,))

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
        return latent_size(self.vae, resolution, self.source)
