"""A LoRA in the file format of kohya's sd-scripts, which A1111 and ComfyUI read.

A layer is named by its path with ``_`` for ``.``, behind the network's prefix, and has
``.lora_down.weight`` (A), ``.lora_up.weight`` (B) and ``.alpha``. For Stable Diffusion 1.x and 2.x
paths are those of diffusers' UNet; for XL of Stability's own (sgm), as kohya trains it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from iet_sd.models.adapter import UNET, adapter_layers
from iet_sd.models.merge import TEXT_MODEL

# Layers of a residual block of the UNet, and those outside of its blocks: diffusers' and sgm's.
_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?_(?:(\d+)_)?([a-z]+)_(\d+)_(.+)")


def write_kohya(modules: Mapping[str, torch.nn.Module], prediction_type: str, path: Path) -> None:
    """Write the adapters of ``modules``, networks by the names of their parts, in fp32.

    ``prediction_type`` is that of the UNet, which is one of them.
    """
    unet = modules[UNET]
    tensors = {}
    for part, module in modules.items():
        for layer_name, layer in adapter_layers(module).items():
            (adapter,) = layer.active_adapters
            name = kohya_name(part, layer_name, unet)
            tensors[f"{name}.lora_down.weight"] = layer.lora_A[adapter].weight
            tensors[f"{name}.lora_up.weight"] = layer.lora_B[adapter].weight
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.lora_alpha[adapter]))
    rank, alpha = layer.r[adapter], layer.lora_alpha[adapter]
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        **_base_model(unet, prediction_type),
    }
    plain = {n: t.detach().to("cpu", torch.float32).contiguous() for n, t in tensors.items()}
    save_file(plain, path, metadata)


def kohya_name(part: str, layer: str, unet: UNet2DConditionModel) -> str:
    """The name of a layer in the file, from the part it is in and its name there."""
    is_xl = _is_xl(unet)
    path = layer.replace(".", "_")
    if part == UNET:
        layers = unet.config.layers_per_block
        if isinstance(layers, int):
            layers = [layers] * len(unet.config.down_block_types)
        return f"lora_unet_{sgm_path(path, layers) if is_xl else path}"
    prefix = {"text_encoder": "lora_te1" if is_xl else "lora_te", "text_encoder_2": "lora_te2"}
    path = f"{TEXT_MODEL}{layer.removeprefix(TEXT_MODEL)}".replace(".", "_")
    return f"{prefix[part]}_{path}"


def sgm_path(path: str, layers: Sequence[int]) -> str:
    """A path in diffusers' UNet of SDXL as one in Stability's, both with ``_`` for ``.``.

    There all layers of the way down are in one list, ``input_blocks``, and of the way up in
    ``output_blocks``; in each of these residual block, attention and resampling are 0, 1 and 2.
    ``layers``: residual blocks of each of diffusers' blocks on the way down.
    """
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    way, block, kind, number, rest = _BLOCK.fullmatch(path).groups()
    if kind == "resnets":
        rest = _RESNET[rest]
    if way == "mid":
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(number)}_{rest}"
    layers = layers if way == "down" else layers[::-1]
    here = layers[int(block)]
    first = sum(layers[: int(block)]) + int(block)
    if kind == "downsamplers":
        return f"input_blocks_{first + here + 1}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{first + here}_2_{rest}"
    side, place = ("input", first + 1) if way == "down" else ("output", first)
    return f"{side}_blocks_{place + int(number)}_{int(kind == 'attentions')}_{rest}"


def _is_xl(unet: UNet2DConditionModel) -> bool:
    """Stable Diffusion XL is told sizes beside the text; 1.x and 2.x are not."""
    return unet.config.addition_embed_type == "text_time"


def _base_model(unet: UNet2DConditionModel, prediction_type: str) -> dict[str, str]:
    """What kohya writes of the kind of model that a LoRA is for."""
    if _is_xl(unet):
        return {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    is_v2 = bool(unet.config.use_linear_projection)
    version = f"sd_v{2 if is_v2 else 1}{'_v' if prediction_type == 'v_prediction' else ''}"
    return {"ss_base_model_version": version, "ss_v2": str(is_v2)}
