"""What proxies hold between their turns, and what becomes of it when they are averaged."""

import numpy as np
import pytest
import torch

from iet_sd.engine.proxy import MOMENTS, WEIGHTS, part
from iet_sd.engine.rounds import RoundDone
from iet_sd.method.aggregate import shard_weights
from tests.compare import equal
from tests.engine.running import LORA

# Every loss below the running mean is skipped, so that proxies differ in their updates.
RUN = {
    "method": "iet_agc",
    "num_shards": 3,
    "num_rounds": 2,
    "steps_per_round": 4,
    "step_unit": "batch",
    "train_batch_size": 1,
    "agc_threshold": 1.0,
    "bank_bins": 1,
}
MODES = [{}, LORA]


def round_by_round(trainer, state):
    """The state at the end of each round, and before it what each proxy held at its end."""
    held = {}
    for event in trainer.run(state):
        if isinstance(event, RoundDone):
            yield held
            held = {}
        elif hasattr(event, "counts"):
            tensors = state.proxies[event.shard].tensors()
            held[event.shard] = {name: t.clone() for name, t in tensors.items()}


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
def test_moments_that_are_kept_stay_with_their_proxy(mode, settings, trainer_for):
    trainer, state = trainer_for(settings(**RUN, **mode))
    held = next(round_by_round(trainer, state))
    for shard, proxy in state.proxies.items():
        assert equal(part(proxy.tensors(), MOMENTS), part(held[shard], MOMENTS))
        assert not part(proxy.tensors(), WEIGHTS)
        proxy.enter(state.weights, state.moments)
        assert equal(part(proxy.tensors(), MOMENTS), part(held[shard], MOMENTS))
        assert equal(part(proxy.tensors(), WEIGHTS), state.weights)
        proxy.keep(part(proxy.leave(), ""))
    assert state.moments == {}


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
def test_moments_that_are_reset_start_as_in_a_new_optimizer(mode, settings, trainer_for):
    trainer, state = trainer_for(settings(**RUN, **mode, proxy_optimizer="reset"))
    next(round_by_round(trainer, state))
    assert state.moments == {}
    for proxy in state.proxies.values():
        assert proxy.tensors() == {}
        proxy.enter(state.weights, state.moments)
        moments = part(proxy.tensors(), MOMENTS)
        assert len(moments) == 3 * len(state.weights)
        assert not any(tensor.any() for tensor in moments.values())


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
@pytest.mark.parametrize("weighting", ["size", "uniform"])
def test_averaged_moments_are_the_weighted_sums_over_the_sum_of_weights(
    mode, weighting, settings, trainer_for
):
    """By hand in double precision: what AdamW will divide the moments by, divided out."""
    given = {"proxy_optimizer": "average", "aggregation_weights": weighting}
    trainer, state = trainer_for(settings(**RUN, **mode, **given))
    sizes = torch.bincount(state.shard_of_N).tolist()
    assert len(set(sizes)) > 1
    share_K = shard_weights(sizes, weighting)
    held = next(round_by_round(trainer, state))
    steps_K = []
    for name in state.weights:
        steps_K = [int(held[k][f"{MOMENTS}{name}/step"]) for k in range(3)]
        steps = int(state.moments[f"{name}/step"])
        assert steps == round(sum(w * t for w, t in zip(share_K, steps_K, strict=True)))
        for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
            own_K = [held[k][f"{MOMENTS}{name}/{key}"].double().numpy() for k in range(3)]
            total = sum(w * own for w, own in zip(share_K, own_K, strict=True))
            weight = sum(w * (1 - beta**t) for w, t in zip(share_K, steps_K, strict=True))
            found = state.moments[f"{name}/{key}"].double().numpy() / (1 - beta**steps)
            scale = np.abs(total / weight).max()
            np.testing.assert_allclose(found, total / weight, rtol=1e-4, atol=1e-6 * scale)
    assert len(set(steps_K)) > 1
    for proxy in state.proxies.values():
        proxy.enter(state.weights, state.moments)
        assert equal(part(proxy.tensors(), MOMENTS), state.moments)
        before = {name: tensor.clone() for name, tensor in state.moments.items()}
        proxy.optimizer.state[next(iter(proxy.parameters.values()))]["exp_avg"].fill_(1.0)
        assert equal(state.moments, before), "the proxies share one tensor"


def test_proxies_keep_their_moments_where_no_average_is_due(settings, trainer_for):
    given = RUN | {"aggregate_every": 2, "proxy_optimizer": "average"}
    trainer, state = trainer_for(settings(**given))
    rounds = round_by_round(trainer, state)
    held = next(rounds)
    assert state.moments == {}
    assert all(equal(p.tensors(), held[shard]) for shard, p in state.proxies.items())
    next(rounds)
    assert state.moments


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
def test_the_outer_optimizer_is_torchs_on_the_averaged_change(mode, settings, trainer_for):
    """Rounds of DiLoCo: the gradient is the last weights less the average of the proxies."""
    given = {"outer_learning_rate": 0.7, "outer_momentum": 0.9}
    trainer, state = trainer_for(settings(**RUN | {"num_rounds": 3}, **mode, **given))
    share_K = shard_weights(torch.bincount(state.shard_of_N).tolist(), "size")
    outer = {name: torch.nn.Parameter(t.clone()) for name, t in state.weights.items()}
    sgd = torch.optim.SGD(outer.values(), lr=0.7, momentum=0.9, nesterov=True)
    for held in round_by_round(trainer, state):
        for name, parameter in outer.items():
            own_K = [held[shard][WEIGHTS + name] for shard in range(3)]
            average = sum(w * own for w, own in zip(share_K, own_K, strict=True))
            parameter.grad = parameter.detach() - average
        sgd.step()
        for name, parameter in outer.items():
            assert torch.allclose(state.weights[name], parameter, rtol=1e-4, atol=1e-6), name
    assert state.velocity.keys() == state.weights.keys()
    final = {name: p.detach() for name, p in trainer.parameters.items()}
    assert equal(final, state.weights)


def test_a_plain_outer_step_is_no_outer_step_bit_for_bit(train):
    given = RUN | {"train_mode": "lora", "lora_aggregation": "product"}
    plain, _ = train(**given)
    assert equal(plain, train(**given, outer_learning_rate=1.0, outer_momentum=0.0)[0])
    assert not equal(plain, train(**given, outer_learning_rate=0.9)[0])
    assert not equal(plain, train(**given, outer_momentum=0.1)[0])
