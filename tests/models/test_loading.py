import gc
import json
import shutil
import weakref

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.loading import as_pipeline, load_components
from tests.pipelines import RESOLUTION, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines of all kinds, and one whose weights are stored in fp16 as a variant."""
    base = tmp_path_factory.mktemp("pipelines")
    folders = {kind: tiny_pipeline(base / kind, kind=kind) for kind in ("sd1", "sd2", "sdxl")}
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"])
    pipeline.to(torch.float16).save_pretrained(base / "fp16", variant="fp16")
    return folders | {"fp16": base / "fp16"}


def load(folder, dtype=torch.float32, **settings):
    config = ModelConfig(pretrained_model_name_or_path=str(folder), **settings)
    return load_components(config, dtype, cache_dir=None)


def dtypes(module):
    return {p.dtype for p in module.parameters()}


@pytest.mark.parametrize(
    ("kind", "prediction_type", "scheduler"),
    [
        ("sd1", "epsilon", PNDMScheduler),
        ("sd2", "v_prediction", DDIMScheduler),
        ("sdxl", "epsilon", EulerDiscreteScheduler),
    ],
)
def test_all_kinds_load_and_generate(folders, kind, prediction_type, scheduler):
    components = load(folders[kind])
    assert components.prediction_type == prediction_type
    assert components.num_train_timesteps == 1000
    assert components.source == str(folders[kind])
    pipeline = as_pipeline(components)
    assert type(pipeline.scheduler) is scheduler
    assert pipeline.unet is components.unet
    image = pipeline("a cat", num_inference_steps=2, height=RESOLUTION, width=RESOLUTION).images[0]
    assert image.size == (RESOLUTION, RESOLUTION)


def test_what_is_borrowed_is_freed_and_what_was_there_is_not(folders):
    components = load(folders["sdxl"])
    encoder, vae = components.text_encoder, weakref.ref(components.vae)
    components.release("vae")
    gc.collect()
    assert vae() is None
    with components.borrowed():
        vae, other = weakref.ref(components.vae), weakref.ref(components.text_encoder_2)
        assert vae() is components.vae
    gc.collect()
    assert (vae(), other()) == (None, None)
    assert components.text_encoder is encoder


def test_noise_scheduler_has_the_schedule_of_the_model(folders):
    components = load(folders["sd1"])
    assert type(components.noise_scheduler) is DDPMScheduler
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0).float()
    torch.testing.assert_close(components.noise_scheduler.alphas_cumprod, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("stored", ["sd1", "fp16"])
def test_every_part_has_the_asked_dtype_whatever_is_stored(folders, stored, mode, dtype):
    variant = "fp16" if stored == "fp16" else None
    components = load(folders[stored], dtype, train_mode=mode, variant=variant)
    assert dtypes(components.vae) == dtypes(components.text_encoder) == {dtype}
    assert dtypes(components.unet) == {torch.float32 if mode == "full" else dtype}
    for part in (components.vae, components.text_encoder, components.unet):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_vae_of_sdxl_stays_in_fp32_where_it_would_overflow(folders, tmp_path, dtype):
    """In fp16, unless its config says that it was made for it."""
    components = load(folders["sdxl"], dtype)
    assert dtypes(components.text_encoder) == dtypes(components.text_encoder_2) == {dtype}
    kept = torch.float32 if dtype == torch.float16 else dtype
    assert dtypes(components.vae) == {kept}
    fixed = shutil.copytree(folders["sdxl"] / "vae", tmp_path / "vae")
    config = json.loads((fixed / "config.json").read_text())
    (fixed / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    other = load(folders["sdxl"], dtype, pretrained_vae_model_name_or_path=str(fixed))
    assert dtypes(other.vae) == {dtype}


def test_a_vae_in_fp32_works_in_fp32_under_autocast_too(folders):
    half, whole = (load(folders["sdxl"], dtype).vae for dtype in (torch.float16, torch.float32))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = whole.encode(images).latent_dist.mean
        expected = whole.decode(latents).sample
        with torch.autocast("cpu", torch.float16):
            assert whole.decode(latents).sample.dtype == torch.float16
            assert torch.equal(half.encode(images).latent_dist.mean, latents)
            assert torch.equal(half.decode(latents).sample, expected)
            assert half.decode(latents.half()).sample.dtype == torch.float32


def test_text_encoders_that_are_trained_are_loaded_in_fp32(folders):
    trained = load(folders["sdxl"], torch.float16, train_text_encoder=True)
    assert dtypes(trained.text_encoder) == dtypes(trained.text_encoder_2) == {torch.float32}
    adapted = load(folders["sdxl"], torch.float16, train_text_encoder=True, train_mode="lora")
    assert dtypes(adapted.text_encoder) == dtypes(adapted.text_encoder_2) == {torch.float16}


@pytest.mark.parametrize("zeros", [True, False])
def test_drawing_without_a_negative_prompt_is_as_the_source_says(folders, tmp_path, zeros):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = zeros
    (folder / "model_index.json").write_text(json.dumps(index))
    components = load(folder)
    pipeline = as_pipeline(components)
    assert pipeline.config.force_zeros_for_empty_prompt is zeros
    assert pipeline.watermark is None
    assert pipeline.text_encoder_2 is components.text_encoder_2


def test_latent_size_is_that_of_the_encoder(folders):
    components = load(folders["sd1"])
    latents = components.vae.encode(torch.zeros(1, 3, 48, 48)).latent_dist.mean
    assert latents.shape[-1] == components.latent_size(48) == 6
    with pytest.raises(UserError, match=r"multiple of 8 .* got 36"):
        components.latent_size(36)


def test_prediction_type_override_reaches_training_and_sampling(folders, caplog):
    components = load(folders["sd1"], prediction_type="v_prediction")
    assert components.prediction_type == "v_prediction"
    assert as_pipeline(components).scheduler.config.prediction_type == "v_prediction"
    assert "v_prediction replaces the epsilon" in caplog.text


def test_own_scheduler_can_be_given(folders):
    components = load(folders["sd1"])
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    assert as_pipeline(components, scheduler).scheduler is scheduler


def test_loading_checks_first(tmp_path):
    with pytest.raises(UserError, match=r"expected model_index.json"):
        load(tmp_path)


def test_unreachable_hub_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = ModelConfig(pretrained_model_name_or_path="name/no-such-model")
    with pytest.raises(UserError, match=r"name/no-such-model is not a folder here, and the Hub"):
        load_components(config, torch.float32, cache_dir=str(tmp_path))
