"""A small Stable Diffusion in which VAE, UNet and text encoder take the shares of work that they
take in Stable Diffusion 1.5, and random images with captions.

Forward work of one image at 512 x 512 is 1.12, 0.80 and 0.013 TFLOP there. Here it is about 1/1650
of that, at 128 x 128. What is not in proportion: weights per work are about six times as many, so
that the optimizer's share of a step is larger than it should be, for all rows alike.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.throughput.arithmetic import Work
from benchmarks.throughput.rows import RESOLUTION
from iet_sd.config import ModelConfig
from iet_sd.engine import sizes
from iet_sd.models.adapter import make_trainable

SD15_TFLOP = {"vae": 1.12, "unet": 0.80, "text": 0.013}
"""Forward work of Stable Diffusion 1.5 on an image of 512 x 512 and its caption."""
TOKENS, TEXT_WIDTH = 77, 32
_TOKENIZER = Path(__file__).parents[2] / "demo" / "model" / "tokenizer"
_WORDS = ("a", "red", "green", "small", "large", "cat", "dog", "house", "face", "tree")


def build_pipeline(folder: Path) -> Path:
    """Save the pipeline, always the same, into ``folder``; returns it.

    Its last layer is almost 0, so that the loss of a sample is the square of its noise, which is
    what `benchmarks.throughput.rows` relies on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = CLIPTokenizer.from_pretrained(_TOKENIZER, model_max_length=TOKENS)
        unet = _unet()
        with torch.no_grad():
            for parameter in unet.conv_out.parameters():
                parameter *= 0.01
        StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                set_alpha_to_one=False,
                steps_offset=1,
                skip_prk_steps=True,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 80),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=RESOLUTION,
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(48, 96, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_images(folder: Path, count: int, resolution: int) -> Path:
    """Save ``count`` square images with captions, always the same, into ``folder``; returns it.

    Smooth shades with grain: neither flat nor noise alone, so that decoding costs what it does.
    """
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        draw = np.random.default_rng(number)
        shades = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(shades.resize((resolution, resolution), Image.Resampling.BICUBIC))
        grain = draw.normal(0, 8, smooth.shape)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        name = f"{number:05d}.png"
        Image.fromarray(pixels).save(folder / name)
        rows.append({"file_name": name, "text": " ".join(draw.choice(_WORDS, 6))})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def count_work(pipeline: Path, resolution: int, train_mode: str, **lora: Any) -> Work:
    """The work of one image in the pipeline of this folder; counted without weights.

    ``lora``: further settings of `ModelConfig`.
    """
    config = ModelConfig(pretrained_model_name_or_path=str(pipeline), train_mode=train_mode, **lora)
    parts = sizes.meta_components(config, None)
    (text_encoder,) = parts.text_encoders
    meta = torch.device("meta")
    image = torch.empty(1, 3, resolution, resolution, device=meta)
    tokens = torch.zeros(1, text_encoder.config.max_position_embeddings, dtype=int, device=meta)
    side = parts.latent_size(resolution)
    latents = torch.empty(1, parts.unet.config.in_channels, side, side, device=meta)
    with torch.no_grad():
        with FlopCounterMode(display=False) as vae:
            parts.vae.encode(image)
        with FlopCounterMode(display=False) as text:
            condition = text_encoder(tokens)[0]
    make_trainable(parts, config, seed=0)
    with FlopCounterMode(display=False) as unet:
        predicted = parts.unet(latents, torch.zeros(1, device=meta), condition)[0]
    with FlopCounterMode(display=False) as backward:
        predicted.sum().backward()
    counters = (vae, text, unet, backward)
    return Work(*(counter.get_total_flops() for counter in counters))
