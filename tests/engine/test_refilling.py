"""Batches that are filled up in place of what is skipped, against a loop over samples."""

import math

import pytest
import torch

from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import collate
from iet_sd.data.shards import Visit
from iet_sd.engine.step import MAX_BATCHES, Memory, accumulate_gradient
from iet_sd.method.agc import Bank
from tests.engine.scoring import METHOD, clear, loaded
from tests.engine.test_step import gradients, losses_of, never


def bank_near(trainer, seen):
    """A bank of one bin whose mean is that of the batch's losses."""
    with torch.no_grad():
        losses, _ = losses_of(trainer, seen)
    return Bank(losses.mean()[None], torch.full((1,), 1000))


@pytest.mark.parametrize("threshold", [0.9, 1.1])
def test_refilled_batches_equal_a_loop_over_samples(threshold, trainer_for, settings):
    """Who is trained when, with which gradient, and what is counted: one sample at a time."""
    given = {"refill_skipped": True, "agc_threshold": threshold, "taa_sharpness": 3.0}
    trainer, state = trainer_for(settings(**METHOD | given))
    method, proxy, objective = trainer.config.method, state.proxies[0], trainer.objective
    stream, again = loaded(trainer, 0, size=4), loaded(trainer, 0, size=4)
    memory = Memory(bank_near(trainer, next(loaded(trainer, 0, size=16))))
    mean, visited = float(memory.bank.value_T), int(memory.bank.visits_T)
    queue, filled = [], 0
    for _ in range(6):
        clear(trainer)
        done = accumulate_gradient(
            objective,
            next(stream),
            memory,
            method,
            trainer.dataset,
            proxy.backward,
            never,
            4,
            stream,
            may_wait=True,
        )
        got = gradients(trainer) if done.trained else []

        # By hand: samples (index, timestep, seed, strength or None), the oldest first.
        old, direct, new, drawn, skipped = queue, [], [], 0, []
        while drawn < MAX_BATCHES and len(old + direct + new) < 4:
            drawn += 1
            seen, losses = next(again), []
            for i, seed in zip(seen["index"].tolist(), seen["seed"].tolist(), strict=True):
                t = int(objective.draw_timesteps([seed], "score/timestep"))
                batch = collate([trainer.dataset[Visit(i, seed)]])
                with torch.no_grad():
                    losses.append(float(objective.loss(batch, torch.tensor([t]), "score")))
                reference = mean / (1 - 0.8**visited)
                if losses[-1] < threshold * reference:
                    skipped.append(i)
                    continue
                strength = math.exp(-3 * abs(losses[-1] / threshold - reference) / reference)
                if strength >= 0.1:
                    new.append((i, t, seed, strength))
                elif len(old + direct) < 4:
                    direct.append((i, t, seed, None))
                else:
                    new.append((i, t, seed, None))
            for loss in losses:
                mean, visited = 0.8 * mean + 0.2 * loss, visited + 1
        now = direct + (old + new)[: 4 - len(direct)]
        queue = (old + new)[4 - len(direct) :]

        assert sorted(done.trained) == sorted((i, t) for i, t, _, _ in now)
        assert done.skipped.tolist() == skipped
        assert [(p.index, p.timestep, p.seed) for p in memory.queue] == [p[:3] for p in queue]
        assert done.counts.batches == drawn
        assert done.counts.scored == 4 * drawn
        again_made = [p for p in now if p not in direct]
        assert done.counts.forward == 4 * drawn + len(now)
        assert done.counts.encoded == 4 * drawn + len(again_made)
        assert done.counts.backward == done.counts.trained == len(now)
        assert len(now) == 4 or drawn == MAX_BATCHES
        filled += len(now) == 4
        clear(trainer)
        for i, t, seed, strength in now:
            how = None if strength is None else Augmentation(5 * strength, operations="gentle")
            batch = collate([trainer.dataset.example(Visit(i, seed), how)])
            purpose = "score" if strength is None else "augmented"
            objective.loss(batch, torch.tensor([t]), purpose).sum().backward()
        for one, two in zip(got, gradients(trainer) if now else [], strict=True):
            assert (one - two).norm() <= 1e-4 * two.norm() + 1e-6
    assert filled > 0
