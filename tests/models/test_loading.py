import huggingface_hub.constants
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.loading import as_pipeline, load_components
from tests.pipelines import RESOLUTION, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines of both kinds, and one whose weights are stored in fp16 as a variant."""
    base = tmp_path_factory.mktemp("pipelines")
    folders = {kind: tiny_pipeline(base / kind, kind=kind) for kind in ("sd1", "sd2")}
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
    [("sd1", "epsilon", PNDMScheduler), ("sd2", "v_prediction", DDIMScheduler)],
)
def test_both_kinds_load_and_generate(folders, kind, prediction_type, scheduler):
    components = load(folders[kind])
    assert components.prediction_type == prediction_type
    assert components.num_train_timesteps == 1000
    assert components.source == str(folders[kind])
    pipeline = as_pipeline(components)
    assert type(pipeline.scheduler) is scheduler
    assert pipeline.unet is components.unet
    image = pipeline("a cat", num_inference_steps=2, height=RESOLUTION, width=RESOLUTION).images[0]
    assert image.size == (RESOLUTION, RESOLUTION)


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
