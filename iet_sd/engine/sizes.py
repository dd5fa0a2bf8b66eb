"""What models take, without their weights: parameters, arithmetic and memory, counted on torch's
meta device, where tensors have a shape and nothing else.
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

TOKENS = 77
"""Of a caption, as Stable Diffusion has it."""


def meta_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a pipeline folder."""
    with torch.device("meta"):
        settings = UNet2DConditionModel.load_config(folder, subfolder="unet")
        return UNet2DConditionModel.from_config(settings).requires_grad_(False)


def meta_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a pipeline folder."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))


def meta_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder of a pipeline folder."""
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))


def parameters_of(*models: torch.nn.Module) -> int:
    """Numbers that models hold as parameters."""
    return sum(p.numel() for model in models for p in model.parameters())


def forward_cost(unet: UNet2DConditionModel, size: int) -> tuple[int, int]:
    """Arithmetic (FLOP) of one sample's forward pass, and bytes of fp32 kept for the backward."""
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []  # so that no storage's address is used again
    text = torch.empty(1, TOKENS, unet.config.cross_attention_dim, device="meta")
    latents = torch.empty(1, unet.config.in_channels, size, size, device="meta")
    unchanged: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks(note, unchanged)
    with FlopCounterMode(display=False) as counter, hooks:
        unet(latents, torch.zeros(1, device="meta"), text)
    return counter.get_total_flops(), sum(kept.values())


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
