"""The bundled model is small, real, reconstructs pictures it never saw, and knows what to draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from demo.pictures import reconstruct, to_pixels

MODEL = Path(__file__).parents[2] / "demo/model"


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    data = MODEL.parent / "data"
    cache = str(tmp_path_factory.mktemp("cache"))
    test = load_dataset(str(data), split="test", cache_dir=cache)
    return test.select(range(0, len(test), 8))


def test_size_and_parts(pipeline):
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}
    parts = (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.tokenizer)
    classes = (AutoencoderKL, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer)
    assert all(isinstance(part, cls) for part, cls in zip(parts, classes, strict=True))
    assert {part.dtype for part in parts[:3]} == {torch.float32}


def test_the_decoder_reconstructs_held_out_fluent_emoji(pipeline, held_out):
    pixels = to_pixels(held_out["image"])
    error = (to_pixels(reconstruct(pipeline.vae, pixels)) - pixels).square().mean()
    assert 10 * np.log10(4 / error.item()) > 22
    blank = (1 - pixels).square().mean()
    assert error < blank / 20


@torch.no_grad()
def test_the_unet_removes_noise_and_heeds_the_caption(pipeline, held_out):
    """Well below predicting 0 (loss 1), and better with an image's own caption than another's."""
    noise_scheduler = DDPMScheduler.from_pretrained(MODEL, subfolder="scheduler")
    generator = torch.Generator().manual_seed(0)
    latents = pipeline.vae.encode(to_pixels(held_out["image"])).latent_dist.mean
    latents = latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.full((len(latents),), 600)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    captions = list(held_out["text"])
    losses = []
    for texts in (captions, captions[1:] + captions[:1]):
        tokens = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        embeddings = pipeline.text_encoder(tokens)[0]
        prediction = pipeline.unet(noisy, timesteps, embeddings).sample
        losses.append((prediction - noise).square().mean().item())
    assert losses[0] < 0.3
    assert losses[0] < losses[1]
