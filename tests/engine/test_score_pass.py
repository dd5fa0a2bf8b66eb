"""What is trained, and at which cost, does not depend on how scoring and training share passes."""

import json
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from iet_sd.config import MethodConfig
from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import collate
from iet_sd.data.shards import Visit, batches
from iet_sd.engine import step
from iet_sd.engine.rounds import ShardDone, StepDone
from iet_sd.engine.second_pass import Pending, take
from iet_sd.engine.step import MAX_BATCHES, Counts, Memory, accumulate_gradient
from iet_sd.errors import UserError
from iet_sd.method.agc import Bank
from tests.compare import equal
from tests.engine.running import RUN, resuming, run, timeless, weights
from tests.engine.test_step import RATIOS, filled_bank, gradients, losses_of, never

LORA = {"train_mode": "lora", "rank": 2}
METHOD = {"num_shards": 1, "msr": False, "bank_bins": 1, "agc_threshold": 0.95}
NEAR = {"num_shards": 2, "bank_bins": 1, "agc_threshold": 0.9, "taa_sharpness": 2.0}
BUCKETS = {"aspect_ratio_buckets": "32,32;24,40;40,24"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of 16 pictures of three shapes."""
    root = tmp_path_factory.mktemp("shapes")
    for number in range(16):
        size = (*[(40, 40), (30, 50), (50, 30)][number % 3], 3)
        pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"a cat {number}")
    return {"train_data_dir": str(root), **BUCKETS}


def loaded(trainer, seed, size=8):
    """Batches of all samples."""
    sizes = trainer.dataset.source.sizes
    for visits in batches(seed, 1, 0, range(16), size, sizes):
        yield collate([trainer.dataset[visit] for visit in visits])


def bank_near(trainer, seen):
    """A bank of one bin whose mean is that of the batch's losses."""
    with torch.no_grad():
        losses, _ = losses_of(trainer, seen)
    return Bank(losses.mean()[None], torch.full((1,), 1000))


def bank_of_all_kinds(trainer, batches):
    """A bank by which some of every batch are skipped, some augmented, and some neither."""
    with torch.no_grad():
        losses, timesteps = zip(*(losses_of(trainer, seen) for seen in batches), strict=True)
    ratios = [RATIOS[3 * i % 8] for loss_B in losses for i in range(len(loss_B))]
    return filled_bank(torch.cat(losses), torch.cat(timesteps), ratios)


def clear(trainer):
    for p in trainer.parameters.values():
        p.grad = None


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


def watched(monkeypatch, trainer):
    """What is kept and what is trained of the samples of a run, and how large second passes are."""
    kept, trained, passes = Counter(), Counter(), []
    score, train = step.score, step.train

    def watch_score(objective, batch, *args):
        done = score(objective, batch, *args)
        times = objective.draw_timesteps(batch["seed"].tolist(), "score/timestep").tolist()
        skipped = set(done.skipped.tolist())
        samples = zip(batch["index"].tolist(), times, strict=True)
        kept.update(sample for sample in samples if sample[0] not in skipped)
        trained.update(done.trained)
        return done

    def watch_train(*args):
        done = train(*args)
        trained.update(done[1])
        passes.append(len(done[1]))
        return done

    monkeypatch.setattr(step, "score", watch_score)
    monkeypatch.setattr(step, "train", watch_train)
    return kept, trained, passes


@pytest.mark.parametrize(
    "given",
    [
        {"score_pass": "train", "taa_min_batch": 0.75},
        {"score_pass": "auto", "gradient_accumulation_steps": 2, "step_unit": "batch"},
        {"score_pass": "auto", "taa_min_batch": 1.0, "agc_threshold": 1.2},
        "buckets",
        {"refill_skipped": True},
        {"refill_skipped": True, "gradient_accumulation_steps": 2, "agc_threshold": 1.1},
    ],
    ids=str,
)
def test_every_kept_sample_is_trained_once_by_the_end_of_the_round(
    given, trainer_for, settings, shapes, monkeypatch
):
    given = {**shapes, "score_pass": "train"} if given == "buckets" else given
    trainer, state = trainer_for(settings(**NEAR | {"num_rounds": 1, "steps_per_round": 8} | given))
    kept, trained, passes = watched(monkeypatch, trainer)
    waited = 0
    for event in trainer.run(state):
        if isinstance(event, StepDone):
            waited += len(state.proxies[event.shard].memory.queue)
        if isinstance(event, ShardDone):
            assert trained == kept
            assert not state.proxies[event.shard].memory.queue
            assert event.counts.trained == event.counts.scored - event.counts.skipped
    assert waited > 0
    # But for each shard's last, passes are full enough.
    if given.get("score_pass") == "train" and "train_data_dir" not in given:
        assert sum(number < 3 for number in passes) <= 2
    assert max(passes) <= 4


def test_who_waits_and_who_does_not():
    sizes = ["a", "a", "b", "b", "b", "c", "a", "b"]
    queue = [Pending(i, 0, i, 0.5) for i in range(8)]

    def taken(beside, least, batch_size=4):
        rest = list(queue)
        found = [p.index for p in take(rest, sizes, beside, batch_size, least)]
        assert sorted(found + [p.index for p in rest]) == [*range(8)]
        assert rest == sorted(rest)
        return found

    assert taken([], 0) == [0, 1, 2, 3]
    assert taken([], 0, batch_size=100) == [*range(8)]
    assert taken([], 3) == [0, 1, 2, 3]
    assert taken([], 4) == [2, 3, 4, 7]
    assert taken([], 5) == []
    assert taken([5], 5) == [5]  # of its size, as there is a pass of it anyway
    assert taken([0, 1], 4) == [0, 1]
    assert taken([0, 1, 6, 0], 0) == []


@pytest.mark.parametrize(
    "given",
    [
        {"taa_min_batch": 1.0, "score_pass": "train"},
        {"taa_min_batch": 1.0, **LORA, "lora_dropout": 0.1, "gradient_accumulation_steps": 2},
        {"refill_skipped": True, "dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_resumed_while_samples_wait_equals_never_stopped(given, trainer_for, settings, tmp_path):
    config = settings(**RUN | NEAR | {"num_rounds": 2} | given, checkpointing_steps=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = weights(run(config, whole, trainer_for)[0])
    run(config, broken, trainer_for, stop_at=1)
    waiting = 0
    for stop_at in (1, 3):
        for path in broken.glob("checkpoint-*/process-*/*-step-*/proxy-*.json"):
            waiting += len(json.loads(path.read_text())["queue"])
        run(resuming(config), broken, trainer_for, stop_at)
    assert waiting > 0
    trainer, state = run(resuming(config), broken, trainer_for)
    assert state.round == 2
    assert equal(weights(trainer), expected)
    assert timeless(broken / "metrics.jsonl") == timeless(whole / "metrics.jsonl")


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
