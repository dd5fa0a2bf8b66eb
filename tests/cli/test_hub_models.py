"""A model on the Hub: what is asked for of it, and what is said where that is not there."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi

from iet_sd.cli.train import train
from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.finding import find_folder

WEIGHTS = "unet/diffusion_pytorch_model"


def put(hub, name, files):
    """A public repository of these files, by name."""
    hub.commits[name], hub.private[name] = [files], False


def files_of(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def find(hub, tmp_path):
    """What a run does before it loads weights, or before it even has them."""

    def found(name, weights=True, **given):
        config = ModelConfig(pretrained_model_name_or_path=name, **given)
        return find_folder(config, str(tmp_path / "cache"), weights)

    return found


def test_a_pipeline_is_found_whole(hub, find, pipelines):
    put(hub, "me/sd1", files_of(pipelines["sd1"]) | {"old.ckpt": b"x"})
    assert not (find("me/sd1", weights=False) / f"{WEIGHTS}.safetensors").exists()
    folder = find("me/sd1")
    assert (folder / f"{WEIGHTS}.safetensors").is_file()
    assert not (folder / "old.ckpt").exists()


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_lora_weights.safetensors", r"me/it is a LoRA .* --lora_weights me/it\."),
        ("v1-5.safetensors", r"found README.md, v1-5.safetensors\. .*from_single_file\('v1-5\.saf"),
        ("notes.txt", r"expected model_index.json in it, found README.md, notes.txt\. Give a fol"),
    ],
)
def test_a_repository_without_a_pipeline_is_called_what_it_is(hub, find, weights, file, said):
    """Nothing of it is what was asked for, so there is not even a folder."""
    put(hub, "me/it", {"README.md": b"x", file: b"x"})
    with pytest.raises(UserError, match=said):
        find("me/it", weights)


def test_weights_of_another_variant_or_split_are_told_from_none(hub, find, pipelines, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd1"])
    pipeline.save_pretrained(tmp_path / "split", max_shard_size="100KB")
    put(hub, "me/split", files_of(tmp_path / "split"))
    with pytest.raises(UserError, match=r"Its weights are split: save it again with max_shard"):
        find("me/split")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    put(hub, "me/fp16", files_of(tmp_path / "fp16"))
    with pytest.raises(UserError, match=r"found config.json, .*Give --variant fp16\."):
        find("me/fp16")
    assert find("me/fp16", variant="fp16")
    bins = {n.replace(".safetensors", ".bin"): b"x" for n in files_of(tmp_path / "fp16")}
    put(hub, "me/bin", bins | files_of_texts(tmp_path / "fp16"))
    with pytest.raises(UserError, match=r"me/bin', use_safetensors=False\).*max_shard_size="):
        find("me/bin")


def files_of_texts(folder):
    return {name: text for name, text in files_of(folder).items() if "safetensors" not in name}


def test_where_the_hub_does_not_list_it_what_came_is_told(hub, find, pipelines, monkeypatch):
    files = files_of(pipelines["sd1"])
    put(hub, "me/sd1", {name: f for name, f in files.items() if not name.startswith(WEIGHTS)})
    monkeypatch.setattr(HfApi, "list_repo_files", raises)
    with pytest.raises(UserError, match=r"expected unet/.*safetensors, found config.json\. "):
        find("me/sd1")


def raises(*_, **__):
    raise ConnectionError


def test_a_part_that_has_no_variant_is_told_how_to_get_one(pipelines, tmp_path):
    folder = tmp_path / "mixed"
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd1"])
    pipeline.save_pretrained(folder, variant="fp16")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    (folder / "text_encoder" / "model.fp16.safetensors").unlink()
    config = ModelConfig(pretrained_model_name_or_path=str(folder), variant="fp16")
    with pytest.raises(UserError, match=r"copy model.safetensors to that name\."):
        find_folder(config, None)
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    assert find_folder(config, None) == folder


def test_a_folder_here_has_no_revision(pipelines):
    config = ModelConfig(pretrained_model_name_or_path=str(pipelines["sd1"]), revision="fp16")
    with pytest.raises(UserError, match=r"--revision names a revision on the Hub, and .*folder"):
        find_folder(config, None)


def test_a_model_that_is_not_there_is_told_before_the_data_are_loaded(
    hub, argv, capsys, monkeypatch
):
    loaded = []
    monkeypatch.setattr("iet_sd.data.sources.load_source", loaded.append)
    assert train(argv(pretrained_model_name_or_path="me/nothing")) == 2
    assert "me/nothing is neither a folder here nor a model on the Hub" in capsys.readouterr().err
    assert not loaded
