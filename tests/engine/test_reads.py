"""How often the device is waited for: in no step more often than losses decide something."""

import pytest
import torch

from iet_sd import devices
from iet_sd.engine import step, update
from iet_sd.engine.proxy import Proxy
from iet_sd.engine.rounds import ShardDone

WAITS = (
    *("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"),
    *("__index__", "__contains__", "masked_select", "unique", "equal", "allclose"),
    *("to", "argwhere", "where", "__getitem__"),
)
"""Methods of a tensor that give something to this process, or need to know how much there is."""


class OnDevice(torch.Tensor):
    """A tensor, and all that is made of it, that cannot be looked at from here."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """What torch does with it, unless that waits."""
        assert func.__name__ not in WAITS, f"{func.__name__} waits for the device"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def reads(monkeypatch):
    """Losses and the gradient's norm are on a device; how many were read, at each time."""
    sizes = []

    def read(*vectors):
        sizes.append(sum(map(len, vectors)))
        assert any(isinstance(vector, OnDevice) for vector in vectors)
        return devices.read(*(vector.as_subclass(torch.Tensor) for vector in vectors))

    for module in (step, update):
        monkeypatch.setattr(module, "read", read)
    clip = Proxy.clip_gradient
    monkeypatch.setattr(
        Proxy, "clip_gradient", lambda self, *args: clip(self, *args).as_subclass(OnDevice)
    )
    return sizes


@pytest.mark.parametrize("name", ["item", "tolist", "cpu", "nonzero"])
def test_a_look_at_the_device_is_found_out(name):
    made = (torch.ones(2).as_subclass(OnDevice) * 2).sum()
    with pytest.raises(AssertionError, match=f"{name} waits"):
        getattr(made, name)()
    to_cpu, masked = (lambda t: t.to("cpu")), (lambda t: t[t > 0])
    looks = (bool, float, int, torch.argwhere, torch.where, to_cpu, masked)
    for look in looks:
        with pytest.raises(AssertionError, match="waits for the device"):
            look(made)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(
    ("given", "scores"),
    [
        ({"method": "none"}, 0),
        ({"method": "none", "snr_gamma": 5.0}, 0),
        ({"method": "iet"}, 0),
        ({"method": "iet_agc"}, 1),
        ({"method": "iet_agc_plus"}, 1),
        ({"method": "iet_agc_plus", "taa_min_strength": 0.0}, 1),
        ({"method": "iet_agc_plus", "refill_skipped": True}, 1),
        ({"preset": "paper", "method": "iet_agc"}, 1),
    ],
    ids=str,
)
def test_an_update_waits_once_and_once_for_each_batch_that_is_scored(
    given, scores, batches, reads, settings, trainer_for
):
    """Also with gradient accumulation; and losses are told as if they were read at once."""
    length = {"num_rounds": 1, "steps_per_round": 3, "gradient_accumulation_steps": batches}
    shards = {} if given.get("method") == "none" else {"num_shards": 2}
    trainer, state = trainer_for(settings(**given, **length, **shards))
    loss_of, seen = trainer.objective.loss_of, []

    def on_device(prepared):
        loss_B = loss_of(prepared)
        seen.append(loss_B.detach().clone())
        return loss_B.as_subclass(OnDevice)

    trainer.objective.loss_of = on_device
    for event in trainer.run(state):
        if not isinstance(event, ShardDone):
            continue
        assert event.counts.updates == 3
        assert len(reads) == scores * event.counts.batches + 3
        if not scores:
            assert event.counts.scored == event.counts.trained == 3 * batches * 4
            assert event.counts.loss_sum == pytest.approx(float(torch.cat(seen).sum()))
        reads.clear()
        seen.clear()
