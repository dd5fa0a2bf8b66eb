"""The engine reduces to what is known: plain diffusers training, and the mean of plain runs."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from PIL import Image
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

from iet_sd.data.shards import visits
from iet_sd.engine.proxy import live_weights
from iet_sd.engine.rounds import RoundDone, ShardDone
from iet_sd.seeding import seed_for
from tests.compare import equal
from tests.pipelines import RESOLUTION

PLAIN = {"method": "none", "num_rounds": 1, "steps_per_round": 5, "center_crop": True}


def generators(seeds, purpose):
    return [torch.Generator().manual_seed(seed_for(seed, purpose)) for seed in seeds]


def normal(seeds, purpose, shape):
    return torch.stack([torch.randn(shape, generator=g) for g in generators(seeds, purpose)])


def plain_diffusers(
    folder,
    images,
    steps,
    batch_size,
    members,
    learning_rate=1e-3,
    shard=0,
    poisoned=None,
    trained=None,
):
    """The loop of diffusers' train_text_to_image.py, with draws at the addresses of our visits.

    Batches that hold the sample ``poisoned`` are left out and are no steps. ``trained`` is called
    with UNet and text encoder and gives a learning rate and named parameters for each group.
    """
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    text_encoder.requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    to_pixels = transforms.Compose(
        [
            transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(RESOLUTION),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    groups = [(learning_rate, dict(unet.named_parameters()))]
    if trained:
        groups = trained(unet, text_encoder)
    named = {name: p for _, group in groups for name, p in group.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(group.values()), "lr": rate} for rate, group in groups],
        betas=(0.9, 0.999),
        weight_decay=1e-2,
        eps=1e-8,
    )
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    order = visits(0, 1, shard, members)
    for _ in range(steps):
        batch = [next(order) for _ in range(batch_size)]
        while poisoned in [visit.index for visit in batch]:
            batch = [next(order) for _ in range(batch_size)]
        seeds = [visit.seed for visit in batch]
        pictures = [Image.open(images / f"{visit.index:02d}.png") for visit in batch]
        pixel_values = torch.stack([to_pixels(picture) for picture in pictures])
        captions = [f"a cat or dog {visit.index}" for visit in batch]
        input_ids = tokenizer(
            captions,
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        posterior = vae.encode(pixel_values).latent_dist
        shape = posterior.mean.shape[1:]
        latents = posterior.mean + posterior.std * normal(seeds, "score/posterior", shape)
        latents = latents * vae.config.scaling_factor
        noise = normal(seeds, "score/noise", shape)
        timesteps = torch.stack(
            [torch.randint(1000, (), generator=g) for g in generators(seeds, "score/timestep")]
        )
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if noise_scheduler.config.prediction_type == "v_prediction":
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
        encoder_hidden_states = text_encoder(input_ids, return_dict=False)[0]
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_method_none_is_plain_diffusers_training_bit_for_bit(kind, train, pipelines, images):
    weights, _ = train(kind=kind, **PLAIN)
    expected = plain_diffusers(pipelines[kind], images, 5, 4, range(16))
    assert equal(weights, expected)


def test_a_batch_that_is_no_power_of_two_is_plain_training_up_to_rounding(train, pipelines, images):
    """The mean of means divides by 3 and by 64 apart, diffusers' mean by 192 at once."""
    weights, _ = train(**PLAIN | {"train_batch_size": 3, "learning_rate": 1e-5})
    expected = plain_diffusers(pipelines["sd1"], images, 5, 3, range(16), learning_rate=1e-5)
    for name, tensor in weights.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_one_shard_with_all_thresholds_off_is_method_none(train):
    off = {"num_shards": 1, "agc_threshold": 0.0, "msr": False, "aggregate_every": 1}
    weights, _ = train(method="iet_agc_plus", **off, steps_per_round=3, num_rounds=2)
    assert equal(weights, train(method="none", steps_per_round=3, num_rounds=2)[0])


def test_a_round_of_iet_is_the_mean_of_plain_runs(train, pipelines, images):
    """K = 2 for one round: each shard trained by plain diffusers, then averaged by hand."""
    settings = {"method": "iet", "num_shards": 2, "shard_split": "contiguous", "center_crop": True}
    weights, _ = train(**settings, num_rounds=1, steps_per_round=3)
    shards = [range(8), range(8, 16)]
    runs = [
        plain_diffusers(pipelines["sd1"], images, 3, 4, members, shard=k)
        for k, members in enumerate(shards)
    ]
    for name, tensor in weights.items():
        assert torch.equal(tensor, runs[0][name] * 0.5 + runs[1][name] * 0.5), name


def test_shards_weigh_by_size(train, trainer_for, settings):
    config = settings(method="iet", num_shards=2, num_rounds=1, steps_per_round=1)
    trainer, state = trainer_for(config)
    state.shard_of_N[:] = torch.tensor([0] * 4 + [1] * 12)
    proxies = dict(state.proxies)
    list(trainer.run_round(state))
    own = []
    for shard in proxies:
        config = settings(method="iet", num_shards=2, num_rounds=1, steps_per_round=1)
        other, fresh = trainer_for(config)
        fresh.shard_of_N[:] = state.shard_of_N
        fresh.progress = other.no_progress(fresh)
        list(other.train_shard(fresh, shard))
        own.append(live_weights(other.parameters))
    for name, tensor in state.weights.items():
        assert torch.equal(tensor, own[0][name] * 0.25 + own[1][name] * 0.75), name


@pytest.mark.parametrize("preset", ["corrected", "paper"])
@pytest.mark.parametrize("train_mode", ["full", "lora"])
def test_the_same_seed_gives_the_same_bits(train, train_mode, preset):
    given = {"train_mode": train_mode, "preset": preset, "num_shards": 2, "steps_per_round": 4}
    once, events = train(**given)
    assert equal(once, train(**given)[0])
    assert not equal(once, train(**given, seed=1)[0])
    assert sum(isinstance(event, RoundDone) for event in events) == 2


def test_accumulation_equals_a_larger_batch(train):
    """Two batches of 2 are one of 4: the same visits, and the mean of means of equal sizes."""
    weights, _ = train(**PLAIN | {"train_batch_size": 2}, gradient_accumulation_steps=2)
    expected, _ = train(**PLAIN)
    for name, tensor in weights.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


def test_updates_spread_over_shards_and_rounds(train):
    """--max_train_steps is the budget of all proxies together."""
    _, events = train(num_shards=2, num_rounds=2, max_train_steps=12, train_batch_size=2)
    done = [event for event in events if isinstance(event, ShardDone)]
    assert [event.counts.updates for event in done] == [3, 3, 3, 3]
