"""The model under evaluation is the one that was named, whole, and known by its content."""

import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from iet_sd.config import ModelConfig
from iet_sd.config.evaluation import PipelineConfig
from iet_sd.errors import UserError
from iet_sd.evaluation.pipelines import check_pipeline, load_pipeline, model_fingerprint
from iet_sd.models.adapter import make_trainable
from iet_sd.models.loading import as_pipeline, load_components
from iet_sd.models.saving import save_lora, save_result
from iet_sd.sampling import draw
from tests.pipelines import RESOLUTION, tiny_pipeline

CPU = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def model(pipelines, tmp_path):
    return shutil.copytree(pipelines["sd1"], tmp_path / "model")


@pytest.fixture(scope="module")
def trained_config(pipelines):
    return ModelConfig(
        pretrained_model_name_or_path=str(pipelines["sd1"]),
        train_mode="lora",
        train_text_encoder=True,
        lora_dropout=0.5,
        lora_alpha=8.0,
    )


@pytest.fixture(scope="module")
def trained(trained_config):
    """Components with adapters that were moved; they have dropout, and another scale than 1."""
    components = load_components(trained_config, torch.float32, None)
    generator = torch.Generator().manual_seed(7)
    for parameter in make_trainable(components, trained_config, seed=0).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return components


@pytest.fixture(scope="module")
def lora(trained, trained_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_lora(trained, trained_config, folder)
    return folder


def config(model, **settings):
    settings = {key: str(value) for key, value in settings.items()}
    return PipelineConfig(pretrained_model_name_or_path=str(model), **settings)


def load(model, dtype=torch.float32, cache_dir=None, **settings):
    return load_pipeline(config(model, **settings), cache_dir, CPU, dtype)


def fingerprint(model, **settings):
    return model_fingerprint(config(model, **settings), None)


def images(pipeline):
    return draw(pipeline, ["a cat", "a dog"], [1, 2], RESOLUTION, 2, 7.5)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- loading


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("sd1", PNDMScheduler), ("sd2", DDIMScheduler), ("sdxl", EulerDiscreteScheduler)],
)
def test_pipeline_is_that_of_diffusers_with_its_own_scheduler(pipelines, kind, scheduler):
    pipeline = load(pipelines[kind])
    plain = DiffusionPipeline.from_pretrained(pipelines[kind])
    assert type(pipeline) is type(plain)
    assert type(pipeline.scheduler) is scheduler
    assert pipeline.scheduler.config == plain.scheduler.config
    assert getattr(pipeline, "safety_checker", None) is None
    assert getattr(pipeline, "watermark", None) is None
    plain.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(images(pipeline), images(plain), atol=1e-5)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert not any(module.training for part in parts for module in part.modules())


def test_no_safety_checker_hides_images(pipelines, tmp_path):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    size["num_attention_heads"] = 1
    StableDiffusionPipeline.from_pretrained(
        pipelines["sd1"],
        safety_checker=StableDiffusionSafetyChecker(
            CLIPConfig(text_config=size, vision_config=size, projection_dim=8)
        ),
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=True,
    ).save_pretrained(tmp_path)
    check_pipeline(config(tmp_path))
    assert StableDiffusionPipeline.from_pretrained(tmp_path).safety_checker is not None
    assert load(tmp_path).safety_checker is None


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_every_part_has_the_asked_precision_whatever_is_stored(pipelines, tmp_path, stored, lora):
    plain = StableDiffusionPipeline.from_pretrained(pipelines["sd1"])
    plain.to(getattr(torch, stored)).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = load(tmp_path, dtype, lora_weights=lora)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            assert {p.dtype for p in part.parameters()} == {dtype}
        assert np.isfinite(images(pipeline)).all()


def test_sdxl_draws_in_fp16_with_its_vae_in_fp32(pipelines):
    pipeline = load(pipelines["sdxl"], torch.float16)
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float16}
    assert pipeline.vae.dtype == torch.float32
    # A weight that no fp16 can hold, as the activations of XL's VAE do not fit.
    pipeline.vae.decoder.conv_out.weight.data *= 1e5
    whole = load(pipelines["sdxl"])
    whole.vae.load_state_dict(pipeline.vae.state_dict())
    assert np.abs(images(pipeline) - images(whole)).mean() < 0.05


def test_a_lora_for_sdxl_draws_as_the_model_that_was_trained(pipelines, tmp_path):
    settings = {"pretrained_model_name_or_path": str(pipelines["sdxl"]), "train_mode": "lora"}
    model = ModelConfig(**settings, lora_dropout=0.5, lora_alpha=8.0)
    components = load_components(model, torch.float32, None)
    generator = torch.Generator().manual_seed(7)
    for parameter in make_trainable(components, model, seed=0).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_result(components, model, tmp_path)
    pipeline = load(pipelines["sdxl"], lora_weights=tmp_path)
    np.testing.assert_allclose(images(pipeline), images(as_pipeline(components)), atol=1e-4)
    assert np.abs(images(pipeline) - images(load(pipelines["sdxl"]))).max() > 1e-2
    with pytest.raises(UserError, match="does not fit"):
        load(pipelines["sd1"], lora_weights=tmp_path)


def test_variant_is_read(pipelines, tmp_path):
    StableDiffusionPipeline.from_pretrained(pipelines["sd1"]).save_pretrained(
        tmp_path, variant="fp16"
    )
    check_pipeline(config(tmp_path, variant="fp16"))
    found, expected = load(tmp_path, variant="fp16"), load(pipelines["sd1"])
    np.testing.assert_allclose(images(found), images(expected), atol=1e-5)
    with pytest.raises(UserError, match=r"Give --variant fp16\."):
        check_pipeline(config(tmp_path))


@pytest.mark.parametrize("given", ["folder", "file"])
def test_lora_draws_as_the_model_that_was_trained(pipelines, trained, lora, given):
    expected = images(as_pipeline(trained))
    pipeline = load(pipelines["sd1"], lora_weights=lora if given == "folder" else lora / LORA)
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-5)
    assert pipeline.get_list_adapters().keys() == {"unet", "text_encoder"}
    assert np.abs(expected - images(load(pipelines["sd1"]))).max() > 0.05


def test_lora_comes_without_the_dropout_of_its_training(pipelines, lora, tmp_path):
    """Where its file tells of one, as those of diffusers' scripts do."""
    with safe_open(lora / LORA, framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert not any(key.endswith("lora_dropout") for key in told)
    told |= {f"{part}.lora_dropout": 0.5 for part in ("unet", "text_encoder")}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    save_file(load_file(lora / LORA), tmp_path / "theirs.safetensors", metadata)
    pipeline = load(pipelines["sd1"], lora_weights=tmp_path / "theirs.safetensors")
    for network in (pipeline.unet, pipeline.text_encoder):
        modules = list(network.modules())
        assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in modules)
        assert not any(module.training for module in modules)


@pytest.mark.parametrize(
    "given", [{"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": True}], ids=str
)
def test_lora_draws_with_the_scheduler_that_was_trained(pipelines, given, tmp_path):
    base, adapter = str(pipelines["sd2"]), {"train_mode": "lora", "rank": 2}
    model = ModelConfig(pretrained_model_name_or_path=base, **adapter, **given)
    components = load_components(model, torch.float32, None)
    make_trainable(components, model, seed=0)
    save_result(components, model, tmp_path)
    pipeline = load(base, lora_weights=tmp_path)
    np.testing.assert_allclose(images(pipeline), images(as_pipeline(components)), atol=1e-5)
    assert np.abs(images(pipeline) - images(load(base))).max() > 0.05
    # What is drawn depends on it.
    before = fingerprint(base, lora_weights=tmp_path)
    edit(tmp_path / "scheduler" / "scheduler_config.json", steps_offset=3)
    assert fingerprint(base, lora_weights=tmp_path) != before


def test_lora_of_another_model_is_an_error(pipelines, lora, tmp_path):
    weights = load_file(lora / LORA)
    wider = {k: v.repeat(1, 2) if "lora.down" in k else v for k, v in weights.items()}
    save_file(wider, tmp_path / "wider.safetensors")
    with pytest.raises(UserError, match=r"wider\.safetensors does not fit .* size mismatch"):
        load(pipelines["sd1"], lora_weights=tmp_path / "wider.safetensors")
    foreign = {f"transformer.{k.removeprefix('unet.')}": v for k, v in weights.items()}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=r"foreign\.safetensors does not fit .* none of its"):
        load(pipelines["sd1"], lora_weights=tmp_path / "foreign.safetensors")


# -- what can be known before weights are loaded


def test_good_models_and_loras_pass(pipelines, lora):
    check_pipeline(config(pipelines["sd2"]))
    check_pipeline(config(pipelines["sd1"], lora_weights=lora))
    check_pipeline(config("name/on-the-hub", lora_weights=lora / LORA))


def test_other_models_are_errors(model):
    with pytest.raises(UserError, match=r"There is no folder \./nowhere"):
        check_pipeline(config("./nowhere"))
    edit(model / "model_index.json", _class_name="StableDiffusion3Pipeline")
    with pytest.raises(UserError, match="is a StableDiffusion3Pipeline"):
        check_pipeline(config(model))
    (model / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"expected model_index\.json"):
        check_pipeline(config(model))


def test_other_loras_are_errors(model, lora, tmp_path):
    with pytest.raises(UserError, match=rf"no file {model / LORA}\. .* --train_mode lora"):
        check_pipeline(config(model, lora_weights=model))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((lora / LORA).read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        check_pipeline(config(model, lora_weights=cut))
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"holds no LoRA, .* --pretrained_model_name_or_path"):
        check_pipeline(config(model, lora_weights=unet))


def test_unreachable_hub_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no-such-model is not a folder here, and the Hub"):
        load("name/no-such-model", cache_dir=str(tmp_path))


# -- fingerprint


def test_fingerprint_is_of_the_content_and_not_of_the_place(pipelines, model):
    assert fingerprint(model) == fingerprint(pipelines["sd1"]) != fingerprint(pipelines["sd2"])


def test_fingerprint_is_the_same_from_the_hub(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--name--model"
    shutil.copytree(pipelines["sd1"], cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    found = model_fingerprint(config("name/model"), str(tmp_path))
    assert found == fingerprint(pipelines["sd1"])
    drawn = images(load("name/model", cache_dir=str(tmp_path)))
    np.testing.assert_allclose(drawn, images(load(pipelines["sd1"])), atol=1e-5)


def test_fingerprint_leaves_out_what_no_image_depends_on(model):
    before = fingerprint(model)
    (model / "README.md").write_text("a card")
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "unet.safetensors").write_bytes(b"x")
    (model / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_fingerprint_sees_a_change_of(model, file):
    before = fingerprint(model)
    path = model / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if path.suffix == ".json":
        edit(path, of_no_meaning=1)
    else:
        path.write_bytes(content)
    assert fingerprint(model) != before


def test_fingerprint_sees_the_lora(pipelines, lora, tmp_path):
    plain = fingerprint(pipelines["sd1"])
    adapted = fingerprint(pipelines["sd1"], lora_weights=lora)
    assert adapted == fingerprint(pipelines["sd1"], lora_weights=lora / LORA) != plain
    other = {name: weight + 1 for name, weight in load_file(lora / LORA).items()}
    save_file(other, tmp_path / LORA)
    assert fingerprint(pipelines["sd1"], lora_weights=tmp_path) not in (plain, adapted)


def test_fingerprint_reads_the_variant(tmp_path):
    folder = tiny_pipeline(tmp_path)
    before = fingerprint(folder)
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert fingerprint(folder, variant="fp16") != before
