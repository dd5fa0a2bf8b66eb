"""What is trained: all weights of the UNet, or low-rank factors beside some of its layers (LoRA);
and the same of the text encoders, if asked for.

LoRA (arXiv 2106.09685): a layer's weight W becomes V = W + (alpha / rank) B A, with B = 0 at the
start, so training starts from the model itself. DoRA (arXiv 2402.09353): each row of V is brought
to a length of its own, which is trained too and starts at that of the row of W.
"""

from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.family import FAMILIES
from iet_sd.models.loading import Components

UNET = "unet"
TEXT_ENCODERS = {name for family in FAMILIES.values() for name in family.text_encoders}
ADAPTER = "default"
"""Name of the adapter that is trained."""
_TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""As diffusers' scripts have them."""


def make_trainable(
    components: Components, config: ModelConfig, seed: int
) -> dict[str, torch.nn.Parameter]:
    """Unfreeze what is trained or add adapters; returns names and trainable parameters, in order.

    Names are those of the UNet; a text encoder's begin with ``text_encoder.`` or
    ``text_encoder_2.``. All are fp32 whatever the model's own dtype, since small updates vanish in
    16 bits. The initial A depends on ``seed`` alone, and the global random state stays as it was.
    Errors: `UserError` for a LoRA target that no layer of the UNet matches.
    """
    modules = trained_modules(components, config)
    if config.train_mode == "lora":
        _add_lora(modules, config, seed)
    for module in modules.values():
        if config.train_mode == "full":
            module.requires_grad_(True)
        cast_training_params(module, torch.float32)
        if config.gradient_checkpointing:
            _recompute_activations(module)
        module.train()
    return {
        (name if part == UNET else f"{part}.{name}"): parameter
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def trained_modules(components: Components, config: ModelConfig) -> dict[str, torch.nn.Module]:
    """The networks that training changes, by the names of their parts; the UNet comes first."""
    texts = components.family.text_encoders if config.train_text_encoder else ()
    return {part: getattr(components, part) for part in (UNET, *texts)}


def of_text_encoder(name: str) -> bool:
    """Whether a parameter name of `make_trainable` is one of a text encoder."""
    return name.partition(".")[0] in TEXT_ENCODERS


def is_trained(module: torch.nn.Module) -> bool:
    """Whether any of a network's weights is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def adapter_layers(module: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers of a network that have an adapter, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoraLayer)}


def lora_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The (A, B) pairs among parameter names of `make_trainable`: the factors of one layer each.

    The lengths of DoRA are in no pair.
    """
    names = list(names)
    pairs = [(a, a.replace(".lora_A.", ".lora_B.")) for a in names if ".lora_A." in a]
    assert {b for _, b in pairs} == {name for name in names if ".lora_B." in name}
    return pairs


def _add_lora(modules: dict[str, torch.nn.Module], config: ModelConfig, seed: int) -> None:
    """Adapters on the target layers: A normal with deviation 1 / rank, B zero."""
    _check_targets(modules[UNET], config.lora_target_modules)
    # The draws happen on the CPU; torch.manual_seed would also set the GPUs' generators.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for part, module in modules.items():
            targets = config.lora_target_modules if part == UNET else _TEXT_ENCODER_TARGETS
            lora = LoraConfig(
                r=config.rank,
                lora_alpha=config.lora_alpha or config.rank,
                lora_dropout=config.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=list(targets),
                use_dora=config.use_dora,
            )
            module.add_adapter(lora, adapter_name=ADAPTER)
            # transformers writes down the folder that the model came from.
            module.peft_config[ADAPTER].base_model_name_or_path = None
            if config.use_dora:
                _measure_rows(module)


@torch.no_grad()
def _measure_rows(module: torch.nn.Module) -> None:
    """Start DoRA's lengths at those of the rows of W; peft rounds them to the dtype of W."""
    for layer in adapter_layers(module).values():
        lengths = layer.lora_magnitude_vector[ADAPTER].weight
        weight = layer.get_base_layer().weight.float()
        lengths.data = torch.linalg.norm(weight.flatten(1), dim=1).view_as(lengths)


def _recompute_activations(module: torch.nn.Module) -> None:
    """Gradient checkpointing, as diffusers and transformers have it."""
    if isinstance(module, UNet2DConditionModel):
        module.enable_gradient_checkpointing()
    else:
        module.activation_checkpointing_enable()


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
