"""Whatever an optimizer remembers of a parameter waits and comes back as it was."""

import importlib.util
import math
import sys
import types
from functools import partial

import pytest
import torch
from peft.import_utils import is_bnb_available

from iet_sd.engine.optimizer import check_optimizer, make_optimizer, put_state, state_of
from iet_sd.engine.proxy import MOMENTS, part
from iet_sd.engine.store import open_store
from iet_sd.errors import UserError
from tests.compare import equal
from tests.engine import running
from tests.engine.plain import Plain
from tests.engine.running import LORA
from tests.engine.test_reduction import PLAIN


class EightBits(torch.optim.Optimizer):
    """State laid out as that of bitsandbytes' AdamW8bit: codes, their tables, scales, a count."""

    def __init__(self, params, lr, betas, weight_decay, eps):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.eps = eps

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    for number in (1, 2):
                        state[f"state{number}"] = torch.zeros_like(p, dtype=torch.uint8)
                        state[f"qmap{number}"] = torch.linspace(0, 1, 256)
                        state[f"absmax{number}"] = torch.zeros(1)
                assert isinstance(state["step"], int)
                state["step"] += 1
                values = (p.grad.abs(), p.grad.square())
                for number, (value, beta) in enumerate(zip(values, group["betas"], strict=True), 1):
                    code, table = state[f"state{number}"], state[f"qmap{number}"]
                    assert code.dtype == torch.uint8
                    mean = table[code.int()] * state[f"absmax{number}"] * beta + value * (1 - beta)
                    state[f"absmax{number}"] = mean.max().view(1)
                    state[f"state{number}"] = (mean / mean.max().clamp(min=1e-12) * 255).to(
                        torch.uint8
                    )
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * p.grad.sign() * mean.sqrt().clamp(max=1) * state["step"])


KINDS = {
    "AdamW8bit's layout": EightBits,
    "NAdam": torch.optim.NAdam,
    "Adafactor": lambda params, lr, betas, weight_decay, eps: torch.optim.Adafactor(params, lr=lr),
}


@pytest.fixture
def bitsandbytes(monkeypatch):
    """An importable package of that name, with the given AdamW8bit."""
    is_bnb_available()  # peft looks once, and is not to find this one

    def install(optimizer):
        package = types.ModuleType("bitsandbytes")
        package.optim = types.SimpleNamespace(AdamW8bit=optimizer)
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)

    return install


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_training_over_rounds_is_one_optimizer_that_never_left(
    kind, settings, trainer_for, bitsandbytes, pipelines, images, tmp_path
):
    """In memory and on disk, where the proxy waits between two rounds."""
    bitsandbytes(kind)
    plain = Plain(pipelines["sd1"], images, 2, adamw=kind)
    for round in (1, 2):
        plain.train(3, round)
    given = PLAIN | LORA | {"num_rounds": 2, "steps_per_round": 3, "use_8bit_adam": True}
    for store in ("memory", "disk"):
        with open_store(store, tmp_path, 0, 1) as proxies:
            trainer, state = trainer_for(settings(**given), proxies)
            list(trainer.run(state))
            remembered = part(state.proxies[0].tensors(), MOMENTS)
        assert equal(state.weights, plain.weights)
        names = {name.rpartition("/")[2] for name in remembered}
        assert "exp_avg_sq" not in names or kind is not EightBits
        theirs = plain.optimizer.state[next(iter(plain.parameters.values()))]
        assert names == theirs.keys()


def test_it_is_resumed_exactly(settings, trainer_for, bitsandbytes, tmp_path):
    bitsandbytes(EightBits)
    run = running.RUN | LORA | {"num_rounds": 2, "msr": False, "aggregate_every": 1}
    config = settings(**run, use_8bit_adam=True, checkpointing_steps=2)
    trainer, state = trainer_for(config)
    list(trainer.run(state))
    running.run(config, tmp_path / "stopped", trainer_for, stop_at=11)
    again, _ = running.run(running.resuming(config), tmp_path / "stopped", trainer_for)
    assert equal(running.weights(again), running.weights(trainer))


def test_one_kernel_over_rounds_is_one_optimizer_that_never_left(
    settings, trainer_for, pipelines, images
):
    plain = Plain(pipelines["sd1"], images, 2, adamw=partial(torch.optim.AdamW, fused=True))
    for round in (1, 2):
        plain.train(3, round)
    given = PLAIN | LORA | {"num_rounds": 2, "steps_per_round": 3, "fused_adamw": True}
    trainer, state = trainer_for(settings(**given))
    list(trainer.run(state))
    assert equal(state.weights, plain.weights)
    other, _ = trainer_for(settings(**given | {"fused_adamw": None}))
    list(other.run(other.start(state.shard_of_N)))
    assert all(
        torch.allclose(other.parameters[name], tensor, atol=1e-6)
        for name, tensor in state.weights.items()
    )


@pytest.mark.parametrize("proxy_optimizer", ["keep", "average"])
def test_one_kernel_is_resumed_exactly(proxy_optimizer, settings, trainer_for, tmp_path):
    run = running.RUN | LORA | {"num_rounds": 2, "msr": False, "proxy_optimizer": proxy_optimizer}
    config = settings(**run, fused_adamw=True, checkpointing_steps=2)
    trainer, state = trainer_for(config)
    list(trainer.run(state))
    running.run(config, tmp_path / "stopped", trainer_for, stop_at=11)
    again, _ = running.run(running.resuming(config), tmp_path / "stopped", trainer_for)
    assert equal(running.weights(again), running.weights(trainer))


@pytest.mark.parametrize("fused", [False, True])
def test_a_count_is_where_the_optimizer_counts(fused):
    """On a device that is no CPU: one kernel counts there, and other code on the CPU."""
    weight = torch.empty(4, 3, 2, 2, device="meta").to(memory_format=torch.channels_last)
    parameters = {"a": torch.nn.Parameter(weight)}
    # No device but a CPU is sure to be here, and a fused optimizer refuses this one.
    optimizer = torch.optim.AdamW(parameters.values())
    optimizer.defaults["fused"] = fused
    state = {"a/step": torch.tensor(3.0), "a/exp_avg": torch.ones(4, 3, 2, 2)}
    put_state(optimizer, parameters, state)
    remembered = optimizer.state[parameters["a"]]
    assert remembered["step"].device.type == ("meta" if fused else "cpu")
    assert remembered["exp_avg"].device.type == "meta"
    assert remembered["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize("fused", [None, True])
def test_fp16_updates_as_the_scaler_itself_does(fused, settings, trainer_for):
    """An overflow changes nothing but the scale; without asking the scaler whether it was one."""
    config = settings(**PLAIN | LORA, mixed_precision="fp16", fused_adamw=fused)
    _, state = trainer_for(config)
    proxy = state.proxies[0]
    proxy.enter(state.weights, state.moments)
    mine = list(proxy.parameters.values())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    group = {"params": twins, "lr": proxy.learning_rate}
    optimizer = make_optimizer([group], config.training, proxy.learning_rate)
    scaler = torch.amp.GradScaler("cpu")
    for value, updates in ((1.0, 1), (math.inf, 1), (2.0, 2)):
        scaler.scale(value * sum(p.sum() for p in twins)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(twins, config.training.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        proxy.backward(value * sum(p.sum() for p in mine))
        if proxy.clip_gradient().isfinite():
            proxy.update()
        else:
            assert proxy.overflowed()
        assert all(torch.equal(*pair) for pair in zip(mine, twins, strict=True))
        assert proxy.scaler.get_scale() == scaler.get_scale()
        assert proxy.lr_scheduler.last_epoch == updates


def test_state_keeps_its_types():
    parameters = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(2))}
    optimizer = EightBits([*parameters.values()], 1e-3, (0.9, 0.999), 0.0, 1e-8)
    assert state_of(optimizer, parameters) == {}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = state_of(optimizer, parameters)
    assert set(state) == {
        f"{name}/{key}"
        for name in "ab"
        for key in ("step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
    }
    other = EightBits([*parameters.values()], 1e-3, (0.9, 0.999), 0.0, 1e-8)
    put_state(other, parameters, state)
    for parameter in parameters.values():
        for key, value in optimizer.state[parameter].items():
            again = other.state[parameter][key]
            assert type(again) is type(value)
            assert torch.equal(torch.as_tensor(again), torch.as_tensor(value)), key
            assert getattr(again, "dtype", None) == getattr(value, "dtype", None)


def test_the_flag_chooses_the_class_and_passes_the_settings_on(settings, bitsandbytes):
    calls = []
    bitsandbytes(lambda groups, **given: calls.append((groups, given)))
    given = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.5, "adam_epsilon": 1e-6}
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [parameter]}]
    make_optimizer(groups, settings(use_8bit_adam=True, **given).training, 0.25)
    expected = {"lr": 0.25, "betas": (0.8, 0.95), "weight_decay": 0.5, "eps": 1e-6}
    assert calls == [(groups, expected)]
    adamw = make_optimizer(groups, settings(**given).training, 0.25)
    assert type(adamw) is torch.optim.AdamW
    assert {k: adamw.defaults[k] for k in expected} == expected
    assert not adamw.defaults["fused"], "on a CPU it is PyTorch's plain AdamW"
    for fused in (False, True):
        adamw = make_optimizer(groups, settings(fused_adamw=fused).training, 0.25)
        assert bool(adamw.defaults["fused"]) is fused


def test_one_kernel_and_eight_bits_are_refused_together(settings):
    with pytest.raises(UserError, match=r"--fused_adamw .* --use_8bit_adam .*give one of them"):
        settings(use_8bit_adam=True, fused_adamw=True)
    settings(use_8bit_adam=True, fused_adamw=False)


def test_averages_of_codes_are_refused(settings):
    with pytest.raises(UserError, match=r"--proxy_optimizer average.*codes of 8 bits"):
        settings(use_8bit_adam=True, proxy_optimizer="average")
    settings(use_8bit_adam=True, proxy_optimizer="reset")


@pytest.mark.skipif(torch.cuda.is_available(), reason="8 bits may work here")
def test_what_is_missing_is_said_before_anything_is_loaded(settings, monkeypatch):
    config = settings(use_8bit_adam=True).training
    found = importlib.util.find_spec
    for installed, message in ((False, "pip install bitsandbytes"), (True, "needs a CUDA GPU")):
        spec = object() if installed else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda n, spec=spec: spec if n == "bitsandbytes" else found(n),
        )
        with pytest.raises(UserError, match=message):
            check_optimizer(config)
    check_optimizer(settings().training)
