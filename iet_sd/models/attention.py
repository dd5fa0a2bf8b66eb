"""Which kernels compute the UNet's attention: one of PyTorch's own (SDPA), or those of xformers.

On the Stable Diffusion UNet ``set_attention_backend`` changes nothing, since its attention
processor calls SDPA directly. So xformers takes the place of the processor, and a kernel of SDPA is
chosen around each call of it; there it also holds where activations are computed again.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from iet_sd.errors import UserError

logger = logging.getLogger(__name__)
Backend = Literal["auto", "xformers", "sdpa", "flash", "math"]
_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


class KernelProcessor(AttnProcessor2_0):
    """Attention by one kernel of SDPA and no other."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self.kernel = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output of an attention layer; arguments as diffusers' processor has them."""
        with sdpa_kernel(self.kernel):
            return super().__call__(*args, **kwargs)


def check_attention(backend: Backend) -> None:
    """`UserError` when xformers is asked for and plainly can't work; needs no model."""
    if backend == "xformers" and (reason := _missing()):
        raise _xformers_unusable(reason)


def enable_attention(
    unet: UNet2DConditionModel, backend: Backend, device: torch.device, dtype: torch.dtype
) -> str:
    """Set the UNet's attention kernels; returns their name: a backend other than ``auto``.

    ``auto`` is xformers on a CUDA GPU if it works there, else SDPA, which then chooses a kernel
    for each call; a line of the log says why. ``dtype`` is that of the forward pass. What is
    asked for by name is tried once, forward and backward, at the UNet's largest head: xformers can
    be importable and still hold no kernel for this GPU, PyTorch or dtype.
    Errors: `UserError` with the reason when what is asked for by name doesn't work.
    """
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    head_size = max(layer.inner_dim // layer.heads for layer in layers)
    if backend == "auto":
        backend = _choose(head_size, device, dtype)
    elif backend == "xformers" and (reason := _failure(_xformers, head_size, device, dtype)):
        raise _xformers_unusable(reason)
    if backend == "xformers":
        unet.enable_xformers_memory_efficient_attention()
        assert all(isinstance(layer.processor, XFormersAttnProcessor) for layer in layers)
    elif backend in _KERNELS:
        kernel = _KERNELS[backend]

        def attend(query: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(query, query, query)

        if reason := _failure(attend, head_size, device, dtype):
            raise UserError(
                f"--attention_backend {backend}: the kernel does not work here, because {reason}. "
                "On a GPU flash needs --mixed_precision fp16 or bf16. Use --attention_backend sdpa."
            )
        unet.set_attn_processor(KernelProcessor(kernel))
    return backend


def _choose(head_size: int, device: torch.device, dtype: torch.dtype) -> Backend:
    """xformers where it works, else SDPA."""
    if device.type != "cuda":
        return "sdpa"
    reason = _missing() or _failure(_xformers, head_size, device, dtype)
    if reason:
        logger.info("attention by SDPA: xformers does not work here, because %s", reason)
    return "sdpa" if reason else "xformers"


def _missing() -> str | None:
    """What xformers plainly lacks here."""
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed"
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA GPU"


def _xformers(query: Tensor) -> Tensor:
    """xformers' attention of (batch, heads, length, size), which it takes as (batch, length, …)."""
    query = query.transpose(1, 2)
    return importlib.import_module("xformers.ops").memory_efficient_attention(query, query, query)


def _failure(
    attend: Callable[[Tensor], Tensor], head_size: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why ``attend`` fails on (batch 1, 2 heads, length 16, ``head_size``), or its gradient."""
    query = torch.ones(1, 2, 16, head_size, device=device, dtype=dtype, requires_grad=True)
    try:
        attend(query).sum().backward()
    except Exception as error:  # whatever a binary package raises that doesn't fit its host
        return f"{type(error).__name__}: {error}"
    return None


def _xformers_unusable(reason: str) -> UserError:
    return UserError(
        f"--attention_backend xformers: xformers does not work here, because {reason}. It needs a "
        "CUDA GPU and `pip install -r requirements.txt -r requirements-xformers.txt`, whose "
        "versions fit each other. With --attention_backend auto, PyTorch's own attention takes "
        "its place."
    )
