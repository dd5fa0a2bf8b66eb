"""One step of a proxy: score a batch, decide what to train on, and leave the gradient.

Data flows one way: batch -> latents, text embeddings -> timesteps, noise -> loss per sample ->
(detached) comparison with the bank -> keep mask, strength, new bank -> mean over what is trained,
with a second, augmented pass for samples near the threshold -> gradient. No I/O but for the
augmented images, no collective, no optimizer. Shapes: B samples of a batch, Q of the second pass.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from iet_sd.config import MethodConfig
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.shards import Visit
from iet_sd.engine.objective import Objective
from iet_sd.method import agc, taa


class Pending(NamedTuple):
    """A kept sample that waits for its augmented pass."""

    index: int
    timestep: int
    seed: int
    strength: float


@dataclass
class Counts:
    """What a step, round or run did; all plain sums."""

    steps: int = 0
    """Batches' worth of scoring, one per attempted update."""
    updates: int = 0
    """Optimizer updates."""
    scored: int = 0
    """Samples compared with the bank."""
    skipped: int = 0
    """Samples below the threshold."""
    trained: int = 0
    """Samples whose loss entered an update, augmented or not."""
    augmented: int = 0
    """Of these, the ones trained on an augmented image."""
    dropped: int = 0
    """Kept samples that were thrown away (``taa_leftovers drop``)."""
    forward: int = 0
    """Samples through the UNet, forward."""
    backward: int = 0
    """Samples through the UNet, backward."""
    encoded: int = 0
    """Images through the VAE encoder."""
    nonfinite: int = 0
    """Batches left out for a loss or gradient that was not finite (``on_nonfinite``)."""
    loss_sum: float = 0.0
    """Sum of the unweighted losses of the scored samples."""
    strength_sum: float = 0.0
    """Sum of the strengths of the augmented samples."""

    def __iadd__(self, other: "Counts") -> "Counts":
        """Add another count to this one."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        return self


@dataclass
class Memory:
    """What the method remembers of a shard: the bank, and kept samples not yet trained."""

    bank: agc.Bank
    queue: list[Pending] = field(default_factory=list)


class Outcome(NamedTuple):
    """What a batch came to."""

    counts: Counts
    skipped: Tensor
    """Indices of the skipped samples, int64."""
    trained: list[tuple[int, int]]
    """Index and timestep of every sample in the gradient."""


class Decision(NamedTuple):
    """What becomes of each sample of a batch; on the CPU."""

    keep_B: Tensor
    """bool: not skipped."""
    second_pass_B: Tensor
    """bool: kept, and near enough to the threshold to be augmented."""
    strength_B: Tensor
    """float32: strength of the augmentation."""
    bank: agc.Bank
    """The bank after the batch."""


def decide(
    loss_B: Tensor, timesteps_B: Tensor, bank: agc.Bank, method: MethodConfig, timesteps: int
) -> Decision:
    """AGC and TAA on a batch of losses; the bank is read for all of it before it is updated."""
    bins_B = agc.bin_of(timesteps_B, len(bank.value_T), timesteps)
    reference_B = agc.reference(bank, bins_B, method.bank_decay, method.bank_bias)
    keep_B = torch.ones_like(loss_B, dtype=torch.bool)
    strength_B = torch.zeros_like(loss_B)
    second_pass_B = ~keep_B
    if method.agc:
        keep_B = agc.keep_mask(loss_B, reference_B, method.agc_threshold)
    if method.taa:
        strength_B = taa.strength(loss_B, reference_B, method.agc_threshold, method.taa_sharpness)
        second_pass_B = keep_B & (strength_B >= method.taa_min_strength)
    return Decision(
        keep_B,
        second_pass_B,
        strength_B,
        agc.update_bank(bank, bins_B, loss_B, method.bank_decay),
    )


def take(queue: list[Pending], batch_size: int, leftovers: str) -> tuple[list[Pending], int]:
    """What to train of the queue now, and how many of it to drop; the queue is left accordingly.

    ``train``: all of it. ``drop``: nothing until a batch is full, then one batch, and the rest is
    lost, as in the authors' code.
    """
    if leftovers == "drop" and len(queue) < batch_size:
        return [], 0
    taken = queue[:batch_size] if leftovers == "drop" else queue[:]
    dropped = len(queue) - len(taken)
    queue.clear()
    return taken, dropped


def accumulate_gradient(
    objective: Objective,
    batch: dict[str, Tensor],
    memory: Memory,
    method: MethodConfig,
    dataset: TrainingImages,
    backward: Callable[[Tensor], None],
    on_nonfinite: Callable[[str, list[tuple[int, int]]], None],
    batch_size: int = 0,
) -> Outcome:
    """Score a batch and call ``backward`` on the sum of losses over what it gives to train on.

    ``memory`` is updated. A pass with a loss that is not finite is left out, the bank included, if
    ``on_nonfinite`` returns: it is told "loss", and index and timestep of the samples.
    ``batch_size`` is that of a full batch, if this one may be smaller.
    """
    timesteps_B = objective.draw_timesteps(batch["seed"].tolist(), "score/timestep")
    size = len(timesteps_B)
    # With no strength below the minimum every kept sample has a second pass: only score.
    trains_directly = not method.taa or method.taa_min_strength > 0
    with torch.set_grad_enabled(trains_directly):
        loss_B = objective.loss(batch, timesteps_B, "score")
    seen_B = loss_B.detach().cpu()
    passes = objective.forward_passes
    counts = Counts(steps=1, forward=size * passes, encoded=size)
    samples = list(zip(batch["index"].tolist(), timesteps_B.tolist(), strict=True))
    # A NaN would otherwise pass for an abnormally low loss and be skipped in silence.
    if bad := chosen(samples, ~seen_B.isfinite()):
        on_nonfinite("loss", bad)
        counts.nonfinite = 1
        return Outcome(counts, batch["index"][:0], [])
    decision = decide(
        seen_B, timesteps_B, memory.bank, method, objective.components.num_train_timesteps
    )
    memory.bank = decision.bank
    memory.queue += [
        Pending(*samples[i], int(batch["seed"][i]), float(decision.strength_B[i]))
        for i in decision.second_pass_B.nonzero().flatten().tolist()
    ]
    taken, counts.dropped = take(memory.queue, max(size, batch_size), method.taa_leftovers)
    direct_B = decision.keep_B & ~decision.second_pass_B
    trained = chosen(samples, direct_B)
    counts.scored = size
    counts.skipped = size - int(decision.keep_B.sum())
    counts.loss_sum = float(seen_B.sum())
    if trained:
        weighted_B = objective.weight(loss_B, timesteps_B)
        backward((weighted_B * direct_B.to(loss_B.device)).sum())
        counts.backward += size
        del weighted_B
    if taken:
        # After the first graph is freed, so that two passes need the memory of one.
        del loss_B
        loss_Q, samples = augmented_loss(objective, taken, method, dataset)
        counts.forward += len(taken) * passes
        counts.encoded += len(taken)
        if bad := chosen(samples, ~loss_Q.detach().cpu().isfinite()):
            on_nonfinite("loss", bad)
            counts.nonfinite = 1
        else:
            backward(loss_Q.sum())
            trained += samples
            counts.backward += len(taken)
            counts.augmented = len(taken)
            counts.strength_sum = sum(pending.strength for pending in taken)
    counts.trained = len(trained)
    return Outcome(counts, batch["index"][~decision.keep_B], trained)


def augmented_loss(
    objective: Objective, taken: list[Pending], method: MethodConfig, dataset: TrainingImages
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The loss of the samples on augmented images, with new noise, weighted: float32 (Q,).

    And the index and timestep of each, in the same order: that of ``taken``, but images of one size
    together, since they are one batch.
    """
    strength_Q = torch.tensor([pending.strength for pending in taken])
    magnitude_Q = taa.magnitudes(strength_Q, method.taa_magnitude, method.taa_strength)
    by_size = defaultdict(list)
    for p, magnitude in zip(taken, magnitude_Q, strict=True):
        example = dataset.example(Visit(p.index, p.seed), magnitude, method.taa_num_ops)
        by_size[example["target_size"]].append((p, example))
    losses, samples = [], []
    for same in by_size.values():
        batch = collate([example for _, example in same])
        if method.taa_redraw_timestep:
            timesteps = objective.draw_timesteps(batch["seed"].tolist(), "augmented/timestep")
        else:
            timesteps = torch.tensor([p.timestep for p, _ in same])
        loss = objective.loss(batch, timesteps, "augmented")
        losses.append(objective.weight(loss, timesteps))
        samples += zip(batch["index"].tolist(), timesteps.tolist(), strict=True)
    return torch.cat(losses), samples


def chosen(samples: list[tuple[int, int]], mask_B: Tensor) -> list[tuple[int, int]]:
    """The samples at which ``mask_B`` is true."""
    return [samples[i] for i in mask_B.nonzero().flatten().tolist()]
