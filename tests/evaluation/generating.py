"""A request, and a loader of pipelines that counts what they do."""

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from iet_sd.evaluation.generate import Request
from tests.pipelines import RESOLUTION

# Levels of 255 that a pixel may differ by between batches: matrix products of another shape add up
# in another order, which can tip the rounding of a pixel.
TOLERANCE = 1
REQUEST = Request(
    prompts=("a cat", "a dog", "a cat"),
    prompt_ids=("train/7.png", "train/8.png", "again"),
    images_per_prompt=2,
    seed=3,
    resolution=RESOLUTION,
    num_inference_steps=2,
    guidance_scale=4.0,
)


class Loader:
    """Loads a pipeline, and counts how often, and the rows that its UNet is given."""

    def __init__(self, folder):
        self.folder, self.loads, self.rows = folder, 0, 0
        self.fail_at = None

    def __call__(self):
        self.loads += 1
        pipeline = StableDiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet.register_forward_pre_hook(self.count)
        return pipeline

    def count(self, unet, arguments):
        self.rows += len(arguments[0])
        if self.fail_at is not None and self.rows >= self.fail_at:
            raise KeyboardInterrupt


def pixels(generations):
    return np.stack([np.asarray(image) for image in generations]).astype(int)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def load_nothing():
    pytest.fail("a pipeline was loaded")
