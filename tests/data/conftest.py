import json

import numpy as np
import pytest
from PIL import Image

from iet_sd.config import DataConfig


@pytest.fixture
def config(tmp_path):
    """Settings for the data at a path, with a cache of the test's own."""

    def make(path, **settings):
        cache = str(tmp_path / "cache")
        return DataConfig(train_data_dir=str(path), cache_dir=cache, **settings)

    return make


@pytest.fixture
def folder(tmp_path):
    """An image folder: pictures of different grey, and a row of metadata.jsonl for each."""

    def make(names=("a.png", "b.png", "c.png"), rows=None, at="images"):
        root = tmp_path / at
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(root / name)
        if rows is None:
            rows = [{"file_name": name, "text": f"picture {name}"} for name in names]
        if rows:
            lines = [json.dumps(row) + "\n" for row in rows]
            (root / "metadata.jsonl").write_text("".join(lines))
        return root

    return make


def picture(number):
    """A picture of 20 x 16 that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photo():
    """Noise of 64 x 48 (width x height), not stretched by AutoContrast to nothing."""
    values = np.random.default_rng(0).integers(10, 200, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)
