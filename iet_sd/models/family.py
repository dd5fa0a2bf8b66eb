"""What Stable Diffusion 1.x and 2.x, and XL have of their own; everything else is the same code.

A family is chosen by the ``_class_name`` in a pipeline's model_index.json. Where a ``model`` is
asked for, it is anything that has the parts as attributes: a diffusers pipeline or our Components.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from iet_sd.models.tokens import INPUT_IDS, Tokenize

SIZES = ("original_size", "crop_top_left", "target_size")
"""What SDXL is told of an image's pixels: names in a batch, int64 (B, 2), height or top first."""
ENCODED = ("encoder_hidden_states", "text_embeds")
"""What text encoders make of a caption: of every token (L, D), and in SDXL of the whole (P,)."""


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: files of its folder, and the classes we can work with (empty: any)."""

    config: str
    weights: str | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A kind of Stable Diffusion."""

    title: str
    """Its name, for people."""
    pipeline: type[DiffusionPipeline]
    """The class of its pipelines, which also saves and loads its LoRAs."""
    text_encoders: Mapping[str, type[PreTrainedModel]]
    """Classes of its text encoders, by part."""
    tokenizers: tuple[str, ...]
    """The tokenizer of each."""
    encode: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]
    """From model and a batch's tokens to what the UNet is told of captions, by `ENCODED` names."""
    time_ids: int = 0
    """How many numbers the UNet is told beside captions (micro-conditioning)."""
    upcasts_vae: bool = False
    """Whether ``force_upcast`` in the VAE's config counts. SD's VAEs all have it, without need."""
    lacking: str = ""
    """What a pipeline that lacks a part may be, for people."""
    drawing: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's class with which it neither hides nor marks an image."""

    @property
    def required(self) -> dict[str, Part]:
        """The parts that every pipeline of the family has."""
        texts = {
            name: Part("config.json", "model", (cls.__name__,))
            for name, cls in self.text_encoders.items()
        }
        tokenizers = dict.fromkeys(self.tokenizers, _TOKENIZER)
        return _IMAGES | texts | tokenizers | {"scheduler": Part("scheduler_config.json")}

    @property
    def parts(self) -> dict[str, Part]:
        """All parts that a pipeline of the family may have."""
        return self.required | OPTIONAL

    def tokenize(self, model: Any) -> Tokenize:
        """From a caption to its tokens."""
        return Tokenize([getattr(model, name) for name in self.tokenizers])

    def condition(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the UNet: from tokens, or captions that are encoded, and `SIZES`.

        ``SIZES`` are needed where there are ``time_ids``.
        """
        told = batch if ENCODED[0] in batch else self.encode(model, batch)
        condition: dict[str, Any] = {ENCODED[0]: told[ENCODED[0]]}
        if self.time_ids:
            # Whole numbers, which the UNet turns into fp32: 16 bits would round large sizes.
            time_ids = torch.cat([batch[name] for name in SIZES], dim=1)
            condition["added_cond_kwargs"] = {
                ENCODED[1]: told[ENCODED[1]],
                "time_ids": time_ids,
            }
        return condition

    def encoders(self, model: Any) -> list[PreTrainedModel]:
        """The text encoders, in order."""
        return [getattr(model, name) for name in self.text_encoders]

    def vae_dtype(self, config: Mapping[str, Any], weight_dtype: torch.dtype) -> torch.dtype:
        """``weight_dtype``, or fp32 for a VAE that overflows in fp16, as its ``config`` says."""
        overflows = self.upcasts_vae and config.get("force_upcast", True)
        return torch.float32 if overflows and weight_dtype == torch.float16 else weight_dtype


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline."""
    return FAMILIES[type(pipeline).__name__]


def whole_image(resolution: int, count: int) -> dict[str, Tensor]:
    """`SIZES` of ``count`` images that are as they were: the pipelines' own choice in drawing."""
    size, corner = torch.full((count, 2), resolution), torch.zeros(count, 2, dtype=torch.int64)
    return dict(zip(SIZES, (size, corner, size), strict=True))


def _last_hidden_state(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the text encoder gives at its end."""
    return {ENCODED[0]: model.text_encoder(batch[INPUT_IDS[0]], return_dict=False)[0]}


def _penultimate_and_pooled(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What both text encoders give before their last layer, and the second's end.

    Podell et al. 2023 (arXiv 2307.01952), 2.1.
    """
    first, second = (
        encoder(batch[tokens], output_hidden_states=True)
        for encoder, tokens in zip(
            (model.text_encoder, model.text_encoder_2), INPUT_IDS, strict=True
        )
    )
    states = [output.hidden_states[-2] for output in (first, second)]
    return {ENCODED[0]: torch.cat(states, dim=-1), ENCODED[1]: second.text_embeds}


_TOKENIZER = Part("tokenizer_config.json", None, ("CLIPTokenizer", "CLIPTokenizerFast"))
_IMAGES = {
    "unet": Part("config.json", "diffusion_pytorch_model", ("UNet2DConditionModel",)),
    "vae": Part("config.json", "diffusion_pytorch_model", ("AutoencoderKL",)),
}
# Not used in training: they go into the result as they are.
OPTIONAL = {
    "safety_checker": Part("config.json", "model"),
    "feature_extractor": Part("preprocessor_config.json"),
    "image_encoder": Part("config.json", "model"),
}
FAMILIES = {
    family.pipeline.__name__: family
    for family in (
        Family(
            title="Stable Diffusion 1.x and 2.x",
            pipeline=StableDiffusionPipeline,
            text_encoders={"text_encoder": CLIPTextModel},
            tokenizers=("tokenizer",),
            encode=_last_hidden_state,
            drawing={
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            },
        ),
        Family(
            title="Stable Diffusion XL",
            pipeline=StableDiffusionXLPipeline,
            text_encoders={
                "text_encoder": CLIPTextModel,
                "text_encoder_2": CLIPTextModelWithProjection,
            },
            tokenizers=("tokenizer", "tokenizer_2"),
            encode=_penultimate_and_pooled,
            time_ids=6,
            upcasts_vae=True,
            lacking=" It may be a refiner, which cannot be trained here.",
            drawing={"add_watermarker": False},
        ),
    )
}
PARTS = {name: part for family in FAMILIES.values() for name, part in family.parts.items()}
"""The parts of all families, which have the same files in each."""
