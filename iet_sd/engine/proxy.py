"""A proxy: the model of one shard, and all that lives through the rounds with it.

One set of parameters is live on the device; proxies take turns in it. Between turns a proxy's
weights, moments of the optimizer and moving average wait in a store on the CPU or the disk, so K
proxies need one model on the device. What waits is contiguous; the live parameters may be laid out
otherwise (``--channels_last``).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import Parameter

from iet_sd.config import TrainingConfig
from iet_sd.engine import ema
from iet_sd.engine.optimizer import make_optimizer, no_moments, on_cpu, put_state, state_of
from iet_sd.engine.step import Memory
from iet_sd.engine.store import Store, Tensors
from iet_sd.method import agc
from iet_sd.models.adapter import of_text_encoder

WEIGHTS, MOMENTS, EMA = "weights/", "moments/", "ema/"


class Proxy:
    """Weights, optimizer, schedule, loss scale, moving average and memory of one shard."""

    def __init__(
        self,
        shard: int,
        store: Store,
        parameters: Mapping[str, Parameter],
        config: TrainingConfig,
        learning_rate: float,
        text_encoder_lr: float,
        total_updates: int,
        bank_bins: int,
        device: torch.device,
    ) -> None:
        """``parameters`` are the live ones, shared by all proxies; ``total_updates`` over a run."""
        self.shard = shard
        self._store = store
        self._store[shard] = {}
        self.parameters = dict(parameters)
        groups = parameter_groups(self.parameters, learning_rate, text_encoder_lr)
        self.optimizer = make_optimizer(groups, config, learning_rate)
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=total_updates,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
        self.max_grad_norm = config.max_grad_norm
        self.memory = Memory(agc.empty_bank(bank_bins))
        self.ema: Tensors = {}
        """Moving average of the live weights; nothing without ``use_ema``."""
        self._offload_ema, self._foreach_ema = config.offload_ema, config.foreach_ema

    @property
    def learning_rate(self) -> float:
        """The rate of the next update, of the UNet."""
        return self.optimizer.param_groups[0]["lr"]

    def enter(self, weights: Tensors, moments: Tensors, average: Tensors | None = None) -> None:
        """Take the live parameters over, from what waits; what all proxies share for the rest.

        ``moments`` by names ``PARAMETER/exp_avg``; where there are none either, the optimizer
        starts anew. ``average`` is that of the moving averages, if there are any.
        """
        waiting = self._store.pop(self.shard)
        copy_into(self.parameters, part(waiting, WEIGHTS) or weights)
        put_state(
            self.optimizer,
            self.parameters,
            part(waiting, MOMENTS)
            or _copies(moments)
            or no_moments(self.optimizer, self.parameters),
        )
        own = part(waiting, EMA) or _copies(average or {})
        self.ema = ema.placed(own, self.parameters, self._offload_ema)

    def leave(self) -> Tensors:
        """Hand the live parameters back; returns all there is to `keep`, or drop."""
        self.drop_gradient()
        tensors = self.tensors()
        self.optimizer.state.clear()
        self.ema = {}
        return tensors

    def keep(self, tensors: Tensors) -> None:
        """What waits until the next turn, of what `leave` or `tensors` gave."""
        self._store[self.shard] = tensors

    def tensors(self) -> Tensors:
        """Own weights, moments and average on the CPU: a copy of the live ones, or what waits.

        Names are ``weights/PARAMETER``, ``moments/PARAMETER/exp_avg`` and ``ema/PARAMETER``; any
        of these may be absent where all proxies have the same.
        """
        if self.shard in self._store:
            return self._store[self.shard]
        moments = state_of(self.optimizer, self.parameters)
        return {
            **{WEIGHTS + name: t for name, t in live_weights(self.parameters).items()},
            **{MOMENTS + name: t for name, t in moments.items()},
            **{EMA + name: t for name, t in on_cpu(self.ema).items()},
        }

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, scaled against fp16 underflow where needed."""
        self.scaler.scale(loss).backward()

    def clip_gradient(self, scale: float = 1.0) -> Tensor:
        """Scale and clip the gradient; returns its norm before, on the device.

        No update may follow if that is not finite.
        """
        self.scaler.unscale_(self.optimizer)
        if scale != 1:
            # None where the loss does not depend on it, as at the end of SDXL's text encoder.
            gradients = (parameter.grad for parameter in self.parameters.values())
            torch._foreach_mul_([g for g in gradients if g is not None], scale)
        return torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)

    def drop_gradient(self) -> None:
        """Have no gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """One update of optimizer, schedule and moving average by the gradient."""
        # Not by the scaler, which would ask the device once more whether the gradient is finite.
        self.optimizer.step()
        self.scaler.update()
        self._count_update()
        self.drop_gradient()

    def leave_out(self) -> None:
        """Drop a clipped gradient that says nothing of the loss scale."""
        self.drop_gradient()
        self.scaler.update(self.scaler.get_scale())

    def overflowed(self) -> bool:
        """Drop a gradient that is not finite; returns whether fp16 explains it.

        The loss scale is then lowered instead. It is no explanation where there is none to lower:
        halved for ever it would be 0, and no gradient finite any more.
        """
        self.drop_gradient()
        self.scaler.update()
        if self.scaler.get_scale() >= 1:  # so it is without fp16
            return self.scaler.is_enabled()
        self.scaler.update(1.0)
        return False

    def update_with_zero_gradient(self) -> None:
        """The authors' update after a batch with nothing kept: moments and decay still act."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        # Past the loss scale, which has nothing to say of a zero.
        self.optimizer.step()
        self._count_update()
        self.drop_gradient()

    def _count_update(self) -> None:
        """What follows the optimizer; the schedule counts the updates of all rounds."""
        self.lr_scheduler.step()
        ema.follow(self.ema, self.parameters, self.lr_scheduler.last_epoch, self._foreach_ema)


def parameter_groups(
    parameters: Mapping[str, Parameter], learning_rate: float, text_encoder_lr: float
) -> list[dict[str, Any]]:
    """The optimizer's groups: the UNet's parameters, then those of text encoders, if any."""
    groups = []
    for of_text, rate in ((False, learning_rate), (True, text_encoder_lr)):
        # A list: whatever goes through an iterator a second time finds nothing there.
        chosen = [p for name, p in parameters.items() if of_text_encoder(name) is of_text]
        if chosen:
            groups.append({"params": chosen, "lr": rate})
    return groups


def live_weights(parameters: Mapping[str, Parameter]) -> Tensors:
    """A copy of the parameters on the CPU."""
    return on_cpu({name: p.detach() for name, p in parameters.items()}, copy=True)


@torch.no_grad()
def copy_into(parameters: Mapping[str, Parameter], weights: Mapping[str, Tensor]) -> None:
    """Write ``weights`` into the parameters' own storage.

    On a GPU maybe later than on return, if they are in pinned memory, but before any other work.
    """
    for name, parameter in parameters.items():
        parameter.copy_(weights[name], non_blocking=parameter.is_cuda)


@contextmanager
def averaged(
    parameters: Mapping[str, Parameter], average: Tensors, weights: Tensors
) -> Iterator[None]:
    """The live parameters hold ``average`` meanwhile, if there is one, and then ``weights``."""
    if average:
        copy_into(parameters, average)
    try:
        yield
    finally:
        if average:
            copy_into(parameters, weights)


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors of names with ``prefix``, by names without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}
