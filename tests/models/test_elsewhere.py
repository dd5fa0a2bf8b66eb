"""Results with text encoders, DoRA, and in other formats, where iet_sd cannot be imported."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iet_sd.models.adapter import trained_modules
from iet_sd.models.saving import KOHYA_LORA, LORA, MERGED, save_non_ema, save_result
from tests.models.test_merge import OTHER_LAYERS
from tests.models.test_saving import CALL, STRANGER, draw, folders, trained  # noqa: F401

TEXT = "text_encoder/model.safetensors"
LORA_RUN = {"train_mode": "lora", "rank": 4, "lora_alpha": 6.0}
OTHERS = {"lora_target_modules": OTHER_LAYERS}


@pytest.fixture(scope="module")
def bases(folders, tmp_path_factory):  # noqa: F811
    """Also one whose text encoder's names begin with text_model., as all published ones do."""
    published = tmp_path_factory.mktemp("published") / "sd1"
    StableDiffusionPipeline.from_pretrained(folders["sd1"]).save_pretrained(published)
    weights = load_file(published / TEXT)
    assert not any(name.startswith("text_model.") for name in weights)
    named = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    save_file(named, published / TEXT, metadata={"format": "pt"})
    return {**folders, "published": published}


def test_all_of_them_load_and_draw_the_same(bases, tmp_path):
    jobs, pictures = [], []
    for kind, given, file in (
        ("sd1", {}, None),
        ("published", {}, None),
        ("sdxl", {}, None),
        ("published", LORA_RUN, LORA),
        ("sdxl", LORA_RUN, LORA),
        ("sd1", LORA_RUN | OTHERS | {"use_dora": True}, LORA),
        ("sdxl", LORA_RUN | {"save_kohya_lora": True}, KOHYA_LORA),
        ("sd2", LORA_RUN | {"merge_lora": True}, MERGED),
    ):
        components, config = trained(bases[kind], train_text_encoder=True, **given)
        result = tmp_path / str(len(jobs))
        save_result(components, config, result)
        base = {None: result, MERGED: result / MERGED}.get(file, bases[kind])
        lora = result / file if file in (LORA, KOHYA_LORA) else None
        jobs.append([str(base), lora and str(lora), str(result / "picture.npy")])
        pictures.append(draw(components))
    subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(jobs), json.dumps(CALL)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=True,
    )
    for job, picture in zip(jobs, pictures, strict=True):
        np.testing.assert_allclose(np.load(job[2]), picture, atol=1e-4, err_msg=str(job))
    plain = {kind: draw(trained(base)[0]) for kind, base in bases.items()}
    assert min(np.abs(a - b).max() for a in pictures for b in plain.values()) > 1e-2


@pytest.mark.parametrize("kind", ["sd1", "published", "sdxl"])
def test_a_trained_text_encoder_is_saved_in_fp32_by_the_names_of_its_source(kind, bases, tmp_path):
    components, config = trained(bases[kind], torch.bfloat16, train_text_encoder=True)
    save_result(components, config, tmp_path)
    modules = trained_modules(components, config)
    assert len(modules) == (3 if kind == "sdxl" else 2)
    for part, module in modules.items():
        if part == "unet":
            continue
        saved, before = (load_file(f / part / "model.safetensors") for f in (tmp_path, bases[kind]))
        assert saved.keys() == before.keys()
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        ours = {name.removeprefix("text_model."): p for name, p in module.named_parameters()}
        for name, tensor in saved.items():
            assert torch.equal(tensor, ours[name.removeprefix("text_model.")]), name
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_file_of_a_lora_tells_all_of_its_settings_and_no_path(kind, dora, bases, tmp_path):
    """Names of a text encoder begin with text_model., which libraries of any age read."""
    components, config = trained(
        bases[kind], torch.bfloat16, train_text_encoder=True, use_dora=dora, **LORA_RUN
    )
    save_result(components, config, tmp_path)
    tensors = load_file(tmp_path / LORA)
    parts = {name.partition(".")[0] for name in tensors}
    assert parts == {"unet", "text_encoder", *["text_encoder_2"] * (kind == "sdxl")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    text = [name for name in tensors if name.startswith("text_encoder")]
    assert all(name.split(".")[1:3] == ["text_model", "encoder"] for name in text)
    assert any("lora_magnitude_vector" in name for name in text) is dora
    with safe_open(tmp_path / LORA, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    for part in parts:
        told = [metadata[f"{part}.{key}"] for key in ("r", "lora_alpha", "use_dora")]
        assert told == [4, 6.0, dora]
    assert str(bases[kind]) not in json.dumps(metadata)


def test_a_frozen_text_encoder_is_not_in_the_file(bases, tmp_path):
    components, config = trained(bases["sd1"], **LORA_RUN)
    save_result(components, config, tmp_path)
    assert {name.partition(".")[0] for name in load_file(tmp_path / LORA)} == {"unet"}


def test_text_encoders_lie_beside_their_moving_average_too(bases, tmp_path):
    components, config = trained(bases["sdxl"], train_text_encoder=True)
    save_non_ema(components, config, tmp_path)
    for part, module in trained_modules(components, config).items():
        model = type(module).from_pretrained(tmp_path, subfolder=f"{part}_non_ema")
        ours = dict(module.named_parameters())
        assert all(torch.equal(p, ours[name]) for name, p in model.named_parameters()), part
