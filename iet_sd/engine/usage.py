"""The memory that this process has needed."""

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: most allocated on a GPU since the last reset, or most resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
