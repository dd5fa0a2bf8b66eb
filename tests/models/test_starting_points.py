"""What a model starts from: another revision's UNet, and a noise schedule that ends in noise."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from iet_sd.cli import train as cli
from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models import finding, loading
from iet_sd.models.finding import check_model
from iet_sd.models.loading import as_pipeline, load_components, prediction_type
from iet_sd.models.saving import save_pipeline
from tests.pipelines import RESOLUTION

ZERO = {"rescale_betas_zero_snr": True}


def config_for(folder, **given):
    return ModelConfig(pretrained_model_name_or_path=str(folder), **given)


def load(folder, **given):
    return load_components(config_for(folder, **given), torch.float32, None)


@pytest.fixture
def hub(pipelines, tmp_path, monkeypatch):
    """The model ``name/model``: its branches, and what was asked of each."""
    raw = shutil.copytree(pipelines["sd1"], tmp_path / "raw")
    unet = UNet2DConditionModel.from_pretrained(raw, subfolder="unet")
    with torch.no_grad():
        unet.conv_in.bias.fill_(7.0)
    unet.save_pretrained(raw / "unet")
    empty = tmp_path / "empty"
    empty.mkdir()
    folders, asked = {None: pipelines["sd1"], "non-ema": raw, "empty": empty}, []

    def download(name, revision, cache_dir, allow_patterns):
        assert name == "name/model"
        asked.append((revision, allow_patterns))
        return folders[revision]

    monkeypatch.setattr(finding, "snapshot_download", download)
    return asked


def test_training_starts_from_the_unet_of_another_revision(hub, pipelines):
    components = load("name/model", non_ema_revision="non-ema")
    assert (components.unet.conv_in.bias == 7).all()
    assert components.folder == pipelines["sd1"]
    files = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert hub[-1] == ("non-ema", files)
    assert not (load("name/model").unet.conv_in.bias == 7).any()


def test_a_revision_without_a_unet_is_refused(hub):
    with pytest.raises(UserError, match=r"--non_ema_revision empty: name/model has no unet/"):
        load("name/model", non_ema_revision="empty")


def test_a_revision_of_what_has_none_is_refused(pipelines):
    with pytest.raises(UserError, match=r"--non_ema_revision.*is a folder here"):
        check_model(config_for(pipelines["sd1"], non_ema_revision="non-ema"))
    with pytest.raises(UserError, match=r"--non_ema_revision is for --train_mode full"):
        config_for("name/model", non_ema_revision="non-ema", train_mode="lora")


def test_the_last_step_is_pure_noise_in_training_and_in_the_result(pipelines, tmp_path):
    components = load(pipelines["sd2"], **ZERO)
    alphas = components.noise_scheduler.alphas_cumprod
    assert alphas[-1] == 0
    # Lin et al. 2024, algorithm 1: the first stays, and in between it is scaled and shifted.
    before = load(pipelines["sd2"]).noise_scheduler.alphas_cumprod.double().sqrt()
    expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
    torch.testing.assert_close(alphas.double().sqrt(), expected, atol=1e-5, rtol=1e-5)
    save_pipeline(components, config_for(pipelines["sd2"], **ZERO), tmp_path / "result")
    result = StableDiffusionPipeline.from_pretrained(tmp_path / "result")
    for scheduler in (as_pipeline(components).scheduler, result.scheduler):
        assert scheduler.config.rescale_betas_zero_snr is True
        assert scheduler.config.timestep_spacing == "trailing"
        torch.testing.assert_close(scheduler.alphas_cumprod, alphas)
    image = result("a cat", num_inference_steps=2, height=RESOLUTION, width=RESOLUTION).images[0]
    assert image.getextrema() != ((0, 0),) * 3


def test_a_model_that_has_it_keeps_its_own_way_of_sampling(pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd2"], tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ZERO))
    assert load(folder).noise_scheduler.alphas_cumprod[-1] == 0
    for given in ({}, ZERO):
        own = as_pipeline(load(folder, **given)).scheduler.config
        assert own.rescale_betas_zero_snr
        assert own.timestep_spacing == "leading"


def test_a_model_that_cannot_sample_so_is_refused_before_weights_are_loaded(pipelines, monkeypatch):
    monkeypatch.setattr(loading, "_load_part", None)
    with pytest.raises(UserError, match=r"--prediction_type v_prediction"):
        load(pipelines["sd1"], **ZERO)
    with pytest.raises(UserError, match=r"samples by PNDMScheduler.*such as DDIMScheduler"):
        load(pipelines["sd1"], **ZERO, prediction_type="v_prediction")


def test_the_prediction_type_is_known_without_weights(pipelines, argv, capsys, monkeypatch):
    """DREAM is refused by it."""
    assert prediction_type(config_for(pipelines["sd1"]), None) == "epsilon"
    assert prediction_type(config_for(pipelines["sd2"]), None) == "v_prediction"
    given = {"prediction_type": "v_prediction"}
    assert prediction_type(config_for(pipelines["sd1"], **given), None) == "v_prediction"
    monkeypatch.setattr(loading, "_load_part", None)
    assert cli.train(argv(pretrained_model_name_or_path=pipelines["sd2"], dream_training="")) == 2
    assert "--dream_training is for models that predict noise" in capsys.readouterr().err
