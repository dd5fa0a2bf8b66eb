"""What is trained, and at which cost, does not depend on how scoring and training share passes."""

import math
from itertools import islice

import pytest
import torch

from iet_sd.config import MethodConfig
from iet_sd.engine import step
from iet_sd.engine.rounds import StepDone
from iet_sd.engine.step import Counts, Memory, accumulate_gradient
from iet_sd.errors import UserError
from tests.compare import equal
from tests.engine.running import LORA
from tests.engine.scoring import METHOD, clear, loaded
from tests.engine.test_step import RATIOS, filled_bank, gradients, losses_of, never


def bank_of_all_kinds(trainer, batches):
    """A bank by which some of every batch are skipped, some augmented, and some neither."""
    with torch.no_grad():
        losses, timesteps = zip(*(losses_of(trainer, seen) for seen in batches), strict=True)
    ratios = [RATIOS[3 * i % 8] for loss_B in losses for i in range(len(loss_B))]
    return filled_bank(torch.cat(losses), torch.cat(timesteps), ratios)


def one_way(trainer, batches, bank, proxy, **given):
    """Gradient, outcomes and memory of the batches one after another."""
    clear(trainer)
    memory = Memory(bank)
    method = MethodConfig(**{**vars(trainer.config.method), **given})
    outcomes = [
        accumulate_gradient(
            trainer.objective,
            seen,
            memory,
            method,
            trainer.dataset,
            proxy.backward,
            never,
            len(batches[0]["seed"]),
        )
        for seen in batches
    ]
    return gradients(trainer), outcomes, memory


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "given",
    [
        {},
        LORA,
        {"kind": "sd2", "snr_gamma": 5.0},
        {"kind": "sdxl"},
        {"dream_training": True, "noise_offset": 0.1},
        {"train_text_encoder": True, "gradient_checkpointing": True},
        "buckets",
    ],
    ids=["full", "lora", "v_prediction", "sdxl", "DREAM", "text encoder", "buckets"],
)
def test_separate_passes_give_the_gradient_of_a_single_one(
    given, seed, trainer_for, settings, shapes
):
    """Up to rounding; what is skipped, augmented and remembered is the same to the bit."""
    given = shapes if given == "buckets" else given
    method = {"num_shards": 1, "msr": False, "bank_bins": 1000}
    trainer, state = trainer_for(settings(**method, **given))
    seen = [*islice(loaded(trainer, seed), 3)]
    bank, proxy = bank_of_all_kinds(trainer, seen), state.proxies[0]
    single, first, memory = one_way(trainer, seen, bank, proxy, score_pass="train")
    apart, other, remembered = one_way(trainer, seen, bank, proxy, score_pass="separate")
    size = sum(len(batch["seed"]) for batch in seen)
    total, costs = Counts(), Counts()
    for one, two in zip(first, other, strict=True):
        assert torch.equal(one.skipped, two.skipped)
        assert sorted(one.trained) == sorted(two.trained)
        total += one.counts
        costs += two.counts
    assert 0 < total.augmented < total.trained < total.scored == size
    passes, direct = trainer.objective.forward_passes, total.trained - total.augmented
    assert (total.forward, total.encoded) == ((size + total.augmented) * passes, costs.encoded)
    assert total.backward <= size + total.augmented
    assert (costs.forward, costs.backward) == (total.forward + direct, costs.trained)
    assert equal(memory.bank._asdict(), remembered.bank._asdict())
    assert memory.queue == remembered.queue == []
    for one, two in zip(single, apart, strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm() + 1e-7


@pytest.mark.parametrize(
    ("mode", "cost"),
    [
        ({}, 2.0),
        ({"gradient_checkpointing": True}, 3.0),
        (LORA, 1.0),
        (LORA | {"gradient_checkpointing": True}, 2.0),
    ],
    ids=str,
)
def test_auto_is_the_cheaper_of_both_for_every_batch(mode, cost, trainer_for, settings):
    """Of 8 samples all numbers are kept in turn, none of them augmented."""
    trainer, state = trainer_for(settings(**METHOD, **mode, taa=False))
    assert trainer.objective.backward_cost == pytest.approx(cost, abs=0.15)
    cost = trainer.objective.backward_cost
    seen = next(loaded(trainer, 0))
    with torch.no_grad():
        losses, timesteps = losses_of(trainer, seen)
    took = []
    for kept in range(1, 9):
        bank = filled_bank(losses, timesteps, [3.0] * kept + [0.1] * (8 - kept))
        work = {}
        for way in ("train", "separate", "auto"):
            given = {"score_pass": way, "bank_bins": 1000}
            _, ((counts, *_),), _ = one_way(trainer, [seen], bank, state.proxies[0], **given)
            work[way] = counts.forward + cost * counts.backward
        single, apart = 8 * (1 + cost), 8 + kept * (1 + cost)
        expected = {"train": single, "separate": apart, "auto": min(single, apart)}
        assert work == pytest.approx(expected)
        took.append(work["auto"] == work["train"])
    first = math.ceil(8 * cost / (1 + cost) - 1e-9)
    assert took == [kept >= first for kept in range(1, 9)]


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({"taa": False, "agc_threshold": 0.5}, {True}),
        ({"taa": False, "agc_threshold": 1.0}, {True, False}),
        ({"taa_sharpness": 0.5}, {True, False}),
        ({"score_pass": "train", "taa_sharpness": 0.5}, {True}),
        ({"taa_min_strength": 0.0}, {False}),
    ],
    ids=str,
)
def test_a_pass_has_gradient_where_those_before_it_have_trained(
    given, kinds, trainer_for, settings, monkeypatch
):
    """In a round's first step, and then if two thirds of its samples were trained as scored."""
    method = {"num_shards": 2, "bank_bins": 1, "msr": False, "agc_threshold": 0.9}
    length = {"num_rounds": 2, "steps_per_round": 6}
    trainer, state = trainer_for(settings(**method | length | given))
    score, flags = step.score, []

    def watch(*args):
        flags.append(args[-1])
        return score(*args)

    monkeypatch.setattr(step, "score", watch)
    seen, before = 0, {}
    for event in trainer.run(state):
        if not isinstance(event, StepDone):
            continue
        (flag,), seen = flags[seen:], len(flags)
        scored, direct = before.get((event.round, event.shard), (0, 0))
        assert flag == (kinds == {True} or (kinds != {False} and direct >= scored * 2 / 3))
        total = state.progress.counts
        before[event.round, event.shard] = total.scored, total.trained - total.augmented
    assert set(flags) == kinds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score_pass": "train", "refill_skipped": True}, "--score_pass train"),
        ({"taa_leftovers": "drop", "refill_skipped": True}, "--taa_leftovers drop"),
        ({"agc": False, "taa": False, "msr": False, "score_pass": "separate"}, "need --agc"),
        ({"agc": False, "taa": False, "msr": False, "refill_skipped": True}, "need --agc"),
        ({"taa_min_batch": 1.5}, "--taa_min_batch"),
        ({"taa_min_batch": -0.5}, "--taa_min_batch"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        MethodConfig(**given)
