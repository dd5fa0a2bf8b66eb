"""A proxy: the model of one shard, and all that lives through the rounds with it.

One set of parameters is live on the device; proxies take turns in it. Between turns the weights and
the optimizer's moments of a proxy wait in a store on the CPU or the disk, so K proxies need one
model on the device.
"""

from collections.abc import Mapping

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import Parameter

from iet_sd.config import TrainingConfig
from iet_sd.engine.step import Memory
from iet_sd.engine.store import Store, Tensors
from iet_sd.method import agc

WEIGHTS, MOMENTS = "weights/", "moments/"


class Proxy:
    """Weights, optimizer, learning-rate schedule, loss scale and memory of one shard."""

    def __init__(
        self,
        shard: int,
        store: Store,
        parameters: Mapping[str, Parameter],
        config: TrainingConfig,
        learning_rate: float,
        total_updates: int,
        bank_bins: int,
        device: torch.device,
    ) -> None:
        """``parameters`` are the live ones, shared by all proxies; ``total_updates`` over a run."""
        self.shard = shard
        self._store = store
        self._store[shard] = {}
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

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def enter(self, weights: Tensors, moments: Tensors) -> None:
        """Take the live parameters over, from what waits; ``weights``, ``moments`` for the rest.

        ``moments`` by names ``PARAMETER/exp_avg``; where there are none either, the optimizer
        starts anew.
        """
        waiting = self._store.pop(self.shard)
        copy_into(self.parameters, part(waiting, WEIGHTS) or weights)
        given = (
            part(waiting, MOMENTS)
            or {name: t.clone() for name, t in moments.items()}
            or no_moments(self.parameters)
        )
        for key, value in given.items():
            name, _, moment = key.rpartition("/")
            # AdamW keeps its step counts on the CPU by choice.
            value = value if moment == "step" else value.to(self.device)
            self.optimizer.state[self.parameters[name]][moment] = value

    def leave(self) -> Tensors:
        """Hand the live parameters back; returns all there is to `keep`, or drop."""
        self.drop_gradient()
        tensors = self.tensors()
        self.optimizer.state.clear()
        return tensors

    def keep(self, tensors: Tensors) -> None:
        """What waits until the next turn, of what `leave` or `tensors` gave."""
        self._store[self.shard] = tensors

    def tensors(self) -> Tensors:
        """Own weights and moments on the CPU: a copy of the live ones, or what waits.

        Names are ``weights/PARAMETER`` and ``moments/PARAMETER/exp_avg``; either may be absent
        where all proxies have the same.
        """
        if self.shard in self._store:
            return self._store[self.shard]
        return {
            **{WEIGHTS + name: t for name, t in live_weights(self.parameters).items()},
            **{
                f"{MOMENTS}{name}/{key}": value.to("cpu")
                for name, parameter in self.parameters.items()
                for key, value in self.optimizer.state[parameter].items()
            },
        }

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, scaled against fp16 underflow where needed."""
        self.scaler.scale(loss).backward()

    def clip_gradient(self, scale: float = 1.0) -> bool:
        """Scale and clip the gradient; returns whether an update may follow.

        It may not if the gradient is not finite, but under fp16, where `update` sees to that.
        """
        self.scaler.unscale_(self.optimizer)
        if scale != 1:
            for parameter in self.parameters.values():
                parameter.grad *= scale
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)
        return self.scaler.is_enabled() or bool(norm.isfinite())

    def drop_gradient(self) -> None:
        """Have no gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> bool:
        """One update of optimizer and schedule by the gradient.

        Returns False if there was none, since an fp16 gradient overflowed and the loss scale was
        lowered instead.
        """
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        updated = self.scaler.get_scale() >= scale
        if updated:
            self.lr_scheduler.step()
        self.drop_gradient()
        return updated

    def update_with_zero_gradient(self) -> None:
        """The authors' update after a batch with nothing kept: moments and decay still act."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        # Past the loss scale, which has nothing to say of a zero.
        self.optimizer.step()
        self.lr_scheduler.step()
        self.drop_gradient()


def live_weights(parameters: Mapping[str, Parameter]) -> Tensors:
    """A copy of the parameters on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def no_moments(parameters: Mapping[str, Parameter]) -> Tensors:
    """The moments of a new optimizer."""
    moments = {}
    for name, parameter in parameters.items():
        moments[f"{name}/step"] = torch.tensor(0.0)
        moments[f"{name}/exp_avg"] = torch.zeros_like(parameter)
        moments[f"{name}/exp_avg_sq"] = torch.zeros_like(parameter)
    return moments


@torch.no_grad()
def copy_into(parameters: Mapping[str, Parameter], weights: Mapping[str, Tensor]) -> None:
    """Write ``weights`` into the parameters' own storage."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors of names with ``prefix``, by names without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
