"""SDXL through the same code as SD 1.x and 2.x: plain diffusers training, and real runs."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from iet_sd.cli.train import train as run_script
from iet_sd.config import ModelConfig
from iet_sd.data.shards import visits
from iet_sd.engine.objective import Objective
from iet_sd.models.family import SIZES, whole_image
from iet_sd.models.loading import load_components
from iet_sd.sampling import grid, sample
from tests.compare import equal
from tests.engine.test_reduction import PLAIN, generators, normal
from tests.pipelines import RESOLUTION

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
PROMPTS = ["a cat", "a dog"]


def seen_as_by_the_script(picture):
    """Pixels of a picture, and its time ids, as diffusers' train_text_to_image_sdxl.py has them."""
    original_size = (picture.height, picture.width)
    resize = transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.LANCZOS)
    picture = resize(picture)
    top = max(0, round((picture.height - RESOLUTION) / 2.0))
    left = max(0, round((picture.width - RESOLUTION) / 2.0))
    to_pixels = transforms.Compose(
        [
            transforms.CenterCrop(RESOLUTION),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    time_ids = [*original_size, top, left, RESOLUTION, RESOLUTION]
    return to_pixels(picture), torch.tensor(time_ids, dtype=torch.float32)


def plain_sdxl(folder, images, steps, batch_size):
    """The script's loop, with draws at the addresses of our visits; captions by the pipeline."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    unet, vae = pipeline.unet.train(), pipeline.vae.requires_grad_(False)
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
    )
    order = visits(0, 1, 0, range(16))
    for _ in range(steps):
        batch = [next(order) for _ in range(batch_size)]
        seeds = [visit.seed for visit in batch]
        pictures = [Image.open(images / f"{visit.index:02d}.png") for visit in batch]
        pixels, time_ids = map(torch.stack, zip(*map(seen_as_by_the_script, pictures), strict=True))
        assert time_ids[0].tolist() == [40, 36, 2, 0, 32, 32]
        posterior = vae.encode(pixels).latent_dist
        shape = posterior.mean.shape[1:]
        latents = posterior.mean + posterior.std * normal(seeds, "score/posterior", shape)
        latents = latents * vae.config.scaling_factor
        noise = normal(seeds, "score/noise", shape)
        timesteps = torch.stack(
            [torch.randint(1000, (), generator=g) for g in generators(seeds, "score/timestep")]
        )
        with torch.no_grad():
            prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                [f"a cat or dog {visit.index}" for visit in batch],
                device="cpu",
                do_classifier_free_guidance=False,
            )
        model_pred = unet(
            noise_scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            prompt_embeds,
            added_cond_kwargs={"time_ids": time_ids, "text_embeds": pooled_prompt_embeds},
            return_dict=False,
        )[0]
        F.mse_loss(model_pred.float(), noise.float(), reduction="mean").backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in unet.named_parameters()}


def test_method_none_is_plain_diffusers_training_bit_for_bit(train, pipelines, images):
    weights, _ = train(kind="sdxl", **PLAIN)
    assert equal(weights, plain_sdxl(pipelines["sdxl"], images, 5, 4))


@pytest.fixture
def objective(pipelines):
    config = ModelConfig(pretrained_model_name_or_path=str(pipelines["sdxl"]))
    components = load_components(config, torch.float32, None)
    return Objective(components, torch.device("cpu"), torch.no_grad)


def test_both_captions_and_all_sizes_count(objective):
    tokens = objective.components.tokenize.batch(PROMPTS)
    whole = {
        "pixel_values": torch.zeros(2, 3, RESOLUTION, RESOLUTION),
        "index": torch.tensor([0, 1]),
        "seed": torch.tensor([5, 6]),
        **tokens,
        **whole_image(RESOLUTION, 2),
    }
    timesteps = torch.tensor([500, 500])
    expected = objective.loss(whole, timesteps, "score")
    for name in (*tokens, *SIZES):
        other = {**whole, name: whole[name].clone()}
        other[name][0] = whole[name][1] if name in tokens else whole[name][0] + 7
        loss = objective.loss(other, timesteps, "score")
        assert loss[0] != expected[0], name
        assert torch.equal(loss[1], expected[1]), name


def test_sizes_are_never_guessed(objective):
    batch = objective.components.tokenize.batch(PROMPTS) | whole_image(RESOLUTION, 2)
    del batch["crop_top_left"]
    with pytest.raises(KeyError, match="crop_top_left"):
        objective.encode_captions(batch)


def drawn_by(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    pictures = grid(sample(pipeline, PROMPTS, 1, 0, RESOLUTION, 2), PROMPTS)
    return np.asarray(pictures).astype(int)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_run_of_two_shards_loads_draws_and_resumes(mode, argv, pipelines, tmp_path):
    """What diffusers loads draws as the live model did; stopped and resumed is never stopped."""
    base, whole, broken = pipelines["sdxl"], tmp_path / "output", tmp_path / "broken"
    given = {"pretrained_model_name_or_path": base, "train_mode": mode, "learning_rate": 1e-2}
    given |= {"num_validation_images": 1, "validation_inference_steps": 2}
    if mode == "lora":
        given |= {"rank": 2, "lora_alpha": 8, "random_flip": ""}
    prompts = ["--validation_prompts", *PROMPTS]
    assert run_script([*argv(**given), *prompts]) == 0

    before = drawn_by(StableDiffusionXLPipeline.from_pretrained(base))
    pipeline = StableDiffusionXLPipeline.from_pretrained(whole if mode == "full" else base)
    if mode == "lora":
        pipeline.load_lora_weights(whole)
    after, live = drawn_by(pipeline), np.asarray(Image.open(whole / "sample_grid.png")).astype(int)
    assert np.abs(after - live).max() <= 1
    assert np.abs(after - before).max() > 10
    card = (whole / "README.md").read_text()
    assert "from diffusers import StableDiffusionXLPipeline\n" in card

    broken.mkdir()
    shutil.copytree(whole / "checkpoint-1", broken / "checkpoint-1")
    resumed = argv(**given, output_dir=broken, resume_from_checkpoint="latest")
    assert run_script([*resumed, *prompts]) == 0
    name = UNET if mode == "full" else LORA
    assert equal(load_file(whole / name), load_file(broken / name))


def test_a_dry_run_counts_both_text_encoders(argv, pipelines, tmp_path, capsys):
    given = {"pretrained_model_name_or_path": pipelines["sdxl"], "dry_run": ""}
    assert run_script(argv(**given)) == 0
    assert "trainable: 0.10 M parameters" in capsys.readouterr().out
    assert not (tmp_path / "output").exists()


def test_another_vae_is_part_of_what_a_run_goes_on_with(argv, pipelines, tmp_path, capsys):
    vae = shutil.copytree(pipelines["sd1"] / "vae", tmp_path / "vae")
    given = {"pretrained_model_name_or_path": pipelines["sdxl"], "steps_per_round": 1}
    ours = {"pretrained_vae_model_name_or_path": vae}
    assert run_script(argv(**given, **ours)) == 0
    result = StableDiffusionXLPipeline.from_pretrained(tmp_path / "output")
    assert result.vae.config.scaling_factor == 0.18215
    assert run_script(argv(**given, resume_from_checkpoint="latest")) == 2
    said = capsys.readouterr().err
    assert "model: 'files with SHA-256" in said
    shutil.move(vae, tmp_path / "moved")
    ours = {"pretrained_vae_model_name_or_path": tmp_path / "moved"}
    assert run_script(argv(**given, **ours, resume_from_checkpoint="latest")) == 0
