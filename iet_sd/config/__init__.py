"""Settings: frozen dataclasses, each field with its type, default and text, checked when made.

Every field is one flag of the same name and one key of the YAML file (`iet_sd.arguments`). Names
and defaults are those of diffusers' ``train_text_to_image.py`` and ``train_text_to_image_lora.py``
where they exist there.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from iet_sd.config.data import DataConfig
from iet_sd.config.evaluation import (
    ComparisonConfig,
    EvaluationConfig,
    GenerationConfig,
    PipelineConfig,
)
from iet_sd.config.hub import SECRETS, HubConfig, PushConfig, ResultConfig
from iet_sd.config.method import MethodConfig
from iet_sd.config.model import ModelConfig
from iet_sd.config.probe import ProbeConfig
from iet_sd.config.training import TrainingConfig
from iet_sd.errors import UserError

__all__ = [
    "CompareSettings",
    "Config",
    "DataConfig",
    "EvaluateSettings",
    "GenerateSettings",
    "HubConfig",
    "MethodConfig",
    "ModelConfig",
    "ProbeConfig",
    "PushConfig",
    "PushSettings",
    "TrainingConfig",
]


class Settings:
    """The settings of one command, in sections; made by `iet_sd.arguments`."""

    POSITIONAL: typing.ClassVar[tuple[str, ...]] = ()
    """Fields that are given without a flag."""

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The dataclass of each section, by its name."""
        hints = typing.get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field]:
        """The field of each setting, by its name; in order."""
        return {f.name: f for part in cls.sections().values() for f in dataclasses.fields(part)}

    def as_dict(self) -> dict[str, Any]:
        """All settings as one flat mapping, as the YAML file has them; without secrets."""
        return {
            f.name: list(value) if isinstance(value := getattr(part, f.name), tuple) else value
            for part in (getattr(self, name) for name in self.sections())
            for f in dataclasses.fields(part)
            if f.name not in SECRETS
        }


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Fine-tune Stable Diffusion with IET-AGC+ (arXiv 2502.09434), which is there to memorize less
    of the training images. Start with accelerate launch.
    """

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    training: TrainingConfig
    probe: ProbeConfig
    push: PushConfig
    hub: HubConfig

    def __post_init__(self) -> None:
        self.data.require()
        given = self.method.steps_per_round is not None, self.training.max_train_steps is not None
        if all(given):
            raise UserError(
                "--steps_per_round and --max_train_steps both set the length of training: "
                "give one of them."
            )
        heldout = self.data.heldout_split or self.data.heldout_data_dir
        if self.probe.eval_every_rounds and not heldout:
            raise UserError(
                "--eval_every_rounds compares with images that are not trained on: name them with "
                "--heldout_split (of the same data set) or --heldout_data_dir."
            )
        if self.training.text_encoder_lr is not None and not self.model.train_text_encoder:
            raise UserError("--text_encoder_lr needs --train_text_encoder.")
        if self.training.use_8bit_adam and self.method.proxy_optimizer == "average":
            raise UserError(
                "--proxy_optimizer average averages moments as numbers, and --use_8bit_adam keeps "
                "codes of 8 bits for them. Use --proxy_optimizer keep or reset."
            )
        if self.training.use_8bit_adam and self.model.channels_last:
            raise UserError(
                "--use_8bit_adam keeps moments by the order of contiguous weights, which "
                "--channels_last changes: give one of them."
            )
        drops = self.method.taa and self.method.taa_leftovers == "drop"
        if drops and self.training.gradient_accumulation_steps > 1:
            raise UserError(
                "--taa_leftovers drop (preset paper) makes a batch of its own for every update "
                "and does not go with --gradient_accumulation_steps above 1."
            )


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(Settings):
    """Draw images for the captions of a training set by a fine-tuned model, one seed an image."""

    pipeline: PipelineConfig
    data: DataConfig
    generation: GenerationConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Measure how much of the training set comes back out of a fine-tuned model, against held-out
    images, with confidence intervals. Runs under accelerate launch on several processes too.
    """

    pipeline: PipelineConfig
    data: DataConfig
    generation: GenerationConfig
    evaluation: EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """Compare two evaluated models, paired by prompt and seed."""

    POSITIONAL = ("first", "second")

    comparison: ComparisonConfig


@dataclass(frozen=True, kw_only=True)
class PushSettings(Settings):
    """Push the result of a training run to the Hub: weights, card, settings, metrics, pictures."""

    POSITIONAL = ("folder",)

    result: ResultConfig
    hub: HubConfig
