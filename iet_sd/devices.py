"""Where tensors are."""

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there. A GPU takes it out of pinned memory, while this process goes on.

    Of other memory a copy waits until the GPU has done all that it was given before.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
