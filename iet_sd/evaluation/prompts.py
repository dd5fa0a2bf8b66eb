"""Which images are drawn: captions of the training set, or prompts as given. P prompts."""

import numpy as np
import torch

from iet_sd.config import DataConfig, EvaluateSettings, GenerateSettings
from iet_sd.data.captions import prefixed, texts
from iet_sd.data.sources import Source
from iet_sd.evaluation.generate import Request
from iet_sd.seeding import seed_for


def request_for(
    settings: GenerateSettings | EvaluateSettings, source: Source | None, dtype: torch.dtype
) -> tuple[Request, np.ndarray]:
    """What to draw, and for each prompt the training sample whose caption it is, -1 for none: (P,).

    ``source``: the training set; needed unless ``prompts`` are given.
    """
    config = settings.generation
    if config.prompts:
        prompts, own_P = config.prompts, np.full(len(config.prompts), -1)
        prompt_ids = tuple(f"prompt-{i}" for i in range(len(prompts)))
    else:
        own_P = choose(len(source.sample_ids), config.num_prompts, config.seed)
        prompts = tuple(prompt_of(source, i, config.seed, settings.data) for i in own_P)
        prompt_ids = tuple(source.sample_ids[i] for i in own_P)
    request = Request(
        prompts=prompts,
        prompt_ids=prompt_ids,
        images_per_prompt=config.images_per_prompt,
        seed=config.seed,
        resolution=settings.data.resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
        dtype=str(dtype).removeprefix("torch."),
    )
    return request, own_P


def choose(count: int, wanted: int, seed: int) -> np.ndarray:
    """Indices of ``wanted`` of ``count`` samples, chosen by seed, in order; all if not so many."""
    if wanted >= count:
        return np.arange(count)
    rng = np.random.default_rng(seed_for(seed, "choose"))
    return np.sort(rng.choice(count, wanted, replace=False))


def prompt_of(source: Source, index: int, seed: int, data: DataConfig) -> str:
    """The caption of a sample as it is read in training, but for tags that are shuffled."""
    return prefixed(caption_of(source, index, seed), data)


def caption_of(source: Source, index: int, seed: int) -> str:
    """The caption of a sample; if it has several, one by seed."""
    name = source.sample_ids[index]
    captions = texts(source.dataset[int(index)][source.caption_column], name) or [""]
    return captions[seed_for(seed, "caption", name) % len(captions)]
