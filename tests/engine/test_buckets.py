"""Training with images of several sizes: steps, second passes, and going on where it stopped."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from iet_sd.config import MethodConfig
from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import collate
from iet_sd.data.shards import Visit, batches
from iet_sd.engine import plan
from iet_sd.engine.rounds import ShardDone
from iet_sd.engine.second_pass import prepare
from iet_sd.engine.step import Memory, Pending, accumulate_gradient
from iet_sd.method.agc import empty_bank
from iet_sd.presets import stand_for
from tests.compare import equal
from tests.engine.running import RUN, resuming, run, timeless, weights

BUCKETS = {"aspect_ratio_buckets": "32,32;24,40;40,24"}
CAPTIONS = {"proportion_empty_prompts": 0.3, "shuffle_caption": True, "caption_prefix": "a dog,"}
OBLONGS = [(24, 40), (40, 24)]
SHAPES = [(40, 40), (30, 50), (50, 30)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """16 pictures of three shapes, the first of which repeats."""
    root = tmp_path_factory.mktemp("shapes")
    rows = []
    for number in range(16):
        size = (*SHAPES[number % 3], 3)
        pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        name = f"{number:02d}.png"
        Image.fromarray(pixels).save(root / name)
        rows.append({"file_name": name, "text": f"a cat, {number}", "n": 3 if number == 0 else 1})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def gradients(trainer):
    found = [p.grad.clone() for p in trainer.parameters.values()]
    for p in trainer.parameters.values():
        p.grad = None
    return found


def augmented_loss(trainer, taken):
    """Of each sample, weighted, with index and timestep."""
    objective = trainer.objective
    parts = prepare(objective, taken, trainer.config.method, trainer.dataset)
    losses = [objective.weight(objective.loss_of(part), part.timesteps) for part in parts]
    return torch.cat(losses), [sample for part in parts for sample in part.samples]


def never(what, samples):
    raise AssertionError(f"the {what} of {samples} is not finite")


@pytest.mark.parametrize("redraw", [False, True])
def test_a_second_pass_of_several_sizes_is_that_of_each_alone(redraw, trainer_for, settings):
    trainer, _ = trainer_for(settings(**BUCKETS, taa_redraw_timestep=redraw, snr_gamma=5.0))
    dataset = trainer.dataset
    taken = [Pending(i, 60 * i, 100 + i, 1 - i / 10) for i in (4, 0, 3, 7, 2, 5)]
    assert len({dataset.source.sizes[p.index] for p in taken}) == 3
    loss_Q, samples = augmented_loss(trainer, taken)
    loss_Q.sum().backward()
    together = gradients(trainer)

    alone = {}
    for pending in taken:
        (loss,), (sample,) = augmented_loss(trainer, [pending])
        loss.backward()
        alone[sample] = loss.detach()
    assert sorted(samples) == sorted(alone)
    assert [i for i, _ in samples] == [4, 7, 0, 3, 2, 5]  # images of one size together
    for loss, sample in zip(loss_Q.detach(), samples, strict=True):
        torch.testing.assert_close(loss, alone[sample])
    for one, other in zip(together, gradients(trainer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_second_pass_of_one_size_is_one_batch(trainer_for, settings):
    """Bit for bit."""
    trainer, _ = trainer_for(settings())
    taken = [Pending(i, 60 * i, 100 + i, 0.5) for i in (4, 0, 3, 7, 2)]
    loss_Q, samples = augmented_loss(trainer, taken)
    visits = [Visit(p.index, p.seed) for p in taken]
    how = Augmentation(2.5, operations="gentle")
    batch = collate([trainer.dataset.example(visit, how) for visit in visits])
    timesteps = torch.tensor([p.timestep for p in taken])
    assert torch.equal(loss_Q, trainer.objective.loss(batch, timesteps, "augmented"))
    assert samples == [(p.index, p.timestep) for p in taken]


def test_a_smaller_batch_does_not_make_the_queue_full(trainer_for, settings):
    trainer, state = trainer_for(settings(**BUCKETS, method="none"))
    method = MethodConfig(**stand_for({}, "paper", "iet_agc_plus"))
    memory = Memory(empty_bank(method.bank_bins))
    order = batches(0, 1, 0, range(16), 4, trainer.dataset.source.sizes)
    waiting = 0
    for visits in (next(order) for _ in range(5)):
        seen = collate([trainer.dataset[visit] for visit in visits])
        counts, *_ = accumulate_gradient(
            trainer.objective,
            seen,
            memory,
            method,
            trainer.dataset,
            state.proxies[0].backward,
            never,
            4,
        )
        waiting += counts.scored - counts.skipped
        taken = 4 if waiting >= 4 else 0
        assert counts.augmented == taken
        assert counts.dropped == (waiting - taken if taken else 0)
        waiting = 0 if taken else waiting


def test_a_batch_has_one_size_and_all_members_have_their_turn(trainer_for, settings):
    config = settings(**BUCKETS, method="none", repeats_column="n", num_rounds=1, steps_per_round=6)
    trainer, state = trainer_for(config)
    seen, shapes = [], set()
    score = trainer.objective.prepare

    def watch(batch, timesteps, purpose):
        seen.extend(batch["index"].tolist())
        shapes.add(tuple(batch["pixel_values"].shape))
        return score(batch, timesteps, purpose)

    trainer.objective.prepare = watch
    (done,) = [event for event in trainer.run(state) if isinstance(event, ShardDone)]
    # 18 visits: 8, 5 and 5 of a size, which 2 batches of 4 hold, or 2 of 4 and 1.
    assert shapes == {
        (4, 3, 32, 32),
        (4, 3, 24, 40),
        (1, 3, 24, 40),
        (4, 3, 40, 24),
        (1, 3, 40, 24),
    }
    assert sorted(seen) == sorted([0, 0, *range(16)])
    assert (done.counts.steps, done.counts.scored, done.counts.trained) == (6, 18, 18)


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "corrected", "gradient_accumulation_steps": 2},
        {"preset": "paper", "train_batch_size": 3, "dataloader_num_workers": 1},
    ],
    ids=["corrected", "paper"],
)
def test_resumed_equals_never_stopped(given, trainer_for, settings, tmp_path):
    config = settings(
        **RUN | {"num_rounds": 2},
        **BUCKETS,
        **CAPTIONS,
        **given,
        repeats_column="n",
        checkpointing_steps=1,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = weights(run(config, whole, trainer_for)[0])
    run(config, broken, trainer_for, stop_at=2)
    run(resuming(config), broken, trainer_for, stop_at=4)
    trainer, state = run(resuming(config), broken, trainer_for)
    assert state.round == 2
    assert equal(weights(trainer), expected)
    assert timeless(broken / "metrics.jsonl") == timeless(whole / "metrics.jsonl")


def test_images_of_one_shape_train_as_without_buckets(train, images, tmp_path):
    """Bit for bit, if their bucket is the square."""
    root = tmp_path / "squares"
    root.mkdir()
    for number in range(0, 16, 3):
        (root / f"{number:02d}.png").write_bytes((images / f"{number:02d}.png").read_bytes())
        (root / f"{number:02d}.txt").write_text("a cat")
    given = {"train_data_dir": str(root), "num_shards": 2, "num_rounds": 2, "steps_per_round": 4}
    assert equal(train(**given)[0], train(**given, **BUCKETS)[0])


def test_workers_change_nothing_live_through_all_rounds_and_end_with_the_run(trainer_for, settings):
    given = {"num_shards": 2, "num_rounds": 2, "steps_per_round": 3, "dataloader_num_workers": 2}
    config = settings(**given, **BUCKETS, **CAPTIONS)
    trainer, state = trainer_for(config)
    workers = set()
    for _ in trainer.run(state):
        workers |= {child.pid for child in multiprocessing.active_children()}
    assert len(workers) == 2
    assert multiprocessing.active_children() == []
    given["dataloader_num_workers"] = 0
    alone, state = trainer_for(settings(**given, **BUCKETS, **CAPTIONS))
    list(alone.run(state))
    assert equal(weights(trainer), weights(alone))


def test_memory_is_planned_for_the_largest_size(settings):
    large = plan.estimate(settings(resolution=64), 2, 1)
    assert plan.estimate(settings(aspect_ratio_buckets="32,64;64,64"), 2, 1) == large
    assert plan.estimate(settings(**BUCKETS), 2, 1) == plan.estimate(settings(), 2, 1)
