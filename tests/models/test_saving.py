import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor

from iet_sd.config import ModelConfig
from iet_sd.hub.contents import contents
from iet_sd.models.adapter import make_trainable
from iet_sd.models.loading import as_pipeline, load_components
from iet_sd.models.saving import save_result
from tests.pipelines import RESOLUTION, XL_POOLED, tiny_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CALL = {"num_inference_steps": 3, "height": RESOLUTION, "width": RESOLUTION, "output_type": "np"}
# What someone runs who has diffusers and the result, and nothing of ours.
STRANGER = """
import importlib.util, json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline

assert importlib.util.find_spec("iet_sd") is None
jobs, call = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for base, lora, picture in jobs:
    pipeline = DiffusionPipeline.from_pretrained(base)
    assert pipeline.unet.dtype == torch.float32
    if lora:
        pipeline.load_lora_weights(lora)
    images = pipeline("a cat", generator=torch.Generator().manual_seed(0), **call).images
    np.save(picture, images)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(base / kind, kind=kind) for kind in ("sd1", "sd2", "sdxl")}


@pytest.fixture
def vae(folders, tmp_path):
    """The folder of another VAE."""
    other = AutoencoderKL.from_pretrained(folders["sd1"], subfolder="vae")
    torch.nn.init.normal_(other.decoder.conv_out.bias)
    other.register_to_config(scaling_factor=0.5, force_upcast=False)
    other.save_pretrained(tmp_path / "another")
    return tmp_path / "another"


def trained(folder, dtype=torch.float32, **settings):
    """Components whose trainable weights were moved, and their settings."""
    config = ModelConfig(pretrained_model_name_or_path=str(folder), **settings)
    components = load_components(config, dtype, cache_dir=None)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in make_trainable(components, config, seed=0).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return components, config


def predict(unet):
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 4, 4, generator=generator),
            torch.tensor([10, 900]),
            torch.randn(2, 16, width, generator=generator),
            added_cond_kwargs={
                "text_embeds": torch.randn(2, XL_POOLED, generator=generator),
                "time_ids": torch.randint(0, 64, (2, 6), generator=generator),
            },
        ).sample


def draw(components):
    generator = torch.Generator().manual_seed(0)
    return as_pipeline(components)("a cat", generator=generator, **CALL).images


def files_of(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_results_load_and_draw_the_same_where_iet_sd_is_not(folders, tmp_path):
    jobs, pictures = [], []
    for kind, base in folders.items():
        for mode in ("full", "lora"):
            adapter = {"rank": 4, "lora_alpha": 8.0} if mode == "lora" else {}
            components, config = trained(base, train_mode=mode, **adapter)
            result = tmp_path / f"{kind}-{mode}"
            save_result(components, config, result)
            job = (base, result) if mode == "lora" else (result, None)
            jobs.append([*(part and str(part) for part in job), str(result / "picture.npy")])
            pictures.append(draw(components))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(jobs), json.dumps(CALL)],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    for job, picture in zip(jobs, pictures, strict=True):
        np.testing.assert_allclose(np.load(job[2]), picture, atol=1e-4)
    # The pictures would tell: training moved them all, each in its own way.
    assert min(np.abs(a - b).max() for a in pictures for b in pictures if a is not b) > 1e-2


@pytest.mark.parametrize(
    ("kind", "alpha", "dropout"),
    [("sd1", 8.0, 0.0), ("sd2", 3.0, 0.5), ("sd1", None, 0.0), ("sdxl", 8.0, 0.5)],
)
def test_lora_reproduces_the_trained_unet_exactly(folders, tmp_path, kind, alpha, dropout):
    """Also where it was trained with dropout: diffusers loads adapters in train mode."""
    given = {"rank": 4, "lora_alpha": alpha, "lora_dropout": dropout}
    components, config = trained(folders[kind], train_mode="lora", **given)
    save_result(components, config, tmp_path)
    assert files_of(tmp_path) == {"pytorch_lora_weights.safetensors"}

    pipeline = DiffusionPipeline.from_pretrained(folders[kind])
    before = predict(pipeline.unet)
    pipeline.load_lora_weights(tmp_path)
    expected = predict(components.unet.eval())
    assert torch.equal(predict(pipeline.unet), expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_lora_file_is_fp32_and_tells_its_settings_and_no_path(folders, tmp_path):
    components, config = trained(
        folders["sd1"], torch.bfloat16, train_mode="lora", rank=2, lora_alpha=6.0
    )
    save_result(components, config, tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 6.0)
    # No more of them: an older peft fails at those that it does not know.
    told = {key.partition(".")[2] for key in metadata}
    assert told == {"r", "lora_alpha", "target_modules", "use_dora"}
    assert str(folders["sd1"]) not in json.dumps(metadata)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_pipeline_is_the_source_with_another_unet(folders, tmp_path, kind):
    source = folders[kind]
    # Frozen parts are bf16 in memory, and must not be saved so.
    components, config = trained(source, torch.bfloat16)
    save_result(components, config, tmp_path)
    assert files_of(tmp_path) == files_of(source)
    for name in files_of(source) - {UNET, "scheduler/scheduler_config.json"}:
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes(), name
    saved = load_file(tmp_path / UNET)
    assert all(torch.equal(saved[k], p) for k, p in components.unet.named_parameters())
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    before, after = (
        json.loads((folder / "scheduler/scheduler_config.json").read_text())
        for folder in (source, tmp_path)
    )
    assert before == after


def test_no_file_names_the_folder_the_model_came_from(folders, tmp_path):
    components, config = trained(folders["sd1"])
    save_result(components, config, tmp_path)
    for name in files_of(tmp_path):
        assert str(folders["sd1"]).encode() not in (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize("given", [{}, {"train_mode": "lora", "merge_lora": True}], ids=str)
def test_nor_a_folder_that_the_source_itself_names(folders, tmp_path, given):
    """As what diffusers saves does, of a pipeline from a folder."""
    secret, source = tmp_path / "alice", tmp_path / "source"
    shutil.copytree(folders["sd1"], secret)
    StableDiffusionPipeline.from_pretrained(secret).save_pretrained(source)
    config = source / "tokenizer" / "tokenizer_config.json"
    told = {"name_or_path": str(secret), "special_tokens_map_file": f"{secret}/special.json"}
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    named = {n for n in files_of(source) if b"alice" in (source / n).read_bytes()}
    assert {"model_index.json", "vae/config.json", "tokenizer/tokenizer_config.json"} <= named
    components, config = trained(source, **given)
    save_result(components, config, tmp_path / "result")
    files = files_of(tmp_path / "result")
    assert not [n for n in files if b"alice" in (tmp_path / "result" / n).read_bytes()]
    folder = tmp_path / "result" / ("merged" if given else "")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.tokenizer("a cat").input_ids == components.tokenizer("a cat").input_ids


def test_a_part_that_no_pipeline_of_ours_has_is_not_named_by_the_result(tmp_path):
    base = tiny_pipeline(tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "my_part").mkdir()
    (base / "model_index.json").write_text(json.dumps(index | {"my_part": ["diffusers", "X"]}))
    components, config = trained(base)
    save_result(components, config, tmp_path / "result")
    assert json.loads((tmp_path / "result" / "model_index.json").read_text()) == index
    assert "model_index.json" in contents(tmp_path / "result", "me/cats")
    StableDiffusionPipeline.from_pretrained(tmp_path / "result")


def test_variant_is_read_and_the_result_has_none(folders, tmp_path):
    source = tmp_path / "fp16"
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"])
    pipeline.to(torch.float16).save_pretrained(source, variant="fp16")
    components, config = trained(source, variant="fp16")
    save_result(components, config, tmp_path / "result")
    expected = {name.replace(".fp16.", ".") for name in files_of(source)}
    assert files_of(tmp_path / "result") == expected
    assert {t.dtype for t in load_file(tmp_path / "result" / VAE).values()} == {torch.float16}
    StableDiffusionPipeline.from_pretrained(tmp_path / "result", use_safetensors=True)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_result_holds_the_vae_that_was_used(folders, vae, tmp_path, kind):
    components, config = trained(folders[kind], pretrained_vae_model_name_or_path=str(vae))
    save_result(components, config, tmp_path / "result")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "result")
    assert pipeline.vae.config.scaling_factor == 0.5
    ours, theirs = (load_file(path) for path in (tmp_path / "result" / VAE, vae / Path(VAE).name))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    np.testing.assert_allclose(pipeline_image(pipeline), draw(components), atol=1e-4)


def pipeline_image(pipeline):
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **CALL).images


def test_trained_prediction_type_is_saved(folders, tmp_path):
    components, config = trained(folders["sd1"], prediction_type="v_prediction")
    save_result(components, config, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_safety_checker_of_the_source_stays(folders, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    sizes |= {"num_hidden_layers": 1}
    clip = CLIPConfig(
        text_config=sizes,
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    source, result = tmp_path / "source", tmp_path / "result"
    StableDiffusionPipeline.from_pretrained(
        folders["sd1"],
        safety_checker=StableDiffusionSafetyChecker(clip),
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=True,
    ).save_pretrained(source)
    components, config = trained(source)
    save_result(components, config, result)
    pipeline = StableDiffusionPipeline.from_pretrained(result)
    checkers = [
        load_file(folder / "safety_checker/model.safetensors") for folder in (source, result)
    ]
    assert all(torch.equal(tensor, checkers[1][name]) for name, tensor in checkers[0].items())
    assert pipeline.safety_checker is not None
    assert pipeline.feature_extractor is not None
    assert pipeline.config.requires_safety_checker


def test_result_joins_the_files_of_a_run_and_replaces_an_older_result(folders, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("e")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    components, config = trained(folders["sd1"])
    save_result(components, config, tmp_path)
    with torch.no_grad():
        components.unet.conv_in.bias += 1
    save_result(components, config, tmp_path)
    assert files_of(tmp_path) == files_of(folders["sd1"]) | {"logs/events", "metrics.jsonl"}
    assert torch.equal(load_file(tmp_path / UNET)["conv_in.bias"], components.unet.conv_in.bias)


def test_result_can_take_the_place_of_its_source(tmp_path):
    source = tiny_pipeline(tmp_path)
    components, config = trained(source)
    names = files_of(source)
    save_result(components, config, source)
    assert files_of(source) == names
    assert torch.equal(load_file(source / UNET)["conv_in.bias"], components.unet.conv_in.bias)


def test_a_source_stored_in_fp16_gives_a_result_that_loads_without_a_dtype(folders, tmp_path):
    half = tmp_path / "half"
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"])
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(half)
    save_result(*trained(half), tmp_path / "result")
    result = StableDiffusionPipeline.from_pretrained(tmp_path / "result")
    parts = (result.unet, result.vae, result.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert np.isfinite(result("a cat", **CALL).images).all()
    as_stored = load_file(tmp_path / "result" / "text_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in as_stored.values()} == {torch.float16}
