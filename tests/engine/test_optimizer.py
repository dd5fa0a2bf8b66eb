"""Whatever an optimizer remembers of a parameter waits and comes back as it was."""

import importlib.util
import sys
import types

import pytest
import torch

from iet_sd.engine.optimizer import check_optimizer, make_optimizer, put_state, state_of
from iet_sd.engine.proxy import MOMENTS, part
from iet_sd.engine.store import open_store
from iet_sd.errors import UserError
from tests.compare import equal
from tests.engine import running
from tests.engine.plain import Plain
from tests.engine.test_reduction import PLAIN

LORA = {"train_mode": "lora", "rank": 2}


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
