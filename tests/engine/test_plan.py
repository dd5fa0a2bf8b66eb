"""What a run will take, compared with the run itself."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iet_sd.engine import plan
from iet_sd.engine.rounds import ShardDone, Trainer
from iet_sd.engine.store import open_store
from iet_sd.errors import UserError
from iet_sd.models import finding
from iet_sd.models.adapter import make_trainable
from iet_sd.models.loading import load_components
from tests.engine.running import run
from tests.pipelines import RESOLUTION, TEXT_WIDTH, TOKENS, XL_POOLED, XL_WIDTH


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


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("given", [{}, {"train_mode": "lora", "rank": 3}], ids=["full", "lora"])
@pytest.mark.parametrize("texts", [False, True], ids=["unet", "texts too"])
def test_parameters_are_those_of_the_model(kind, given, texts, settings):
    config = settings(kind, **given, train_text_encoder=texts)
    components = load_components(config.model, torch.float32, None)
    total = sum(p.numel() for p in components.unet.parameters())
    parameters = make_trainable(components, config.model, seed=0)
    trainable = sum(p.numel() for p in parameters.values())
    frozen = 0 if config.model.train_mode == "full" else total
    found = plan.estimate(config, 3, 1)
    assert found.trainable == trainable
    # fp32: weights, gradients and two moments of what is trained, weights of the rest.
    assert found.model == 4 * 4 * trainable + 4 * frozen
    networks = components.vae, components.text_encoder, components.text_encoder_2
    held = [p for network in networks if network for p in network.parameters()]
    assert found.frozen == 4 * sum(p.numel() for p in held if not p.requires_grad)


def test_text_encoders_that_are_trained_count_in_arithmetic_and_activations(settings):
    frozen, trained = (
        plan.estimate(settings("sdxl", train_text_encoder=given), 3, 1) for given in (False, True)
    )
    assert trained.flops > frozen.flops
    assert trained.activations > frozen.activations


@pytest.mark.parametrize(
    ("kind", "resolution"),
    [("sd1", RESOLUTION), ("sd2", 2 * RESOLUTION), ("sdxl", RESOLUTION)],
    ids=["sd1", "sd2", "sdxl"],
)
def test_arithmetic_is_that_of_the_model_on_this_machine(kind, resolution, settings):
    """FLOP of a real forward pass, and how many of them a run makes."""
    config = settings(kind, resolution=resolution, num_shards=4, num_rounds=2)
    unet = load_components(config.model, torch.float32, None).unet
    size = resolution // 8
    text = torch.randn(1, TOKENS, TEXT_WIDTH + XL_WIDTH * (kind == "sdxl"))
    added = {"text_embeds": torch.randn(1, XL_POOLED), "time_ids": torch.ones(1, 6)}
    # With the kernel that the counter can count: it knows no fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(
            torch.randn(1, 4, size, size),
            torch.ones(1),
            text,
            added_cond_kwargs=added if kind == "sdxl" else None,
        )
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


RUN = {"num_shards": 3, "num_rounds": 4, "steps_per_round": 1, "bank_bins": 1}
STORED = [
    {},
    {"aggregate_every": 1},
    {"aggregate_every": 1, "proxy_optimizer": "reset"},
    {"proxy_optimizer": "average", "outer_momentum": 0.9},
    {"train_mode": "lora", "rank": 2, "method": "iet"},
]


def bytes_of(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("given", STORED, ids=str)
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_main_memory_is_what_is_held(given, store, settings, trainer_for, tmp_path):
    """All tensors of a run at the ends of its rounds' shards, and the proxy that leaves then."""
    config = settings(**RUN, **given, proxy_store=store)
    with open_store(store, tmp_path, 0, 1) as waiting:
        trainer, state = trainer_for(config, waiting)
        most = 0
        for event in trainer.run(state):
            if isinstance(event, ShardDone):
                held = [*state.weights.values(), *state.moments.values(), *state.velocity.values()]
                for mean in state.progress.means.values():
                    held += mean.totals.values()
                if store == "memory":
                    held += [t for shard in waiting.values() for t in shard.values()]
                leaving = state.proxies[event.shard].tensors()
                most = max(most, bytes_of(held) + bytes_of(leaving.values()))
    found = plan.estimate(config, 1, 1)
    assert 0.75 * found.host < most < 1.02 * found.host


def test_main_memory_grows_with_the_proxies_of_a_process_unless_they_wait_on_disk(settings):
    def host(processes, **given):
        return plan.estimate(settings(num_shards=4, **given), 1, processes).host

    model = 4 * plan.estimate(settings(num_shards=4), 1, 1).trainable
    assert [host(p) / model for p in (1, 2, 3, 4)] == [3 * 4 + 2, 3 * 2 + 2, 3 * 2 + 2, 3 + 2]
    assert [host(p, proxy_store="disk") / model for p in (1, 2, 4)] == [3 + 2] * 3


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Bytes of tensors in the checkpoints, after every event: of a round's end, and within it."""
    found = []

    def numbers(paths):
        return sum(t.nbytes for path in paths for t in load_file(path).values())

    def measuring(trainer, state, run=Trainer.run):
        for event in run(trainer, state):
            yield event
            for folder in tmp_path.glob("checkpoint-*"):
                ends = numbers(folder.glob("*.safetensors"))
                found.append((ends, numbers(folder.rglob("*.safetensors")) - ends))

    monkeypatch.setattr(Trainer, "run", measuring)
    return found


@pytest.mark.parametrize("given", STORED, ids=str)
def test_disk_is_what_is_written(given, settings, trainer_for, tmp_path, written):
    config = settings(**RUN, **given)
    run(config, tmp_path, trainer_for)
    ends, within = (max(sizes) for sizes in zip(*written, strict=True))
    found = plan.estimate(config, 1, 1)
    # With the bank and what is known of the samples.
    assert found.checkpoint < ends < 1.15 * found.checkpoint
    assert found.within_round < within < 1.15 * found.within_round


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, 10),
        ({"checkpoints_total_limit": 3}, 3),
        ({"checkpoints_total_limit": 30}, 10),
        ({"checkpointing_rounds": 4}, 3),
        ({"checkpointing_rounds": 0}, 0),
    ],
    ids=str,
)
def test_checkpoints_that_are_kept(given, kept, settings):
    assert plan.checkpoints_kept(settings(num_rounds=10, **given)) == kept


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_frozen_parts_are_those_of_the_model(kind, precision, settings):
    """As loaded in that precision: in fp16 the VAE of XL stays in fp32."""
    config = settings(kind, mixed_precision=precision, train_batch_size=1)
    parts = load_components(config.model, plan.weight_dtype(precision), None)
    networks = parts.vae, parts.text_encoder, parts.text_encoder_2
    found = plan.estimate(config, 1, 1)
    held = [p for network in networks if network for p in network.parameters()]
    assert found.frozen == sum(p.nbytes for p in held)
    # Two feature maps of an image.
    assert found.encoding > parts.vae.dtype.itemsize * 2 * 8 * RESOLUTION**2


def test_a_model_of_another_kind_is_what_the_model_check_says(
    pipelines, settings, monkeypatch, tmp_path
):
    """Only its configs were fetched from the Hub."""
    folder = tmp_path / "sd3"
    shutil.copytree(pipelines["sd1"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = folder / "model_index.json"
    index.write_text(
        index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusion3Pipeline"')
    )
    asked = []

    def snapshot_download(name, *, allow_patterns, **_):
        asked.extend(allow_patterns)
        return folder

    monkeypatch.setattr(finding, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="is a StableDiffusion3Pipeline; supported are"):
        plan.estimate(settings(pretrained_model_name_or_path="some/sd3"), 3, 1)
    assert asked
    assert not any("safetensors" in pattern for pattern in asked)


def test_a_resolution_that_the_vae_cannot_halve_is_refused(settings):
    with pytest.raises(UserError, match="--resolution must be a multiple of 8"):
        plan.estimate(settings(resolution=36), 3, 1)


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
    with pytest.raises(UserError, match=r"there is no unet/config\.json"):
        plan.estimate(settings(pretrained_model_name_or_path=str(folder)), 3, 1)


def test_the_plan_adds_up_and_is_told(settings):
    config = settings(num_shards=2, num_rounds=3)
    found = plan.estimate(config, 5, 1)
    text = plan.describe(config, [9, 7], 5, found, torch.device("cpu"))
    assert "16 in 2 shards of 9, 7" in text
    assert "3 rounds of 5 updates per shard: 15 for each proxy, 30 together" in text
    assert f"{found.trainable / 1e6:.2f} M" in text
    assert "disk:      0.01 GiB for 3 checkpoints of at most 0.00 GiB" in text
    for name, value in config.as_dict().items():
        assert f"{name}: {value}" in text.splitlines()
    batches = plan.describe(
        settings(num_shards=2, num_rounds=3, preset="paper"), [8, 8], 5, found, torch.device("cpu")
    )
    assert "rounds of 5 batches scored per shard" in batches


def test_time_is_a_range_and_in_proportion_to_the_arithmetic(monkeypatch):
    monkeypatch.setattr(plan, "_matrix_speed", lambda device, dtype: 1e9)
    names = [field.name for field in dataclasses.fields(plan.Estimate)]
    found = plan.Estimate(**dict.fromkeys(names, 1) | {"flops": 1e10})
    fast, slow = found.seconds(torch.device("cpu"), torch.float32)
    assert (fast, slow) == (pytest.approx(20), pytest.approx(50))


def test_speed_of_this_machine_is_plausible():
    assert 1e8 < plan._matrix_speed(torch.device("cpu"), torch.bfloat16) < 1e14


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_told_in_a_fitting_unit(seconds, text):
    assert plan._duration(seconds) == text
