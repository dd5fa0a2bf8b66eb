import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from iet_sd.errors import UserError
from iet_sd.evaluation import features as module
from iet_sd.evaluation.embedders import Embedder, build_embedder
from iet_sd.evaluation.features import embed
from iet_sd.files import atomic_file


class Pictures:
    """An image set in memory that counts how often each image is asked for."""

    def __init__(self, count, name="pictures"):
        self.ids = [f"image-{i}" for i in range(count)]
        self.fingerprint = f"{name} {count}"
        self.asked = []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.asked.append(index)
        return picture(index)


def picture(seed, size=(6, 4)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def network(forward=lambda x: x.float().flatten(1)[:, :5], fingerprint="test"):
    device = torch.device("cpu")
    return Embedder("tiny", fingerprint, "none", F.pil_to_tensor, forward, device)


def expected(count, flip=False):
    """The first five bytes, channel first, of each image."""
    pixels = np.stack([np.asarray(picture(i), dtype=np.float32) for i in range(count)])
    pixels = pixels[:, :, ::-1] if flip else pixels
    return pixels.transpose(0, 3, 1, 2).reshape(count, -1)[:, :5]


def files(cache):
    return sorted(p.name for p in cache.rglob("*") if p.is_file())


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 4)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_features_in_order(small_parts, tmp_path, flip, batch_size):
    found = embed(network(), Pictures(11), tmp_path, flip=flip, batch_size=batch_size)
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected(11, flip))
    assert files(tmp_path) == ["features.npy"]


def test_second_call_computes_nothing(small_parts, tmp_path):
    first = embed(network(), Pictures(11), tmp_path)
    images = Pictures(11)
    second = embed(network(lambda _: pytest.fail("computed")), images, tmp_path)
    assert images.asked == []
    assert np.array_equal(first, second)


@pytest.mark.parametrize("change", ["embedder", "images", "flip"])
def test_another_embedder_other_images_or_flip_are_another_entry(tmp_path, change):
    embed(network(), Pictures(3), tmp_path)
    images = Pictures(3, name="others" if change == "images" else "pictures")
    fingerprint = "other" if change == "embedder" else "test"
    embed(network(fingerprint=fingerprint), images, tmp_path, flip=change == "flip")
    assert sorted(images.asked) == [0, 1, 2]


def test_interrupted_run_goes_on_with_what_is_missing(small_parts, tmp_path):
    calls = []

    def until_the_third_part(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return x.float().flatten(1)[:, :5]

    with pytest.raises(KeyboardInterrupt):
        embed(network(until_the_third_part), Pictures(11), tmp_path)
    assert files(tmp_path) == ["part-00000.npy", "part-00001.npy"]
    images = Pictures(11)
    assert np.array_equal(embed(network(), images, tmp_path), expected(11))
    assert sorted(images.asked) == [8, 9, 10]
    assert files(tmp_path) == ["features.npy"]


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_any_number_of_processes_gives_the_same(small_parts, tmp_path, processes):
    # A network whose rounding depends on the batch, as real ones do.
    torch.manual_seed(0)
    weight = torch.randn(72, 64)

    def forward(x):
        return torch.nn.functional.gelu(x.float().flatten(1) / 99 @ weight)

    alone = embed(network(forward), Pictures(11), tmp_path / "1", batch_size=3)
    sets = [Pictures(11) for _ in range(processes)]
    barrier = threading.Barrier(processes)

    def process(index):
        return embed(
            network(forward),
            sets[index],
            tmp_path / "n",
            batch_size=3,
            process_index=index,
            num_processes=processes,
            barrier=lambda: barrier.wait(timeout=20),
        )

    with ThreadPoolExecutor(processes) as pool:
        together = list(pool.map(process, range(processes)))
    assert all(np.array_equal(alone, found) for found in together)
    # Shared out, not done by all.
    assert sorted(index for images in sets for index in images.asked) == list(range(11))
    assert all(images.asked for images in sets[:3])


class FullDisk:
    """A file that takes ``room`` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        self.file.write(content[: self.room])
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("full", "left"), [("part-00000.npy", 0), ("part-00002.npy", 2), ("features.npy", 3)]
)
def test_full_disk_leaves_nothing_half_written(small_parts, tmp_path, monkeypatch, full, left):
    @contextmanager
    def on_a_full_disk(path):
        with atomic_file(path) as file:
            yield FullDisk(file, room=150) if path.name == full else file

    with monkeypatch.context() as patch:
        patch.setattr(module, "atomic_file", on_a_full_disk)
        with pytest.raises(OSError, match="No space left"):
            embed(network(), Pictures(11), tmp_path)
    assert files(tmp_path) == [f"part-0000{i}.npy" for i in range(left)]
    assert np.array_equal(embed(network(), Pictures(11), tmp_path), expected(11))


def not_finite_for(index, value):
    """A network that fails for one image."""

    def forward(x):
        features = x.float().flatten(1)[:, :5]
        features[(features == torch.from_numpy(expected(11)[index])).all(1), 3] = value
        return features

    return forward


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_that_gives_nan_is_named(small_parts, tmp_path, value):
    with pytest.raises(UserError, match="tiny gives NaN or infinity for image image-6"):
        embed(network(not_finite_for(6, value)), Pictures(11), tmp_path, batch_size=3)
    assert files(tmp_path) == ["part-00000.npy"]


def test_unreadable_image_is_passed_on(small_parts, tmp_path):
    class Broken(Pictures):
        def __getitem__(self, index):
            if index == 5:
                raise UserError("image-5: not an image")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="image-5"):
        embed(network(), Broken(11), tmp_path)
    assert files(tmp_path) == ["part-00000.npy"]


def test_images_of_unequal_sizes_in_raw_pixels(tmp_path, monkeypatch):
    class Unequal(Pictures):
        def __getitem__(self, index):
            return picture(index, size=(6, 4 + index // 4))

    embedder = build_embedder("raw_pixels")
    with pytest.raises(UserError, match=r"raw_pixels gives 72 to 90 numbers .* one size"):
        embed(embedder, Unequal(8), tmp_path)
    with pytest.raises(UserError, match=r"72 features and some 90: .* one size"):
        embed(embedder, Unequal(8), tmp_path, batch_size=4)
    assert files(tmp_path) == []
    monkeypatch.setattr(module, "PART_ROWS", 4)
    with pytest.raises(UserError, match=r"72 features and some 90: .* one size"):
        embed(embedder, Unequal(8), tmp_path)
    assert files(tmp_path) == ["part-00000.npy", "part-00001.npy"]


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="no images"):
        embed(network(), Pictures(0), tmp_path)


def save(array):
    return lambda path: np.save(path, array)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def with_nan(path):
    array = np.load(path)
    array[1, 2] = np.nan
    np.save(path, array)


DAMAGE = {
    "truncated": (truncate, ""),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "no .npy": (lambda path: path.write_bytes(b"0" * 500), ""),
    "another archive": (lambda path: np.savez(path.open("wb"), x=np.zeros(3)), "not a matrix"),
    "a pickle": (save(np.array([{"a": 1}], dtype=object)), ""),
    "rows": (save(np.zeros((3, 5), np.float32)), "3 rows for"),
    "dtype": (save(np.zeros((4, 5))), "not a matrix of float32"),
    "no matrix": (save(np.zeros(4, np.float32)), "not a matrix of float32"),
    "NaN": (with_nan, "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_part_is_named(small_parts, tmp_path, damage, monkeypatch):
    break_it, says = DAMAGE[damage]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", lambda _: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            embed(network(), Pictures(11), tmp_path)
    (part,) = tmp_path.rglob("part-00001.npy")
    break_it(part)
    with pytest.raises(UserError, match=rf"part-00001\.npy is damaged \(.*{says}.*Delete it"):
        embed(network(), Pictures(11), tmp_path)
    assert files(tmp_path) == ["part-00000.npy", "part-00001.npy", "part-00002.npy"]
    part.unlink()
    assert np.array_equal(embed(network(), Pictures(11), tmp_path), expected(11))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named(small_parts, tmp_path, damage):
    break_it, says = DAMAGE[damage]
    embed(network(), Pictures(11), tmp_path)
    (joined,) = tmp_path.rglob("features.npy")
    break_it(joined)
    with pytest.raises(UserError, match=rf"features\.npy is damaged \(.*{says}.*Delete it"):
        embed(network(), Pictures(11), tmp_path)
    joined.unlink()
    assert np.array_equal(embed(network(), Pictures(11), tmp_path), expected(11))


def test_processes_that_do_not_see_one_folder(small_parts, tmp_path):
    with pytest.raises(UserError, match=r"part-00001\.npy is not there\. All processes must see"):
        embed(network(), Pictures(11), tmp_path, num_processes=2)


def test_nan_is_found_in_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 45)  # 2 rows of 5
    embed(network(), Pictures(7), tmp_path)
    (joined,) = tmp_path.rglob("features.npy")
    whole = np.load(joined)
    for row in range(7):
        broken = whole.copy()
        broken[row, 4] = np.nan
        np.save(joined, broken)
        with pytest.raises(UserError, match="NaN"):
            embed(network(), Pictures(7), tmp_path)


def test_cache_is_npy_that_numpy_reads(small_parts, tmp_path):
    embed(network(), Pictures(11), tmp_path)
    (joined,) = tmp_path.rglob("features.npy")
    assert np.array_equal(np.load(joined), expected(11))


def test_progress_bar_has_a_title_and_ends(small_parts, tmp_path, capsys):
    embed(network(), Pictures(11), tmp_path, progress="Training images")
    assert "Training images: 100%" in capsys.readouterr().err
    embed(network(fingerprint="other"), Pictures(11), tmp_path)
    assert capsys.readouterr().err == ""
