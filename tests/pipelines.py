"""Real Stable Diffusion pipelines, small enough to build in every test."""

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

RESOLUTION = 32
"""Pixels for which the pipelines are made: latents of 4 x 4, as the VAE shrinks by 8."""
TOKENS = 16
TEXT_WIDTH = 32
"""Of the text encoder; in XL, of the first."""
XL_WIDTH, XL_POOLED, XL_TIME = 24, 20, 8
"""Of XL: width of its second text encoder, what that is projected to, and each number's width."""
NOISE_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tiny_pipeline(
    folder: Path,
    prediction_type: Literal["epsilon", "v_prediction"] | None = None,
    kind: Literal["sd1", "sd2", "sdxl"] = "sd1",
) -> Path:
    """Save a pipeline of random weights, always the same ones, into ``folder``; returns it.

    ``kind`` takes its configs after Stable Diffusion 1.5, 2.1, or XL base 1.0, which predict
    ``epsilon``, ``v_prediction`` and ``epsilon`` unless told otherwise.
    """
    if kind == "sdxl":
        return _tiny_xl(Path(folder), prediction_type or "epsilon")
    sd2 = kind == "sd2"
    prediction_type = prediction_type or ("v_prediction" if sd2 else "epsilon")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = _tokenizer(Path(folder) / "tokenizer", pad="!" if sd2 else "<|endoftext|>")
        StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer, "gelu" if sd2 else "quick_gelu"),
            tokenizer=tokenizer,
            unet=_unet(sd2),
            scheduler=(
                DDIMScheduler(**NOISE_SCHEDULE, prediction_type=prediction_type, clip_sample=False)
                if sd2
                else PNDMScheduler(
                    **NOISE_SCHEDULE, prediction_type=prediction_type, skip_prk_steps=True
                )
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return Path(folder)


def _tiny_xl(folder: Path, prediction_type: str) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizers = [
            _tokenizer(folder / name, pad=pad)
            for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))
        ]
        StableDiffusionXLPipeline(
            vae=_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=_text_encoder(tokenizers[0], "quick_gelu"),
            text_encoder_2=_text_encoder_2(tokenizers[1]),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=_unet_xl(),
            scheduler=EulerDiscreteScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                steps_offset=1,
                timestep_spacing="leading",
                prediction_type=prediction_type,
            ),
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def _vae(**config) -> AutoencoderKL:
    return AutoencoderKL(
        **config,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
    )


def _unet(sd2: bool) -> UNet2DConditionModel:
    """In SD 1.x ``attention_head_dim`` is one number, in 2.x one a block (of heads, in both)."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4) if sd2 else 2,
        use_linear_projection=sd2,
    )


def _unet_xl() -> UNet2DConditionModel:
    """More transformer layers deeper down, and told of the sizes of images and the pooled text."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH + XL_WIDTH,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=XL_TIME,
        projection_class_embeddings_input_dim=XL_POOLED + 6 * XL_TIME,
    )


def _text_encoder(tokenizer: CLIPTokenizer, hidden_act: str) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act=hidden_act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _text_encoder_2(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """With the ids that XL's config has: 2 at the end means the largest of a caption, as of old."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=XL_WIDTH,
            intermediate_size=2 * XL_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            projection_dim=XL_POOLED,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def _tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """CLIP's layout: bytes, bytes at a word's end, one entry a merge, then the two specials."""
    letters = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab, rules = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    rules.write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer(str(vocab), str(rules), model_max_length=TOKENS, pad_token=pad)
