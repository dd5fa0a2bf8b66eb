"""What processes exchange, at the start and at round boundaries. All take part in each call."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor

from iet_sd.errors import UserError

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20


def sum_in_place(tensors: Mapping[str, Tensor], num_processes: int) -> None:
    """Replace each CPU tensor by its sum over processes, a bucket of tensors at a time.

    Names and shapes are the same on all processes. The order need not be: it is that of the names,
    as a process that goes on from files has its tensors in the order of these.
    """
    if num_processes == 1:
        return
    device = _communication_device()
    bucket: list[Tensor] = []
    for _, tensor in sorted(tensors.items()):
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
    if num_processes == 1:
        return items
    with _peers():
        return gather_object(items)


def from_main(function: Callable[[], T], process_index: int, num_processes: int) -> T:
    """What ``function`` gives on the main process, or its `UserError`, on every process."""
    if num_processes == 1:
        return function()
    answer: list[T | UserError | None] = [None]
    if process_index == 0:
        try:
            answer = [function()]
        except UserError as error:
            answer = [error]
    with _peers():
        broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def wait(num_processes: int) -> None:
    """Return when all processes have come here."""
    if num_processes > 1:
        with _peers():
            PartialState().wait_for_everyone()


@contextmanager
def main_first(process_index: int, num_processes: int) -> Iterator[None]:
    """The main process does the block before all others do, such as to download what they read."""
    if process_index:
        wait(num_processes)
    yield
    if not process_index:
        wait(num_processes)


def together(work: Callable[[], None], num_processes: int) -> None:
    """Write what each process has to; returns when all have. A full disk of one ends it on all."""
    error = None
    try:
        work()
    except (OSError, SafetensorError) as raised:
        error = raised
    errors = [other for other in gather([error], num_processes) if other is not None]
    if errors:
        raise error or errors[0]


@contextmanager
def _peers() -> Iterator[None]:
    """What torch says when a process has ended or does not answer, as a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        late = "timed out" in text or "timeout" in text
        raise UserError(
            "Another process of this run "
            + (
                "did not answer within --ddp_timeout: it hangs, or its shards take so much longer."
                if late
                else "has ended. If it names no error of its own, the machine may have killed it "
                "for want of memory."
            )
            + " Start all processes again with --resume_from_checkpoint latest."
        ) from error


def _sum_bucket(bucket: list[Tensor], device: torch.device) -> None:
    flat = torch.cat([tensor.flatten() for tensor in bucket]).to(device)
    with _peers():
        torch.distributed.all_reduce(flat)
    parts = flat.cpu().split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _communication_device() -> torch.device:
    """NCCL sums on the GPU, gloo on the CPU."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
