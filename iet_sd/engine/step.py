"""One step of a proxy: score a batch, decide what to train on, and leave the gradient.

Data flows one way: batch -> latents, text embeddings -> timesteps, noise -> loss per sample ->
(detached) comparison with the bank -> keep mask, strength, new bank -> mean over what is trained ->
gradient. Samples far from the threshold are trained by the backward pass of their own scoring, or
in a second pass where that is cheaper; those near it in a second pass, on an augmented image. No
I/O but for these images, no collective, no optimizer. The device is waited for where losses decide
what it is given next, once a batch, and else not. Shapes: B samples of a batch, Q of a second pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from iet_sd.config import MethodConfig
from iet_sd.data.dataset import TrainingImages
from iet_sd.devices import on_device, read
from iet_sd.engine.objective import Objective, Prepared, join
from iet_sd.engine.second_pass import Pending, prepare, take, take_or_drop
from iet_sd.method import agc, taa

# With --refill_skipped: batches that are scored for one batch to train, at most.
MAX_BATCHES = 4
OnNonfinite = Callable[[str, list[tuple[int, int]]], None]


@dataclass
class Counts:
    """What a step, round or run did; all plain sums."""

    steps: int = 0
    """Batches' worth of scoring, one per attempted update."""
    batches: int = 0
    """Batches drawn to be scored."""
    updates: int = 0
    """Optimizer updates."""
    scored: int = 0
    """Samples whose loss was read, and compared with the bank where that decides anything."""
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
    """Batches and updates left out for a loss or gradient that is not finite (``on_nonfinite``)."""
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


class Losses(NamedTuple):
    """Of the samples of a pass, on the device, where they may still be under way."""

    samples: list[tuple[int, int]]
    """Index and timestep of each."""
    loss: Tensor
    """float32, without gradient."""
    are_scores: bool
    """Whether it is the pass that scores them."""


class Outcome(NamedTuple):
    """What a batch came to."""

    counts: Counts
    skipped: Tensor
    """Indices of the skipped samples, int64."""
    trained: list[tuple[int, int]]
    """Index and timestep of every sample in the gradient."""
    unread: list[Losses]
    """What nothing was decided by; where one is not finite, neither is the gradient."""


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


def accumulate_gradient(
    objective: Objective,
    batch: dict[str, Tensor],
    memory: Memory,
    method: MethodConfig,
    dataset: TrainingImages,
    backward: Callable[[Tensor], None],
    on_nonfinite: OnNonfinite,
    batch_size: int = 0,
    further: Iterable[dict[str, Tensor]] = (),
    may_wait: bool = False,
    so_far: Counts | None = None,
) -> Outcome:
    """Score a batch and call ``backward`` on the sum of losses over what it gives to train on.

    ``memory`` is updated. A batch that is not to be compared with the bank, since a loss in it is
    not finite, is left out if ``on_nonfinite`` returns: it is told "loss", and index and timestep
    of the samples.
    ``batch_size`` is that of a full batch, if this one may be smaller. ``further`` batches are
    scored until as many are kept (``refill_skipped``). Kept samples stay in the queue for a later
    call by ``taa_leftovers``, or if they ``may_wait``. By ``so_far``, what has been done with
    batches like this one, it is foreseen how much of it its own pass will train.
    """
    full, waiting = max(len(batch["seed"]), batch_size), len(memory.queue)
    counts, direct, beside, skipped, trained, unread = Counts(steps=1), [], [], [], [], []
    with_gradient = foresees_one_pass(method, so_far or Counts(), objective)
    for scored in chain([batch], islice(further, MAX_BATCHES - 1)):
        # Where batches are filled up those that wait come first, and the others may have to.
        room = full - waiting - len(beside) if method.refill_skipped else full
        done = score(objective, scored, memory, method, backward, on_nonfinite, room, with_gradient)
        counts += done.counts
        skipped.append(done.skipped)
        trained += done.trained
        unread += done.unread
        direct += done.direct
        beside += [index for part in done.direct for index, _ in part.samples]
        if len(beside) + len(memory.queue) >= full:
            break
    drops, sizes_N = method.taa_leftovers == "drop", dataset.source.sizes
    if drops:
        taken, counts.dropped = take_or_drop(memory.queue, full)
    else:
        waits = may_wait and method.score_pass != "separate" and not method.refill_skipped
        least = method.taa_min_batch * full if waits else 0
        taken = take(memory.queue, sizes_N, beside, full, least)
    while direct or taken:
        second, losses = train(objective, direct, taken, method, dataset, backward)
        counts += second
        trained += losses.samples
        unread.append(losses)
        direct, taken = [], []
        if not may_wait and not drops:
            taken = take(memory.queue, sizes_N, [], full, 0)
    counts.trained = len(trained)
    return Outcome(counts, torch.cat(skipped), trained, unread)


class Scored(NamedTuple):
    """What scoring a batch came to."""

    counts: Counts
    skipped: Tensor
    """Indices of the skipped samples, int64."""
    trained: list[tuple[int, int]]
    """Index and timestep of the samples whose gradient is there already."""
    direct: list[Prepared]
    """Samples that are to be trained as they were scored, if any."""
    unread: Sequence[Losses] = ()
    """Those of the batch, where they decide nothing."""


def score(
    objective: Objective,
    batch: dict[str, Tensor],
    memory: Memory,
    method: MethodConfig,
    backward: Callable[[Tensor], None],
    on_nonfinite: OnNonfinite,
    room: int,
    with_gradient: bool,
) -> Scored:
    """Score a batch, remember what it says, and train of it what costs least trained right away.

    Samples to augment join the queue, and so do samples to train as they are, beyond ``room``.
    A pass ``with_gradient`` costs more than one without, which can train nothing.
    """
    timesteps_B = objective.draw_timesteps(batch["seed"].tolist(), "score/timestep")
    with torch.set_grad_enabled(with_gradient):
        prepared = objective.prepare(batch, timesteps_B, "score")
        loss_B = objective.loss_of(prepared)
    size, samples, nothing = len(timesteps_B), prepared.samples, batch["index"][:0]
    encoded = size if "pixel_values" in batch else 0
    counts = Counts(batches=1, forward=size * objective.forward_passes, encoded=encoded)
    if not (method.agc or method.taa):
        backward(objective.weight(loss_B, timesteps_B).sum())
        counts.backward = size
        unread = Losses(samples, loss_B.detach(), are_scores=True)
        return Scored(counts, nothing, samples, [], [unread])
    (read_B,) = read(loss_B)
    # A NaN would otherwise pass for an abnormally low loss and be skipped in silence.
    if bad := chosen(samples, ~read_B.isfinite()):
        on_nonfinite("loss", bad)
        counts.nonfinite = 1
        return Scored(counts, nothing, [], [])
    decision = decide(
        read_B, timesteps_B, memory.bank, method, objective.components.num_train_timesteps
    )
    memory.bank = decision.bank
    counts.scored = size
    counts.skipped = size - int(decision.keep_B.sum())
    counts.loss_sum = float(read_B.sum())
    direct_B = decision.keep_B & ~decision.second_pass_B
    late_B = direct_B & (direct_B.cumsum(0) > room)
    memory.queue += [
        Pending(
            *samples[i],
            int(batch["seed"][i]),
            float(decision.strength_B[i]),
            bool(decision.second_pass_B[i]),
        )
        for i in (decision.second_pass_B | late_B).nonzero().flatten().tolist()
    ]
    direct_B &= ~late_B
    skipped, number = batch["index"][~decision.keep_B], int(direct_B.sum())
    if not number:
        return Scored(counts, skipped, [], [])
    if with_gradient and trains_all(method, number, size, objective):
        weighted_B = objective.weight(loss_B, timesteps_B)
        backward((weighted_B * on_device(direct_B, loss_B.device)).sum())
        counts.backward = size
        return Scored(counts, skipped, chosen(samples, direct_B), [])
    return Scored(counts, skipped, [], [objective.select(prepared, batch, direct_B)])


def foresees_one_pass(method: MethodConfig, so_far: Counts, objective: Objective) -> bool:
    """Whether a batch is likely to be trained by the pass that scores it: as those before it.

    By the shares of what was scored in this round, so a resumed run foresees the same.
    """
    # With no strength below the minimum every kept sample has a second pass: only score.
    has_direct = not method.taa or method.taa_min_strength > 0
    if not has_direct or method.score_pass == "separate" or method.refill_skipped:
        return False
    # Without AGC all is trained as it is scored, also after batches that were left out.
    if not method.agc or method.score_pass == "train" or not so_far.scored:
        return True
    return trains_all(method, so_far.trained - so_far.augmented, so_far.scored, objective)


def trains_all(method: MethodConfig, number: int, size: int, objective: Objective) -> bool:
    """Whether ``number`` of ``size`` scored samples are trained by a backward pass of them all.

    It costs ``size`` backward passes, and a pass of its own ``number`` forward and backward ones.
    """
    if method.score_pass == "train" or number == size:
        return True
    cost = objective.backward_cost
    return size * cost <= number * (1 + cost)


def train(
    objective: Objective,
    direct: list[Prepared],
    taken: list[Pending],
    method: MethodConfig,
    dataset: TrainingImages,
    backward: Callable[[Tensor], None],
) -> tuple[Counts, Losses]:
    """A second pass, images of a size together; all of it is trained.

    Of ``direct`` ones neither latents nor captions are made again.
    """
    parts = join([*direct, *prepare(objective, taken, method, dataset)])
    samples = [sample for part in parts for sample in part.samples]
    loss_Q = torch.cat([objective.weight(objective.loss_of(p), p.timesteps) for p in parts])
    augmented = [pending for pending in taken if pending.augmented]
    counts = Counts(
        backward=len(samples),
        augmented=len(augmented),
        strength_sum=sum(pending.strength for pending in augmented),
        # What DREAM's own pass makes of ``direct`` is there.
        forward=len(samples) + len(taken) * (objective.forward_passes - 1),
        encoded=sum(dataset.kept(pending.augmented) is None for pending in taken),
    )
    backward(loss_Q.sum())
    return counts, Losses(samples, loss_Q.detach(), are_scores=False)


def chosen(samples: list[tuple[int, int]], mask_B: Tensor) -> list[tuple[int, int]]:
    """The samples at which ``mask_B`` is true."""
    return [samples[i] for i in mask_B.nonzero().flatten().tolist()]
