"""Saving the result: a pipeline folder (full), or the file of an adapter (LoRA).

Both load with diffusers alone. The pipeline is the source with another UNet: everything that was
not trained is copied file by file, so it keeps its stored precision (in memory it may be fp16),
and a safety checker stays if the source had one.
"""

import json
import shutil
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict

from iet_sd.config import ModelConfig
from iet_sd.files import atomic_folder
from iet_sd.models.layout import INDEX, PARTS, parts_of, read_json, weights_file
from iet_sd.models.loading import Components


def save_result(components: Components, config: ModelConfig, folder: Path) -> None:
    """Save what was trained into ``folder``, which may hold other files; whole or not at all.

    Called on the main process alone.
    """
    save = save_lora if config.train_mode == "lora" else save_pipeline
    save(components, folder)


def save_pipeline(components: Components, folder: Path) -> None:
    """Save an ordinary pipeline folder: the fp32 UNet, and the source's other parts as stored.

    Weights carry no variant in their names, so the result loads without one.
    """
    with atomic_folder(folder) as staging:
        components.unet.save_pretrained(staging / "unet", max_shard_size="20GB")
        for part in parts_of(components.folder):
            _copy_part(part, components, staging / part)
        _write_scheduler(components, staging / "scheduler")
        load_in_fp32(staging)
        shutil.copyfile(components.folder / INDEX, staging / INDEX)


def save_lora(components: Components, folder: Path) -> None:
    """Save ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``.

    Its metadata holds the adapter's settings; without them alpha would be read back as rank.
    """
    unet = components.unet
    with atomic_folder(folder) as staging:
        StableDiffusionPipeline.save_lora_weights(
            staging,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            **_collate_lora_metadata({"unet": unet}),
        )


def load_in_fp32(pipeline: Path) -> None:
    """Have transformers' parts load in fp32, whatever they are stored in, unless asked otherwise.

    ``from_pretrained`` without a dtype takes the one in the config for these (transformers 5), but
    fp32 for diffusers' parts: a text encoder stored in fp16 would not work with the UNet.
    """
    for config in pipeline.glob("*/config.json"):
        content = read_json(config)
        if "_diffusers_version" not in content:
            content.pop("torch_dtype", None)
            content["dtype"] = "float32"
            config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_part(part: str, components: Components, target: Path) -> None:
    """Copy a part's configs, vocabulary and weights; of the UNet the config alone.

    The UNet's architecture is the source's, and the config that diffusers writes would name the
    folder it was loaded from on this machine.
    """
    target.mkdir(exist_ok=True)
    weights = weights_file(part, components.variant)
    for file in sorted((components.folder / part).iterdir()):
        if file.suffix in (".json", ".txt") and ".index" not in file.name:
            shutil.copyfile(file, target / file.name)
        elif file.name == weights and part != "unet":
            shutil.copyfile(file, target / weights_file(part, None))


def _write_scheduler(components: Components, target: Path) -> None:
    """The source's scheduler config, with the prediction type that was trained."""
    name = PARTS["scheduler"].config
    config = read_json(components.folder / "scheduler" / name)
    config["prediction_type"] = components.prediction_type
    (target / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
