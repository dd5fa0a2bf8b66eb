"""A LoRA folded into the weights it was trained beside: W + (alpha / rank) B A, or DoRA's rows."""

from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from iet_sd.models.adapter import adapter_layers

TEXT_MODEL = "text_model."
"""How names of a text encoder's weights begin on disk; not in transformers' module, from 5.6 on."""


@torch.no_grad()
def write_folded(module: torch.nn.Module, source: Path, target: Path) -> None:
    """Write to ``target`` the weights in ``source`` with the adapters of ``module`` folded in.

    In the dtype and with the names that they have in ``source``, a safetensors file of the model
    that ``module`` is, which may be in memory in another dtype.
    """
    weights = load_file(source)
    stored = {name.removeprefix(TEXT_MODEL): name for name in weights}
    for layer_name, layer in adapter_layers(module).items():
        name = stored[f"{layer_name.removeprefix(TEXT_MODEL)}.weight"]
        weights[name] = folded(layer, weights[name])
    save_file(weights, target, metadata={"format": "pt"})


def folded(layer: LoraLayer, weight: Tensor) -> Tensor:
    """``weight``, (out, in, ...), as an adapter changes it: computed in fp32, in its own dtype."""
    (adapter,) = layer.active_adapters
    # On the CPU, where no setting makes products less exact.
    A, B = (factors[adapter].weight.float().cpu() for factors in (layer.lora_A, layer.lora_B))
    product = (B.flatten(1) @ A.flatten(1)).view_as(weight)
    changed = weight.float() + product * layer.scaling[adapter]
    if adapter in layer.lora_magnitude_vector:
        wanted = layer.lora_magnitude_vector[adapter].weight.float().cpu().flatten()
        scale = wanted / torch.linalg.norm(changed.flatten(1), dim=1)
        changed *= scale.view(-1, *[1] * (changed.dim() - 1))
    return changed.to(weight.dtype)
