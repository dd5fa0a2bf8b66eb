"""Samples that wait for a fuller pass: each kept one is trained once, in a resumed run too."""

import json
from collections import Counter

import pytest

from iet_sd.engine import step
from iet_sd.engine.rounds import ShardDone, StepDone
from iet_sd.engine.second_pass import Pending, take
from tests.compare import equal
from tests.engine.running import LORA, RUN, resuming, run, timeless, weights

NEAR = {"num_shards": 2, "bank_bins": 1, "agc_threshold": 0.9, "taa_sharpness": 2.0}


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
        trained.update(done[1].samples)
        passes.append(len(done[1].samples))
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
