"""The optimizer of a proxy, and its state as named tensors that can wait anywhere.

AdamW of PyTorch, or that of bitsandbytes with moments of 8 bits (Dettmers et al. 2022, arXiv
2110.02861). What an optimizer remembers of a parameter is taken as it is, whatever its names.
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
    adamw = torch.optim.AdamW
    if config.use_8bit_adam:
        adamw = importlib.import_module("bitsandbytes").optim.AdamW8bit
    return adamw(
        groups,
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def state_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> Tensors:
    """What the optimizer remembers, by names ``PARAMETER/exp_avg``, on the CPU; not a copy there.

    Whole numbers become int64 tensors.
    """
    return {
        f"{name}/{key}": torch.as_tensor(value).to("cpu")
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def put_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], state: Tensors
) -> None:
    """Have the optimizer remember ``state``, as `state_of` gave it; tensors on the CPU are used."""
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][entry] = _remembered(value, parameter.device)


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


def _remembered(value: Tensor, device: torch.device) -> Tensor | int:
    """An entry as the optimizer had it: single numbers stay on the CPU, where it counts."""
    if value.ndim:
        return value.to(device)
    return value if value.is_floating_point() else int(value)
