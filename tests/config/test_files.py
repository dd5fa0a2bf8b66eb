"""Files of settings: those in configs, as people write them, and what is wrong with some."""

import pytest
import yaml

from iet_sd.arguments import from_layers, load
from iet_sd.config import Config, EvaluateSettings
from iet_sd.errors import UserError
from tests.config.needed import FLAGS, NEEDED
from tests.launching import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_file(path):
    """It parses, and opens with a comment that holds the command to run it."""
    evaluates = path.stem.endswith("_evaluation")
    command = "python -m iet_sd evaluate" if evaluates else "train_iet_sd.py"
    load(["--config", str(path)], EvaluateSettings if evaluates else Config)
    text = path.read_text(encoding="utf-8")
    comment = text[: next(i for i, line in _lines(text) if not line.startswith("#"))]
    assert f"{command} --config configs/{path.name}" in comment


def _lines(text):
    """Each line with where it begins."""
    begin = 0
    for line in text.splitlines(keepends=True):
        yield begin, line
        begin += len(line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agc_treshold: 0.5", "unknown key 'agc_treshold'. Did you mean agc_threshold"),
        ("zzz: 1", "unknown key 'zzz'. See --help"),
        ("num_shards: four", "num_shards must be a whole number; got 'four'"),
        ("num_shards: 2.0", "num_shards must be a whole number; got 2.0"),
        ("num_shards: true", "num_shards must be a whole number; got True"),
        ("num_shards:", "num_shards must be a whole number; got None"),
        ("learning_rate: fast", "learning_rate must be a number; got 'fast'"),
        ("learning_rate: true", "learning_rate must be a number; got True"),
        ("learning_rate: [1]", "learning_rate must be a number; got [1]"),
        ("random_flip: 1", "random_flip must be true or false; got 1"),
        ("output_dir: [a, b]", "output_dir must be a text; got ['a', 'b']"),
        ("revision: 2", "revision must be a text; got 2"),
        ("validation_prompts: a cat", "validation_prompts must be a list of texts; got 'a cat'"),
        ("validation_prompts: [a, 1]", "validation_prompts must be a list of texts"),
        ("preset: papers", "preset must be one of corrected, strict, paper; got 'papers'"),
        ("cache: yes please", "cache must be one of auto, on, off; got 'yes please'"),
        ("preset: on", "preset must be one of corrected, strict, paper; got True"),
        ("output_dir: ''", "--output_dir is empty"),
        ("report_to: no", "report_to must be one of tensorboard, wandb, comet_ml, all, none"),
        ("- a list", "expected lines of `name: value`"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_file_that_is_wrong(loaded, text, message):
    with pytest.raises(UserError) as error:
        loaded(text)
    assert message in str(error.value)
    assert "settings.yaml" in str(error.value) or message.startswith("--")


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load([*FLAGS, "--config", str(tmp_path / "absent.yaml")])
    (tmp_path / "latin.yaml").write_bytes("output_dir: ä".encode("latin-1"))
    with pytest.raises(UserError, match="not valid YAML"):
        load([*FLAGS, "--config", str(tmp_path / "latin.yaml")])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # a text to YAML, which wants 1.0e-4
        ("max_grad_norm: 2", "max_grad_norm", 2.0),
        ("mixed_precision: no", "mixed_precision", "no"),  # false to YAML
        ("mixed_precision: null", "mixed_precision", None),
        ("cache: off", "cache", "off"),  # false and true to YAML
        ("cache: on", "cache", "on"),
        ("cache: 'auto'", "cache", "auto"),
        ("validation_prompts: [a cat, a dog]", "validation_prompts", ["a cat", "a dog"]),
        ("", "num_shards", 4),
    ],
)
def test_file_as_people_write_it(loaded, text, name, value):
    found = loaded(text)[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"preset": "paper"},
        {"method": "none", "max_train_steps": 9},
        {
            "train_mode": "lora",
            "mixed_precision": "no",
            "learning_rate": 3e-7,
            "steps_per_round": 2,
            "validation_prompts": ("ein Kätzchen: süß", "no", "#1"),
        },
    ],
    ids=str,
)
def test_all_settings_as_a_file_give_the_same_settings(given, tmp_path):
    config = from_layers(NEEDED, given)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config.as_dict(), allow_unicode=True), encoding="utf-8")
    again = load(["--config", str(path)])
    assert again == config
    assert hash(again) == hash(config)
