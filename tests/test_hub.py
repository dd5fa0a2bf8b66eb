"""The model card is read by the Hub's own code, and says nothing of this machine."""

import pytest
import yaml
from huggingface_hub import ModelCard

from iet_sd import hub
from iet_sd.arguments import from_layers, load
from iet_sd.engine.rounds import RoundDone, ShardDone
from iet_sd.engine.step import Counts
from iet_sd.engine.tracking import round_line, table


def line(number, **counts):
    """The line of a round of one shard."""
    shard = ShardDone(number, 0, 10, Counts(**counts), 1e-4, 1.0, 1)
    return round_line(RoundDone(number, [shard], True, [3], None, 2.5))


ROUNDS = [
    line(1, updates=5, scored=20, trained=14, skipped=6),
    line(2, updates=4, scored=16, trained=15, skipped=1),
]


@pytest.fixture
def config(tmp_path):
    """Settings of a run on local files, all of them under ``tmp_path``."""
    for name in ("base", "pictures", "result"):
        (tmp_path / name).mkdir()
    local = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "train_data_dir": str(tmp_path / "pictures"),
        "output_dir": str(tmp_path / "result"),
        "cache_dir": str(tmp_path / "cache"),
        "seed": 7,
    }
    return lambda **given: from_layers(local, given)


@pytest.fixture
def card(config, tmp_path):
    """The card of a run, written and loaded again."""

    def make(**given):
        hub.write_card(tmp_path / "result", config(**given), 123, ROUNDS)
        return ModelCard.load(tmp_path / "result" / "README.md")

    return make


MODES = [{}, {"train_mode": "lora", "rank": 8}]


@pytest.mark.parametrize("given", MODES, ids=["full", "lora"])
def test_metadata(card, given):
    data = card(pretrained_model_name_or_path="some/model", **given).data
    assert data.base_model == "some/model"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert {"stable-diffusion", "text-to-image", "diffusers", "iet-agc"} <= set(data.tags)
    assert ("lora" in data.tags) == ("train_mode" in given)


def test_the_rounds_are_shown(card):
    assert table(ROUNDS) in card().text
    assert "    2  0.000     6.2%" in table(ROUNDS)


@pytest.mark.parametrize("given", MODES, ids=["full", "lora"])
def test_nothing_of_this_machine(card, given, tmp_path, monkeypatch):
    found = card(**given)
    text = (tmp_path / "result" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    # A local folder is no model of the Hub, so the metadata must not call it the base.
    assert "base_model" not in found.data.to_dict()
    assert "# result" in found.text
    assert "fine-tuned from base" in found.text
    assert "pictures, 123 images at 512 px" in found.text
    monkeypatch.setenv("HOME", str(tmp_path))
    home = card(pretrained_model_name_or_path="~/base", train_data_dir="~/pictures", **given)
    assert home.text == found.text
    assert home.data.to_dict() == found.data.to_dict()


def test_a_relative_folder_is_called_by_its_own_name(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "result")
    assert "# result" in card(output_dir=".").text
    assert "fine-tuned from base" in card(pretrained_model_name_or_path="../base").text


def test_method_settings_and_data_are_told(card):
    text = card(
        method="iet_agc",
        preset="paper",
        num_shards=8,
        num_rounds=25,
        dataset_name="some/pictures",
        train_data_dir=None,
        train_batch_size=4,
        learning_rate=2.5e-6,
        resolution=256,
    ).text
    assert "| method | `iet_agc`, preset `paper` |" in text
    assert "| shards, rounds | 8, 25 |" in text
    assert "| trained | all of the UNet |" in text
    assert "| data | some/pictures, 123 images at 256 px |" in text
    assert "| optimizer updates | 9 over all proxies, batch size 4, learning rate 2.5e-06 |" in text
    assert "| samples | 29 trained, 7 of 36 skipped |" in text
    assert "| seed | 7 |" in text


def test_plain_fine_tuning_does_not_claim_the_method(card):
    assert "memoriz" in card().text
    plain = card(method="none").text
    assert "plain fine-tuning" in plain
    assert "memoriz" not in plain
    assert "2502.09434" not in plain


@pytest.mark.parametrize("given", MODES, ids=["full", "lora"])
def test_use_is_valid_python_for_the_kind_of_result(card, given):
    text = card(pretrained_model_name_or_path="some/model", **given).text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert ('load_lora_weights("path/to/this/folder")' in code) == ("train_mode" in given)
    assert ('from_pretrained("some/model")' in code) == ("train_mode" in given)


def test_pictures_are_shown_where_there_are_some(card, tmp_path):
    # A picture that an earlier run left in the folder is not this run's.
    (tmp_path / "result" / hub.GRID).write_bytes(b"")
    assert hub.GRID not in card().content
    assert f"]({hub.GRID})" in card(validation_prompts=("a cat",)).content


@pytest.mark.parametrize("given", [*MODES, {"validation_prompts": ("ein Kätzchen", "no")}], ids=str)
def test_settings_load_again(config, given, tmp_path):
    config = config(**given, mixed_precision="no")
    hub.write_settings(tmp_path / "result", config)
    path = tmp_path / "result" / hub.SETTINGS
    assert from_layers(yaml.safe_load(path.read_text(encoding="utf-8"))) == from_layers(
        config.as_dict()
    )
    assert load(["--config", str(path)]) == config
