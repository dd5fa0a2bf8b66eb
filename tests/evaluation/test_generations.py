"""Generated images are a set that is known by its content; what is on disk is whole and is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from iet_sd.errors import UserError
from iet_sd.evaluation.generate import Generations, generate
from tests.evaluation.generating import REQUEST, TOLERANCE, Loader, load_nothing, names, pixels
from tests.pipelines import RESOLUTION

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
