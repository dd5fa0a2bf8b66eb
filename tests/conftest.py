import json

import numpy as np
import pytest
from PIL import Image

from tests.pipelines import tiny_pipeline


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folders of the tiny pipelines, by kind."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(root / kind, kind=kind) for kind in ("sd1", "sd2")}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 16 captioned pictures."""
    root = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": f"a cat or dog {number}"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
