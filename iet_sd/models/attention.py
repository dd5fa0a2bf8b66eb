"""Which kernels compute attention: PyTorch's own (SDPA), or those of xformers.

On the Stable Diffusion UNet ``set_attention_backend`` changes nothing, since its attention
processor calls SDPA directly; only `enable_xformers_memory_efficient_attention` swaps it.
"""

import importlib
import importlib.util

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor

from iet_sd.errors import UserError


def check_attention(xformers: bool) -> None:
    """`UserError` when xformers is asked for and plainly can't work; needs no model."""
    if not xformers:
        return
    if importlib.util.find_spec("xformers") is None:
        raise _unusable("it is not installed")
    if not torch.cuda.is_available():
        raise _unusable("PyTorch sees no CUDA GPU")


def enable_attention(
    unet: UNet2DConditionModel, xformers: bool, device: torch.device, dtype: torch.dtype
) -> str:
    """Set the UNet's attention kernels; returns their name, ``sdpa`` or ``xformers``.

    ``dtype`` is that of the forward pass. xformers is tried once, forward and backward, at the
    UNet's largest head: it can be importable and still hold no kernel for this GPU, PyTorch or
    dtype. There is no silent way back to SDPA.
    Errors: `UserError` with the reason when xformers is asked for and doesn't work.
    """
    if not xformers:
        return "sdpa"
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    head_size = max(layer.inner_dim // layer.heads for layer in layers)
    _probe_xformers(head_size, device, dtype)
    unet.enable_xformers_memory_efficient_attention()
    assert all(isinstance(layer.processor, XFormersAttnProcessor) for layer in layers)
    return "xformers"


def _probe_xformers(head_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Run the operator once on (batch 1, length 16, 2 heads, ``head_size``), with its gradient."""
    try:
        ops = importlib.import_module("xformers.ops")
        query = torch.ones(1, 16, 2, head_size, device=device, dtype=dtype, requires_grad=True)
        ops.memory_efficient_attention(query, query, query).sum().backward()
    except Exception as error:  # whatever a binary package raises that doesn't fit its host
        raise _unusable(f"{type(error).__name__}: {error}") from error


def _unusable(reason: str) -> UserError:
    return UserError(
        "--enable_xformers_memory_efficient_attention: xformers does not work here, because "
        f"{reason}. It needs a CUDA GPU and `pip install -r requirements-xformers.txt`, whose "
        "versions fit each other; without the flag, PyTorch's own attention is used."
    )
