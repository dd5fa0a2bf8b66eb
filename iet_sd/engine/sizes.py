"""What models take, without their weights: parameters, arithmetic and memory, counted on torch's
meta device, where tensors have a shape and nothing else.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from iet_sd.config import ModelConfig
from iet_sd.models.family import whole_image
from iet_sd.models.finding import find_folder, find_vae
from iet_sd.models.layout import family_in, locate
from iet_sd.models.loading import Components
from iet_sd.models.tokens import INPUT_IDS


def meta_components(config: ModelConfig, cache_dir: str | None) -> Components:
    """The networks of a model, frozen; its weights need not be there."""
    folder = find_folder(config, cache_dir, weights=False)
    vae_folder = find_vae(config, folder, cache_dir, weights=False)
    family = family_in(folder, config.pretrained_model_name_or_path)
    vae, _ = locate("vae", folder, None, vae_folder)
    with torch.device("meta"):
        networks = {
            name: cls(CLIPTextConfig.from_pretrained(folder, subfolder=name))
            for name, cls in family.text_encoders.items()
        }
        networks["vae"] = AutoencoderKL.from_config(AutoencoderKL.load_config(vae))
        parts = Components(
            family=family,
            **dict.fromkeys(family.tokenizers),
            loaders={name: partial(networks.get, name) for name in networks},
            device=torch.device("meta"),
            unet=UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder, subfolder="unet")
            ),
            noise_scheduler=None,
            source=config.pretrained_model_name_or_path,
            folder=folder,
            variant=config.variant,
            vae_folder=vae_folder,
        )
    for network in (parts.unet, parts.vae, *parts.text_encoders):
        network.requires_grad_(False)
    return parts


def frozen_parameters(*models: torch.nn.Module) -> int:
    """Numbers that models hold as parameters and that are not trained."""
    return sum(p.numel() for model in models for p in model.parameters() if not p.requires_grad)


def forward_cost(parts: Components, size: int) -> tuple[int, int]:
    """Arithmetic (FLOP) of one sample's forward pass, and bytes of fp32 kept for the backward.

    Of the UNet on latents of ``size``, and of text encoders that are trained.
    """
    networks = (parts.unet, *parts.text_encoders)
    weights = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []  # so that no storage's address is used again
    latents = torch.empty(1, parts.unet.config.in_channels, size, size, device="meta")
    condition = _condition(parts)
    unchanged: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks(note, unchanged)
    with FlopCounterMode(display=False) as counter, hooks:
        if any(p.requires_grad for encoder in parts.text_encoders for p in encoder.parameters()):
            condition = _condition(parts)
        parts.unet(latents, torch.zeros(1, device="meta"), **condition)
    return counter.get_total_flops(), sum(kept.values())


def encoded_caption(parts: Components) -> int:
    """Bytes of what text encoders make of a caption, in fp32."""
    with torch.no_grad():
        return sum(t.nbytes for t in parts.family.encode(parts, _tokens(parts)).values())


def _condition(parts: Components) -> dict[str, Any]:
    """What the UNet is told of one sample, whose caption is as long as they get."""
    image = {name: t.to("meta") for name, t in whole_image(0, 1).items()}
    return parts.family.condition(parts, _tokens(parts) | image)


def _tokens(parts: Components) -> dict[str, Tensor]:
    """Of one caption, as long as they get."""
    return {
        name: torch.zeros(1, encoder.config.max_position_embeddings, dtype=int, device="meta")
        for name, encoder in zip(INPUT_IDS, parts.text_encoders, strict=False)
    }


def peak_of(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made in ``call`` take at one moment, without gradients."""
    with torch.no_grad(), _Alive() as alive:
        call()
    return alive.most


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, while a tensor with them is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, given)
        self.most = max(self.most, self.now)
        return out

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._users:
            if key in given:
                return  # a view of what was there before
            self._users[key] = 0
            self.now += size
        self._users[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size
