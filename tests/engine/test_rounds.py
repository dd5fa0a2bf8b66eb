"""What happens at the end of a round: averages of adapters, redistribution, events."""

import pytest
import torch

from iet_sd.engine.proxy import MOMENTS, WEIGHTS, live_weights, part
from iet_sd.engine.rounds import RoundDone, ShardDone, StepDone


def own_weights(trainer_for, config, num_shards):
    """The weights of each proxy after one round, each trained by a trainer of its own."""
    own = []
    for shard in range(num_shards):
        trainer, state = trainer_for(config)
        state.progress = trainer.no_progress(state)
        list(trainer.train_shard(state, shard))
        own.append(live_weights(trainer.parameters))
    return own


@pytest.mark.parametrize("mode", ["factors", "product"])
def test_adapters_are_averaged_as_asked_and_the_gap_is_reported(mode, trainer_for, settings):
    given = {"method": "iet", "num_shards": 2, "num_rounds": 1, "steps_per_round": 4}
    config = settings(train_mode="lora", rank=2, lora_aggregation=mode, learning_rate=1e-1, **given)
    trainer, state = trainer_for(config)
    done = list(trainer.run(state))[-1]
    first, second = own_weights(trainer_for, config, 2)
    gaps = []
    for a, b in trainer.lora_pairs:
        mean_product = (first[b] @ first[a] + second[b] @ second[a]) / 2
        mean_a, mean_b = (first[a] + second[a]) / 2, (first[b] + second[b]) / 2
        gaps.append((mean_product - mean_b @ mean_a).norm() / mean_product.norm())
        got = state.weights[b] @ state.weights[a]
        if mode == "factors":
            assert torch.allclose(state.weights[a], mean_a)
            assert torch.allclose(state.weights[b], mean_b)
        else:
            left, values, right = torch.linalg.svd(mean_product)
            best = left[:, :2] * values[:2] @ right[:2]
            assert torch.allclose(got, best, atol=1e-5)
            assert (got - mean_product).norm() <= (mean_b @ mean_a - mean_product).norm() + 1e-5
    assert done.lora_gap == pytest.approx(max(gaps).item(), rel=1e-3)
    assert done.lora_gap > 0


def test_the_lengths_of_dora_are_averaged_as_the_factors_are(trainer_for, settings):
    given = {"method": "iet", "num_shards": 2, "num_rounds": 1, "steps_per_round": 3}
    config = settings(train_mode="lora", use_dora=True, learning_rate=1e-2, **given)
    trainer, state = trainer_for(config)
    done = list(trainer.run(state))[-1]
    first, second = own_weights(trainer_for, config, 2)
    assert sum("lora_magnitude_vector" in name for name in first) == len(trainer.lora_pairs)
    for name, tensor in state.weights.items():
        assert torch.equal(tensor, first[name] * 0.5 + second[name] * 0.5), name
        assert not torch.equal(first[name], second[name]), name
    assert done.lora_gap > 0


def test_the_most_skipped_move_in_odd_rounds_and_none_is_lost(trainer_for, settings):
    config = settings(num_shards=4, num_rounds=4, steps_per_round=6, agc_threshold=1.0, bank_bins=1)
    trainer, state = trainer_for(config)
    rounds, members, skips = [], state.shard_of_N.clone(), None
    for event in trainer.run(state):
        if not isinstance(event, RoundDone):
            continue
        rounds.append(event)
        moved = (state.shard_of_N != members).nonzero().flatten()
        assert sorted(state.shard_of_N.unique().tolist()) == [0, 1, 2, 3]
        assert torch.equal(state.shard_of_N[moved], (members[moved] + 1) % 4)
        assert [int((members[moved] == k).sum()) for k in range(4)] == event.moved_K
        if event.round % 2:
            assert state.skips_N.sum() == 0
        else:
            assert len(moved) == 0
            assert state.skips_N.sum() == sum(shard.counts.skipped for shard in event.shards)
            skips = state.skips_N.clone()
        members = state.shard_of_N.clone()
    assert sum(rounds[0].moved_K) > 0
    assert [event.aggregated for event in rounds] == [False, True, False, True]
    assert skips.sum() > 0


def test_events_tell_of_every_step(train):
    _, events = train(num_shards=2, num_rounds=2, steps_per_round=3, score_pass="train")
    steps = [e for e in events if isinstance(e, StepDone)]
    assert [(e.round, e.shard, e.step) for e in steps] == [
        (r, s, p) for r in (1, 2) for s in (0, 1) for p in (1, 2, 3)
    ]
    for done in (e for e in events if isinstance(e, ShardDone)):
        mine = [e.loss for e in steps if (e.round, e.shard) == (done.round, done.shard)]
        assert done.counts.loss_sum / done.counts.scored == pytest.approx(sum(mine) / 3)
        assert done.counts.trained == done.counts.scored - done.counts.skipped
        assert done.counts.forward == done.counts.scored + done.counts.augmented


def test_proxies_keep_their_own_weights_until_they_are_averaged(trainer_for, settings):
    trainer, state = trainer_for(settings(num_shards=2, num_rounds=2, steps_per_round=2))
    ends = (event for event in trainer.run(state) if isinstance(event, RoundDone))
    before = {name: tensor.clone() for name, tensor in state.weights.items()}
    next(ends)
    one, other = (part(proxy.tensors(), WEIGHTS) for proxy in state.proxies.values())
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(before[name], state.weights[name]) for name in before)
    next(ends)
    assert not any(part(proxy.tensors(), WEIGHTS) for proxy in state.proxies.values())
    assert all(part(proxy.tensors(), MOMENTS) for proxy in state.proxies.values())
    assert any(not torch.equal(before[name], state.weights[name]) for name in before)
