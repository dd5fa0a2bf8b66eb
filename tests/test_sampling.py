"""Pictures depend on (seed, prompt, number) alone, and drawing leaves no trace."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from iet_sd.config import ModelConfig
from iet_sd.models.loading import as_pipeline, load_components
from iet_sd.sampling import grid, sample
from iet_sd.seeding import seed_for
from tests.pipelines import RESOLUTION

# Levels of 255 that a pixel may differ by between batches: matrix products of another shape add up
# in another order, which can tip the rounding of a pixel.
TOLERANCE = 1
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def pipeline(request, pipelines):
    config = ModelConfig(pretrained_model_name_or_path=str(pipelines[request.param]))
    pipeline = as_pipeline(load_components(config, torch.float32, None))
    pipeline.folder = pipelines[request.param]
    return pipeline


def draw(pipeline, prompts=PROMPTS, per_prompt=3, seed=0):
    rows = sample(pipeline, prompts, per_prompt, seed, RESOLUTION, inference_steps=3)
    return [[np.asarray(image).astype(int) for image in row] for row in rows]


def difference(one, other):
    return np.abs(one - other).max()


def test_an_image_does_not_depend_on_those_drawn_with_it(pipeline):
    few, many = draw(pipeline, PROMPTS[:1], 1), draw(pipeline, PROMPTS, 3)
    assert difference(few[0][0], many[0][0]) <= TOLERANCE
    two = draw(pipeline, PROMPTS, 2)
    assert max(difference(two[1][i], many[1][i]) for i in range(2)) <= TOLERANCE


def test_images_differ_by_number_prompt_and_seed(pipeline):
    rows, others = draw(pipeline, ["a cat", "a cat"], 2), draw(pipeline, ["a cat"], 2, seed=1)
    images = [*rows[0], *rows[1], *others[0]]
    assert [image.shape for image in images] == [(RESOLUTION, RESOLUTION, 3)] * 6
    for i, one in enumerate(images):
        assert all(difference(one, other) > 10 * TOLERANCE for other in images[:i])


def test_an_image_is_that_of_the_pipeline_with_the_seed_by_hand(pipeline):
    """Drawn by a pipeline from the folder, one image, noise from the address in the seed's name."""
    plain = DiffusionPipeline.from_pretrained(pipeline.folder)
    assert type(plain) is type(pipeline)
    plain.set_progress_bar_config(disable=True)
    latents = torch.randn(
        (1, 4, RESOLUTION // 8, RESOLUTION // 8),
        generator=torch.Generator().manual_seed(seed_for(0, "sample", 1, 2)),
    )
    alone = plain(
        PROMPTS[1],
        latents=latents,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=3,
        guidance_scale=7.5,
    ).images[0]
    assert difference(np.asarray(alone).astype(int), draw(pipeline)[1][2]) <= TOLERANCE


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_as_before(pipeline, training):
    pipeline.unet.train(training)
    modes = []
    handle = pipeline.unet.register_forward_hook(lambda unet, *_: modes.append(unet.training))
    before = torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()
    draw(pipeline)
    handle.remove()
    assert pipeline.unet.training is training
    assert set(modes) == {False}
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert not any(parameter.grad is not None for parameter in pipeline.unet.parameters())


def test_mode_is_put_back_after_an_error(pipeline):
    pipeline.unet.train()
    with pytest.raises(ValueError, match="divisible by 8"):
        sample(pipeline, PROMPTS, 1, 0, RESOLUTION + 1, 2)
    assert pipeline.unet.training


def test_grid_has_a_row_a_prompt_and_every_image_in_its_place():
    colours = [["red", "green", "blue"], ["cyan", "magenta", "black"]]
    rows = [[Image.new("RGB", (32, 32), colour) for colour in row] for row in colours]
    sheet = grid(rows, PROMPTS)
    line = sheet.height // 2 - 128
    assert sheet.size == (3 * 128, 2 * (128 + line))
    assert line > 0
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            centre = (c * 128 + 64, r * (128 + line) + 64)
            assert sheet.getpixel(centre) == image.getpixel((16, 16))
        top = r * (128 + line) + 128
        text = np.asarray(sheet.crop((0, top, sheet.width, top + line)))
        assert text.min() < 100, "no prompt under the row"
        assert text.max() == 255


def test_grid_does_not_shrink_large_images_and_takes_odd_prompts():
    sheet = grid([[Image.new("RGB", (300, 300), "red")]], ["ein süßes 猫 " * 30])
    assert sheet.width == 300
    assert sheet.height > 300


def test_grid_of_drawn_images_is_not_blank(pipeline):
    rows = sample(pipeline, PROMPTS, 2, 0, RESOLUTION, 2)
    sheet = np.asarray(grid(rows, PROMPTS))
    assert sheet[:128, :128].std() > 1
    assert sheet[:128, 128:].std() > 1
