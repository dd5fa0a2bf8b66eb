"""The moving average is diffusers' `EMAModel` number for number, and is averaged over proxies."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from iet_sd.engine import ema, plan
from iet_sd.engine.proxy import EMA, MOMENTS, part
from iet_sd.engine.rounds import RoundDone, ShardDone
from iet_sd.engine.store import open_store
from iet_sd.errors import UserError
from iet_sd.method.aggregate import shard_weights
from tests.compare import equal
from tests.engine import running
from tests.engine.plain import Plain
from tests.engine.running import LORA
from tests.engine.test_proxy import RUN, round_by_round
from tests.engine.test_reduction import PLAIN

MODES = [{}, LORA]
IDS = ["full", "lora"]
TWO_ROUNDS = PLAIN | {"num_rounds": 2, "steps_per_round": 3, "use_ema": True}


def live():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 2, 2), (17,)]
    return {
        str(i): torch.nn.Parameter(torch.randn(shape, generator=generator))
        for i, shape in enumerate(shapes)
    }


def test_the_decay_is_that_of_diffusers():
    theirs = EMAModel([])
    for update in [*range(1, 200), 1000, 89_989, 89_990, 89_991, 89_992, 10**6]:
        assert ema.decay_of(update) == theirs.get_decay(update)


@pytest.mark.parametrize("foreach", [False, True])
def test_an_update_is_that_of_diffusers_bit_for_bit(foreach):
    parameters = live()
    average = {name: p.detach().clone() for name, p in parameters.items()}
    theirs = EMAModel(parameters.values(), foreach=foreach)
    for update in range(1, 30):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ema.follow(average, parameters, update, foreach)
        theirs.step(parameters.values())
        assert all(map(torch.equal, average.values(), theirs.shadow_params))
    assert not equal(average, {name: p.detach() for name, p in parameters.items()})


@pytest.mark.parametrize("foreach", [False, True])
def test_an_average_on_another_device_is_updated_where_it_lies(foreach):
    """``meta`` stands for the GPU: tensors go there for the arithmetic and are copied back."""
    parameters = {name: torch.nn.Parameter(p.to("meta")) for name, p in live().items()}
    average = ema.placed({name: p.detach() for name, p in live().items()}, parameters, True)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        ema.follow(average, parameters, 1, foreach)
    assert all(tensor.device.type == "cpu" for tensor in average.values())


def test_an_average_lies_in_memory_as_its_parameter_does():
    """Else the kernel for lists of tensors is none: it wants the strides of all to be the same."""
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    parameters = {"a": torch.nn.Parameter(weight), "b": torch.nn.Parameter(torch.randn(3))}
    waiting = {name: torch.randn(p.shape) for name, p in parameters.items()}
    average = ema.placed(waiting, parameters, False)
    assert equal(average, waiting)
    assert {n: t.stride() for n, t in average.items()} == {
        n: p.stride() for n, p in parameters.items()
    }


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_method_none_has_the_average_of_a_plain_loop_bit_for_bit(
    mode, foreach, settings, trainer_for, pipelines, images
):
    """Over two rounds, at whose end the only proxy is averaged with itself."""
    trainer, state = trainer_for(settings(**TWO_ROUNDS | mode, foreach_ema=foreach))
    list(trainer.run(state))
    plain = Plain(pipelines["sd1"], images, mode.get("rank"), foreach)
    for round in (1, 2):
        plain.train(3, round)
    assert equal(state.ema, plain.averages)
    assert equal(state.weights, plain.weights)
    assert not equal(state.ema, state.weights)


def test_the_average_changes_nothing_that_is_trained(train, settings, trainer_for):
    given = RUN | {"num_rounds": 3, "aggregate_every": 2}
    weights, _ = train(**given)
    for options in ({}, {"offload_ema": True}):
        trainer, state = trainer_for(settings(**given, use_ema=True, **options))
        list(trainer.run(state))
        assert equal(state.weights, weights)
        assert equal({n: p.detach() for n, p in trainer.parameters.items()}, weights)


def test_without_the_flag_there_is_none_of_it(settings, trainer_for):
    trainer, state = trainer_for(settings(**RUN))
    for held in round_by_round(trainer, state):
        assert not any(part(tensors, EMA) for tensors in held.values())
        assert state.ema == {}
    assert all(proxy.ema == {} for proxy in state.proxies.values())


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("weighting", ["size", "uniform"])
def test_averages_are_averaged_as_the_weights_and_every_proxy_goes_on_from_that(
    mode, weighting, settings, trainer_for
):
    """Also of proxies that differ in their updates, as those of RUN do."""
    given = RUN | mode | {"use_ema": True, "aggregation_weights": weighting}
    trainer, state = trainer_for(settings(**given))
    share_K = shard_weights(torch.bincount(state.shard_of_N).tolist(), weighting)
    held = next(round_by_round(trainer, state))
    updates_K = [proxy.lr_scheduler.last_epoch for proxy in state.proxies.values()]
    assert len(set(updates_K)) > 1
    for name, tensor in state.ema.items():
        own_K = [held[k][EMA + name].double().numpy() for k in range(3)]
        mean = sum(w * own for w, own in zip(share_K, own_K, strict=True))
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-5, atol=1e-6)
    before = {name: tensor.clone() for name, tensor in state.ema.items()}
    for proxy in state.proxies.values():
        assert not part(proxy.tensors(), EMA)
        proxy.enter(state.weights, state.moments, state.ema)
        assert equal(proxy.ema, state.ema)
        next(iter(proxy.ema.values())).fill_(1.0)
        assert equal(state.ema, before), "the proxies share one tensor"
        proxy.leave()


def test_the_average_of_adapters_is_that_of_products_where_theirs_is(settings, trainer_for):
    """With one shard: what BA of the average is, if not its factors, is that of the plain mean."""
    given = TWO_ROUNDS | LORA | {"num_rounds": 1}
    products = []
    for how in ("factors", "product"):
        trainer, state = trainer_for(settings(**given, lora_aggregation=how))
        list(trainer.run(state))
        products.append(
            {b: state.ema[b].double() @ state.ema[a].double() for a, b in trainer.lora_pairs}
        )
    for name, product in products[0].items():
        assert torch.allclose(product, products[1][name], atol=1e-7), name


def test_it_waits_with_its_proxy_where_no_average_is_due(settings, trainer_for):
    trainer, state = trainer_for(settings(**RUN | {"aggregate_every": 2, "use_ema": True}))
    start = dict(state.ema)
    rounds = round_by_round(trainer, state)
    held = next(rounds)
    assert equal(state.ema, start)
    for shard, proxy in state.proxies.items():
        assert equal(part(proxy.tensors(), EMA), part(held[shard], EMA))
    next(rounds)
    assert not equal(state.ema, start)


def test_no_update_of_the_weights_is_none_of_the_average(settings, trainer_for):
    """An fp16 gradient that overflows; and an update with no gradient counts as one."""
    given = PLAIN | {"use_ema": True, "mixed_precision": "fp16"}
    _, state = trainer_for(settings(**given))
    proxy = state.proxies[0]
    proxy.enter(state.weights, state.moments, state.ema)
    before = {name: tensor.clone() for name, tensor in proxy.ema.items()}
    for value, updated in ((math.inf, False), (1.0, True)):
        for parameter in proxy.parameters.values():
            parameter.grad = torch.full_like(parameter, value)
        # What the scaler notes when it scales a loss.
        proxy.backward(next(iter(proxy.parameters.values())).sum() * 0)
        assert bool(proxy.clip_gradient().isfinite()) is updated
        if updated:
            proxy.update()
        else:
            assert proxy.overflowed()
        assert equal(proxy.ema, before) is not updated
    assert proxy.lr_scheduler.last_epoch == 1
    proxy.update_with_zero_gradient()
    assert proxy.lr_scheduler.last_epoch == 2


def test_disk_keeps_the_same_bits_as_memory(settings, trainer_for, tmp_path):
    results = []
    for kind in ("memory", "disk"):
        with open_store(kind, tmp_path, 0, 1) as store:
            given = RUN | LORA | {"aggregate_every": 2, "num_rounds": 3, "use_ema": True}
            trainer, state = trainer_for(settings(**given), store)
            list(trainer.run(state))
            results.append(state.ema)
    assert equal(*results)


@pytest.mark.parametrize(
    ("mode", "stop_at"),
    [(LORA, 3), (LORA, 8), ({}, 20)],
    ids=["in a shard, LoRA", "after a shard, LoRA", "in a later round, full"],
)
def test_stopped_and_resumed_equals_never_stopped(mode, stop_at, settings, trainer_for, tmp_path):
    config = settings(**running.RUN | mode, use_ema=True, checkpointing_steps=1)
    trainer, state = trainer_for(config)
    list(trainer.run(state))
    running.run(config, tmp_path / "stopped", trainer_for, stop_at)
    goes_on = running.resuming(config, checkpointing_steps=500)
    again, resumed = running.run(goes_on, tmp_path / "stopped", trainer_for)
    assert equal(running.weights(again), running.weights(trainer))
    assert equal(resumed.ema, state.ema)
    assert not equal(state.ema, state.weights)
    assert equal(load_file(tmp_path / "stopped" / "checkpoint-4" / "ema.safetensors"), state.ema)


@pytest.mark.parametrize(("mode", "aggregate_every"), [({}, 1), (LORA, 2)], ids=IDS)
def test_the_plan_counts_it(mode, aggregate_every, settings, trainer_for):
    """What a checkpoint holds at most, and what the device and main memory hold more."""
    given = RUN | mode | {"aggregate_every": aggregate_every}
    config = settings(**given, use_ema=True)
    trainer, state = trainer_for(config)
    largest = 0
    for event in trainer.run(state):
        if isinstance(event, RoundDone):
            waiting = [t for proxy in state.proxies.values() for t in proxy.tensors().items()]
            kept = [t for name, t in waiting if not name.endswith("/step")]
            shared = [*state.weights.values(), *state.ema.values()]
            largest = max(largest, sum(t.nbytes for t in kept + shared))
    found = plan.estimate(config, 4, 1)
    assert found.checkpoint == largest
    plain = plan.estimate(settings(**given), 4, 1)
    offloaded = plan.estimate(settings(**given, use_ema=True, offload_ema=True), 4, 1)
    trained = 4 * found.trainable
    assert found.model - plain.model == trained
    assert offloaded.model == plain.model
    # Of the proxy that enters or leaves, the last average, the next; and of those that wait.
    assert found.host - plain.host == trained * (3 + 2 * (aggregate_every > 1))
    assert found.within_round - plain.within_round == 3 * trained


def test_flags_of_an_average_that_is_not_kept_are_refused(settings):
    for flag in ("offload_ema", "foreach_ema"):
        with pytest.raises(UserError, match=f"--{flag} says how --use_ema works"):
            settings(**{flag: True})


def test_moments_are_untouched(settings, trainer_for):
    """With averaged moments: both averages are there, each under its own names."""
    given = RUN | {"proxy_optimizer": "average", "use_ema": True}
    trainer, state = trainer_for(settings(**given))
    held = next(round_by_round(trainer, state))
    assert all(part(tensors, EMA) and part(tensors, MOMENTS) for tensors in held.values())
    assert state.ema.keys() == state.weights.keys()
    assert len(state.moments) == 3 * len(state.weights)
    assert isinstance(state.history[0].shards[0], ShardDone)
