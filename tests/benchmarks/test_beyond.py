"""Methods beyond the paper, against what they are made of."""

import pytest
import torch

from benchmarks.efficacy import beyond
from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.shards import Visit
from iet_sd.engine import rounds, step
from iet_sd.engine.step import Memory, decide
from iet_sd.evaluation.heldout import load_heldout
from iet_sd.method import agc
from tests.compare import equal


@pytest.fixture
def swaps(monkeypatch):
    """All that a swap may replace is put back."""
    places = (
        (TrainingImages, "example"),
        (rounds.Trainer, "start"),
        (step, "score"),
        (step, "decide"),
    )
    for place in places:
        monkeypatch.setattr(*place, getattr(*place))


def test_the_caption_of_an_augmented_image_says_so_and_no_other(swaps, trainer_for, settings):
    trainer, _ = trainer_for(settings())
    images, visits = trainer.dataset, [Visit(i, 7 + i) for i in range(4)]
    plain = [images.example(visit) for visit in visits]
    augmented = [images.example(visit, Augmentation(10.0)) for visit in visits]
    captions = []
    tokenize, images.read = images.read, lambda text: captions.append(text) or tokenize(text)
    beyond.told_taa()
    for visit, before in zip(visits, plain, strict=True):
        assert equal(collate([images.example(visit)]), collate([before]))
    assert not any("augmented" in caption for caption in captions)
    for visit, before in zip(visits, augmented, strict=True):
        told = collate([images.example(visit, Augmentation(10.0))])
        caption = captions[-1]
        assert caption.endswith(", augmented")
        expected = collate([before | tokenize(caption)])
        assert not equal(expected, collate([before]))
        assert equal(told, expected)


@pytest.fixture
def calibrated(swaps, trainer_for, settings, heldout, monkeypatch):
    """A trainer whose UNet is no longer what it was at the start, and its first batch."""
    made = []
    take_over = beyond.Calibrated.take_over
    monkeypatch.setattr(
        beyond.Calibrated, "take_over", lambda self: made.append(self) or take_over(self)
    )
    beyond.calibrated_agc()
    config = settings(
        method="iet_agc",
        num_shards=1,
        bank_bins=4,
        heldout_data_dir=str(heldout),
        eval_every_rounds=1,
        eval_samples=10,
        score_pass="train",
    )
    trainer, _ = trainer_for(config)
    before = {
        k: p.detach().clone() for k, p in trainer.objective.components.unet.named_parameters()
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * parameter.abs().mean() * noise
    seen = collate([trainer.dataset[Visit(i, 50 + i)] for i in range(8)])
    (each,) = made
    return each, trainer, before, seen


def scored(trainer, seen, memory, method):
    return step.score(
        trainer.objective,
        seen,
        memory,
        method,
        lambda loss: None,
        pytest.fail,
        len(seen["seed"]),
        with_gradient=True,
    )


@torch.no_grad()
def test_what_is_left_of_a_loss_is_that_of_two_models(calibrated):
    each, trainer, before, seen = calibrated
    objective, unet = trainer.objective, trainer.objective.components.unet
    timesteps_B = objective.draw_timesteps(seen["seed"].tolist(), "score/timestep")
    now_B = objective.loss(seen, timesteps_B, "score")
    after = {k: p.clone() for k, p in unet.named_parameters()}
    unet.load_state_dict(before, strict=False)
    then_B = objective.loss(seen, timesteps_B, "score")
    unet.load_state_dict(after, strict=False)
    assert (now_B / then_B - 1).abs().min() > 1e-3
    left_B = each._left(now_B, objective.prepare(seen, timesteps_B, "score"))
    torch.testing.assert_close(left_B, now_B / then_B)
    assert objective.components.unet is unet


def test_it_decides_by_unseen_images_that_no_reading_is_taken_of(calibrated, monkeypatch):
    """The decision is AGC's on what is left, and the bank has the held-out images' in order."""
    each, trainer, _, seen = calibrated
    config, objective = trainer.config, trainer.objective
    heldout = load_heldout(config.data, trainer.dataset.source)
    assert len(each.unread) == 30 - 10
    visits, example = [], each.unseen.example
    monkeypatch.setattr(each.unseen, "example", lambda v: visits.append(v) or example(v))
    bank = agc.Bank(torch.full((4,), 0.9), torch.full((4,), 1000))
    memory = Memory(bank)
    done = scored(trainer, seen, memory, config.method)
    assert len(visits) == len({visit.index for visit in visits}) == beyond.UNSEEN_AT_ONCE
    assert {visit.index for visit in visits} <= set(each.unread)
    assert done.counts.forward == 8 + 8 + 2 * len(visits)

    images = TrainingImages(heldout, trainer.dataset.read, config.data)
    value_T, visits_T = bank.value_T.clone(), bank.visits_T.clone()
    with torch.no_grad():
        for visit in visits:
            one = collate([images.example(visit)])
            t = objective.draw_timesteps([visit.seed], "score/timestep")
            left = each._left(objective.loss(one, t, "score"), objective.prepare(one, t, "score"))
            bin = int(t) * 4 // 1000
            value_T[bin] = 0.8 * value_T[bin] + 0.2 * float(left)
            visits_T[bin] += 1
        timesteps_B = objective.draw_timesteps(seen["seed"].tolist(), "score/timestep")
        prepared = objective.prepare(seen, timesteps_B, "score")
        left_B = each._left(objective.loss_of(prepared), prepared)
    assert config.method.bank_decay == 0.8
    torch.testing.assert_close(memory.bank.value_T, value_T)
    assert torch.equal(memory.bank.visits_T, visits_T)
    rule = decide(left_B, timesteps_B, bank, config.method, 1000)
    assert torch.equal(done.skipped, seen["index"][~rule.keep_B])


def test_the_same_batch_and_bank_are_decided_the_same(calibrated):
    """So that a run that goes on after a stop does as one that was never stopped."""
    _, trainer, _, seen = calibrated
    banks = []
    for _ in range(2):
        memory = Memory(agc.Bank(torch.full((4,), 0.9), torch.full((4,), 1000)))
        scored(trainer, seen, memory, trainer.config.method)
        banks.append(memory.bank)
    assert equal(banks[0]._asdict(), banks[1]._asdict())


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_before_training_nothing_has_fallen(mode, swaps, trainer_for, settings, heldout):
    beyond.calibrated_agc()
    trainer, _ = trainer_for(
        settings(
            method="iet_agc",
            num_shards=1,
            bank_bins=1,
            train_mode=mode,
            heldout_data_dir=str(heldout),
            eval_every_rounds=1,
            eval_samples=10,
        )
    )
    seen = collate([trainer.dataset[Visit(i, 50 + i)] for i in range(8)])
    memory = Memory(agc.empty_bank(1))
    done = scored(trainer, seen, memory, trainer.config.method)
    assert not len(done.skipped)
    torch.testing.assert_close(memory.bank.value_T, torch.tensor([1 - 0.8**beyond.UNSEEN_AT_ONCE]))
