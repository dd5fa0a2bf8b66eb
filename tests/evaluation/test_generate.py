"""An image depends on what was asked for alone, and what cannot be is refused."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from iet_sd.errors import UserError
from iet_sd.evaluation.generate import generate
from iet_sd.seeding import seed_for
from tests.evaluation.generating import REQUEST, TOLERANCE, Loader, names, pixels
from tests.pipelines import RESOLUTION

# -- what an image depends on


@pytest.mark.parametrize(("batch_size", "processes"), [(2, 1), (5, 1), (99, 1), (2, 2), (3, 4)])
def test_neither_batch_size_nor_processes_change_an_image(
    reference, tmp_path, batch_size, processes
):
    folder, expected = reference
    met = []
    for process in range(processes):
        generations = generate(
            REQUEST,
            "model",
            Loader(folder),
            tmp_path,
            batch_size=batch_size,
            process_index=process,
            num_processes=processes,
            barrier=lambda: met.append(1),
        )
    assert len(met) == processes
    assert np.abs(pixels(generations) - expected).max() <= TOLERANCE


def test_processes_at_the_same_time_share_the_work(reference, tmp_path):
    folder, expected = reference
    barrier, results = threading.Barrier(2, timeout=20), {}
    loaders = [Loader(folder), Loader(folder)]
    loaded = [loader() for loader in loaders]  # diffusers loads no two models at the same time

    def run(process):
        generations = generate(
            REQUEST,
            "model",
            lambda: loaded[process],
            tmp_path,
            batch_size=2,
            process_index=process,
            num_processes=2,
            barrier=barrier.wait,
        )
        results[process] = pixels(generations)

    threads = [threading.Thread(target=run, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(results[0], results[1])
    assert np.abs(results[0] - expected).max() <= TOLERANCE
    assert loaders[0].rows == loaders[1].rows


def test_an_image_is_that_of_the_plain_pipeline_with_the_seed_by_hand(reference):
    folder, expected = reference
    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    image = plain(
        "a dog",
        num_inference_steps=2,
        guidance_scale=4.0,
        height=RESOLUTION,
        width=RESOLUTION,
        generator=torch.Generator().manual_seed(seed_for(3, "generate", "train/8.png", 1)),
    ).images[0]
    assert np.abs(np.asarray(image).astype(int) - expected[3]).max() <= TOLERANCE


def test_images_of_a_prompt_and_of_its_duplicate_differ(reference):
    _, expected = reference
    for g in range(len(expected)):
        for other in range(g):
            assert np.abs(expected[g] - expected[other]).max() > 10 * TOLERANCE


def test_an_image_does_not_depend_on_the_other_prompts(reference, tmp_path):
    folder, expected = reference
    alone = replace(REQUEST, prompts=("a dog",), prompt_ids=("train/8.png",))
    drawn = pixels(generate(alone, "model", Loader(folder), tmp_path))
    assert np.abs(drawn - expected[2:4]).max() <= TOLERANCE


# -- what cannot be


def test_images_that_are_not_numbers_are_an_error(loader, tmp_path):
    def broken():
        pipeline = loader()
        pipeline.unet.conv_out.weight.data.fill_(np.nan)
        return pipeline

    with pytest.raises(UserError, match=r"train/7.png-0 is not a number .* float32"):
        generate(REQUEST, "model", broken, tmp_path)
    assert names(tmp_path) == ["request.json"]


def test_precision_is_the_one_that_was_asked_for(loader, tmp_path):
    with pytest.raises(ValueError, match=r"asked for bfloat16, loaded torch\.float32"):
        generate(replace(REQUEST, dtype="bfloat16"), "model", loader, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": (), "prompt_ids": ()}, "no prompt"),
        ({"prompt_ids": ("1", "2")}, "3 prompts and 2 ids"),
        ({"prompt_ids": ("1", "2", "1")}, "'1' is there twice"),
    ],
)
def test_prompts_need_ids_of_their_own(changes, message):
    with pytest.raises(UserError, match=message):
        replace(REQUEST, **changes)
