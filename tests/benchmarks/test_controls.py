"""Controls of the efficacy study: the side effect of a rule without its choice of samples."""

import numpy as np
import pytest
import torch

from benchmarks.efficacy import controls
from benchmarks.efficacy.methods import METHODS
from iet_sd.config import MethodConfig
from iet_sd.data import augmentation
from iet_sd.data.augmentation import Augmentation
from iet_sd.engine import rounds, step
from iet_sd.engine.step import Decision, decide
from iet_sd.method import agc
from iet_sd.method.agc import empty_bank
from iet_sd.method.msr import redistribute
from iet_sd.presets import stand_for


def decision(batch=16, seed=0):
    """Of AGC and TAA on a batch of which some are skipped, some augmented, some neither."""
    generator = torch.Generator().manual_seed(seed)
    loss_B = torch.rand(batch, generator=generator) + 0.3
    method = MethodConfig(**stand_for({}, "corrected", "iet_agc_plus") | {"bank_bins": 1})
    timesteps_B = torch.randint(1000, (batch,), generator=generator)
    bank = decide(loss_B, timesteps_B, empty_bank(1), method, 1000).bank
    found = decide(loss_B, timesteps_B, bank, method, 1000)
    assert 0 < found.second_pass_B.sum() < found.keep_B.sum() < batch
    return found


def generators(count=300):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_skips_at_random_are_as_many_and_any():
    rule = decision()
    drawn = [controls.skip_at_random(rule, g) for g in generators()]
    assert all(each.keep_B.sum() == rule.keep_B.sum() for each in drawn)
    share_B = torch.stack([each.keep_B for each in drawn]).float().mean(0)
    expected = rule.keep_B.float().mean()
    assert torch.allclose(share_B, expected, atol=5 * float(expected * (1 - expected) / 300) ** 0.5)
    # A sample brings its own strength along, so that no skipped one is augmented.
    assert all((each.second_pass_B <= each.keep_B).all() for each in drawn)
    assert all(each.bank is rule.bank for each in drawn)


def test_taa_without_agc_keeps_all_and_augments_on_both_sides_of_the_threshold():
    method = MethodConfig(**stand_for({}, "corrected", "iet_agc_plus") | {"bank_bins": 1})
    batch = torch.tensor([1.0, 0.81, 0.79, 0.1, 3.0]), torch.zeros(5, dtype=torch.int64)
    bank = agc.Bank(torch.ones(1), torch.tensor([10**6]))
    rule, free = (f(*batch, bank, method, 1000) for f in (decide, controls.keep_all))
    assert rule.keep_B.tolist() == [True, True, False, False, True]
    assert rule.second_pass_B.tolist() == [True, True, False, False, False]
    assert free.keep_B.all()
    assert free.second_pass_B.tolist() == [True, True, True, False, False]
    assert torch.equal(free.strength_B, rule.strength_B)
    assert torch.equal(free.bank.value_T, rule.bank.value_T)


def test_dropout_is_on_while_training_and_off_while_measuring(trainer_for, settings, monkeypatch):
    monkeypatch.setattr(rounds.Trainer, "start", rounds.Trainer.start)
    controls.dropout()
    trainer, _ = trainer_for(settings())
    unet = trainer.objective.components.unet
    drops = [m for m in unet.modules() if isinstance(m, torch.nn.Dropout)]
    assert {m.p for m in drops} == {0.1}
    ones = torch.ones(4000)
    unet.train()
    assert 0.85 < (drops[0](ones) > 0).float().mean() < 0.95
    unet.eval()
    assert torch.equal(drops[0](ones), ones)


def test_shuffled_strengths_are_the_same_ones_among_the_kept():
    rule = decision()
    drawn = [controls.shuffle_strengths(rule, g) for g in generators()]
    kept = rule.keep_B
    for each in drawn:
        assert torch.equal(each.keep_B, kept)
        assert torch.equal(each.strength_B[kept].sort().values, rule.strength_B[kept].sort().values)
        assert torch.equal(each.strength_B[~kept], rule.strength_B[~kept])
        passes = each.second_pass_B
        assert not passes[~kept].any()
        assert torch.equal(
            each.strength_B[passes].sort().values, rule.strength_B[rule.second_pass_B].sort().values
        )
    share_B = torch.stack([each.second_pass_B for each in drawn]).float().mean(0)[kept]
    expected = rule.second_pass_B[kept].float().mean()
    assert torch.allclose(share_B, expected, atol=5 * float(expected * (1 - expected) / 300) ** 0.5)


def test_level_strengths_are_one_and_add_up_to_the_rules():
    rule = decision()
    level = controls.level_strengths(rule, torch.Generator())
    assert torch.equal(level.second_pass_B, rule.keep_B)
    assert len(level.strength_B[rule.keep_B].unique()) == 1
    assert torch.allclose(
        level.strength_B[rule.keep_B].sum(), rule.strength_B[rule.second_pass_B].sum()
    )
    none = Decision(rule.keep_B, torch.zeros_like(rule.keep_B), rule.strength_B, rule.bank)
    assert not controls.level_strengths(none, torch.Generator()).second_pass_B.any()


def test_the_exchange_at_random_moves_as_many_and_not_the_most_skipped():
    shard_of_N = torch.arange(400) % 4
    skips_N = torch.arange(400) // 4 % 10
    rule = (0.25, 1, "seed", 7)
    moved, left_K = redistribute(shard_of_N, skips_N, 4, *rule)
    random, random_left_K = controls.exchange_at_random(shard_of_N, skips_N, 4, *rule)
    assert torch.equal(random_left_K, left_K)
    assert torch.equal((random - shard_of_N) % 4 > 0, random != shard_of_N)
    assert ((random - shard_of_N) % 4 <= 1).all()
    assert skips_N[moved != shard_of_N].float().mean() > 8
    assert skips_N[random != shard_of_N].float().mean() == pytest.approx(4.5, abs=1)
    again, _ = controls.exchange_at_random(shard_of_N, skips_N, 4, *rule)
    assert torch.equal(again, random)


@pytest.mark.parametrize(
    "name", sorted({m.swap for m in METHODS.values() if hasattr(controls, m.swap or "")})
)
def test_a_swap_is_in_effect_in_the_loop(name, monkeypatch):
    swapped = (
        *((step, "decide"), (rounds, "redistribute")),
        *((rounds.Trainer, "start"), (augmentation, "OPERATIONS")),
    )
    before = [getattr(*place) for place in swapped]
    for place, value in zip(swapped, before, strict=True):
        monkeypatch.setattr(*place, value)
    getattr(controls, name)()
    assert sum(getattr(*p) is not b for p, b in zip(swapped, before, strict=True)) == 1


def test_colour_operations_leave_a_white_page_white_and_a_picture_at_rest_as_it_is(monkeypatch):
    monkeypatch.setattr(augmentation, "OPERATIONS", augmentation.OPERATIONS)
    everything = list(augmentation.OPERATIONS["randaugment"])
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    (seeded,) = generators(1)
    noise = torch.randint(60, 200, (3, 32, 32), dtype=torch.uint8, generator=seeded)

    def marks():
        """Operations that change a white page, or anything at strength 0."""
        there = augmentation.OPERATIONS["randaugment"]
        strong = {o for o in there if _changed(white, o, 10.0)}
        return strong | {o for o in there if _changed(noise, o, 0.0)}

    assert {"Solarize", "Equalize", "AutoContrast", "ShearX", "Rotate"} <= marks()
    controls.colour_taa()
    kept = [o for o in everything if o in controls.COLOUR_OPS]
    assert list(augmentation.OPERATIONS["randaugment"]) == kept
    assert marks() <= {"Brightness"}
    augmented = [augmentation.augment(noise, Augmentation(0.0), g) for g in generators(30)]
    assert all(torch.equal(each, noise) for each in augmented)


def test_whole_pixel_operations_make_no_grey_of_black_and_white(monkeypatch):
    monkeypatch.setattr(augmentation, "OPERATIONS", augmentation.OPERATIONS)
    board = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((3, 3)))
    picture = torch.from_numpy(np.uint8(255 * board)).expand(3, -1, -1)

    def blurring():
        strong = Augmentation(9.3, operations="gentle")
        there = augmentation.OPERATIONS["gentle"]
        made = {o: augmentation.apply(picture, o, strong, False) for o in there}
        return {o for o, each in made.items() if len(each.unique()) > 2}

    assert {"ShearX", "ShearY", "Rotate"} <= blurring()
    controls.whole_pixel_taa()
    assert list(augmentation.OPERATIONS["gentle"]) == list(controls.WHOLE_PIXEL_OPS)
    assert not blurring()


def _changed(image, operation, magnitude):
    """Whether it does, in either direction."""
    both = [
        augmentation.apply(image, operation, Augmentation(magnitude), negative)
        for negative in (False, True)
    ]
    return not all(torch.equal(each, image) for each in both)


def test_a_swapped_rule_is_the_same_for_the_same_batch_and_bank(monkeypatch):
    """So that a run that goes on after a stop does as one that was never stopped."""
    monkeypatch.setattr(step, "decide", step.decide)
    controls.random_skip()
    method = MethodConfig(**stand_for({}, "corrected", "iet_agc") | {"bank_bins": 1})
    generator = torch.Generator().manual_seed(1)
    loss_B, timesteps_B = torch.rand(16, generator=generator) + 0.3, torch.arange(16)
    bank = decide(loss_B, timesteps_B, empty_bank(1), method, 1000).bank
    first, again, rule = (
        f(loss_B, timesteps_B, bank, method, 1000).keep_B
        for f in (step.decide, step.decide, decide)
    )
    assert torch.equal(first, again)
    assert first.sum() == rule.sum()
    assert not torch.equal(first, rule)
