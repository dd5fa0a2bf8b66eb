import json
import os
import shutil
from fnmatch import fnmatch

import diffusers
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from diffusers.utils import dummy_torch_and_torchsde_objects as dummy

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.finding import check_model, find_vae
from iet_sd.models.layout import download_patterns
from tests.pipelines import XL_POOLED, XL_TIME, tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def xl(pipelines, tmp_path):
    return shutil.copytree(pipelines["sdxl"], tmp_path / "xl")


def check(folder, **settings):
    check_model(ModelConfig(pretrained_model_name_or_path=str(folder), **settings))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_weights(folder, old, new):
    for path in folder.rglob(f"*{old}"):
        path.rename(path.with_name(path.name.replace(old, new)))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_whole_pipelines_pass(tmp_path, kind):
    check(tiny_pipeline(tmp_path, kind=kind))


def test_variant_is_honoured_both_ways(folder):
    with pytest.raises(
        UserError, match=r"expected text_encoder/model\.fp16\.s.* Give no --variant, or"
    ):
        check(folder, variant="fp16")
    rename_weights(folder, ".safetensors", ".fp16.safetensors")
    check(folder, variant="fp16")
    with pytest.raises(UserError, match=r"Give --variant fp16\."):
        check(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
            r"StableDiffusionXLImg2ImgPipeline; supported are .* 1.x and 2.x .* XL .* no refiner",
        ),
        ({"_class_name": "StableDiffusion3Pipeline"}, "no Stable Diffusion 3 or Flux"),
        ({"_class_name": "FluxPipeline"}, "FluxPipeline; supported"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is a T5EncoderModel"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is a UNet3DConditionModel"),
        ({"vae": [None, None]}, "names no vae"),
        (
            {"scheduler": ["diffusers", "DDIMSchedulr"]},
            r"names the scheduler DDIMSchedulr of diffusers; expected .* such as DDIMScheduler\.",
        ),
        ({"scheduler": ["mine", "DDIMScheduler"]}, "the scheduler DDIMScheduler of mine; expected"),
        ({"scheduler": ["diffusers", "UNet2DModel"]}, "the scheduler UNet2DModel of diffusers"),
        ({"scheduler": ["diffusers", "utils"]}, "the scheduler utils of diffusers"),
        (
            {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
            r"no safety_checker/config.json .*set safety_checker to \[null, null\]",
        ),
    ],
)
def test_other_models_are_named(folder, values, message):
    edit(folder / "model_index.json", **values)
    with pytest.raises(UserError, match=message):
        check(folder)


def test_a_scheduler_whose_libraries_are_missing_names_them(folder, monkeypatch):
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", dummy.DPMSolverSDEScheduler)
    with pytest.raises(UserError, match="DPMSolverSDEScheduler needs torch and torchsde: install"):
        check(folder)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, LCMScheduler, EulerDiscreteScheduler])
def test_schedulers_of_diffusers_pass(folder, scheduler):
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler.__name__])
    check(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model_index.json", r"no pipeline folder: expected model_index.json .* found scheduler"),
        ("unet", r"no unet/config.json \(and there is no such folder\)"),
        ("text_encoder/config.json", "no text_encoder/config.json"),
        ("scheduler/scheduler_config.json", "no scheduler/scheduler_config.json"),
        (f"vae/{WEIGHTS}", f"expected vae/{WEIGHTS}, found config.json"),
    ],
)
def test_missing_parts_are_named(folder, missing, message):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message):
        check(folder)


def test_tokenizer_needs_one_of_its_two_vocabulary_formats(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    check(folder)
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError, match="tokenizer/ has no vocabulary"):
        check(folder)


def test_pickled_weights_come_with_the_way_to_convert(folder):
    rename_weights(folder, ".safetensors", ".bin")
    with pytest.raises(UserError, match=r"Only .* safetensors .*use_safetensors=False\)\.save_pre"):
        check(folder)


def test_split_weights_are_told_apart_from_missing_ones(folder):
    name = "diffusion_pytorch_model-00001-of-00002.safetensors"
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / name)
    with pytest.raises(UserError, match=r"weights are split: .*max_shard_size"):
        check(folder)


def test_git_lfs_pointer_is_not_taken_for_weights(folder):
    (folder / "unet" / WEIGHTS).write_text("version https://git-lfs/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"not a whole safetensors file .*git lfs pull"):
        check(folder)


def test_truncated_weights_are_found(folder):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        check(folder)


def test_broken_json_is_named(folder):
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index.json cannot be read as JSON"):
        check(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"must hold a JSON object; got list"):
        check(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_encoder_2": [None, None]}, "names no text_encoder_2; a StableDiffusionXLPipeline"),
        ({"tokenizer_2": [None, None]}, "names no tokenizer_2"),
        (
            {"text_encoder": [None, None], "tokenizer": [None, None]},
            r"names no text_encoder; .*may be a refiner",
        ),
        (
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "text_encoder_2 is a CLIPTextModel; .* with CLIPTextModelWithProjection",
        ),
    ],
)
def test_sdxl_needs_both_text_encoders(xl, values, message):
    edit(xl / "model_index.json", **values)
    with pytest.raises(UserError, match=message):
        check(xl)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("text_encoder_2", r"no text_encoder_2/config.json \(and there is no such folder\)"),
        ("text_encoder_2/model.safetensors", r"expected text_encoder_2/model\.safetensors"),
        ("tokenizer_2/tokenizer_config.json", "no tokenizer_2/tokenizer_config.json"),
    ],
)
def test_missing_parts_of_sdxl_are_named(xl, missing, message):
    path = xl / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message):
        check(xl)


def test_a_unet_that_is_told_something_else_is_refused(folder, xl):
    """A refiner's is told 5 numbers: a score in place of a size."""
    edit(xl / "unet" / "config.json", projection_class_embeddings_input_dim=XL_POOLED + 5 * XL_TIME)
    with pytest.raises(UserError, match=rf"width {XL_POOLED + 5 * XL_TIME}; .* XL, with {68}"):
        check(xl)
    edit(folder / "unet" / "config.json", addition_embed_type="text")
    with pytest.raises(UserError, match=r"addition_embed_type text of .* 2\.x, with None"):
        check(folder)


def test_latents_that_are_normalized_otherwise_are_refused(xl):
    edit(xl / "vae" / "config.json", latents_mean=[0.0] * 4)
    with pytest.raises(UserError, match="config has latents_mean"):
        check(xl)


def test_another_vae_is_checked_before_anything_is_loaded(folder, xl, tmp_path):
    def check_with(vae):
        check(folder, pretrained_vae_model_name_or_path=str(vae))

    check_with(xl / "vae")
    check_with("name/of-a-vae")
    with pytest.raises(
        UserError, match=r"There is no folder \./nowhere\. Expected the folder of a"
    ):
        check_with("./nowhere")
    with pytest.raises(UserError, match=r"AutoencoderKL\.from_single_file\('vae\.safetensors'\)"):
        check_with("vae.safetensors")
    with pytest.raises(UserError, match=r"expected config\.json and .* found model_index\.json"):
        check_with(xl)
    with pytest.raises(UserError, match="is a UNet2DConditionModel; supported is AutoencoderKL"):
        check_with(xl / "unet")
    edit(xl / "vae" / "config.json", latent_channels=16)
    config = ModelConfig(
        pretrained_model_name_or_path=str(folder),
        pretrained_vae_model_name_or_path=str(xl / "vae"),
    )
    with pytest.raises(UserError, match="takes 4 channels, its VAE makes 16"):
        find_vae(config, folder, None)
    (xl / "vae" / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        check_with(xl / "vae")
    (xl / "vae" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"expected config.json and {WEIGHTS}"):
        check_with(xl / "vae")


def test_inpainting_unet_of_sdxl_is_refused(xl):
    edit(xl / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="takes 9 channels, its VAE makes 4"):
        check(xl)


def test_inpainting_unet_is_refused(folder):
    edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="takes 9 channels, its VAE makes 4"):
        check(folder)


def test_prediction_type_of_the_scheduler(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match="'sample'; supported are epsilon and v_prediction"):
        check(folder)
    check(folder, prediction_type="epsilon")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "There is no folder"),
        ("/missing", "There is no folder"),
        ("~/missing", "There is no folder"),
        ("runs/sd/missing", "There is no folder"),
        ("runs\\missing", "There is no folder"),
        ("missing.safetensors", r"no such file exists\. .*from_single_file\('missing.safetensors'"),
        ("missing.ckpt", "from_single_file"),
        ("not a name!", "neither a folder here nor a valid model id"),
    ],
)
def test_names_that_are_no_model(name, message):
    with pytest.raises(UserError, match=message):
        check(name)


def test_a_lora_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    advice = f"is a LoRA .*the model it was trained on, .*evaluation --lora_weights {tmp_path}"
    with pytest.raises(UserError, match=advice):
        check(tmp_path)


def test_a_single_file_and_a_folder_of_one_come_with_the_way_to_convert(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"is a single file\. .*from_single_file"):
        check(file)
    with pytest.raises(UserError, match=r"no pipeline folder: .*found model.ckpt.*single_file\('"):
        check(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"found nothing\. Give a folder"):
        check(tmp_path)


def test_hub_ids_wait_for_loading():
    check("stabilityai/stable-diffusion-2-1")


def test_download_takes_one_variant_of_the_weights_and_no_pickles():
    repository = [
        "model_index.json",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/config.json",
        *(
            f"unet/diffusion_pytorch_model{v}"
            for v in (".safetensors", ".fp16.safetensors", ".bin")
        ),
        *(f"text_encoder/{v}" for v in ("model.safetensors", "model.fp16.safetensors", "x.bin")),
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        *(f"text_encoder_2/{v}" for v in ("model.safetensors", "model.fp16.safetensors")),
        "tokenizer_2/merges.txt",
        "README.md",
    ]

    def taken(variant):
        patterns = download_patterns(variant)
        return {f for f in repository if any(fnmatch(f, pattern) for pattern in patterns)}

    small = {
        "model_index.json",
        "unet/config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_2/merges.txt",
    }
    plain = {"unet/diffusion_pytorch_model.safetensors"}
    plain |= {f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")}
    half = {os.path.splitext(name)[0] + ".fp16.safetensors" for name in plain}
    assert taken(None) == small | plain
    assert taken("fp16") == small | half
