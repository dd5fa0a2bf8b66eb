"""Kept samples that wait for a second pass: who has it when, and what the UNet sees of them.

Shapes: N samples of the data, Q samples of a second pass.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from iet_sd.config import MethodConfig
from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.shards import Visit
from iet_sd.engine.objective import Objective, Prepared
from iet_sd.method import taa


class Pending(NamedTuple):
    """A kept sample that waits for its second pass."""

    index: int
    timestep: int
    seed: int
    strength: float
    augmented: bool = True
    """Whether it is to be seen augmented, or as it was scored."""


def take_or_drop(queue: list[Pending], batch_size: int) -> tuple[list[Pending], int]:
    """A full batch of the queue, and how many are then dropped; nothing until there is one.

    The authors' code's rule (``taa_leftovers drop``).
    """
    if len(queue) < batch_size:
        return [], 0
    taken, dropped = queue[:batch_size], len(queue) - batch_size
    queue.clear()
    return taken, dropped


def take(
    queue: list[Pending],
    sizes_N: Sequence[Hashable],
    beside: Sequence[int],
    batch_size: int,
    least: float,
) -> list[Pending]:
    """What to train of the queue in one pass; the rest waits in it.

    The oldest, up to ``batch_size`` with the samples of indices ``beside``, which have a pass
    anyway. Of a size of images that none of these has, only if at least ``least`` of it wait.
    """
    present = {sizes_N[index] for index in beside}
    of_size = Counter(sizes_N[p.index] for p in queue)
    taken, waiting = [], []
    for p in queue:
        size = sizes_N[p.index]
        has_pass = size in present or of_size[size] >= least
        fits = len(beside) + len(taken) < batch_size
        (taken if has_pass and fits else waiting).append(p)
    queue[:] = waiting
    return taken


def augmentation(magnitude: float, method: MethodConfig) -> Augmentation:
    """How an image is augmented at a magnitude."""
    return Augmentation(magnitude, method.taa_num_ops, method.taa_operations, method.taa_variants)


def prepare(
    objective: Objective, taken: list[Pending], method: MethodConfig, dataset: TrainingImages
) -> list[Prepared]:
    """What the UNet sees of the samples: images of one size are one batch, encoded at once.

    Augmented ones have new noise; others the draws with which they were scored.
    """
    strength_Q = torch.tensor([p.strength for p in taken if p.augmented])
    magnitude_Q = iter(
        taa.magnitudes(
            strength_Q, method.taa_magnitude, method.taa_strength, method.taa_variants > 0
        )
    )
    looks = [
        (Visit(p.index, p.seed), augmentation(next(magnitude_Q), method) if p.augmented else None)
        for p in taken
    ]
    batches = defaultdict(list)
    for p, example in zip(taken, dataset.examples(looks), strict=True):
        batches[example["target_size"], p.augmented].append((p, example))
    parts = []
    for (_, augmented), same in batches.items():
        batch = collate([example for _, example in same])
        timesteps = torch.tensor([p.timestep for p, _ in same])
        if augmented and method.taa_redraw_timestep:
            timesteps = objective.draw_timesteps(batch["seed"].tolist(), "augmented/timestep")
        parts.append(objective.prepare(batch, timesteps, "augmented" if augmented else "score"))
    return parts
