"""A pipeline folder on disk: ``model_index.json`` names the parts, each in a folder of its own.

All that can be told from names, configs and file headers, so before any weights are loaded.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.family import FAMILIES, OPTIONAL, PARTS, Family

INDEX = "model_index.json"
LORA = "pytorch_lora_weights.safetensors"
SINGLE_FILE = (".safetensors", ".ckpt")
PREDICTION_TYPES = ("epsilon", "v_prediction")
Names = Callable[[], Sequence[str]]
"""Of the files that there are, as `names_in`; asked for where something is missing."""


def family_in(folder: Path, name: str) -> Family:
    """The family of the pipeline in ``folder``; `UserError`, calling it ``name``, if unknown."""
    pipeline = read_json(folder / INDEX).get("_class_name")
    if pipeline not in FAMILIES:
        known = " and ".join(f"{f.title} ({cls})" for cls, f in FAMILIES.items())
        raise UserError(
            f"{name} is a {pipeline}; supported are {known}: the text-to-image models, no refiner, "
            "inpainting, or ControlNet, and no Stable Diffusion 3 or Flux."
        )
    return FAMILIES[pipeline]


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


def locate(
    part: str, folder: Path, variant: str | None, vae: Path | None = None
) -> tuple[Path, str | None]:
    """Folder and variant of a part of the pipeline in ``folder``.

    ``vae``: folder of another VAE, without variant, that takes the place of the pipeline's own.
    """
    return (vae, None) if part == "vae" and vae is not None else (folder / part, variant)


def download_patterns(variant: str | None, weights: bool = True) -> list[str]:
    """Files of a Hub repository that make up its pipeline: one format and variant of weights."""
    files = {f"{name}/{file}" for name in PARTS if (file := weights_file(name, variant))}
    return [INDEX, "*/*.json", "tokenizer*/*.txt", *(sorted(files) if weights else [])]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` when it isn't there or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


def names_in(folder: Path) -> list[str]:
    """The files in a folder and in those directly below it, as paths from it, sorted."""
    files = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def check_folder(
    folder: Path, config: ModelConfig, weights: bool = True, names: Names | None = None
) -> None:
    """`UserError` unless ``folder`` holds a whole pipeline of a family that we can train.

    Without ``weights`` all but these must be there. ``names``: of what there is besides, where
    ``folder`` has only what was asked for of it.
    """
    name, names = config.pretrained_model_name_or_path, names or partial(names_in, folder)
    if not (folder / INDEX).is_file():
        there = names()
        if LORA in there:
            raise UserError(
                f"{name} is a LoRA (it holds {LORA}): give the model it was trained on, and for "
                f"evaluation --lora_weights {name}."
            )
        single = next((n for n in there if "/" not in n and n.endswith(SINGLE_FILE)), None)
        advice = "Give a folder that save_pretrained wrote."
        if single:
            here = folder / single
            advice = convert_hint(str(here) if here.is_file() else single)
        raise UserError(
            f"{name} is no pipeline folder: expected {INDEX} in it, {_found(there)}. {advice}"
        )
    family = family_in(folder, name)
    _check_classes(folder, name, family)
    _check_scheduler(folder, name)
    for part in parts_of(folder):
        _check_part(folder / part, part, config, names)
        if weights and (file := weights_file(part, config.variant)):
            _check_weights(folder / part / file, part, config, names)
    check_channels(folder / "unet", folder / "vae", name)
    _check_micro_conditioning(folder, name, family)
    _check_prediction_type(folder, config)


def check_vae(folder: Path, name: str, weights: bool = True) -> None:
    """`UserError` unless ``folder`` holds a VAE by itself; without ``weights``, its config."""
    part, file = PARTS["vae"], weights_file("vae", None)
    if not all((folder / wanted).is_file() for wanted in [part.config, *[file] * weights]):
        raise UserError(
            f"--pretrained_vae_model_name_or_path {name}: expected {part.config} and {file} of a "
            f"VAE in it, {_found(names_in(folder))}. Give a folder as vae/ in a pipeline, without "
            "variant."
        )
    found = read_json(folder / part.config).get("_class_name")
    if found not in part.classes:
        raise UserError(
            f"--pretrained_vae_model_name_or_path {name} is a {found}; supported is "
            f"{' or '.join(part.classes)}."
        )
    if weights:
        _check_header(folder / file)


def check_channels(unet: Path, vae: Path, name: str) -> None:
    """The UNet must take latents alone: inpainting and depth models take more channels."""
    channels = read_json(unet / "config.json").get("in_channels", 4)
    config = read_json(vae / "config.json")
    latents = config.get("latent_channels", 4)
    if channels != latents:
        raise UserError(
            f"{name}: its UNet takes {channels} channels, its VAE makes {latents}. Supported are "
            "text-to-image models; this may be one for inpainting, depth or upscaling."
        )
    if config.get("latents_mean") is not None:
        raise UserError(
            f"{name}: its VAE's config has latents_mean; supported are latents that are scaled by "
            "scaling_factor alone."
        )


def convert_hint(source: str, single_file_class: str = "StableDiffusionPipeline") -> str:
    """How to turn weights of another format into a folder."""
    cls, call = "DiffusionPipeline", f"from_pretrained('{source}', use_safetensors=False)"
    if source.endswith(SINGLE_FILE):
        cls, call = single_file_class, f"from_single_file('{source}')"
    # diffusers splits what is larger than 10 GB, such as the UNet of SDXL in fp32.
    saving = "save_pretrained('new_folder', max_shard_size='20GB')"
    return (
        "Only folders with safetensors weights are read; convert with "
        f'python -c "from diffusers import {cls}; {cls}.{call}.{saving}"'
    )


def _check_classes(folder: Path, name: str, family: Family) -> None:
    """The pipeline must have the parts of its family, and these of classes that we can train."""
    found, pipeline = parts_of(folder), family.pipeline.__name__
    for part, expected in family.required.items():
        if part not in found:
            raise UserError(
                f"{name}: {INDEX} names no {part}; a {pipeline} needs one.{family.lacking}"
            )
        if expected.classes and found[part] not in expected.classes:
            raise UserError(
                f"{name}: its {part} is a {found[part]}; supported is {family.title}, "
                f"with {' or '.join(expected.classes)}."
            )


def _check_scheduler(folder: Path, name: str) -> None:
    """The class that draws must be one of this diffusers, which imports none but the one named."""
    library, found = read_json(folder / INDEX)["scheduler"]
    cls = getattr(diffusers, str(found), None) if library == "diffusers" else None
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
        return
    # In place of a class whose libraries are not installed diffusers has one that names them.
    if lacking := getattr(cls, "_backends", None):
        raise UserError(
            f"{name}: its scheduler {found} needs {' and '.join(lacking)}: install what is "
            f"missing, or name another in {INDEX}, such as DDIMScheduler."
        )
    raise UserError(
        f"{name}: {INDEX} names the scheduler {found} of {library}; expected one of diffusers "
        f"{diffusers.__version__}. Name another there, such as DDIMScheduler."
    )


def _check_part(folder: Path, part: str, config: ModelConfig, names: Names) -> None:
    """The folder of a part must hold its config, and a tokenizer its vocabulary."""
    missing = f"{config.pretrained_model_name_or_path}: {INDEX} names a {part}, but"
    if not (folder / PARTS[part].config).is_file():
        raise UserError(
            f"{missing} there is no {part}/{PARTS[part].config} ({_found(names(), part)}). Get the "
            f"whole pipeline{f', or set {part} to [null, null] there' if part in OPTIONAL else ''}."
        )
    if part.startswith("tokenizer") and not (
        (folder / "tokenizer.json").is_file()
        or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())
    ):
        raise UserError(
            f"{missing} {part}/ has no vocabulary: expected tokenizer.json, or vocab.json and "
            f"merges.txt, {_found(names(), part)}."
        )


def _check_weights(path: Path, part: str, config: ModelConfig, names: Names) -> None:
    """The weights must be there as one safetensors file with a readable header."""
    if path.is_file():
        _check_header(path)
        return
    name, stem, there = config.pretrained_model_name_or_path, PARTS[part].weights, names()
    # Of diffusion_pytorch_model.fp16.safetensors the middle; without variant nothing.
    begin = f"{part}/{stem}."
    files = [n.removeprefix(begin) for n in there if n.startswith(begin)]
    variants = [
        file.removesuffix("safetensors").rstrip(".")
        for file in files
        if file.endswith("safetensors") and "-of-" not in file
    ]
    if variants == [""]:
        plain = weights_file(part, None)
        advice = f"Give no --variant, or, if other parts have it alone, copy {plain} to that name"
    elif variants:
        advice = "Give " + " or ".join(
            f"--variant {variant}" if variant else "no --variant" for variant in variants
        )
    elif any(n.startswith(f"{part}/{stem}") and "-of-" in n for n in there):
        advice = "Its weights are split: save it again with max_shard_size='20GB'"
    else:
        advice = convert_hint(name)
    raise UserError(f"{name}: expected {part}/{path.name}, {_found(there, part)}. {advice}.")


def _check_header(path: Path) -> None:
    """The file must be whole."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}). Download it again; in a git "
            "clone, `git lfs pull` fetches the weights."
        ) from error


def _check_micro_conditioning(folder: Path, name: str, family: Family) -> None:
    """The UNet must take what its family is told besides captions: sizes, or nothing."""
    unet = read_json(folder / "unet" / "config.json")
    expected = None
    if family.time_ids:
        pooled = read_json(folder / list(family.text_encoders)[-1] / "config.json")
        each = unet.get("addition_time_embed_dim") or 0
        expected = pooled.get("projection_dim", 512) + family.time_ids * each
    kind, width = (
        unet.get(key) for key in ("addition_embed_type", "projection_class_embeddings_input_dim")
    )
    if (kind, width) != ("text_time" if expected else None, expected):
        raise UserError(
            f"{name}: its UNet has addition_embed_type {kind} of width {width}; supported is "
            f"{family.title}, with {expected}."
        )


def _check_prediction_type(folder: Path, config: ModelConfig) -> None:
    scheduler = read_json(folder / "scheduler" / PARTS["scheduler"].config)
    found = config.prediction_type or scheduler.get("prediction_type", "epsilon")
    if found not in PREDICTION_TYPES:
        raise UserError(
            f"{config.pretrained_model_name_or_path}: its scheduler says prediction_type "
            f"{found!r}; supported are {' and '.join(PREDICTION_TYPES)}. If the scheduler is "
            "wrong about the UNet, give --prediction_type."
        )


def _found(names: Sequence[str], part: str = "") -> str:
    """What a folder, or that of a part in it, holds, for a message: at most eight names."""
    below = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/" if part else "")]
    entries = sorted({name.partition("/")[0] for name in below})
    if part and not entries:
        return "and there is no such folder"
    more = ", …" if len(entries) > 8 else ""
    return f"found {', '.join(entries[:8])}{more}" if entries else "found nothing"
