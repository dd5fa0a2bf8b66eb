"""What processes exchange at a round boundary, all at once, and the memory each has needed."""

import resource
import sys
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed
from accelerate.utils import gather_object
from torch import Tensor

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20


def sum_in_place(tensors: Iterable[Tensor], num_processes: int) -> None:
    """Replace each CPU tensor by its sum over processes, a bucket of tensors at a time.

    The tensors must have the same shapes and order on all processes.
    """
    if num_processes == 1:
        return
    device = _communication_device()
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = bucket and (
            tensor.dtype != bucket[0].dtype
            or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES
        )
        if full:
            _sum_bucket(bucket, device)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _sum_bucket(bucket, device)


def gather(items: list[T], num_processes: int) -> list[T]:
    """The items of all processes, in one list, on every process."""
    return gather_object(items) if num_processes > 1 else items


def peak_memory(device: torch.device) -> int:
    """Bytes: most allocated on a GPU since the last reset, or most resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _sum_bucket(bucket: list[Tensor], device: torch.device) -> None:
    flat = torch.cat([tensor.flatten() for tensor in bucket]).to(device)
    torch.distributed.all_reduce(flat)
    parts = flat.cpu().split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _communication_device() -> torch.device:
    """NCCL sums on the GPU, gloo on the CPU."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
