"""Controls: what a rule does to a run besides its choice of samples.

Each takes the rule's own decision on the same losses and deals it out otherwise: the same number of
samples skipped, augmented or moved, but not the same samples. So a control has the rule's rates
exactly, on its own run, and differs by the choice alone; but for `constant_taa` and `no_skip`, with
which all samples are augmented, or trained. A method beyond the paper is swapped in in the same
way.

A swap is a function of no arguments that replaces a part of `iet_sd.engine` in this process, for
good: it is for a process that trains one model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iet_sd.config import MethodConfig
from iet_sd.data import augmentation
from iet_sd.engine import rounds, step
from iet_sd.engine.step import Decision, decide
from iet_sd.method import agc
from iet_sd.method.msr import redistribute
from iet_sd.seeding import seed_for

COLOUR_OPS = ("Identity", "Brightness", "Color", "Contrast", "Sharpness")
DROPOUT = 0.1
WHOLE_PIXEL_OPS = ("Identity", "TranslateX", "TranslateY", "Color")


def random_skip() -> None:
    """As many samples of a batch are skipped as AGC would skip, at random."""
    _swap_decide(skip_at_random)


def no_skip() -> None:
    """TAA without AGC: below the threshold too, the nearer to it the stronger."""
    step.decide = keep_all


def shuffled_taa() -> None:
    """As many kept samples are augmented, with the strengths of TAA, at random."""
    _swap_decide(shuffle_strengths)


def constant_taa() -> None:
    """Every kept sample is augmented, at the mean over the batch of what TAA would do."""
    _swap_decide(level_strengths)


def random_exchange() -> None:
    """As many samples leave each shard as by MSR, at random."""
    rounds.redistribute = exchange_at_random


def colour_taa() -> None:
    """RandAugment with the operations that do nothing at strength 0, and uncover nothing.

    The others leave marks that a model learns to draw, whatever the strength: AutoContrast and
    Equalize have no scale, Solarize turns white black at 0, Posterize has few steps, and shifts,
    shears and turns leave black where a page was white.
    """
    _only("randaugment", COLOUR_OPS)


def whole_pixel_taa() -> None:
    """Gentle augmentation by shifts and saturation alone: edges stay as sharp as they are."""
    _only("gentle", WHOLE_PIXEL_OPS)


def dropout() -> None:
    """A tenth of the activations of each block is dropped in training: a rival, not a control."""
    start = rounds.Trainer.start

    def begun(trainer: rounds.Trainer, *given: Any) -> Any:
        state = start(trainer, *given)
        for module in trainer.objective.components.unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = DROPOUT
        return state

    rounds.Trainer.start = begun


def skip_at_random(decision: Decision, generator: torch.Generator) -> Decision:
    """The keep mask in another order, and with it what follows from it; B samples."""
    order = torch.randperm(len(decision.keep_B), generator=generator)
    return decision._replace(
        keep_B=decision.keep_B[order],
        second_pass_B=decision.second_pass_B[order],
        strength_B=decision.strength_B[order],
    )


def keep_all(
    loss_B: Tensor, timesteps_B: Tensor, bank: agc.Bank, method: MethodConfig, timesteps: int
) -> Decision:
    """`decide` with every sample kept, and augmented by its distance from the threshold."""
    decision = decide(loss_B, timesteps_B, bank, method, timesteps)
    return decision._replace(
        keep_B=torch.ones_like(decision.keep_B),
        second_pass_B=decision.strength_B >= method.taa_min_strength,
    )


def shuffle_strengths(decision: Decision, generator: torch.Generator) -> Decision:
    """Strengths and second passes in another order among the kept samples."""
    (kept,) = decision.keep_B.nonzero(as_tuple=True)
    order = kept[torch.randperm(len(kept), generator=generator)]
    second_pass_B, strength_B = decision.second_pass_B.clone(), decision.strength_B.clone()
    second_pass_B[kept], strength_B[kept] = second_pass_B[order], strength_B[order]
    return decision._replace(second_pass_B=second_pass_B, strength_B=strength_B)


def level_strengths(decision: Decision, generator: torch.Generator) -> Decision:
    """One strength for all kept samples: the mean of TAA's, 0 where it would not augment."""
    strength_B = decision.strength_B * decision.second_pass_B
    kept = decision.keep_B.sum().clamp(min=1)
    mean_B = torch.full_like(strength_B, float(strength_B.sum() / kept))
    return decision._replace(second_pass_B=decision.keep_B & (mean_B > 0), strength_B=mean_B)


def exchange_at_random(
    shard_of_N: Tensor, skips_N: Tensor, num_shards: int, *rule: object
) -> tuple[Tensor, Tensor]:
    """`redistribute` with the skips of each shard dealt out at random among its samples."""
    generator = torch.Generator().manual_seed(seed_for(int(rule[-1]), "exchange at random"))
    dealt_N = skips_N.clone()
    for shard in range(num_shards):
        (members,) = (shard_of_N == shard).nonzero(as_tuple=True)
        order = torch.randperm(len(members), generator=generator)
        dealt_N[members] = skips_N[members[order]]
    return redistribute(shard_of_N, dealt_N, num_shards, *rule)


def _only(kind: str, names: Sequence[str]) -> None:
    everything = augmentation.OPERATIONS[kind]
    augmentation.OPERATIONS = {kind: {name: everything[name] for name in names}}


def _swap_decide(change: Callable[[Decision, torch.Generator], Decision]) -> None:
    def changed(
        loss_B: Tensor, timesteps_B: Tensor, bank: agc.Bank, method: MethodConfig, timesteps: int
    ) -> Decision:
        # From the batch and the bank alone, so that a run goes on after a stop as if never stopped.
        address = int(bank.visits_T.sum()), *loss_B.tolist()
        generator = torch.Generator().manual_seed(seed_for(0, "control", *map(str, address)))
        return change(decide(loss_B, timesteps_B, bank, method, timesteps), generator)

    step.decide = changed
