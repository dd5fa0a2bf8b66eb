"""The model card is read by the Hub's own code, and says nothing of this machine."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from iet_sd.arguments import from_layers, load
from iet_sd.engine.rounds import RoundDone, ShardDone
from iet_sd.engine.step import Counts
from iet_sd.engine.tracking import round_line, table
from iet_sd.hub.card import plain, refresh_card, write_card, write_settings
from iet_sd.hub.contents import GRID, SETTINGS, contents, is_evaluated
from iet_sd.presets import METHODS


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
        write_card(tmp_path / "result", config(**given), 123, ROUNDS)
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


def test_each_method_is_said_in_words(card):
    said = {re.search(r"Method: (.+)\.", card(method=method).text)[1] for method in METHODS}
    assert len(said) == len(METHODS)


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


@pytest.mark.parametrize(
    "prompt", ["a photo, " * 40 + "85mm, f/1.8", "~nobody of this name/x", "zero \0 / byte"]
)
def test_a_prompt_is_no_place(prompt, config, tmp_path):
    """However long, and whatever it begins with."""
    folder = tmp_path / "result"
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    write_settings(folder, config(validation_prompts=(prompt,)))
    settings = yaml.safe_load(contents(folder, "me/cats")[SETTINGS])
    assert settings["validation_prompts"] == [prompt]
    assert settings["train_data_dir"] == "pictures"


def test_a_path_keeps_its_last_name_wherever_it_leads_from_here(config, tmp_path, evaluated):
    """As when push runs in another folder than training, or the data have moved."""
    folder, report = evaluated
    given = {
        "pretrained_model_name_or_path": "../clients/acme/base",
        "pretrained_vae_model_name_or_path": "me/vae",
        "train_data_dir": "acme/photos/",
        "heldout_data_dir": r"D:\acme\others",
        "cache_dir": "~acme/cache",
        "output_dir": "acme/result",
        "logging_dir": "acme/logs",
        "eval_embedder": "sscd_disc_mixup=clients/acme/sscd.pt",
        "validation_prompts": ("half / half",),
    }
    write_settings(folder, config(**given))
    path = report("2026-01-01")
    content = json.loads(path.read_text())
    content["settings"] = {"lora_weights": "./acme/lora.safetensors", "clip_score": "open/clip"}
    content["settings"] |= {"embedders": ["clip=acme/models/clip", "python=a.b:c"]}
    content["command"] = "evaluate --config acme/e.yaml --lora_weights ./acme/lora.safetensors"
    path.write_text(json.dumps(content))
    files = contents(folder, "me/cats")
    assert not [n for n, what in files.items() if isinstance(what, bytes) and b"acme" in what]
    settings = yaml.safe_load(files[SETTINGS])
    kept = ("base", "me/vae", "photos", "others", "cache", "result", "logs")
    assert tuple(settings[name] for name in list(given)[:7]) == kept
    assert settings["eval_embedder"] == "sscd_disc_mixup=sscd.pt"
    assert settings["validation_prompts"] == ["half / half"]
    settings = json.loads(files["evaluation/report.json"])["settings"]
    assert settings["clip_score"] == "open/clip"
    assert settings["embedders"] == ["clip=clip", "python=a.b:c"]


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
    assert "| shards, rounds | 8, 2 of 25, training goes on |" in text
    assert "| trained | all of the UNet |" in text
    assert "| data | some/pictures, 123 images at 256 px |" in text
    assert "| optimizer updates | 9 over all proxies, batch size 4, learning rate 2.5e-06 |" in text
    assert "| samples | 29 trained, 7 of 36 skipped |" in text
    assert "| seed | 7 |" in text


def test_a_round_that_is_not_the_last_says_so(card):
    assert "| shards, rounds | 4, 2 of 3, training goes on |" in card(num_rounds=3).text
    assert "| shards, rounds | 4, 2 |" in card(num_rounds=2).text


def test_what_is_on_the_hub_is_linked(card):
    data = card(
        pretrained_model_name_or_path="some/model", dataset_name="some/data", train_data_dir=None
    ).data
    assert data.base_model_relation == "finetune"
    assert data.datasets == ["some/data"]
    assert "license" not in data.to_dict()
    assert card().data.to_dict().keys().isdisjoint({"datasets", "base_model_relation", "license"})


NASTY = [
    "a | b",
    "two\nlines\n\n# and a heading",
    "<script>alert(1)</script>",
    "<!-- iet_sd: end of evaluation -->",
    "![x](http://x.invalid/x.png) [y](z)",
    "1. not a list",
    "- not a list",
    "# no heading",
    "`code` *bold* __bold__ ~~gone~~ \\| \\",
    "> no quote & amp; &lt;",
    "--- ",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_is_shown_as_it_is(text):
    """By a Markdown reader of another's: in a list and in a table, one item of plain text."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = " ".join(text.split())
    for page, kind in (
        (f"- {plain(text)}\n- next", "list_item_open"),
        (f"| a | b |\n|---|---|\n| {plain(text)} | next |", "td_open"),
    ):
        tokens = markdown.parse(page)
        assert sum(token.type == kind for token in tokens) == 2
        inline = [t for t in tokens if t.type == "inline"][-2]
        assert {child.type for child in inline.children} <= {"text", "text_special"}
        assert "".join(child.content for child in inline.children) == shown


def test_prompts_and_names_cannot_break_the_card(card, tmp_path):
    (tmp_path / "result" / GRID).write_bytes(b"")
    text = card(validation_prompts=tuple(NASTY), dataset_name="a|b<i>", train_data_dir=None).text
    assert "<script>" not in text
    assert "| data | a\\|b&lt;i&gt;, 123 images at 512 px |" in text
    assert text.count("<!-- iet_sd: end of evaluation -->") == 1
    assert text.count("\n## ") == 2


@pytest.fixture
def evaluated(card, tmp_path):
    """A result with its card, to which an evaluation of a given date is added."""
    folder = tmp_path / "result"
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")

    def measure(name, value, low, high, headline=True):
        return {
            "name": name,
            "label": name.title(),
            "value": value,
            "low": low,
            "high": high,
            "level": None if low is None else 0.9,
            "embedder": "pixels",
            "headline": headline,
        }

    def make(created, value=0.25):
        report = {
            "created": created,
            "verdict": "It copies.",
            "seed": 3,
            "settings": {"train_data_dir": str(tmp_path / "pictures")},
            "model": {"name": str(folder)},
            "data": {
                "train": {"count": 1234},
                "heldout": {"count": 56},
                "prompts": 7,
                "images_per_prompt": 2,
            },
            "measures": [
                measure("excess", value, 0.125, 0.375),
                measure("kid", None, None, None),
                measure("other", 1.0, None, None, headline=False),
            ],
        }
        path = folder / "evaluation" / "report.json"
        path.write_text(json.dumps(report), encoding="utf-8")
        return path

    return folder, make


def test_an_evaluation_is_told_in_the_card_and_nothing_else_changes(card, evaluated):
    folder, report = evaluated
    before = card().content + "\nMy own words.\n"
    (folder / "README.md").write_text(before, encoding="utf-8")
    assert "has not been measured" in before
    assert refresh_card(folder, report("2026-01-01"))
    after = (folder / "README.md").read_text(encoding="utf-8")
    assert "has not been measured" not in after
    assert "It copies.\n\n| measure | value | interval, 90% |\n|---|---|---|\n" in after
    assert "| Excess (pixels) | 0.25 | 0.12 to 0.38 |\n| Kid (pixels) | – |  |\n\n" in after
    assert "Other" not in after
    assert "7 prompts, 2 image(s) each, seed 3; 1,234 training images, 56 held-out" in after

    def others(text):
        begin, end = text.index("<!-- iet_sd: evaluation"), text.index("<!-- iet_sd: end")
        return text[:begin], text[end:]

    assert others(after) == others(before)
    refresh_card(folder, report("2026-01-02", 0.3))
    again = (folder / "README.md").read_text(encoding="utf-8")
    assert "| 0.30 |" in again
    assert "2026-01-01" not in again
    assert others(again) == others(before)


def test_a_card_that_is_not_ours_stays_as_it_is(evaluated):
    folder, report = evaluated
    (folder / "README.md").write_text("# Mine\n", encoding="utf-8")
    assert not refresh_card(folder, report("2026-01-01"))
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Mine\n"
    assert is_evaluated(folder)
    (folder / "README.md").unlink()
    assert not refresh_card(folder, report("2026-01-01"))
    assert not (folder / "README.md").exists()


def test_an_evaluation_of_other_weights_is_neither_told_nor_pushed(card, evaluated):
    folder, report = evaluated
    report("2026-01-01")
    assert "has not been measured" in card().text, "it was there before these weights"
    assert not is_evaluated(folder)
    assert "evaluation/report.json" not in contents(folder, "me/cats")
    refresh_card(folder, report("2026-01-02"))
    assert is_evaluated(folder)
    assert "evaluation/report.json" in contents(folder, "me/cats")


def test_plain_fine_tuning_does_not_claim_the_method(card):
    assert "memoriz" in card().text
    text = card(method="none").text
    assert "plain fine-tuning" in text
    assert "memoriz" not in text.partition("<!--")[0]
    assert "2502.09434" not in text


@pytest.mark.parametrize("given", MODES, ids=["full", "lora"])
def test_use_is_valid_python_for_the_kind_of_result(card, given):
    text = card(pretrained_model_name_or_path="some/model", **given).text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert ('load_lora_weights("path/to/this/folder")' in code) == ("train_mode" in given)
    assert ('from_pretrained("some/model")' in code) == ("train_mode" in given)


@pytest.mark.parametrize("given", MODES, ids=["full", "lora"])
def test_use_of_a_local_base_has_a_stand_in_for_its_place(card, given):
    code = card(**given).text.split("```python\n")[1].split("```")[0]
    expected = "path/to/the/base/model" if given else "path/to/this/folder"
    assert f'from_pretrained("{expected}")' in code


def test_pictures_are_shown_where_there_are_some(card, tmp_path):
    assert GRID not in card(validation_prompts=("a cat",)).content
    # A picture that an earlier run left in the folder is not this run's.
    (tmp_path / "result" / GRID).write_bytes(b"")
    assert GRID not in card().content
    assert f"]({GRID})\n\n- a cat\n" in card(validation_prompts=("a cat",)).content


@pytest.mark.parametrize("given", [*MODES, {"validation_prompts": ("ein Kätzchen", "no")}], ids=str)
def test_settings_load_again(config, given, tmp_path):
    config = config(**given, mixed_precision="no")
    write_settings(tmp_path / "result", config)
    path = tmp_path / "result" / SETTINGS
    assert from_layers(yaml.safe_load(path.read_text(encoding="utf-8"))) == from_layers(
        config.as_dict()
    )
    assert load(["--config", str(path)]) == config
