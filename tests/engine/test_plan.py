"""What a run will take, compared with the run itself."""

import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iet_sd.engine import plan
from iet_sd.errors import UserError
from iet_sd.models.adapter import make_trainable
from iet_sd.models.loading import load_components
from tests.pipelines import RESOLUTION, TEXT_WIDTH

TOKENS = 77  # of Stable Diffusion, for which the estimate is made


@pytest.mark.parametrize(
    ("given", "samples", "expected"),
    [
        ({"steps_per_round": 7}, 1000, 7),
        # 100 updates over 4 proxies and 5 rounds.
        ({"max_train_steps": 100, "num_shards": 4, "num_rounds": 5}, 16, 5),
        # 101 updates: rounded up, so that none is missing.
        ({"max_train_steps": 101, "num_shards": 4, "num_rounds": 5}, 16, 6),
        ({"max_train_steps": 1, "num_shards": 4, "num_rounds": 5}, 16, 1),
        # 3 passes of ceil(17 / 4) = 5 updates over 2 proxies and 3 rounds.
        ({"num_train_epochs": 3, "num_shards": 2, "num_rounds": 3}, 17, 3),
        # The same with two batches an update: 3 passes of ceil(17 / 8) = 3 updates.
        (
            {
                "num_train_epochs": 3,
                "num_shards": 2,
                "num_rounds": 3,
                "gradient_accumulation_steps": 2,
            },
            17,
            2,
        ),
        ({"num_train_epochs": 2, "method": "none", "num_rounds": 1}, 16, 8),
    ],
    ids=str,
)
def test_steps_per_round(given, samples, expected, settings):
    assert plan.steps_per_round(settings(**given), samples) == expected


def test_no_more_processes_than_shards(settings):
    config = settings(num_shards=3)
    for number in (1, 2, 3):
        plan.check_processes(config, number)
    with pytest.raises(UserError, match=r"4 processes for 3 shards.*--num_processes 3"):
        plan.check_processes(config, 4)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("given", [{}, {"train_mode": "lora", "rank": 3}], ids=["full", "lora"])
def test_parameters_are_those_of_the_model(kind, given, settings):
    config = settings(kind, **given)
    components = load_components(config.model, torch.float32, None)
    total = sum(p.numel() for p in components.unet.parameters())
    parameters = make_trainable(components, config.model, seed=0)
    trainable = sum(p.numel() for p in parameters.values())
    frozen = 0 if config.model.train_mode == "full" else total
    found = plan.estimate(config, 3, 1)
    assert found.trainable == trainable
    # fp32: weights, gradients and two moments of what is trained, weights of the rest.
    assert found.model == 4 * 4 * trainable + 4 * frozen


@pytest.mark.parametrize(
    ("kind", "resolution"), [("sd1", RESOLUTION), ("sd2", 2 * RESOLUTION)], ids=["sd1", "sd2"]
)
def test_arithmetic_is_that_of_the_model_on_this_machine(kind, resolution, settings):
    """FLOP of a real forward pass, and how many of them a run makes."""
    config = settings(kind, resolution=resolution, num_shards=4, num_rounds=2)
    unet = load_components(config.model, torch.float32, None).unet
    size = resolution // 8
    # With the kernel that the counter can count: it knows no fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(torch.randn(1, 4, size, size), torch.ones(1), torch.randn(1, TOKENS, TEXT_WIDTH))
    one = counter.get_total_flops()
    assert one > 0
    # A backward pass is two forward; on one process 4 shards, 2 rounds, 3 steps of 4 samples.
    assert plan.estimate(config, 3, 1).flops == 3 * one * 4 * 2 * 3 * 4
    assert plan.estimate(config, 3, 2).flops == 3 * one * 2 * 2 * 3 * 4
    assert plan.estimate(config, 3, 3).flops == 3 * one * 2 * 2 * 3 * 4


def test_checkpointing_keeps_less_and_computes_more(settings):
    plain = plan.estimate(settings(), 3, 1)
    saving = plan.estimate(settings(gradient_checkpointing=True), 3, 1)
    assert 0 < saving.activations < plain.activations / 2
    assert saving.flops == plain.flops * 4 / 3


def test_activations_grow_with_batch_resolution_and_precision(settings):
    def activations(**given):
        return plan.estimate(settings(**given), 1, 1).activations

    one = activations(train_batch_size=1)
    assert one > 0
    assert activations(train_batch_size=4) == 4 * one
    assert activations(train_batch_size=1, resolution=2 * RESOLUTION) > 2 * one
    assert activations(train_batch_size=1, mixed_precision="bf16") == one / 2


def test_activations_are_about_what_autograd_keeps(settings):
    """Against the real model: storages that its forward pass hands to the backward pass."""
    config = settings(train_batch_size=2)
    components = load_components(config.model, torch.float32, None)
    parameters = make_trainable(components, config.model, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in parameters.values()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    size = RESOLUTION // 8
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        sdpa_kernel(SDPBackend.MATH),
    ):
        components.unet(
            torch.randn(2, 4, size, size), torch.ones(2), torch.randn(2, TOKENS, TEXT_WIDTH)
        )
    real = sum(size for size, _ in kept.values())
    assert plan.estimate(config, 1, 1).activations == pytest.approx(real, rel=0.1)


def test_waiting_proxies_need_main_memory_only_where_they_take_turns(settings):
    def host(processes):
        return plan.estimate(settings(num_shards=4), 1, processes).host

    found = plan.estimate(settings(num_shards=4), 1, 1)
    model = 4 * found.trainable
    assert host(1) == (3 * 4 + 2) * model
    assert host(2) == (3 * 2 + 2) * model
    assert host(4) == 2 * model


def test_weights_are_neither_needed_nor_read(pipelines, settings, tmp_path):
    folder = tmp_path / "configs_alone"
    shutil.copytree(pipelines["sd1"], folder)
    weights = list(folder.rglob("*.safetensors"))
    assert weights
    for path in weights:
        path.unlink()
    given = {"pretrained_model_name_or_path": str(folder)}
    assert plan.estimate(settings(**given), 3, 1) == plan.estimate(settings(), 3, 1)


def test_a_home_folder_is_found(pipelines, settings, monkeypatch):
    monkeypatch.setenv("HOME", str(pipelines["sd1"].parent))
    given = {"pretrained_model_name_or_path": f"~/{pipelines['sd1'].name}"}
    assert plan.estimate(settings(**given), 3, 1) == plan.estimate(settings(), 3, 1)


def test_a_missing_config_is_a_users_mistake(pipelines, settings, tmp_path):
    folder = tmp_path / "no_unet"
    shutil.copytree(pipelines["sd1"], folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="config of its unet cannot be read"):
        plan.estimate(settings(pretrained_model_name_or_path=str(folder)), 3, 1)


def test_the_plan_adds_up_and_is_told(settings):
    config = settings(num_shards=2, num_rounds=3)
    found = plan.estimate(config, 5, 1)
    text = plan.describe(config, [9, 7], 5, found, torch.device("cpu"))
    assert "16 in 2 shards of 9, 7" in text
    assert "3 rounds of 5 updates per shard: 15 for each proxy, 30 together" in text
    assert f"{found.trainable / 1e6:.2f} M" in text
    for name, value in config.as_dict().items():
        assert f"{name}: {value}" in text.splitlines()
    batches = plan.describe(
        settings(num_shards=2, num_rounds=3, preset="paper"), [8, 8], 5, found, torch.device("cpu")
    )
    assert "rounds of 5 batches scored per shard" in batches


def test_time_is_a_range_and_in_proportion_to_the_arithmetic(monkeypatch):
    monkeypatch.setattr(plan, "_matrix_speed", lambda device, dtype: 1e9)
    found = plan.Estimate(trainable=1, model=1, activations=1, host=1, flops=1e10)
    fast, slow = found.seconds(torch.device("cpu"), torch.float32)
    assert (fast, slow) == (pytest.approx(20), pytest.approx(50))


def test_speed_of_this_machine_is_plausible():
    assert 1e8 < plan._matrix_speed(torch.device("cpu"), torch.bfloat16) < 1e14


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_told_in_a_fitting_unit(seconds, text):
    assert plan._duration(seconds) == text
