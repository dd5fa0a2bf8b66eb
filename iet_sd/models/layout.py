"""A pipeline folder on disk: ``model_index.json`` names the parts, each in a folder of its own.

All that can be told from names, configs and file headers, so before any weights are loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError

PIPELINE = "StableDiffusionPipeline"
INDEX = "model_index.json"
SINGLE_FILE = (".safetensors", ".ckpt")
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: files of its folder, and the classes we can work with (empty: any)."""

    config: str
    weights: str | None = None
    classes: tuple[str, ...] = ()


REQUIRED = {
    "unet": Part("config.json", "diffusion_pytorch_model", ("UNet2DConditionModel",)),
    "vae": Part("config.json", "diffusion_pytorch_model", ("AutoencoderKL",)),
    "text_encoder": Part("config.json", "model", ("CLIPTextModel",)),
    "tokenizer": Part("tokenizer_config.json", None, ("CLIPTokenizer", "CLIPTokenizerFast")),
    "scheduler": Part("scheduler_config.json"),
}
# Not used in training: they go into the result as they are.
OPTIONAL = {
    "safety_checker": Part("config.json", "model"),
    "feature_extractor": Part("preprocessor_config.json"),
    "image_encoder": Part("config.json", "model"),
}
PARTS = REQUIRED | OPTIONAL


def parts_of(folder: Path) -> dict[str, str]:
    """Class name of each part that the pipeline in ``folder`` has; absent ones are left out."""
    index = read_json(folder / INDEX)
    return {
        name: entry[1]
        for name, entry in index.items()
        if name in PARTS and isinstance(entry, list) and entry[1] is not None
    }


def weights_file(part: str, variant: str | None) -> str | None:
    """File of the weights in the folder of ``part``, for example ``model.fp16.safetensors``."""
    stem = PARTS[part].weights
    return stem and ".".join(filter(None, (stem, variant, "safetensors")))


def download_patterns(variant: str | None, weights: bool = True) -> list[str]:
    """Files of a Hub repository that make up its pipeline: one format and variant of weights."""
    files = {f"{name}/{file}" for name in PARTS if (file := weights_file(name, variant))}
    return [INDEX, "*/*.json", "tokenizer/*.txt", *(sorted(files) if weights else [])]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` when it isn't there or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


def check_folder(folder: Path, config: ModelConfig, weights: bool = True) -> None:
    """`UserError` unless ``folder`` holds a whole SD 1.x or 2.x pipeline that we can train.

    Without ``weights`` all but these must be there.
    """
    name = config.pretrained_model_name_or_path
    if not (folder / INDEX).is_file():
        single = next((str(f) for f in sorted(folder.iterdir()) if f.suffix in SINGLE_FILE), None)
        advice = convert_hint(single) if single else "Give a folder that save_pretrained wrote."
        raise UserError(
            f"{name} is no pipeline folder: expected {INDEX} in it, {_found(folder)}. {advice}"
        )
    _check_classes(folder, name)
    for part in parts_of(folder):
        _check_part(folder / part, part, config)
        if weights and (file := weights_file(part, config.variant)):
            _check_weights(folder / part / file, part, config)
    _check_channels(folder, name)
    _check_prediction_type(folder, config)


def convert_hint(source: str) -> str:
    """How to turn weights of another format into a pipeline folder."""
    call = (
        f"from_single_file('{source}')"
        if source.endswith(SINGLE_FILE)
        else f"from_pretrained('{source}', use_safetensors=False)"
    )
    return (
        "Only pipeline folders with safetensors weights are read; convert with "
        f'python -c "from diffusers import {PIPELINE}; '
        f"{PIPELINE}.{call}.save_pretrained('new_folder')\""
    )


def _check_classes(folder: Path, name: str) -> None:
    """The pipeline and its parts must be those of Stable Diffusion 1.x and 2.x."""
    pipeline = read_json(folder / INDEX).get("_class_name")
    if pipeline != PIPELINE:
        raise UserError(
            f"{name} is a {pipeline}; supported are Stable Diffusion 1.x and 2.x ({PIPELINE})."
        )
    found = parts_of(folder)
    for part, expected in REQUIRED.items():
        if part not in found:
            raise UserError(f"{name}: {INDEX} names no {part}; a {PIPELINE} needs one.")
        if expected.classes and found[part] not in expected.classes:
            raise UserError(
                f"{name}: its {part} is a {found[part]}; supported are Stable Diffusion 1.x and "
                f"2.x, with {' or '.join(expected.classes)}."
            )


def _check_part(folder: Path, part: str, config: ModelConfig) -> None:
    """The folder of a part must hold its config, and a tokenizer its vocabulary."""
    missing = f"{config.pretrained_model_name_or_path}: {INDEX} names a {part}, but"
    if not (folder / PARTS[part].config).is_file():
        raise UserError(
            f"{missing} there is no {part}/{PARTS[part].config} ({_found(folder)}). Get the whole "
            f"pipeline{f', or set {part} to [null, null] there' if part in OPTIONAL else ''}."
        )
    if part == "tokenizer" and not (
        (folder / "tokenizer.json").is_file()
        or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())
    ):
        raise UserError(
            f"{missing} {part}/ has no vocabulary: expected tokenizer.json, or vocab.json and "
            f"merges.txt, {_found(folder)}."
        )


def _check_weights(path: Path, part: str, config: ModelConfig) -> None:
    """The weights must be there as one safetensors file with a readable header."""
    name, stem = config.pretrained_model_name_or_path, PARTS[part].weights
    if not path.is_file():
        others = sorted(
            file.name.removeprefix(f"{stem}.").removesuffix("safetensors").rstrip(".")
            for file in path.parent.glob(f"{stem}.*safetensors")
            if "-of-" not in file.name
        )
        if others:
            advice = "Give " + " or ".join(
                f"--variant {variant}" if variant else "no --variant" for variant in others
            )
        elif any(path.parent.glob(f"{stem}*-of-*.safetensors")):
            advice = "Its weights are split: save it again with max_shard_size='20GB'"
        else:
            advice = convert_hint(name)
        raise UserError(f"{name}: expected {part}/{path.name}, {_found(path.parent)}. {advice}.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}). Download it again; in a git "
            "clone, `git lfs pull` fetches the weights."
        ) from error


def _check_channels(folder: Path, name: str) -> None:
    """The UNet must take latents alone: inpainting and depth models take more channels."""
    channels = read_json(folder / "unet" / "config.json").get("in_channels", 4)
    latents = read_json(folder / "vae" / "config.json").get("latent_channels", 4)
    if channels != latents:
        raise UserError(
            f"{name}: its UNet takes {channels} channels, its VAE makes {latents}. Supported are "
            "text-to-image models; this may be one for inpainting, depth or upscaling."
        )


def _check_prediction_type(folder: Path, config: ModelConfig) -> None:
    scheduler = read_json(folder / "scheduler" / REQUIRED["scheduler"].config)
    found = config.prediction_type or scheduler.get("prediction_type", "epsilon")
    if found not in PREDICTION_TYPES:
        raise UserError(
            f"{config.pretrained_model_name_or_path}: its scheduler says prediction_type "
            f"{found!r}; supported are {' and '.join(PREDICTION_TYPES)}. If the scheduler is "
            "wrong about the UNet, give --prediction_type."
        )


def _found(folder: Path) -> str:
    """What a folder holds, for a message: at most eight names."""
    if not folder.is_dir():
        return "and there is no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    more = ", …" if len(names) > 8 else ""
    return f"found {', '.join(names[:8])}{more}" if names else "found nothing"
