"""What makes passes through the networks faster and changes no more than rounding."""

import torch
from torch import Tensor

from iet_sd.config import Config, ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.loading import Components

GRAPHS = 64
"""That torch.compile may make of the UNet; beyond them it would run uncompiled."""


def check_compile(config: ModelConfig, device: torch.device) -> None:
    """`UserError` when ``torch_compile`` is asked for and cannot work here; needs no model.

    A small function is compiled for ``device``, as only that finds all that may be missing: the
    compiler, Python's headers, Triton.
    """
    if not config.torch_compile:
        return
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # whatever compilers and their callers raise
        reason = next(iter(str(error).splitlines()), "it does not say why")
        raise UserError(
            f"--torch_compile does not work here, because {type(error).__name__}: {reason}. It "
            "needs a C++ compiler and Python's headers (on Debian and Ubuntu: apt-get install g++ "
            "python3-dev; the variable CXX names another compiler), and on a GPU Triton. Or train "
            "without the flag."
        ) from error


def memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """That of the networks on ``device``."""
    channels_last = config.model.channels_last
    if channels_last is None:
        # bitsandbytes makes weights contiguous when it updates them, and not what it remembers.
        channels_last = device.type == "cuda" and not config.training.use_8bit_adam
    return torch.channels_last if channels_last else torch.preserve_format


def place(components: Components, config: Config, device: torch.device) -> None:
    """Move the networks to ``device``, in their `memory_format`; the UNet's first call compiles.

    All in place: modules, parameters and their names stay.
    """
    components.to(device, memory_format(config, device))
    if config.model.torch_compile:
        # Each size of image and of batch has graphs of its own, with gradient and without.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        components.unet.compile(mode=config.model.torch_compile_mode)


def _small(numbers: Tensor) -> Tensor:
    return numbers.sin() + 1
