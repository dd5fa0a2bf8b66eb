import json
import os
import shutil
from fnmatch import fnmatch

import pytest

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.layout import download_patterns
from iet_sd.models.loading import check_model
from tests.pipelines import tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def check(folder, **settings):
    check_model(ModelConfig(pretrained_model_name_or_path=str(folder), **settings))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_weights(folder, old, new):
    for path in folder.rglob(f"*{old}"):
        path.rename(path.with_name(path.name.replace(old, new)))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_whole_pipelines_pass(tmp_path, kind):
    check(tiny_pipeline(tmp_path, kind=kind))


def test_variant_is_honoured_both_ways(folder):
    with pytest.raises(
        UserError, match=r"expected text_encoder/model\.fp16\.s.* Give no --variant\."
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
            {"_class_name": "StableDiffusionXLPipeline"},
            r"StableDiffusionXLPipeline; .* 1.x and 2.x",
        ),
        ({"_class_name": "FluxPipeline"}, "FluxPipeline; supported"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is a T5EncoderModel"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is a UNet3DConditionModel"),
        ({"vae": [None, None]}, "names no vae"),
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
    }
    plain = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    half = {os.path.splitext(name)[0] + ".fp16.safetensors" for name in plain}
    assert taken(None) == small | plain
    assert taken("fp16") == small | half
