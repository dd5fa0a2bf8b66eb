import numpy as np
import pytest
import torch
from PIL import Image

from iet_sd.config import DataConfig
from iet_sd.data.sources import load_source
from iet_sd.data.transforms import view
from iet_sd.errors import UserError
from iet_sd.evaluation import images as module
from iet_sd.evaluation.images import FolderImages, TableImages


def picture(seed, size=(20, 16)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Images b.png, a.jpg, sub/c.png, and what is no image."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    picture(1).save(root / "b.png")
    picture(0).save(root / "a.jpg")
    picture(2).save(root / "sub" / "c.png")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def source(folder, tmp_path):
    def make(**settings):
        config = DataConfig(
            train_data_dir=str(folder),
            on_missing_caption="empty",
            cache_dir=str(tmp_path / "cache"),
            **settings,
        )
        return load_source(config)

    return make


def table(source, **settings):
    return TableImages(source, **{"resolution": 8, "interpolation": "bilinear"} | settings)


def test_folder_is_sorted_and_read_as_rgb(folder):
    images = FolderImages(folder)
    assert images.ids == ("a.jpg", "b.png", "sub/c.png")
    assert len(images) == 3
    assert images[1].mode == "RGB"
    assert np.array_equal(np.asarray(images[1]), np.asarray(picture(1)))
    assert np.array_equal(np.asarray(images[2]), np.asarray(picture(2)))


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match=r"holds no images\. Expected files like"):
        FolderImages(tmp_path)
    with pytest.raises(UserError, match="nowhere is no folder"):
        FolderImages(tmp_path / "nowhere")


def test_bad_image_is_named(folder):
    (folder / "b.png").write_bytes(b"no image")
    images = FolderImages(folder)
    with pytest.raises(UserError, match=r"^b\.png: not an image"):
        images[1]


def swap(folder):
    (folder / "b.png").rename(folder / "x.png")
    (folder / "sub" / "c.png").rename(folder / "b.png")
    (folder / "x.png").rename(folder / "sub" / "c.png")


CHANGES = {
    "an image": lambda folder: picture(9).save(folder / "b.png"),
    "their order": swap,
    "one more": lambda folder: picture(9).save(folder / "d.png"),
    "one less": lambda folder: (folder / "b.png").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprints_change_with_the_images(folder, source, change):
    before = FolderImages(folder).fingerprint, table(source()).fingerprint
    assert before == (FolderImages(folder).fingerprint, table(source()).fingerprint)
    CHANGES[change](folder)
    after = FolderImages(folder).fingerprint, table(source()).fingerprint
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_fingerprint_of_a_table_changes_with_the_resize(source):
    assert table(source()).fingerprint == table(source()).fingerprint
    assert table(source()).fingerprint != table(source(), resolution=16).fingerprint
    assert table(source()).fingerprint != table(source(), interpolation="bicubic").fingerprint


def test_fingerprints_decode_nothing(folder, source, monkeypatch):
    rows = source()
    monkeypatch.setattr(module, "decode", lambda *_: pytest.fail("decoded"))
    assert FolderImages(folder).fingerprint
    assert table(rows).fingerprint


def test_fingerprint_of_a_table_reads_no_file_twice(source, monkeypatch):
    rows = source()
    monkeypatch.setattr(module, "read_bytes", lambda *_: pytest.fail("read"))
    assert table(rows).fingerprint


def test_digests_that_the_source_did_not_make_are_made(folder, source):
    (folder / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{n}", "text": "x", "g": "1"}}\n' for n in ("a.jpg", "b.png"))
    )
    (folder / "sub" / "c.png").unlink()
    unread = source(check_images="none", group_column="g")
    assert unread.digests == (None, None)
    assert table(unread).fingerprint == table(source()).fingerprint
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"^b\.png cannot be read"):
        assert table(unread).fingerprint


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_table_is_what_training_sees_without_chance(source, interpolation):
    images = table(source(), interpolation=interpolation)
    assert images.ids == ("a.jpg", "b.png", "sub/c.png")
    seen = view(
        picture(1),
        size=(8, 8),
        center_crop=True,
        random_flip=False,
        interpolation=interpolation,
    ).pixel_values
    assert images[1].size == (8, 8)
    found = torch.from_numpy(np.asarray(images[1]).astype(np.float32)).permute(2, 0, 1)
    torch.testing.assert_close((found / 255 - 0.5) / 0.5, seen)


def test_table_is_resized_and_cropped_in_the_centre(source):
    # 20 x 16 to 10 x 8, of which columns 1 to 8 stay.
    expected = picture(1).resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8))
    assert np.array_equal(np.asarray(table(source())[1]), np.asarray(expected))


def test_bytes_survive_the_way_through_the_transform(folder, source):
    """At its own size an image is unchanged, for every value that a byte can have."""
    square = np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    Image.fromarray(square).save(folder / "b.png")
    assert np.array_equal(np.asarray(table(source(), resolution=16)[1]), square)


def test_image_that_changed_after_it_was_hashed_is_named(folder, source):
    images = table(source())
    picture(9).save(folder / "b.png")
    with pytest.raises(UserError, match=r"^b\.png: not the file that it was before"):
        images[1]
