"""Training the text encoder with the UNet: what its gradient, its rate and its average are."""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from iet_sd.data.dataset import collate
from iet_sd.data.shards import Visit
from iet_sd.engine.proxy import live_weights
from iet_sd.errors import UserError
from iet_sd.models.adapter import make_trainable, of_text_encoder
from iet_sd.models.loading import as_pipeline, load_components
from iet_sd.sampling import draw
from tests.compare import equal
from tests.engine.test_reduction import PLAIN, plain_diffusers
from tests.pipelines import RESOLUTION

BOTH = {"train_text_encoder": True, "learning_rate": 1e-3, "text_encoder_lr": 2e-4}
LORA = {"train_mode": "lora", "rank": 2, "lora_alpha": 6.0}
MODES = pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])


def by_hand(mode):
    """What diffusers' scripts train: all weights, or adapters on attention; at two rates."""

    def groups(unet, text_encoder):
        if mode:
            torch.manual_seed(0)
            unet.requires_grad_(False)
            shape = {"r": 2, "lora_alpha": 6.0, "init_lora_weights": "gaussian"}
            unet_targets = ["to_k", "to_q", "to_v", "to_out.0"]
            text_targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
            unet.add_adapter(LoraConfig(**shape, target_modules=unet_targets))
            text_encoder.add_adapter(LoraConfig(**shape, target_modules=text_targets))
        else:
            text_encoder.requires_grad_(True)
        text_encoder.train()
        return [
            (rate, {prefix + n: p for n, p in model.named_parameters() if p.requires_grad})
            for rate, prefix, model in ((1e-3, "", unet), (2e-4, "text_encoder.", text_encoder))
        ]

    return groups


@MODES
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_method_none_is_a_plain_loop_with_two_rates_bit_for_bit(
    kind, mode, train, pipelines, images
):
    weights, _ = train(kind=kind, **PLAIN, **BOTH, **mode)
    expected = plain_diffusers(pipelines[kind], images, 5, 4, range(16), trained=by_hand(mode))
    assert sum(map(of_text_encoder, weights)) > 10
    assert equal(weights, expected)


@MODES
def test_a_round_is_the_mean_of_plain_runs(mode, train, pipelines, images):
    """K = 2 for one round: each shard trained by the plain loop, then averaged by hand."""
    settings = {"method": "iet", "num_shards": 2, "shard_split": "contiguous", "center_crop": True}
    weights, _ = train(**settings, num_rounds=1, steps_per_round=3, **BOTH, **mode)
    runs = [
        plain_diffusers(pipelines["sd1"], images, 3, 4, members, shard=shard, trained=by_hand(mode))
        for shard, members in enumerate((range(8), range(8, 16)))
    ]
    assert equal(weights, {name: (t * 0.5) + runs[1][name] * 0.5 for name, t in runs[0].items()})
    assert not any(torch.equal(weights[name], runs[0][name]) for name in weights)


def test_off_is_the_unet_alone_and_its_names_stay(train):
    short = PLAIN | {"steps_per_round": 1}
    unet, _ = train(**short)
    both, _ = train(**short, train_text_encoder=True)
    assert list(both)[: len(unet)] == list(unet)
    assert all(name.startswith("text_encoder.") for name in list(both)[len(unet) :])
    assert not any(map(of_text_encoder, unet))


def test_each_network_moves_at_its_own_rate(train, settings):
    """After its first update AdamW has moved every weight with a gradient by about its rate."""
    before = load_components(settings().model, torch.float32, None)
    short = PLAIN | {"steps_per_round": 1} | BOTH

    def moved(**given):
        weights, _ = train(**short | {"adam_weight_decay": 0.0} | given)
        text = before.text_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight")
        name = "text_encoder.encoder.layers.0.mlp.fc1.weight"
        unet = before.unet.get_parameter("conv_in.weight")
        return [
            (weights["conv_in.weight"] - unet).abs().max().item(),
            (weights[name] - text).abs().max().item(),
        ]

    assert moved() == pytest.approx([1e-3, 2e-4], rel=1e-3)
    assert moved(text_encoder_lr=None) == pytest.approx([1e-3, 1e-3], rel=1e-3)
    accumulated = {"scale_lr": True, "gradient_accumulation_steps": 2, "train_batch_size": 2}
    assert moved(**accumulated) == pytest.approx([4e-3, 8e-4], rel=1e-3)


@MODES
@pytest.mark.parametrize("taa_min_strength", [0.0, 0.99], ids=["second pass", "first pass"])
def test_both_passes_of_the_method_give_the_text_encoder_a_gradient(
    taa_min_strength, mode, train, trainer_for, settings
):
    """With the one all samples are trained in the second pass, with the other in the first."""
    short = {"num_shards": 1, "msr": False, "num_rounds": 1, "steps_per_round": 1}
    method = {"agc_threshold": 0.01, "taa_min_strength": taa_min_strength}
    config = settings(**BOTH, **mode, **short, **method)
    trainer, state = trainer_for(config)
    before = live_weights(trainer.parameters)
    events = list(trainer.run(state))
    counts = events[-1].shards[0].counts
    assert counts.trained == 4
    assert counts.augmented == (0 if taa_min_strength else 4)
    moved = [name for name, p in trainer.parameters.items() if not torch.equal(p, before[name])]
    text = [name for name in before if of_text_encoder(name)]
    assert set(moved) >= {name for name in text if "lora_A" not in name}


@MODES
def test_gradients_are_clipped_to_one_norm_over_both_networks(mode, trainer_for, settings):
    """Not left as they are, as where clip_grad_norm_ is given an iterator that is used up."""
    config = settings(train_text_encoder=True, max_grad_norm=0.5, **mode)
    _, state = trainer_for(config)
    proxy = state.proxies[0]
    proxy.enter(state.weights, state.moments)
    for parameter in proxy.parameters.values():
        parameter.grad = torch.full_like(parameter, 3.0)
    numbers = sum(p.numel() for p in proxy.parameters.values())
    assert proxy.clip_gradient() == pytest.approx(3 * numbers**0.5, rel=1e-4)
    for name, parameter in proxy.parameters.items():
        expected = torch.full_like(parameter, 0.5 / numbers**0.5)
        torch.testing.assert_close(parameter.grad, expected, msg=name, rtol=1e-4, atol=0)


@MODES
def test_both_text_encoders_of_sdxl_are_trained(mode, train, trainer_for, settings):
    """All but the end of the first, whose output SDXL does not use: it stays to the bit."""
    given = {"kind": "sdxl", "train_text_encoder": True, **mode}
    short = {"method": "iet", "num_shards": 2, "num_rounds": 1, "steps_per_round": 2}
    before = live_weights(trainer_for(settings(**given))[0].parameters)
    weights, _ = train(**given, **short)
    same = {name for name, tensor in weights.items() if torch.equal(tensor, before[name])}
    end = ("text_encoder.encoder.layers.1.", "text_encoder.final_layer_norm.")
    assert same == {name for name in weights if name.startswith(end)}
    assert any(name.startswith("text_encoder_2.") for name in weights)


def test_a_picture_drops_nothing_out_of_a_text_encoder(trainer_for, settings):
    """Though it trains with dropout, and goes on so."""
    config = settings(train_text_encoder=True, train_mode="lora", lora_dropout=0.5)
    trainer, _ = trainer_for(config)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter += of_text_encoder(name)
    components = trainer.objective.components
    pictures = [draw(as_pipeline(components), ["a cat"], [0], RESOLUTION, 1, 4.0) for _ in range(2)]
    np.testing.assert_array_equal(*pictures)
    assert components.text_encoder.training


def test_its_rate_without_training_it_is_refused(settings):
    with pytest.raises(UserError, match="--text_encoder_lr needs --train_text_encoder"):
        settings(text_encoder_lr=1e-4)


def test_scoring_alone_builds_no_graph(trainer_for, settings):
    """Captions have a gradient where training does, and nowhere else."""
    trainer, _ = trainer_for(settings(train_text_encoder=True))
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
    encode = trainer.objective.encode_captions
    assert encode(batch)["encoder_hidden_states"].requires_grad
    with torch.no_grad():
        assert not encode(batch)["encoder_hidden_states"].requires_grad
    frozen, _ = trainer_for(settings())
    assert not frozen.objective.encode_captions(batch)["encoder_hidden_states"].requires_grad


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients_in_autocast_too(mode, dtype, trainer_for, settings):
    """Every trained weight is fp32 and has its gradient, from a text encoder in train mode."""

    def gradients(**given):
        config = settings(**mode, train_text_encoder=True, **given)
        components = load_components(config.model, dtype, None)
        parameters = make_trainable(components, config.model, seed=0)
        trainer, _ = trainer_for(config)
        objective = trainer.objective
        objective.components = components
        objective.autocast = lambda: torch.autocast(
            "cpu", torch.bfloat16, enabled=dtype is torch.bfloat16
        )
        batch = collate([trainer.dataset.example(Visit(0, seed=1))])
        objective.loss(batch, torch.tensor([500]), "score").sum().backward()
        assert components.text_encoder.training
        assert components.text_encoder.is_activation_checkpointing is bool(given)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        return {name: p.grad for name, p in parameters.items()}

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0 or "lora_A" in name or "k_proj.bias" in name, name
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
