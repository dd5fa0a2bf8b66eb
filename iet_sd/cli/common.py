"""What all commands share: errors as one line, and the processes they run in."""

import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from iet_sd.errors import PushFailed, Stopped, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("iet_sd")
# Disk full, over quota, read-only, not allowed.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def status_of(command: Callable[[], None], way_on: str) -> int:
    """Run a command; its exit status. A user's mistake is one line and status 2.

    ``way_on`` says what to do once there is room on the disk again.
    """
    # Threads that wait for their next piece of work else do so at full speed, and take the cores
    # from those that have some. OpenMP reads this when torch is loaded, which no command is yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rank = os.environ.get("RANK", "0")
    prefix = f"error{'' if rank == '0' else f' (process {rank})'}"
    try:
        command()
    except UserError as error:
        print(f"{prefix}: {error}", file=sys.stderr)
        return 2
    except PushFailed as error:
        print(f"{prefix}: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        if _errno(error) not in _CANNOT_WRITE:
            raise
        print(f"{prefix}: {error}. {way_on}", file=sys.stderr)
        return 1
    except Stopped as stop:
        # A launcher ends all processes when one has ended, and those that clean up after it too:
        # why they end is what they have found out, not its signal.
        if mistake := _user_error_before(stop):
            print(f"{prefix}: {mistake}", file=sys.stderr)
            return 2
        print(stop, file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print(f"Stopped by {signal.SIGINT.name} at once.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _user_error_before(stop: Stopped) -> UserError | None:
    """The user's mistake that was on its way out when the signal came."""
    before = stop.__context__
    while before is not None and not isinstance(before, UserError):
        before = before.__context__
    return before


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors' own exception has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def make_accelerator(
    mixed_precision: str | None, timeout: timedelta, **options: Any
) -> "Accelerator":
    """Join the processes of this run, on their devices, and set up logging."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # Before Accelerator, which sets this variable too.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    one_thread_by_default = launched and os.environ.get("OMP_NUM_THREADS") == "1"
    on_cpu = not torch.accelerator.is_available()
    _check_precision(mixed_precision, on_cpu)
    _check_launch()
    # NCCL would else abort this process when another is gone, before it can say what to do.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    accelerator = Accelerator(
        # Else several processes on a machine without a GPU would each train alone.
        cpu=on_cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        mixed_precision=mixed_precision,
        **options,
    )
    _set_up_logging(accelerator.is_main_process)
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) not in ("no", ""):
        logger.warning("accelerate's dynamo_backend %s is left out: see --torch_compile", backend)
    if one_thread_by_default and on_cpu and accelerator.num_processes == 1:
        _use_all_cores()
    return accelerator


def _check_precision(flag: str | None, on_cpu: bool) -> None:
    """Errors: `UserError` for a precision that this machine or this program does not have."""
    precision = flag or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"--mixed_precision {precision}: expected no, fp16 or bf16.")
    if precision == "fp16" and on_cpu:
        raise UserError("--mixed_precision fp16 needs a GPU, and there is none: use no or bf16.")


def _check_launch() -> None:
    """Errors: `UserError` for what accelerate's own configuration asks for and is not done here."""
    asks = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
    for variable, name in asks.items():
        if os.environ.get(f"ACCELERATE_USE_{variable}", "").lower() in ("true", "1"):
            raise UserError(
                f"accelerate's configuration asks for {name}, and each process here trains whole "
                "proxies. Run `accelerate config`, or launch with a --config_file without it."
            )


def _use_all_cores() -> None:
    """Undo accelerate's default of one thread for a lone process on a CPU.

    Any other number is the user's, by OMP_NUM_THREADS or --num_cpu_threads_per_process.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    logger.info("using %d threads, not the one that accelerate sets", torch.get_num_threads())


def _set_up_logging(is_main_process: bool) -> None:
    """Ours at INFO on the main process; libraries at WARNING, and without bars of their own.

    What others find it finds too, but for what becomes of their shards.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)
    logging.getLogger("iet_sd.shards").setLevel(logging.INFO)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
