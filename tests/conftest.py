import json
import os
import signal

# Before numpy and torch read it. Two threads of so little work wait for each other on a busy
# machine: a tenth of the time for some tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from tests.pipelines import RESOLUTION, tiny_pipeline


def pytest_configure():
    """Signals as in a terminal: a shell has what it starts in the background ignore some."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folders of the tiny pipelines, by kind."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(root / kind, kind=kind) for kind in ("sd1", "sd2", "sdxl")}


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


@pytest.fixture(scope="session")
def heldout(tmp_path_factory):
    """A folder of 30 captioned pictures that nothing was trained on."""
    root = tmp_path_factory.mktemp("heldout")
    rows = []
    for number in range(30):
        pixels = np.random.default_rng(100 + number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": f"a bird {number}"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def argv(pipelines, images, tmp_path):
    """Flags of a short run; a keyword replaces, adds, or with None takes away a flag."""
    from accelerate.state import AcceleratorState

    def make(**given):
        flags = {
            "pretrained_model_name_or_path": pipelines["sd1"],
            "train_data_dir": images,
            "output_dir": tmp_path / "output",
            "cache_dir": tmp_path / "cache",
            "resolution": RESOLUTION,
            "train_batch_size": 4,
            "num_shards": 2,
            "num_rounds": 2,
            "steps_per_round": 2,
            "seed": 0,
            "report_to": "none",
        } | given
        pairs = [(f"--{k}", v) for k, v in flags.items() if v is not None]
        return [str(part) for flag, v in pairs for part in ([flag] if v == "" else [flag, v])]

    yield make
    # Accelerate keeps its settings for the life of a process.
    AcceleratorState._reset_state(reset_partial_state=True)
