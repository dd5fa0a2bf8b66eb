"""Pictures from a pipeline, one seed an image: the same whatever the batch they are drawn in."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from iet_sd.seeding import seed_for

logger = logging.getLogger(__name__)


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    per_prompt: int,
    seed: int,
    resolution: int,
    inference_steps: int,
    guidance_scale: float = 7.5,
) -> list[list[Image.Image]]:
    """``per_prompt`` images for each prompt; image i of prompt p depends on (seed, p, i) only."""
    say_what_is_cut(pipeline, prompts)
    rows = []
    for prompt_index, prompt in enumerate(prompts):
        seeds = [seed_for(seed, "sample", prompt_index, image) for image in range(per_prompt)]
        images = draw(
            pipeline, [prompt] * per_prompt, seeds, resolution, inference_steps, guidance_scale
        )
        rows.append(pipeline.numpy_to_pil(images))
    return rows


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    prompts_B: Sequence[str],
    seeds_B: Sequence[int],
    resolution: int,
    inference_steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
) -> np.ndarray:
    """One batch, an image for each prompt and seed: float32 (B, H, W, 3) in [0, 1].

    negative_prompt: empty for the pipeline's own way to draw without one (of XL, zeros).
    An image depends on its own prompt and seed alone, to the rounding of matrix products.
    Of prompts that are cut off nothing is said here, but by `say_what_is_cut`.
    """
    parts = pipeline.components.values()
    modules = (part for part in parts if isinstance(part, torch.nn.Module))
    with evaluating(*modules), _libraries_quiet():
        return pipeline(
            list(prompts_B),
            negative_prompt=[negative_prompt] * len(prompts_B) if negative_prompt else None,
            height=resolution,
            width=resolution,
            num_inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds_B],
            output_type="np",
        ).images


def say_what_is_cut(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> None:
    """Log how many prompts are longer than the text encoders read, in one line, if any are.

    The libraries would log each of them, whole, in every batch.
    """
    parts = pipeline.components
    tokenizers = [parts[name] for name in ("tokenizer", "tokenizer_2") if name in parts]
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    with _libraries_quiet():
        lengths = [map(len, tokenizer(list(prompts)).input_ids) for tokenizer in tokenizers]
    long = sum(max(of_prompt) > limit for of_prompt in zip(*lengths, strict=True))
    if long:
        logger.warning(
            "%d of %d prompts are longer than the %d tokens that the model reads: what goes beyond "
            "is not drawn",
            long,
            len(prompts),
            limit,
        )


def grid(rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """One sheet: a row of images a prompt, with the prompt under it. Small images are enlarged."""
    width, height = rows[0][0].size
    zoom = max(1, math.ceil(128 / width))
    width, height, line = width * zoom, height * zoom, 20
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        top = r * (height + line)
        for c, image in enumerate(row):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (c * width, top))
        draw.text((4, top + height + 3), prompt, fill="black")
    return sheet


@contextmanager
def evaluating(*modules: torch.nn.Module):
    """Dropout off inside, and the modes as they were afterwards."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.train(training)


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Inside, diffusers and transformers log errors only."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
