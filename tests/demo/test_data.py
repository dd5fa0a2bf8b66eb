"""The bundled demo data: limits, columns, and a split that keeps near-duplicates on one side."""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from demo import emoji
from demo.make_data import SIMILAR, connected, distances, split_of

FOLDER = Path(__file__).parents[2] / "demo" / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DatasetDict:
    return load_dataset(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def ink(data) -> dict[str, np.ndarray]:
    """White minus pixel at half size, as rows of float64, by split."""
    rows = {}
    for split, part in data.items():
        pixels = np.stack([np.asarray(image, np.float64) for image in part["image"]])
        quarters = [pixels[:, y::2, x::2] for y in (0, 1) for x in (0, 1)]
        rows[split] = 255 - sum(quarters) / 4
    return rows


def test_the_folder_loads_with_the_stated_columns_and_stays_small(data):
    features = {"image": Image(), "text": Value("string"), "sample_id": Value("string")}
    features |= {"group": Value("string"), "category": Value("string")}
    assert set(data) == {"train", "test"}
    for part in data.values():
        assert part.features == Features(features)
    assert data["train"].num_rows >= 1200
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000


def test_pictures_are_lossless_64_pixel_rgb_and_not_blank(data):
    for part in data.values():
        for row in part.cast_column("image", Image(decode=False)):
            content = row["image"]["bytes"]
            assert content[:4] == b"RIFF"
            assert content[12:16] == b"VP8L"  # the lossless kind of WebP
            image = PILImage.open(io.BytesIO(content))
            assert (image.mode, image.size) == ("RGB", (64, 64))
            assert np.ptp(np.asarray(image)) > 20, row["sample_id"]


def test_every_sample_has_its_own_id_and_a_caption(data):
    ids = [i for part in data.values() for i in part["sample_id"]]
    assert len(set(ids)) == len(ids)
    for part in data.values():
        assert all(text == text.strip() and len(text) > 3 for text in part["text"])
        assert set(part["group"]) <= set(part["sample_id"])


def test_no_group_is_on_both_sides_and_a_fifth_is_held_out(data):
    groups = {split: set(part["group"]) for split, part in data.items()}
    assert not groups["train"] & groups["test"]
    for split, names in groups.items():
        assert all(split_of(name) == split for name in names)
    share = data["test"].num_rows / sum(part.num_rows for part in data.values())
    assert 0.15 <= share <= 0.25


def test_no_picture_has_a_near_duplicate_on_the_other_side(ink):
    train, test = ink["train"].reshape(len(ink["train"]), -1), ink["test"]
    size = np.linalg.norm(train, axis=1)
    for drawn in (test, test[:, :, ::-1]):
        flat = drawn.reshape(len(drawn), -1)
        lengths = np.hypot(size[:, None], np.linalg.norm(flat, axis=1)[None])
        # |a - b|² = |a|² + |b|² - 2 a·b
        gap = np.sqrt(np.maximum(0, lengths**2 - 2 * train @ flat.T))
        assert (gap / lengths).min() >= SIMILAR - 1e-5


def test_no_two_pictures_are_equal(data):
    contents = [image.tobytes() for part in data.values() for image in part["image"]]
    assert len(set(contents)) == len(contents)


def test_distance_is_0_for_mirror_images_1_for_disjoint_ones_and_symmetric():
    left, right, grey = (np.full((64, 64, 3), 255, np.uint8) for _ in range(3))
    left[:, :20] = right[:, -20:] = 0
    grey[:, 24:40] = 200
    found = distances([PILImage.fromarray(p) for p in (left, right, grey)])
    np.testing.assert_allclose(found, [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-3)


def test_connected_follows_chains_to_the_lowest_item():
    assert connected(6, [(4, 5), (5, 1), (2, 3)]) == [0, 1, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("code", "other", "same"),
    [
        ("1f468-1f3fb-200d-1f52c", "1f469-200d-1f52c", True),  # man, woman scientist
        ("1f6b4-1f3ff-200d-2642-fe0f", "1f6b4", True),  # man biking, biking
        ("1f934-1f3fb", "1f478", True),  # prince, princess
        ("1f9d1-200d-1f373", "1f373", False),  # a cook, cooking
        ("2640-fe0f", "2642-fe0f", False),  # the signs themselves
    ],
)
def test_family_ignores_skin_tone_and_gender_only(code, other, same):
    first, second = (emoji.Emoji(c, "", "", "", Path()).family for c in (code, other))
    assert (first == second) is same


def test_licence_and_card_lie_beside_the_data_and_the_card_counts_right(data):
    licence = (FOLDER / "LICENSE").read_text()
    assert "Copyright (c) Microsoft Corporation" in licence
    assert "Copyright (c) 2013 Cal Henderson" in licence
    card = (FOLDER / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    for split, part in data.items():
        assert f"| {split} | {part.num_rows:,} | {len(set(part['group'])):,} |" in card
    assert f"below {SIMILAR:.2f}" in card
