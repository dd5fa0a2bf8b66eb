"""An image depends on what was asked for alone, and what is on disk is whole and is kept."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from iet_sd.errors import UserError
from iet_sd.evaluation.generate import Generations, Request, generate
from iet_sd.seeding import seed_for
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


@pytest.fixture
def loader(pipelines):
    return Loader(pipelines["sd1"])


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def reference(request, pipelines, tmp_path_factory):
    """Folder of a pipeline, and its images, drawn one by one."""
    folder = pipelines[request.param]
    cache = tmp_path_factory.mktemp("reference")
    return folder, pixels(generate(REQUEST, "model", Loader(folder), cache, batch_size=1))


def pixels(generations):
    return np.stack([np.asarray(image) for image in generations]).astype(int)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def load_nothing():
    pytest.fail("a pipeline was loaded")


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


# -- the set of images


def test_ids_prompts_and_numbers_are_in_order(loader, tmp_path):
    generations = generate(REQUEST, "model", loader, tmp_path)
    assert len(generations) == 6
    assert generations.ids == [f"{name}-{i}" for name in REQUEST.prompt_ids for i in range(2)]
    assert generations.prompt_G.tolist() == [0, 0, 1, 1, 2, 2]
    assert generations.image_G.tolist() == [0, 1] * 3
    assert [image.mode for image in generations] == ["RGB"] * 6
    assert generations[0].size == (RESOLUTION, RESOLUTION)


def test_fingerprint_follows_ids_images_and_their_order(loader, tmp_path):
    first = generate(REQUEST, "model", loader, tmp_path)
    folder, paths = first.folder, first.paths
    assert generate(REQUEST, "model", load_nothing, tmp_path).fingerprint == first.fingerprint
    seen = [first.fingerprint]
    renamed = replace(REQUEST, prompt_ids=("1", "2", "3"))
    seen.append(Generations(folder, renamed).fingerprint)
    one, two = paths[0].read_bytes(), paths[1].read_bytes()
    paths[0].write_bytes(two)
    seen.append(Generations(folder, REQUEST).fingerprint)
    paths[1].write_bytes(one)
    seen.append(Generations(folder, REQUEST).fingerprint)
    assert len(set(seen)) == 4


def test_request_says_how_images_were_made(reference, tmp_path):
    folder, _ = reference
    generations = generate(REQUEST, "the model", Loader(folder), tmp_path)
    content = json.loads((generations.folder / "request.json").read_text(encoding="utf-8"))
    own = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert content["scheduler"]["_class_name"] == own["_class_name"]
    assert content["scheduler"]["prediction_type"] == own["prediction_type"]
    assert content["model"] == "the model"
    assert content["seed"] == 3
    assert content["prompts"] == list(REQUEST.prompts)
    assert str(folder) not in json.dumps(content)


# -- what is kept


def test_second_run_loads_nothing(loader, tmp_path):
    first = pixels(generate(REQUEST, "model", loader, tmp_path))
    second = pixels(generate(REQUEST, "model", load_nothing, tmp_path))
    assert np.array_equal(first, second)
    assert loader.loads == 1


def test_interrupted_run_goes_on_with_what_is_missing(reference, tmp_path):
    folder, expected = reference
    loader = Loader(folder)
    generate(replace(REQUEST, seed=4), "model", loader, tmp_path)
    per_image = loader.rows / 6
    loader.rows, loader.fail_at = 0, 3 * per_image
    with pytest.raises(KeyboardInterrupt):
        generate(REQUEST, "model", loader, tmp_path, batch_size=2)
    loader.rows, loader.fail_at = 0, None
    generations = generate(REQUEST, "model", loader, tmp_path, batch_size=2)
    assert loader.rows == 4 * per_image
    assert np.abs(pixels(generations) - expected).max() <= TOLERANCE


def test_only_processes_with_missing_images_load(loader, pipelines, tmp_path):
    generations = generate(REQUEST, "model", loader, tmp_path)
    generations.paths[3].unlink()
    generate(REQUEST, "model", load_nothing, tmp_path, process_index=0, num_processes=2)
    other = Loader(pipelines["sd1"])
    generate(REQUEST, "model", other, tmp_path, process_index=1, num_processes=2)
    assert other.loads == 1
    assert generations.paths[3].exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"guidance_scale": 5.0},
        {"num_inference_steps": 3},
        {"resolution": 64},
        {"negative_prompt": "a dog"},
        {"images_per_prompt": 1},
        {"prompts": ("a cat", "a dog", "a dog")},
        {"prompt_ids": ("1", "2", "3")},
        {"dtype": "float64"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_request_has_another_folder(loader, tmp_path, changes):
    def load():
        return loader().to(getattr(torch, changes.get("dtype", "float32")))

    first = generate(REQUEST, "model", loader, tmp_path)
    second = generate(replace(REQUEST, **changes), "model", load, tmp_path)
    assert loader.loads == 2
    assert first.folder != second.folder
    if "dtype" not in changes:
        assert second.fingerprint != first.fingerprint


def test_another_model_has_another_folder(loader, tmp_path):
    first = generate(REQUEST, "one", loader, tmp_path)
    assert generate(REQUEST, "other", loader, tmp_path).folder != first.folder


# -- files


@pytest.mark.parametrize("damage", [b"", b"not a picture", "cut", "flipped"])
def test_damaged_image_is_named(loader, tmp_path, damage):
    generations = generate(REQUEST, "model", loader, tmp_path)
    path = generations.paths[2]
    content = path.read_bytes()
    if damage == "cut":
        damage = content[: len(content) // 2]
    elif damage == "flipped":
        middle = len(content) // 2
        damage = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path.write_bytes(damage)
    generations = generate(REQUEST, "model", load_nothing, tmp_path)
    generations[1]
    with pytest.raises(UserError, match=rf"{path.name} cannot be read .* Delete it"):
        generations[2]


def test_half_of_a_file_is_none(loader, tmp_path):
    generations = generate(REQUEST, "model", loader, tmp_path)
    path = generations.paths[2]
    half = path.with_name(f".{path.name}.4711.partial")
    path.rename(half)
    generate(REQUEST, "model", loader, tmp_path)
    assert loader.loads == 2
    assert names(tmp_path) == [half.name, *(p.name for p in generations.paths), "request.json"]


def test_full_disk_leaves_nothing_half_written(loader, tmp_path, monkeypatch):
    save = Image.Image.save

    def fill(image, file, **options):
        if "00001-000" in file.name:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(image, file, **options)

    with monkeypatch.context() as context:
        context.setattr(Image.Image, "save", fill)
        with pytest.raises(OSError, match="No space left"):
            generate(REQUEST, "model", loader, tmp_path)
    assert names(tmp_path) == ["00000-000.png", "00000-001.png", "request.json"]
    assert len(pixels(generate(REQUEST, "model", loader, tmp_path))) == 6


def test_odd_prompts_never_become_names_of_files(loader, tmp_path):
    prompts = (
        "../../a/b",
        "🦊 ein süßes 猫",
        "",
        "a cat",
        "a cat",
        "x " * 250,
        "a\nb\0",
        "C:\\con",
    )
    request = replace(
        REQUEST,
        prompts=prompts,
        prompt_ids=tuple(f"{i}/{prompt}" for i, prompt in enumerate(prompts)),
        images_per_prompt=1,
    )
    generations = generate(request, "model", loader, tmp_path)
    assert names(tmp_path) == [*(f"{p:05d}-000.png" for p in range(8)), "request.json"]
    assert len(pixels(generations)) == 8
    content = json.loads((generations.folder / "request.json").read_text(encoding="utf-8"))
    assert tuple(content["prompts"]) == prompts


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
