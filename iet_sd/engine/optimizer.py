"""The optimizer of a proxy, and its state as named tensors that can wait anywhere.

AdamW of PyTorch, in one kernel where asked for, or that of bitsandbytes with moments of 8 bits
(Dettmers et al. 2022, arXiv 2110.02861). What an optimizer remembers of a parameter is taken as it
is, whatever its names; tensors that wait are contiguous, whatever the parameters' memory format.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from iet_sd.config import TrainingConfig
from iet_sd.engine.store import Tensors
from iet_sd.errors import UserError


def check_optimizer(config: TrainingConfig) -> None:
    """Errors: `UserError` for ``use_8bit_adam`` where it plainly cannot work; needs no model."""
    if not config.use_8bit_adam:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes, or train "
            "without the flag."
        )
    if not torch.cuda.is_available():
        raise UserError(
            "--use_8bit_adam needs a CUDA GPU, and PyTorch sees none: train without the flag."
        )


def make_optimizer(
    groups: list[dict[str, Any]], config: TrainingConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW for parameter groups; its state is made by the first update of each parameter."""
    settings = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(groups, **settings)
    fused = config.fused_adamw
    if fused is None:
        fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
    # None, since False would also rule out the kernels for lists of tensors.
    return torch.optim.AdamW(groups, **settings, fused=fused or None)


def state_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> Tensors:
    """What the optimizer remembers, by names ``PARAMETER/exp_avg``, as `on_cpu` gives it.

    Whole numbers become int64 tensors.
    """
    return on_cpu(
        {
            f"{name}/{key}": torch.as_tensor(value)
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )


def put_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], state: Tensors
) -> None:
    """Have the optimizer remember ``state``, as `state_of` gave it; tensors on the CPU are used."""
    # One kernel for all parameters counts where they are; others count on the CPU.
    counts_on_device = optimizer.defaults.get("fused")
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        if value.ndim or (counts_on_device and value.is_floating_point()):
            remembered = beside(parameter, value)
        else:
            remembered = value if value.is_floating_point() else int(value)
        optimizer.state[parameter][entry] = remembered


def no_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> Tensors:
    """The state of a new optimizer: that of AdamW, and of others none, since they make their own.

    AdamW would too, but moments that are averaged must be there before the first update.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return {}
    moments = {}
    for name, parameter in parameters.items():
        moments[f"{name}/step"] = torch.tensor(0.0)
        moments[f"{name}/exp_avg"] = torch.zeros_like(parameter)
        moments[f"{name}/exp_avg_sq"] = torch.zeros_like(parameter)
    return moments


def on_cpu(tensors: Mapping[str, Tensor], copy: bool = False) -> Tensors:
    """The tensors on the CPU, contiguous; of those that are so already a copy only if asked for.

    From a GPU all are on their way at once, into pinned memory, and have arrived on return.
    """
    found = {
        name: tensor.contiguous().to("cpu", copy=copy, non_blocking=tensor.is_cuda)
        for name, tensor in tensors.items()
    }
    for device in {t.device for t in tensors.values() if t.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return found


def beside(parameter: Parameter, value: Tensor) -> Tensor:
    """``value`` on the parameter's device, and as that lies in memory if it is of its shape.

    A kernel that goes through both by address takes it for granted.
    """
    value = value.to(parameter.device, non_blocking=parameter.is_cuda)
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
