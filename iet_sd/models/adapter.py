"""What is trained: all weights of the UNet, or low-rank factors beside some of its layers (LoRA).

LoRA (arXiv 2106.09685): a layer's output W x becomes W x + (alpha / rank) B A x, with B = 0 at
the start, so training starts from the model itself.
"""

from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.loading import Components


def make_trainable(
    components: Components, config: ModelConfig, seed: int
) -> dict[str, torch.nn.Parameter]:
    """Unfreeze the UNet or add an adapter; returns names and trainable parameters, in order.

    They are fp32 whatever the UNet's own dtype, since small updates vanish in 16 bits. The initial
    A depends on ``seed`` alone, and the global random state stays as it was.
    Errors: `UserError` for a LoRA target that no layer of the UNet matches.
    """
    unet = components.unet
    if config.train_mode == "lora":
        _add_lora(unet, config, seed)
    else:
        unet.requires_grad_(True)
    cast_training_params(unet, torch.float32)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


def lora_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The (A, B) pairs among parameter names of `make_trainable`: the factors of one layer each."""
    names = list(names)
    pairs = [(a, a.replace(".lora_A.", ".lora_B.")) for a in names if ".lora_A." in a]
    assert {name for pair in pairs for name in pair} == {n for n in names if ".lora_" in n}
    return pairs


def _add_lora(unet: UNet2DConditionModel, config: ModelConfig, seed: int) -> None:
    """Adapters on the target layers: A normal with deviation 1 / rank, B zero."""
    _check_targets(unet, config.lora_target_modules)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha or config.rank,
        lora_dropout=config.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=list(config.lora_target_modules),
    )
    # The draws happen on the CPU; torch.manual_seed would also set the GPUs' generators.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(lora)


def _check_targets(unet: UNet2DConditionModel, targets: tuple[str, ...]) -> None:
    """Each target must be the name, or the end of the name, of a linear or convolution layer."""
    layers = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({_short_name(name) for name in layers}))
            raise UserError(
                f"--lora_target_modules {target!r} matches no linear or convolution layer of the "
                f"UNet. Ends of names that do: {known}."
            )


def _short_name(name: str) -> str:
    """The end of a module's name that says what it is: ``to_q``, ``to_out.0``."""
    parts = name.split(".")
    last_word = max(i for i, part in enumerate(parts) if not part.isdigit())
    return ".".join(parts[last_word:])
