"""Losses are those of a loop by hand, and what was memorized is told from what was not."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from iet_sd.diffusion import add_noise_and_target
from iet_sd.errors import UserError
from iet_sd.evaluation.membership import (
    loss_gap,
    membership_auc,
    stratified_losses,
    stratified_timesteps,
    tpr_at_fpr,
)
from iet_sd.seeding import seed_for
from tests.pipelines import RESOLUTION

TIMESTEPS = [50, 500, 500, 900]


class Pictures:
    """An `ImageSet` of noise, or of given pictures."""

    def __init__(self, ids, pictures=None):
        self.ids = list(ids)
        self.pictures = pictures or [noise(i) for i in range(len(self.ids))]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.pictures[index]


def noise(seed, size=(RESOLUTION, RESOLUTION)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def pipeline(request, pipelines):
    return DiffusionPipeline.from_pretrained(pipelines[request.param])


@pytest.fixture(scope="module")
def images():
    return Pictures(["a", "b/c", "🦊", "d", "e"])


CAPTIONS = ["a cat", "", "a dog", "🦊 ein süßes 猫", "cat " * 100]


def losses(pipeline, images, captions=CAPTIONS, timesteps=TIMESTEPS, seed=3, **options):
    return stratified_losses(pipeline, images, captions, timesteps, seed, RESOLUTION, **options)


def condition_by_hand(pipeline, caption):
    """What the pipeline itself would tell the UNet, if it drew an image."""
    if isinstance(pipeline, StableDiffusionPipeline):
        tokens = pipeline.tokenizer(
            caption, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        )
        return {"encoder_hidden_states": pipeline.text_encoder(tokens.input_ids).last_hidden_state}
    told = {}
    handle = pipeline.unet.register_forward_pre_hook(
        lambda unet, args, kwargs: told.update(kwargs), with_kwargs=True
    )
    size = {"height": RESOLUTION, "width": RESOLUTION}
    pipeline(caption, num_inference_steps=1, guidance_scale=1, output_type="latent", **size)
    handle.remove()
    return {k: told[k] for k in ("encoder_hidden_states", "added_cond_kwargs")}


@torch.no_grad()
def losses_by_hand(pipeline, images, captions):
    """One image and timestep after the other, from the formulas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    table = []
    for n, caption in enumerate(captions):
        pixels = torch.from_numpy(np.array(images[n])).permute(2, 0, 1)[None] / 127.5 - 1
        latents = (
            pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        )
        condition = condition_by_hand(pipeline, caption)
        row = []
        for s, timestep in enumerate(TIMESTEPS):
            seed = seed_for(seed_for(3, "membership", images.ids[n]), str(s))
            noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed))
            a, b = alphas_cumprod[timestep].sqrt(), (1 - alphas_cumprod[timestep]).sqrt()
            velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
            target = a * noise - b * latents if velocity else noise
            noisy = (a * latents + b * noise).float()
            prediction = pipeline.unet(noisy, timestep, **condition).sample
            row.append(float(((prediction - target) ** 2).mean()))
        table.append(row)
    return np.array(table)


def latents_of(pipeline, images):
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    with torch.no_grad():
        return pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean


def overfit(pipeline, images, captions, steps=80):
    """Train the UNet on all of the images at once, again and again."""
    generator = torch.Generator().manual_seed(0)
    latents = latents_of(pipeline, images) * pipeline.vae.config.scaling_factor
    with torch.no_grad():
        text = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
    optimizer = torch.optim.Adam(pipeline.unet.parameters(), lr=1e-2)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    for _ in range(steps):
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(200, 800, (len(captions),), generator=generator)
        noisy, target = add_noise_and_target(scheduler, latents, noise, timesteps)
        loss = ((pipeline.unet(noisy, timesteps, text).sample - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- losses


@pytest.mark.parametrize("batch_size", [1, 2, 99])
def test_losses_are_those_of_a_loop_by_hand_in_any_batch(pipeline, images, batch_size):
    found = losses(pipeline, images, batch_size=batch_size)
    assert found.shape == (5, 4)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, losses_by_hand(pipeline, images, CAPTIONS), rtol=2e-5)


def test_a_loss_does_not_depend_on_the_other_images(pipeline, images):
    order = [3, 0]
    some = Pictures([images.ids[i] for i in order], [images[i] for i in order])
    found = losses(pipeline, some, [CAPTIONS[i] for i in order])
    np.testing.assert_allclose(found, losses(pipeline, images)[order], rtol=2e-5)


def test_noise_differs_by_id_seed_and_place(pipeline):
    same = Pictures(["a", "b"], [noise(0), noise(0)])
    first = losses(pipeline, same, ["a cat", "a cat"])
    values = [*first[0], *first[1], *losses(pipeline, same, ["a cat", "a cat"], seed=4)[0]]
    assert len(set(values)) == 12


def test_images_are_resized_and_cropped_at_the_centre(pipeline):
    wide = Image.new("RGB", (3 * RESOLUTION, RESOLUTION), "red")
    wide.paste(noise(0), (RESOLUTION, 0))
    found = losses(pipeline, Pictures(["a"], [wide]), ["a cat"])
    expected = losses(pipeline, Pictures(["a"], [noise(0)]), ["a cat"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mode_and_random_state_are_as_before(pipeline, images):
    pipeline.unet.train()
    modes = []
    handle = pipeline.unet.register_forward_hook(lambda unet, *_: modes.append(unet.training))
    before = torch.get_rng_state()
    losses(pipeline, images)
    handle.remove()
    assert pipeline.unet.training
    assert set(modes) == {False}
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_near(pipelines, images):
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd1"])
    expected = losses(pipeline, images)
    np.testing.assert_allclose(losses(pipeline.to(torch.bfloat16), images), expected, rtol=0.05)


def test_loss_that_is_not_finite_is_named(pipelines, images):
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd1"])
    pipeline.unet.conv_out.bias.data.fill_(np.inf)
    with pytest.raises(UserError, match=r"for 20 of 20 pairs .* a \(t=50\), a \(t=500\)"):
        losses(pipeline, images)


def test_timesteps_are_the_middles_of_equal_parts():
    assert stratified_timesteps(1, 1000) == [500]
    assert stratified_timesteps(4, 1000) == [125, 375, 625, 875]
    assert stratified_timesteps(1000, 1000) == list(range(1000))


# -- membership


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_model_that_memorized_is_told_from_one_that_did_not(pipelines, kind):
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines[kind])
    names = [f"{i} cat" for i in range(16)]
    pictures = [noise(i, (4, 4)).resize((RESOLUTION, RESOLUTION), 0) for i in range(16)]
    # What a scaling factor is for: latents of about unit variance.
    spread = latents_of(pipeline, pictures).std(dim=0).mean()
    pipeline.vae.register_to_config(scaling_factor=float(1 / spread))
    train, heldout = (Pictures(names[half::2], pictures[half::2]) for half in (0, 1))

    def measure():
        timesteps = list(range(210, 800, 30))
        train_NS, heldout_NS = (losses(pipeline, p, p.ids, timesteps) for p in (train, heldout))
        auc = membership_auc(train_NS.mean(axis=1), heldout_NS.mean(axis=1))
        return loss_gap(train_NS, heldout_NS, resamples=500), auc

    gap, auc = measure()
    assert gap.low < 0 < gap.high
    assert auc < 0.8
    overfit(pipeline, train, train.ids)
    gap, auc = measure()
    assert gap.low > 0
    assert auc > 0.9


def test_gap_is_the_difference_of_means_with_whole_images_resampled():
    rng = np.random.default_rng(0)
    # Images differ by 1, their timesteps hardly: what counts is the number of images.
    train_NS = rng.normal(0.5, 1, (100, 1)) + rng.normal(0, 0.01, (100, 50))
    heldout_NS = rng.normal(0.6, 1, (200, 1)) + rng.normal(0, 0.01, (200, 50))
    gap = loss_gap(train_NS, heldout_NS)
    assert gap.value == pytest.approx(heldout_NS.mean() - train_NS.mean())
    half_width = 1.96 * np.sqrt(1 / 100 + 1 / 200)
    assert gap.high - gap.low == pytest.approx(2 * half_width, rel=0.15)
    assert loss_gap(train_NS, heldout_NS, level=0.5).level == 0.5


def test_gap_covers_zero_at_its_level_where_nothing_was_learned():
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        gap = loss_gap(rng.gamma(4, 1, (30, 2)), rng.gamma(4, 1, (40, 2)), resamples=200)
        missed += not gap.low <= 0 <= gap.high
    assert missed <= 20  # 10 are expected; more than 20 come by chance once in 1,000 times


def test_auc_is_that_of_the_roc_curve():
    rng = np.random.default_rng(2)
    for _ in range(20):
        # Few values, so that many are equal.
        train_N, heldout_N = rng.integers(0, 8, 30) / 8, rng.integers(1, 9, 50) / 8
        member = np.repeat([True, False], [30, 50])
        expected = roc_auc_score(member, -np.concatenate([train_N, heldout_N]))
        assert membership_auc(train_N, heldout_N) == pytest.approx(expected)


def test_auc_at_its_ends_and_in_the_middle():
    losses_N = np.random.default_rng(3).normal(size=2000)
    assert membership_auc(losses_N, losses_N) == 0.5
    assert membership_auc(losses_N, losses_N + 100) == 1
    assert membership_auc(losses_N + 100, losses_N) == 0
    assert membership_auc(losses_N[:1000], losses_N[1000:]) == pytest.approx(0.5, abs=0.04)


def test_tpr_by_hand():
    heldout_N = np.arange(100) + 10.0
    train_N = np.array([9.0, 10.0, 10.5, 11.0, 11.5])
    assert tpr_at_fpr(train_N, heldout_N) == 0.6  # one held-out image, of loss 10, is let through
    assert tpr_at_fpr(train_N, heldout_N[:99]) == 0.2
    assert tpr_at_fpr(train_N, heldout_N, fpr=0) == 0.2
    assert tpr_at_fpr(train_N, heldout_N, fpr=0.02) == 1  # two are, and the next is at 12


@pytest.mark.parametrize("fpr", [0, 0.01, 0.07, 0.29, 0.5])
def test_tpr_is_the_best_of_the_roc_curve(fpr):
    rng = np.random.default_rng(4)
    for _ in range(20):
        train_N, heldout_N = rng.integers(0, 40, 60), rng.integers(5, 45, 100)
        member = np.repeat([True, False], [60, 100])
        scores = -np.concatenate([train_N, heldout_N])
        false_rates, true_rates, _ = roc_curve(member, scores, drop_intermediate=False)
        expected = true_rates[false_rates <= fpr + 1e-9].max()
        assert tpr_at_fpr(train_N, heldout_N, fpr) == pytest.approx(expected)
