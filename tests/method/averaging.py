"""Models to average, their mean by hand, and what a mean holds."""

import gc
import types

import numpy as np
import torch

from iet_sd.method.aggregate import StreamingMean

SHAPES = {"conv.weight": (3, 2, 3, 3), "linear.weight": (5, 4), "scale": ()}
PAIR = ("lora_A", "lora_B")


def draw_models(count: int, shapes=None, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(shape, generator=generator)
            for name, shape in (shapes or SHAPES).items()
        }
        for _ in range(count)
    ]


def draw_factors(count: int, *, rank=2, inputs=6, outputs=5, seed=0):
    return draw_models(count, {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}, seed)


def filled(mean, models):
    for number, model in enumerate(models):
        mean.add(number, model)
    return mean


def stream(models, weights):
    return filled(StreamingMean(weights), models).result()


def mean_by_hand(models, weights) -> dict[str, np.ndarray]:
    return {
        name: sum(
            w * model[name].double().numpy() for model, w in zip(models, weights, strict=True)
        )
        for name in models[0]
    }


def numbers_held(root: object) -> int:
    """Elements of all tensors that can be reached from ``root``."""
    code = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    found, queue = {}, [root]
    while queue:
        item = queue.pop()
        if id(item) in found or isinstance(item, code):
            continue
        found[id(item)] = item
        if not isinstance(item, torch.Tensor):
            queue += gc.get_referents(item)
    return sum(
        t.untyped_storage().nbytes() // t.element_size()
        for t in found.values()
        if isinstance(t, torch.Tensor)
    )
