"""The fingerprint of a model is that of its content, wherever it lies and however it got there."""

import hashlib
import os
import shutil

import pytest

from iet_sd.models import fingerprint as module
from iet_sd.models.fingerprint import fingerprint
from tests.engine.running import flip


@pytest.fixture
def copy(pipelines, tmp_path):
    return shutil.copytree(pipelines["sd1"], tmp_path / "copy")


def test_a_copy_is_the_same_and_what_lies_beside_it_is_nothing(pipelines, copy):
    (copy / "README.md").write_text("a card")
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (copy / "checkpoint-1").mkdir()
    assert fingerprint(copy, None) == fingerprint(pipelines["sd1"], None)
    assert fingerprint(pipelines["sd2"], None) != fingerprint(pipelines["sd1"], None)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder_2/model.safetensors",
        "tokenizer_2/vocab.json",
        "vae/config.json",
    ],
)
def test_any_bit_of_sdxl_counts(name, pipelines, tmp_path):
    copy = shutil.copytree(pipelines["sdxl"], tmp_path / "copy")
    assert fingerprint(copy, None) == fingerprint(pipelines["sdxl"], None)
    flip(copy / name)
    assert fingerprint(copy, None) != fingerprint(pipelines["sdxl"], None)


def test_another_vae_counts_as_if_it_were_the_models_own(pipelines, copy):
    vae = shutil.copytree(copy / "vae", copy.parent / "vae")
    assert fingerprint(copy, None, vae) == fingerprint(copy, None)
    flip(vae / "diffusion_pytorch_model.safetensors")
    changed = fingerprint(copy, None, vae)
    assert changed != fingerprint(copy, None)
    shutil.rmtree(copy / "vae")
    shutil.copytree(vae, copy / "vae")
    assert fingerprint(copy, None) == changed


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_any_bit_counts(name, pipelines, copy):
    flip(copy / name)
    assert fingerprint(copy, None) != fingerprint(pipelines["sd1"], None)


def test_a_download_is_known_by_the_names_of_its_files(pipelines, tmp_path, monkeypatch):
    """As the Hub's cache keeps them: links to files named by their SHA-256, or by git's hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    for file in sorted(path for path in pipelines["sd1"].rglob("*") if path.is_file()):
        large = file.suffix == ".safetensors"
        content = file.read_bytes()
        digest = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        (blobs / digest).write_bytes(content)
        link = snapshot / file.relative_to(pipelines["sd1"])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / digest, link.parent))
    expected, read = fingerprint(pipelines["sd1"], None), []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        module.hashlib,
        "file_digest",
        lambda file, kind: read.append(file.name) or digest(file, kind),
    )
    assert fingerprint(snapshot, None) == expected
    assert read
    assert not [name for name in read if name.endswith(".safetensors")]
