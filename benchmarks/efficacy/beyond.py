"""Methods beyond the paper, as swaps (see `controls`): tried here before they are built.

Letters in shapes: B samples of a batch, H held-out images beside it, T bins of the bank.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks.efficacy.settings import READ_SEED
from iet_sd.config import MethodConfig
from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.shards import Visit
from iet_sd.engine import rounds, step
from iet_sd.engine.objective import Objective, Prepared
from iet_sd.engine.step import Decision, Scored, decide
from iet_sd.evaluation.heldout import load_heldout
from iet_sd.evaluation.prompts import choose
from iet_sd.method import agc
from iet_sd.seeding import seed_for

TOLD = ", augmented"
UNSEEN_AT_ONCE = 8


def told_taa() -> None:
    """The caption of an augmented image says so, and no prompt does.

    So what augmentation does to pictures is learnt as a style of its own, and does not leak into
    what is drawn: the augmentation conditioning of Karras et al. 2022 (arXiv 2206.00364), by words.
    """
    plain = TrainingImages.example

    def example(
        images: TrainingImages, visit: Visit, augmentation: Augmentation | None = None
    ) -> dict[str, Any]:
        if augmentation is not None:
            images, read = copy.copy(images), images.read
            images.read = lambda caption: read(caption + TOLD)
        return plain(images, visit, augmentation)

    TrainingImages.example = example


def calibrated_agc() -> None:
    """AGC by how far training has lowered a sample's loss, against how far that of unseen images.

    Of each sample the loss is taken of the model before training too, at the same noise and
    timestep: what is left of it is l / l_0, whatever is hard about the image. The bank holds the
    mean of that for held-out images, which no reading is taken of.
    """
    start = rounds.Trainer.start

    def begun(trainer: rounds.Trainer, *given: Any) -> Any:
        state = start(trainer, *given)
        Calibrated(trainer).take_over()
        return state

    rounds.Trainer.start = begun


class Calibrated:
    """The decision by l / l_0, and the images it is calibrated by."""

    def __init__(self, trainer: rounds.Trainer) -> None:
        """``trainer``: one that has just started, with the weights from before training."""
        self.objective: Objective = trainer.objective
        self.before = copy.deepcopy(trainer.objective.components.unet).requires_grad_(False).eval()
        data = trainer.config.data
        heldout = load_heldout(data, trainer.dataset.source)
        number = len(heldout.sample_ids)
        read = choose(number, trainer.config.probe.eval_samples, READ_SEED)
        self.unread = sorted(set(range(number)) - set(read.tolist()))
        self.unseen = TrainingImages(heldout, trainer.objective.components.tokenize, data)
        self.scored: Prepared | None = None
        self.passes = 0

    def take_over(self) -> None:
        """Decide from now on."""
        loss_of, score = self.objective.loss_of, step.score

        def remembering(prepared: Prepared) -> Tensor:
            self.scored = prepared
            return loss_of(prepared)

        def counting(*given: Any, **named: Any) -> Scored:
            done = score(*given, **named)
            done.counts.forward += self.passes
            return done

        self.objective.loss_of = remembering
        step.score, step.decide = counting, self.decide

    def decide(
        self, loss_B: Tensor, timesteps_B: Tensor, bank: agc.Bank, method: MethodConfig, steps: int
    ) -> Decision:
        """`decide` of what is left of each loss, by a bank of the held-out images alone."""
        left_B = self._left(loss_B, self.scored)
        address = int(bank.visits_T.sum()), *loss_B.tolist()
        seed = seed_for(0, "unseen", *map(str, address))
        order = torch.randperm(len(self.unread), generator=torch.Generator().manual_seed(seed))
        chosen = [self.unread[i] for i in order[:UNSEEN_AT_ONCE].tolist()]
        visits = [Visit(i, seed_for(seed, str(i))) for i in chosen]
        batch = collate([self.unseen.example(visit) for visit in visits])
        timesteps_H = self.objective.draw_timesteps(batch["seed"].tolist(), "score/timestep")
        with torch.no_grad():
            unseen = self.objective.prepare(batch, timesteps_H, "score")
            left_H = self._left(self.objective.loss_of(unseen).cpu(), unseen)
        self.passes = len(loss_B) + 2 * len(visits)
        decision = decide(left_B, timesteps_B, bank, method, steps)
        bins_H = agc.bin_of(timesteps_H, len(bank.value_T), steps)
        return decision._replace(bank=agc.update_bank(bank, bins_H, left_H, method.bank_decay))

    @torch.no_grad()
    def _left(self, loss_B: Tensor, prepared: Prepared) -> Tensor:
        """l / l_0: float32 (B,), on the CPU."""
        unet, self.objective.components.unet = self.objective.components.unet, self.before
        try:
            before_B = Objective.loss_of(self.objective, prepared)
        finally:
            self.objective.components.unet = unet
        return loss_B / before_B.cpu()
