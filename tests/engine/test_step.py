"""One step against a naive re-computation, and its corner cases."""

import math

import pytest
import torch

from iet_sd.config import MethodConfig
from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import collate
from iet_sd.data.shards import Visit, visits
from iet_sd.engine.second_pass import Pending, take_or_drop
from iet_sd.engine.step import Memory, accumulate_gradient, decide
from iet_sd.method.agc import Bank, empty_bank
from iet_sd.presets import PRESETS, stand_for


@pytest.fixture
def batch(trainer_for, settings):
    """A trainer on one shard and its first batch of 8 visits."""
    trainer, state = trainer_for(settings(method="iet_agc", num_shards=1, train_batch_size=8))
    order = visits(0, 1, 0, range(16))
    seen = collate([trainer.dataset[next(order)] for _ in range(8)])
    return trainer, state.proxies[0], seen


def never(what, samples):
    raise AssertionError(f"the {what} of {samples} is not finite")


def losses_of(trainer, seen, purpose="score"):
    timesteps = trainer.objective.draw_timesteps(seen["seed"].tolist(), "score/timestep")
    return trainer.objective.loss(seen, timesteps, purpose), timesteps


def gradients(trainer):
    return [p.grad.clone() for p in trainer.parameters.values()]


def filled_bank(losses, timesteps, ratios):
    """A bank of 1000 bins whose corrected mean at each timestep is loss / ratio."""
    value, visited = torch.zeros(1000), torch.zeros(1000, dtype=torch.int64)
    for loss, t, ratio in zip(losses.tolist(), timesteps.tolist(), ratios, strict=True):
        value[t] = loss / ratio * (1 - 0.8**10)
        visited[t] = 10
    return Bank(value, visited)


RATIOS = [0.5, 0.7, 0.801, 0.85, 1.0, 1.5, 2.0, 3.0]
SKIPPED, NEAR, FAR = [0, 1], [2, 3, 4], [5, 6, 7]


@pytest.mark.parametrize(
    ("score_pass", "cost"),
    [
        # 8 are scored, 3 of them augmented; the 3 others have a backward pass of 8, or their own.
        ("train", (8 + 3, 8 + 3, 8 + 3)),
        ("separate", (8 + 3 + 3, 3 + 3, 8 + 3)),
        ("auto", (8 + 3 + 3, 3 + 3, 8 + 3)),
    ],
)
@pytest.mark.parametrize("operations", ["randaugment", "gentle"])
def test_corrected_trains_far_samples_as_scored_and_near_ones_augmented(
    operations, score_pass, cost, batch
):
    trainer, proxy, seen = batch
    losses, timesteps = losses_of(trainer, seen)
    memory = Memory(filled_bank(losses.detach(), timesteps, RATIOS))
    given = {"bank_bins": 1000, "score_pass": score_pass, "taa_operations": operations}
    method = MethodConfig(**PRESETS["corrected"] | given)
    counts, skipped, *_ = accumulate_gradient(
        trainer.objective, seen, memory, method, trainer.dataset, proxy.backward, never
    )
    assert skipped.tolist() == seen["index"][SKIPPED].tolist()
    assert (counts.skipped, counts.trained, counts.augmented, counts.dropped) == (2, 6, 3, 0)
    assert (counts.forward, counts.backward, counts.encoded) == cost
    got = gradients(trainer)

    # By hand: the strength is exp(-5 |ratio / 0.8 - 1|), the magnitude 5 times that.
    for p in trainer.parameters.values():
        p.grad = None
    strengths = [math.exp(-5 * abs(RATIOS[i] / 0.8 - 1)) for i in NEAR]
    augmented = collate(
        [
            trainer.dataset.example(
                Visit(int(seen["index"][i]), int(seen["seed"][i])),
                Augmentation(5 * s, operations=operations),
            )
            for i, s in zip(NEAR, strengths, strict=True)
        ]
    )
    again = trainer.objective.loss(augmented, timesteps[NEAR], "augmented")
    (losses[FAR].sum() + again.sum()).backward()
    for one, other in zip(got, gradients(trainer), strict=True):
        if operations == "randaugment":
            assert torch.allclose(one, other, atol=1e-6)
        # Strengths are of float32 there, by which an interpolated pixel may round the other way.
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6
    assert counts.strength_sum == pytest.approx(sum(strengths), rel=1e-4)


def test_paper_waits_for_a_full_batch_and_drops_the_rest(batch):
    trainer, proxy, seen = batch
    losses, timesteps = losses_of(trainer, seen)
    bank = filled_bank(losses.detach(), timesteps, RATIOS)
    memory = Memory(Bank(bank.value_T / (1 - 0.8**10), bank.visits_T))  # raw: no correction
    method = MethodConfig(**stand_for({}, "paper", "iet_agc_plus"))
    done = [trainer.objective, seen, memory, method, trainer.dataset, proxy.backward, never]
    counts, skipped, *_ = accumulate_gradient(*done)
    assert len(skipped) == 2
    assert (counts.trained, counts.backward, len(memory.queue)) == (0, 0, 6)
    assert all(p.grad is None for p in trainer.parameters.values())

    memory.bank = bank
    counts, *_ = accumulate_gradient(*done)
    assert (counts.trained, counts.augmented, counts.dropped) == (8, 8, 4)
    assert (counts.forward, counts.backward, counts.encoded) == (16, 8, 16)
    assert memory.queue == []


def test_all_skipped_leaves_no_gradient_and_still_updates_the_bank(batch):
    trainer, proxy, seen = batch
    losses, timesteps = losses_of(trainer, seen)
    before = filled_bank(losses.detach(), timesteps, [0.1] * 8)
    memory = Memory(before)
    method = MethodConfig(**PRESETS["corrected"] | {"bank_bins": 1000})
    counts, skipped, *_ = accumulate_gradient(
        trainer.objective, seen, memory, method, trainer.dataset, proxy.backward, never
    )
    assert (counts.skipped, counts.trained, len(skipped)) == (8, 0, 8)
    assert all(p.grad is None for p in trainer.parameters.values())
    assert (memory.bank.value_T[timesteps] < before.value_T[timesteps]).all()


@pytest.mark.parametrize(("empty_batch", "moves"), [("skip", False), ("step", True)])
def test_a_shard_that_is_skipped_whole_ends(empty_batch, moves, trainer_for, settings):
    """With a threshold that nothing reaches, after the first visits; weight decay may still act."""
    config = settings(
        method="iet_agc",
        num_shards=1,
        num_rounds=1,
        steps_per_round=2,
        agc_threshold=1e9,
        bank_bins=1,
        empty_batch=empty_batch,
    )
    trainer, state = trainer_for(config)
    state.proxies[0].memory.bank = Bank(torch.ones(1), torch.full((1,), 1000))
    before = {name: tensor.clone() for name, tensor in state.weights.items()}
    done = list(trainer.run(state))[-2]
    assert done.counts.trained == 0
    assert done.counts.steps == (2 if moves else 20)
    assert done.counts.updates == (2 if moves else 0)
    moved = any(not torch.equal(before[k], p) for k, p in trainer.parameters.items())
    assert moved == moves
    assert (state.proxies[0].lr_scheduler.last_epoch > 0) == moves


@pytest.mark.parametrize("preset", ["corrected", "paper"])
def test_decisions_equal_a_loop_over_batches(preset):
    """Mask, strength and bank of 30 batches against one number at a time."""
    method = MethodConfig(**stand_for({}, preset, "iet_agc_plus") | {"bank_bins": 7})
    generator = torch.Generator().manual_seed(0)
    bank, values, visited = empty_bank(7), [0.0] * 7, [0] * 7
    for _ in range(30):
        timesteps = torch.randint(1000, (6,), generator=generator)
        losses = torch.rand(6, generator=generator) + 0.1
        decision = decide(losses, timesteps, bank, method, 1000)
        bank = decision.bank
        bins = [t * 7 // 1000 for t in timesteps.tolist()]
        for i, (bin, loss) in enumerate(zip(bins, losses.tolist(), strict=True)):
            mean = values[bin]
            if preset == "corrected" and visited[bin]:
                mean = mean / (1 - 0.8 ** visited[bin])
            kept = loss >= 0.8 * mean
            strength = math.exp(-5 * abs(loss / 0.8 - mean) / mean) if mean else 0.0
            assert bool(decision.keep_B[i]) == kept
            assert float(decision.strength_B[i]) == pytest.approx(strength, abs=1e-5)
            near = strength >= (0.1 if preset == "corrected" else 0.0)
            assert bool(decision.second_pass_B[i]) == (kept and near)
        for bin, loss in zip(bins, losses.tolist(), strict=True):
            values[bin] = 0.8 * values[bin] + 0.2 * loss
            visited[bin] += 1
        assert bank.value_T.tolist() == pytest.approx(values, rel=1e-5)
        assert bank.visits_T.tolist() == visited


def test_the_queue_of_the_authors_code():
    pending = [Pending(i, i, i, 0.5) for i in range(5)]
    queue = pending[:3]
    assert take_or_drop(queue, 4) == ([], 0)
    assert queue == pending[:3]
    queue = list(pending)
    assert take_or_drop(queue, 4) == (pending[:4], 1)
    assert queue == []


def test_skipping_compares_unweighted_losses(trainer_for, settings):
    """Min-SNR changes the gradient, not which samples are skipped."""
    skips, gradient = [], []
    for gamma in (None, 1.0):
        trainer, state = trainer_for(
            settings(method="iet_agc", num_shards=1, train_batch_size=8, snr_gamma=gamma)
        )
        order = visits(0, 1, 0, range(16))
        memory = Memory(empty_bank(4))
        for _ in range(3):
            seen = collate([trainer.dataset[next(order)] for _ in range(8)])
            _, skipped, *_ = accumulate_gradient(
                trainer.objective,
                seen,
                memory,
                trainer.config.method,
                trainer.dataset,
                state.proxies[0].backward,
                never,
            )
            skips.append(skipped.tolist())
        gradient.append(torch.cat([g.flatten() for g in gradients(trainer)]))
    assert skips[:3] == skips[3:]
    assert sum(map(len, skips)) > 0
    assert not torch.allclose(*gradient)
