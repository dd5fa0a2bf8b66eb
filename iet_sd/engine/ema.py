"""The exponential moving average of a proxy's weights, by the rule of diffusers' `EMAModel`.

A proxy has an average of its own, which goes on over all rounds. Where proxies are averaged, so
are their averages, with the same weights: both are sums of weights of the same training. A proxy
that made fewer updates in the round counts by its weight all the same, and its next decay follows
from its own updates.
"""

from collections.abc import Mapping

import torch
from torch.nn import Parameter

from iet_sd.engine.optimizer import beside
from iet_sd.engine.store import Tensors

MAX_DECAY = 0.9999


def decay_of(update: int) -> float:
    """The decay at update number ``update`` of a proxy, counted from 1: 0, 2/11, 3/12, ..."""
    return min(update / (9 + update), MAX_DECAY) if update > 1 else 0.0


@torch.no_grad()
def follow(
    average: Tensors, parameters: Mapping[str, Parameter], update: int, foreach: bool
) -> None:
    """average <- average - (1 - decay) (average - parameters), after update number ``update``.

    In place, whether the average lies on the parameters' device or on the CPU (``--offload_ema``);
    nothing for an empty one. ``foreach``: all tensors in one call, which rounds differently.
    """
    names = list(average)
    rest = 1 - decay_of(update)
    for chosen in [names] if foreach and names else [[name] for name in names]:
        live = [parameters[name] for name in chosen]
        moved = [average[name].to(p.device) for name, p in zip(chosen, live, strict=True)]
        if foreach:
            torch._foreach_sub_(moved, torch._foreach_sub(moved, live), alpha=rest)
        else:
            moved[0].sub_(rest * (moved[0] - live[0]))
        for name, tensor in zip(chosen, moved, strict=True):
            average[name].copy_(tensor)  # of a tensor into itself: does nothing


def placed(average: Tensors, parameters: Mapping[str, Parameter], offload: bool) -> Tensors:
    """The average where it is updated: beside the parameters, or in memory that a GPU reads."""
    if not offload:
        # Laid out alike, else one call for all tensors would be one for each.
        return {name: beside(parameters[name], tensor) for name, tensor in average.items()}
    return {
        name: tensor.pin_memory() if parameters[name].is_cuda else tensor
        for name, tensor in average.items()
    }
