"""Saving the result: a pipeline folder (full), or the file of an adapter (LoRA).

Both load with diffusers alone. The pipeline is the source with other weights: everything that was
not trained is copied file by file, so it keeps its stored precision (in memory it may be fp16),
and a safety checker stays if the source had one.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.nn import Module

from iet_sd.config import ModelConfig
from iet_sd.files import atomic_folder
from iet_sd.models.adapter import ADAPTER, UNET, trained_modules
from iet_sd.models.family import PARTS
from iet_sd.models.kohya import write_kohya
from iet_sd.models.layout import INDEX, LORA, locate, parts_of, read_json, weights_file
from iet_sd.models.loading import Components, changes_scheduler, scheduler_config
from iet_sd.models.merge import TEXT_MODEL, write_folded
from iet_sd.models.origin import without_origin

KOHYA_LORA = "pytorch_lora_weights_kohya.safetensors"
MERGED = "merged"
NON_EMA_LORA = "pytorch_lora_weights_non_ema.safetensors"
NON_EMA = "_non_ema"
_LORA_METADATA = ("r", "lora_alpha", "target_modules", "use_dora")


def save_result(components: Components, config: ModelConfig, folder: Path) -> None:
    """Save what was trained into ``folder``, which may hold other files; whole or not at all.

    Called on the main process alone.
    """
    save = save_lora if config.train_mode == "lora" else save_pipeline
    save(components, config, folder)


def save_non_ema(components: Components, config: ModelConfig, folder: Path) -> None:
    """Save the live weights beside a result that has their moving average, on the main process.

    As ``unet_non_ema/`` for ``UNet2DConditionModel.from_pretrained``, and so for text encoders
    that were trained; or as a LoRA of that name.
    """
    if config.train_mode == "lora":
        with atomic_folder(folder) as staging:
            _write_lora(components, trained_modules(components, config), staging, NON_EMA_LORA)
        return
    with atomic_folder(folder) as staging:
        for part, module in trained_modules(components, config).items():
            target = staging / f"{part}{NON_EMA}"
            module.save_pretrained(target, max_shard_size="20GB")
            _copy_part(part, components, target, weights=False)
        load_in_fp32(staging)


def save_pipeline(components: Components, config: ModelConfig, folder: Path) -> None:
    """Save an ordinary pipeline folder: in fp32 what was trained, other parts as stored."""
    with atomic_folder(folder) as staging:
        trained = trained_modules(components, config)
        for part, module in trained.items():
            module.save_pretrained(staging / part, max_shard_size="20GB")
        _copy_others(components, staging, trained)


def save_lora(components: Components, config: ModelConfig, folder: Path) -> None:
    """Save ``pytorch_lora_weights.safetensors``, and what else of the adapter is asked for.

    Also the ``scheduler/`` to draw with, if it is not that of the model it is loaded into.
    """
    trained = trained_modules(components, config)
    with atomic_folder(folder) as staging:
        _write_lora(components, trained, staging, LORA)
        if changes_scheduler(components):
            _write_scheduler(components, staging / "scheduler")
        if config.save_kohya_lora:
            write_kohya(trained, components.prediction_type, staging / KOHYA_LORA)
        if config.merge_lora:
            save_merged(components, trained, staging / MERGED)


def save_merged(components: Components, trained: Mapping[str, Module], folder: Path) -> None:
    """Save a pipeline folder: the source, with the adapters of ``trained`` folded in."""
    with atomic_folder(folder) as staging:
        for part, module in trained.items():
            (staging / part).mkdir()
            source = components.folder / part / weights_file(part, components.variant)
            write_folded(module, source, staging / part / weights_file(part, None))
        _copy_others(components, staging, trained)


def _write_lora(
    components: Components, trained: Mapping[str, Module], folder: Path, name: str
) -> None:
    """Write the adapters for ``load_lora_weights``."""
    components.family.pipeline.save_lora_weights(
        folder,
        **{f"{part}_lora_layers": _lora_state(part, module) for part, module in trained.items()},
        weight_name=name,
        **_lora_metadata(trained),
    )


def _lora_metadata(trained: Mapping[str, Module]) -> dict[str, dict[str, Any]]:
    """The settings that a reader needs; without them it would take alpha for the rank.

    No others of peft's: a reader hands all of them to its own peft, where an older one knows fewer
    and fails, and dropout would be on when pictures are drawn.
    """
    found = {}
    for name, settings in _collate_lora_metadata(trained).items():
        needed = {key: settings[key] for key in _LORA_METADATA}
        # A set has another order in each process, and the file other bytes.
        found[name] = {k: sorted(v) if isinstance(v, set) else v for k, v in needed.items()}
    return found


def _lora_state(part: str, module: Module) -> dict[str, Tensor]:
    """An adapter's weights by the names that they have in a file.

    The UNet's are those of diffusers' scripts for every layer: its own conversion leaves out
    convolutions, and its loader takes names of one kind alone.
    """
    state = get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)
    # A file takes no other memory format (--channels_last).
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if part == UNET:
        named = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
        return {re.sub(r"\.lora_[AB]\.", lambda m: named[m[0]], n): t for n, t in state.items()}
    # DoRA's lengths as transformers wants them, which does not know peft's own name.
    ends = {n: f"{n}.weight" if n.endswith("magnitude_vector") else n for n in state}
    state = {f"{TEXT_MODEL}{ends[n].removeprefix(TEXT_MODEL)}": t for n, t in state.items()}
    return convert_state_dict_to_diffusers(state)


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


def _copy_others(components: Components, folder: Path, written: Collection[str]) -> None:
    """Make ``folder``, which holds the weights of the parts ``written``, a whole pipeline.

    Weights carry no variant in their names, so the result loads without one.
    """
    for part in parts_of(components.folder):
        _copy_part(part, components, folder / part, weights=part not in written)
    _write_scheduler(components, folder / "scheduler")
    load_in_fp32(folder)
    _write_index(components.folder / INDEX, folder / INDEX)


def _write_index(source: Path, target: Path) -> None:
    """Copy the index, without parts that a pipeline of ours has not: diffusers passes them over."""
    content = without_origin(source)
    index = json.loads(content)
    foreign = {name for name, entry in index.items() if isinstance(entry, list)} - set(PARTS)
    if foreign:
        kept = {name: entry for name, entry in index.items() if name not in foreign}
        content = (json.dumps(kept, indent=2) + "\n").encode()
    target.write_bytes(content)


def _copy_part(part: str, components: Components, target: Path, weights: bool) -> None:
    """Copy a part's configs and vocabulary, and its weights unless they were trained.

    The architecture is the source's either way. What a config says of the folder it was loaded
    from on some machine stays behind.
    """
    target.mkdir(exist_ok=True)
    folder, variant = locate(part, components.folder, components.variant, components.vae_folder)
    stored = weights_file(part, variant)
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json" and ".index" not in file.name:
            (target / file.name).write_bytes(without_origin(file))
        elif file.suffix == ".txt":
            shutil.copyfile(file, target / file.name)
        elif file.name == stored and weights:
            shutil.copyfile(file, target / weights_file(part, None))


def _write_scheduler(components: Components, target: Path) -> None:
    """The source's scheduler config, with what training has changed."""
    target.mkdir(exist_ok=True)
    text = json.dumps(scheduler_config(components), indent=2)
    (target / PARTS["scheduler"].config).write_text(text + "\n", encoding="utf-8")
