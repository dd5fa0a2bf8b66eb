"""Where tensors are."""

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there. A CUDA GPU takes it out of pinned memory, while this process goes on.

    Of other memory a copy waits until the GPU has done all that it was given before.
    """
    is_cuda = device.type == "cuda"
    if is_cuda and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    # Others may read the memory when it has been freed and used again.
    return tensor.to(device, non_blocking=is_cuda)


def read(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Vectors of one device and dtype on the CPU, by one copy that waits for all it was given."""
    return torch.cat(vectors).detach().cpu().split([len(vector) for vector in vectors])
