"""A proxy: the model of one shard, and all that lives through the rounds with it.

One set of parameters is live on the device; proxies take turns in it. Between turns a proxy keeps
its weights and its optimizer's moments on the CPU, so K proxies need one model on the device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import Parameter

from iet_sd.config import TrainingConfig
from iet_sd.engine.step import Memory
from iet_sd.method import agc

Weights = dict[str, Tensor]


class Proxy:
    """Weights, optimizer, learning-rate schedule, loss scale and memory of one shard."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        config: TrainingConfig,
        learning_rate: float,
        total_updates: int,
        bank_bins: int,
        device: torch.device,
    ) -> None:
        """``parameters`` are the live ones, shared by all proxies; ``total_updates`` over a run."""
        self.parameters = dict(parameters)
        self.device = device
        self.optimizer = torch.optim.AdamW(
            # A list: clipping and AdamW both go through it, and an iterator ends after the first.
            list(self.parameters.values()),
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=total_updates,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
        self.max_grad_norm = config.max_grad_norm
        self.memory = Memory(agc.empty_bank(bank_bins))
        self.weights: Weights | None = None

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def enter(self, weights: Mapping[str, Tensor]) -> None:
        """Take the live parameters over: own weights if it has any, else ``weights``."""
        copy_into(self.parameters, self.weights if self.weights is not None else weights)
        self._move_optimizer(self.device)

    def leave(self) -> Weights:
        """Hand the live parameters back; returns this proxy's weights on the CPU."""
        self.optimizer.zero_grad(set_to_none=True)
        self._move_optimizer(torch.device("cpu"))
        self.weights = live_weights(self.parameters)
        return self.weights

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, scaled against fp16 underflow where needed."""
        self.scaler.scale(loss).backward()

    def update(self, gradient_scale: float = 1.0) -> bool:
        """Scale and clip the gradient, and do one update of optimizer and schedule.

        Returns False if there was none, since an fp16 gradient overflowed and the loss scale was
        lowered instead.
        """
        self.scaler.unscale_(self.optimizer)
        if gradient_scale != 1:
            for parameter in self.parameters.values():
                parameter.grad *= gradient_scale
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        updated = self.scaler.get_scale() >= scale
        if updated:
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return updated

    def update_with_zero_gradient(self) -> None:
        """The authors' update after a batch with nothing kept: moments and decay still act."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        # Past the loss scale, which has nothing to say of a zero.
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name."""
        return {
            name: self.optimizer.state[parameter]
            for name, parameter in self.parameters.items()
            if parameter in self.optimizer.state
        }

    def load_moments(self, moments: Mapping[str, dict[str, Any]]) -> None:
        """Put back what `moments` gave."""
        for name, state in moments.items():
            self.optimizer.state[self.parameters[name]] = dict(state)

    def _move_optimizer(self, device: torch.device) -> None:
        for state in self.optimizer.state.values():
            for key, value in state.items():
                # AdamW keeps its step counts on the CPU by choice.
                if isinstance(value, Tensor) and key != "step":
                    state[key] = value.to(device)


def live_weights(parameters: Mapping[str, Parameter]) -> Weights:
    """A copy of the parameters on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


@torch.no_grad()
def copy_into(parameters: Mapping[str, Parameter], weights: Mapping[str, Tensor]) -> None:
    """Write ``weights`` into the parameters' own storage."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
