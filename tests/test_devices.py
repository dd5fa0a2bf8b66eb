import pytest
import torch

from iet_sd.devices import on_device


class Recorded:
    """A tensor on the CPU that notes where it is sent, and how."""

    is_cuda = False

    def __init__(self):
        self.calls = []

    def pin_memory(self):
        self.calls.append("pinned")
        return self

    def to(self, device, non_blocking):
        self.calls.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_a_copy_is_waited_for_where_nothing_holds_its_memory(kind):
    """What is copied is often gone when the statement ends, and a GPU would read what is there."""
    tensor = Recorded()
    on_device(tensor, torch.device(kind))
    assert tensor.calls == [(kind, False)]


def test_cuda_reads_pinned_memory_while_the_process_goes_on():
    """PyTorch holds pinned memory until the copy has happened."""
    tensor = Recorded()
    on_device(tensor, torch.device("cuda"))
    assert tensor.calls == ["pinned", ("cuda", True)]
    tensor = Recorded()
    tensor.is_cuda = True
    on_device(tensor, torch.device("cuda"))
    assert tensor.calls == [("cuda", True)]
