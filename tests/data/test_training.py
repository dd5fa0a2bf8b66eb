"""All of it at once, as people start it."""

import io
import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from iet_sd.cli.train import train
from tests.data.test_archives import pack
from tests.launching import finish


def encoded(number, size):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_two_processes_equal_one_on_archives_with_buckets_and_captions(argv, tmp_path, capfd):
    """A broken image and a missing caption are named and left out, on both the same."""
    files = []
    for number in range(14):
        size = [(40, 40), (30, 50), (50, 30)][number % 3]
        content = encoded(number, size) if number != 5 else b"words"
        described = {"text": ["a, cat, dog", "a dog"], "n": 1 + number % 2}
        files += [(f"{number:02d}.png", content)]
        files += [(f"{number:02d}.json", described if number != 7 else {"n": 1})]
    root = pack(tmp_path / "archives" / "0.tar", files).parent
    flags = [
        *argv(
            train_data_dir=root,
            aspect_ratio_buckets="auto",
            bucket_reso_steps=8,
            proportion_empty_prompts=0.2,
            caption_prefix="a",
            keep_tokens=1,
            repeats_column="n",
            on_bad_image="skip",
            on_missing_caption="skip",
            agc_threshold=1.0,
            bank_bins=1,
            steps_per_round=4,
            dataloader_num_workers=1,
        ),
        "--shuffle_caption",
    ]
    output = finish(flags, processes=2)
    assert "left out 05: not an image" in output
    assert "left out 07: no caption" in output
    assert train([*flags, "--output_dir", str(tmp_path / "one")]) == 0
    weights = [
        load_file(tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in ("output", "one")
    ]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-4) for k in weights[1])
    lines = [
        [
            json.loads(line)
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in ("output", "one")
    ]
    keys = ("round", "shard", "scored", "skipped", "moved", "updates", "size")
    two, one = ([[line.get(key) for key in keys] for line in found] for found in lines)
    assert two == one
    # Batches were smaller at the ends of epochs.
    assert any(line["scored"] < 16 for line in lines[1] if line["kind"] == "shard")
