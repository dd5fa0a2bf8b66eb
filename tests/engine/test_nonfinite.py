"""A loss or gradient that is NaN or infinite: named, and left out or the end of the run."""

import logging
import math
import re

import pytest
import torch

from iet_sd.config import MethodConfig
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.shards import visits
from iet_sd.engine.rounds import RoundDone, ShardDone, StepDone
from iet_sd.engine.step import Counts, Memory, accumulate_gradient, decide, foresees_one_pass
from iet_sd.engine.update import update
from iet_sd.errors import UserError
from iet_sd.presets import PRESETS
from tests.compare import equal
from tests.engine.running import LORA
from tests.engine.test_reduction import PLAIN, plain_diffusers
from tests.engine.test_step import FAR, NEAR, RATIOS, SKIPPED, filled_bank, losses_of

MODES = [{}, LORA]
SAMPLE = 5


@pytest.fixture
def poisoned_image(monkeypatch):
    """Every reading of one sample gives pixels that are no numbers."""
    example = TrainingImages.example

    def read(self, visit, *args):
        found = example(self, visit, *args)
        if visit.index == SAMPLE:
            found["pixel_values"][0, 0, 0] = math.nan
        return found

    monkeypatch.setattr(TrainingImages, "example", read)


def poison_gradients(trainer, value):
    """Every batch with one sample gives a gradient that is no number, of a loss that is one."""
    poisoned, loss_of = [], trainer.objective.loss_of

    def watch(prepared):
        poisoned[:] = [index for index, _ in prepared.samples if index == SAMPLE]
        return loss_of(prepared)

    trainer.objective.loss_of = watch
    first = next(iter(trainer.parameters.values()))
    first.register_hook(lambda gradient: gradient * value if poisoned else gradient)


def all_finite(state):
    tensors = [*state.weights.values()]
    for proxy in state.proxies.values():
        tensors += [proxy.memory.bank.value_T, *proxy.tensors().values()]
    return all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(
    mode, settings, trainer_for, poisoned_image
):
    """By sample, timestep, shard, round and step; those of the bad sample alone."""
    trainer, state = trainer_for(settings(num_shards=2, steps_per_round=5, **mode))
    shard = int(state.shard_of_N[SAMPLE])
    steps = []
    with pytest.raises(UserError) as error:
        steps.extend(trainer.run(state))
    found = re.search(
        r"round 1, shard (\d), step (\d), samples 05.png \(t=(\d+)\)\.", str(error.value)
    )
    assert found, error.value
    assert "The loss is not finite" in str(error.value)
    assert "--on_nonfinite skip_batch" in str(error.value)
    mine = [e.step for e in steps if isinstance(e, StepDone) and e.shard == shard]
    assert (int(found[1]), int(found[2])) == (shard, len(mine) + 1)
    order = visits(0, 1, shard, (state.shard_of_N == shard).nonzero().flatten().tolist())
    batch = [next(order) for _ in range(4 * (len(mine) + 1))][-4:]
    (visit,) = [visit for visit in batch if visit.index == SAMPLE]
    timestep = trainer.objective.draw_timesteps([visit.seed], "score/timestep")
    assert int(found[3]) == int(timestep)
    assert all_finite(state)
    assert state.round == 0


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(mode, settings, trainer_for):
    config = settings(method="none", num_rounds=1, steps_per_round=5, **mode)
    trainer, state = trainer_for(config)
    poison_gradients(trainer, math.inf)
    with pytest.raises(UserError, match=r"The gradient is not finite in round 1, .*05.png \(t="):
        list(trainer.run(state))
    assert all(p.isfinite().all() for p in trainer.parameters.values())
    assert all_finite(state)


def test_batches_left_out_for_their_loss_are_as_if_they_were_not_there(
    train, pipelines, images, poisoned_image, caplog
):
    """Against plain training that never sees them, bit for bit."""
    with caplog.at_level(logging.WARNING):
        weights, events = train(**PLAIN, on_nonfinite="skip_batch")
    expected = plain_diffusers(pipelines["sd1"], images, 5, 4, range(16), poisoned=SAMPLE)
    assert equal(weights, expected)
    (done,) = [event for event in events if isinstance(event, ShardDone)]
    assert done.counts.updates == 5
    assert done.counts.nonfinite == done.counts.steps - 5 > 0
    assert (done.counts.scored, done.counts.trained) == (20, 20)
    assert caplog.text.count("05.png (t=") == done.counts.nonfinite
    assert "They are left out" in caplog.text
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert sum(map(math.isnan, losses)) == done.counts.nonfinite


def test_batches_left_out_for_their_gradient_are_as_if_they_were_not_there(
    settings, trainer_for, pipelines, images
):
    trainer, state = trainer_for(settings(**PLAIN, on_nonfinite="skip_batch"))
    poison_gradients(trainer, math.nan)
    done = next(event for event in trainer.run(state) if isinstance(event, ShardDone))
    expected = plain_diffusers(pipelines["sd1"], images, 5, 4, range(16), poisoned=SAMPLE)
    assert equal({name: p.detach() for name, p in trainer.parameters.items()}, expected)
    assert done.counts.nonfinite == done.counts.steps - 5 > 0
    assert done.counts.trained == 20
    # One pass each, the first batch being left out or not.
    assert done.counts.forward == 4 * done.counts.batches
    left_out = Counts(scored=4, nonfinite=1)
    assert foresees_one_pass(trainer.config.method, left_out, trainer.objective)


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
@pytest.mark.parametrize(
    "way",
    [
        {"preset": "corrected"},
        {"preset": "paper"},
        {"score_pass": "separate"},
        {"refill_skipped": True},
    ],
    ids=str,
)
def test_the_whole_method_goes_on_without_them(mode, way, settings, trainer_for, poisoned_image):
    given = {"num_shards": 2, "steps_per_round": 4, "on_nonfinite": "skip_batch"}
    trainer, state = trainer_for(settings(**mode, **given, **way))
    rounds = [event for event in trainer.run(state) if isinstance(event, RoundDone)]
    assert sum(shard.counts.nonfinite for event in rounds for shard in event.shards) > 0
    assert all_finite(state)


def test_a_round_of_nothing_but_bad_batches_ends(settings, trainer_for):
    trainer, state = trainer_for(settings(**PLAIN, on_nonfinite="skip_batch"))
    loss_of = trainer.objective.loss_of
    trainer.objective.loss_of = lambda prepared: loss_of(prepared) * math.nan
    before = {name: tensor.clone() for name, tensor in state.weights.items()}
    done = next(event for event in trainer.run(state) if isinstance(event, ShardDone))
    assert (done.counts.updates, done.counts.nonfinite) == (0, 50)
    assert equal({name: p.detach() for name, p in trainer.parameters.items()}, before)


@pytest.mark.parametrize(
    ("score_pass", "bad"), [("train", NEAR[0]), ("separate", NEAR[0]), ("separate", FAR[0])]
)
def test_an_update_is_left_out_whole_where_only_its_second_pass_is_bad(
    score_pass, bad, settings, trainer_for
):
    """What the first pass found is remembered; whatever is bad, that sample alone is named."""
    trainer, state = trainer_for(settings(num_shards=1, train_batch_size=8, msr=False))
    order = visits(0, 1, 0, range(16))
    seen = collate([trainer.dataset[next(order)] for _ in range(8)])
    losses, timesteps = losses_of(trainer, seen)
    memory = Memory(filled_bank(losses.detach(), timesteps, RATIOS))
    given = {"bank_bins": 1000, "score_pass": score_pass}
    method = MethodConfig(**PRESETS["corrected"] | given)
    expected = decide(losses.detach(), timesteps, memory.bank, method, 1000)
    sample = int(seen["index"][bad]), int(timesteps[bad])
    loss_of, told, proxy = trainer.objective.loss_of, [], state.proxies[0]

    def poisoned(prepared):
        loss_Q = loss_of(prepared)
        if len(prepared.samples) == 8:  # scoring
            return loss_Q
        at = torch.tensor([found == sample for found in prepared.samples])
        return torch.where(at, math.nan, loss_Q)

    def tell(what, samples):
        told.append((what, samples))

    trainer.objective.loss_of = poisoned
    proxy.enter(state.weights, state.moments)
    done = accumulate_gradient(
        trainer.objective, seen, memory, method, trainer.dataset, proxy.backward, tell
    )
    update(proxy, done.counts, done.trained, done.unread, 1 / len(done.trained), tell)
    assert told == [("loss", [sample])]
    assert (done.counts.trained, done.counts.augmented, done.counts.strength_sum) == (0, 0, 0.0)
    assert (done.counts.nonfinite, done.counts.scored, done.counts.updates) == (1, 8, 0)
    assert done.skipped.tolist() == seen["index"][SKIPPED].tolist()
    assert equal(memory.bank._asdict(), expected.bank._asdict())
    assert memory.queue == []
    assert all(p.grad is None for p in trainer.parameters.values())
    assert equal(proxy.parameters, state.weights)


@pytest.mark.parametrize(("method", "losses"), [("none", {}), ("iet_agc", {"agc_threshold": 0.0})])
def test_of_several_batches_to_an_update_one_is_bad(
    method, losses, settings, trainer_for, poisoned_image
):
    """All of it is left out where losses are read for it; else the batch that has no score."""
    given = {"num_shards": 1, "gradient_accumulation_steps": 2, "on_nonfinite": "skip_batch"}
    length = {"num_rounds": 1, "steps_per_round": 5, "train_batch_size": 4}
    trainer, state = trainer_for(settings(method=method, **given, **length, **losses))
    done = next(event for event in trainer.run(state) if isinstance(event, ShardDone)).counts
    assert done.updates == 5
    assert done.nonfinite > 0
    if method == "none":
        assert done.steps == 5 + done.nonfinite
        assert done.scored == done.trained == 5 * 8
    else:
        assert done.steps == 5
        assert done.scored == done.trained == 5 * 8 - 4 * done.nonfinite
    assert all_finite(state)


def test_an_overflow_of_fp16_stays_what_it_is(settings, trainer_for):
    """The loss scale is lowered and another step makes the update, whatever --on_nonfinite says."""
    trainer, state = trainer_for(settings(**PLAIN, mixed_precision="fp16", max_grad_norm=1e9))
    poison_gradients(trainer, math.inf)
    scale = state.proxies[0].scaler.get_scale()
    done = next(event for event in trainer.run(state) if isinstance(event, ShardDone))
    assert done.counts.nonfinite == 0
    assert done.counts.updates == 5 < done.counts.steps
    # What an overflow lost was not trained.
    assert done.counts.trained == 5 / done.counts.steps * done.counts.scored
    assert state.proxies[0].scaler.get_scale() < scale
    assert all(p.isfinite().all() for p in trainer.parameters.values())


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip_batch"])
def test_a_gradient_that_no_loss_scale_mends_is_no_overflow(on_nonfinite, settings, trainer_for):
    """Else the scale would be halved until it is 0, and no update could ever follow."""
    config = settings(**PLAIN, mixed_precision="fp16", on_nonfinite=on_nonfinite)
    trainer, state = trainer_for(config)
    first = next(iter(trainer.parameters.values()))
    first.register_hook(lambda gradient: gradient * math.nan)
    run = trainer.run(state)
    if on_nonfinite == "stop":
        with pytest.raises(UserError, match="gradient is not finite in round 1, shard 0, step 17,"):
            list(run)
        return
    done = next(event for event in run if isinstance(event, ShardDone))
    assert done.counts.updates == done.counts.trained == 0
    assert done.counts.nonfinite == done.counts.steps - 16
    assert state.proxies[0].scaler.get_scale() == 1
