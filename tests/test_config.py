"""Settings: which layer wins, what is refused, and that the files and the help are in step."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from iet_sd.arguments import build_parser, field_docs, from_layers, load
from iet_sd.cli.train import train
from iet_sd.config import Config, EvaluateSettings
from iet_sd.config.hub import SECRETS
from iet_sd.errors import UserError
from iet_sd.presets import METHODS, PRESETS
from tests.diffusers_flags import FULL, LORA

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NEEDED = {"pretrained_model_name_or_path": "some/model", "train_data_dir": "pictures"}
FLAGS = [part for key, value in NEEDED.items() for part in (f"--{key}", value)]
FIELDS = {f.name: f for cls in Config.sections().values() for f in dataclasses.fields(cls)}

# Those of ours that have their names and defaults, and the targets of the LoRA script's adapter.
# Not here: what must be given, has another default, or is written nowhere.
DIFFUSERS = {
    **{
        name: default
        for name, default in FULL.items()
        if name
        not in {
            "pretrained_model_name_or_path",
            "train_data_dir",
            "tracker_project_name",
            "hub_token",
        }
    },
    **{name: LORA[name] for name in ("num_validation_images", "rank")},
    "lora_target_modules": ["to_k", "to_q", "to_v", "to_out.0"],
}


@pytest.fixture
def loaded(tmp_path):
    """The flat settings of a YAML text and flags."""

    def make(text="", *flags):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return load([*FLAGS, "--config", str(path), *flags]).as_dict()

    return make


def run(*arguments):
    """``train_iet_sd.py`` in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


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


@pytest.mark.parametrize("name", DIFFUSERS)
def test_default_is_that_of_diffusers(name):
    assert from_layers(NEEDED).as_dict()[name] == DIFFUSERS[name]


def test_defaults_in_the_help_are_the_ones_in_force():
    """The defaults of the fields and those that the default method and preset stand for."""
    in_force = from_layers(NEEDED).as_dict()
    for name, field in FIELDS.items():
        if name not in {*NEEDED, *SECRETS}:
            default = field.default
            assert in_force[name] == (list(default) if isinstance(default, tuple) else default)


def test_file_wins_over_default_and_flag_over_file(loaded):
    assert loaded()["num_rounds"] == FIELDS["num_rounds"].default
    assert loaded("num_rounds: 7")["num_rounds"] == 7
    assert loaded("num_rounds: 7", "--num_rounds", "8")["num_rounds"] == 8
    assert loaded("random_flip: true", "--no-random_flip")["random_flip"] is False


def test_preset_flag_replaces_single_values_of_the_file(loaded):
    found = loaded("bank_bins: 7\nnum_rounds: 3", "--preset", "paper")
    assert found["bank_bins"] == PRESETS["paper"]["bank_bins"]
    assert found["num_rounds"] == 3


def test_single_flag_replaces_one_value_of_the_preset_in_the_file(loaded):
    found = loaded("preset: paper", "--bank_bins", "7", "--method", "iet_agc")
    assert {name: found[name] for name in PRESETS["paper"]} == PRESETS["paper"] | {"bank_bins": 7}


@pytest.mark.parametrize("flags", [["--preset", "paper"], ["--preset", "paper", "--no-taa"]])
def test_the_paper_steps_after_an_empty_batch_unless_there_is_taa(loaded, flags):
    """Whichever of file and flags says what; `--method iet_agc` has no TAA."""
    without = "--no-taa" in flags
    assert loaded("", *flags)["empty_batch"] == ("step" if without else "skip")
    assert loaded("method: iet_agc", *flags)["empty_batch"] == "step"
    assert loaded("method: iet_agc\ntaa: true", *flags)["empty_batch"] == (
        "step" if without else "skip"
    )
    assert loaded("empty_batch: step\ntaa: false")["empty_batch"] == "step"


def test_presets_say_the_same_things_so_that_one_replaces_another_whole(loaded):
    names = set(PRESETS["paper"])
    assert all(set(preset) == names for preset in PRESETS.values())
    corrected, strict = PRESETS["corrected"], PRESETS["strict"]
    assert {n for n in names if corrected[n] != strict[n]} == {"agc_threshold"}
    found = loaded("preset: paper", "--preset", "strict")
    assert {n: found[n] for n in names - {"empty_batch"}} == {
        n: strict[n] for n in names - {"empty_batch"}
    }


def test_what_is_written_beside_a_preset_wins(loaded):
    assert loaded("bank_bins: 7\npreset: paper")["bank_bins"] == 7
    assert loaded("", "--bank_bins", "7", "--preset", "paper")["bank_bins"] == 7


def test_method_flag_replaces_single_values_of_the_file(loaded):
    found = loaded("num_shards: 8", "--method", "none")
    assert {name: found[name] for name in METHODS["none"]} == METHODS["none"]


def test_the_winner_of_the_study_is_a_method_and_a_preset(loaded):
    """What makes it, in two words; its cells besides let no augmented image wait."""
    found = loaded("", "--method", "agc_taa", "--preset", "strict")
    wanted = loaded(
        *("", "--num_shards", "1", "--no-msr", "--aggregate_every", "1"),
        *("--taa_operations", "gentle", "--agc_threshold", "0.9"),
    )
    names = {"method", "preset"}
    assert {n: v for n, v in found.items() if n not in names} == {
        n: v for n, v in wanted.items() if n not in names
    }


@pytest.mark.parametrize("method", ["iet_agc_plus", "iet_agc", "agc_taa", "iet"])
def test_nothing_remains_of_the_method_in_the_file(loaded, method):
    """Not even what the new method does not speak of: the one shard of method none."""
    assert loaded("method: none", "--method", method) == loaded("", "--method", method)


def test_what_the_file_says_itself_remains_under_another_method(loaded):
    assert loaded("method: none\nnum_shards: 1", "--method", "iet")["num_shards"] == 1
    assert loaded("method: iet\nnum_shards: 8", "--method", "iet_agc")["num_shards"] == 8


def test_length_flag_replaces_the_other_kind_of_length_in_the_file(loaded):
    found = loaded("max_train_steps: 100", "--steps_per_round", "5")
    assert (found["steps_per_round"], found["max_train_steps"]) == (5, None)
    found = loaded("steps_per_round: 5", "--max_train_steps", "100")
    assert (found["steps_per_round"], found["max_train_steps"]) == (None, 100)


def test_data_flag_replaces_the_other_kind_of_data_in_the_file():
    config = from_layers(NEEDED, {"dataset_name": "some/pictures"})
    assert (config.data.dataset_name, config.data.train_data_dir) == ("some/pictures", None)


def test_switching_parts_off(loaded):
    found = loaded("", "--no-agc", "--no-taa", "--no-msr")
    assert not found["agc"]
    assert not found["taa"]
    assert not found["msr"]
    assert found["num_shards"] == 4


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
        ("report_to: no", "report_to must be one of tensorboard, wandb, comet_ml, all, none"),
        ("- a list", "expected lines of `name: value`"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_file_that_is_wrong(loaded, text, message):
    with pytest.raises(UserError) as error:
        loaded(text)
    assert message in str(error.value)
    assert "settings.yaml" in str(error.value)


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
        ("validation_prompts: [a cat, a dog]", "validation_prompts", ["a cat", "a dog"]),
        ("", "num_shards", 4),
    ],
)
def test_file_as_people_write_it(loaded, text, name, value):
    found = loaded(text)[name]
    assert found == value
    assert type(found) is type(value)


MISTAKES = [
    ({"rank": 0}, "--rank must be above 0; got 0"),
    ({"lora_dropout": 1.0}, "--lora_dropout"),
    ({"lora_dropout": -0.1}, "--lora_dropout"),
    ({"lora_alpha": 0.0}, "--lora_alpha"),
    ({"lora_target_modules": ()}, "--lora_target_modules"),
    ({"resolution": 0}, "--resolution must be above 0"),
    ({"resolution": 100}, "--resolution must be a multiple of 8; got 100"),
    ({"train_batch_size": 0}, "--train_batch_size"),
    ({"dataloader_num_workers": -1}, "--dataloader_num_workers"),
    ({"max_train_samples": 0}, "--max_train_samples"),
    ({"dataset_name": "some/pictures", "train_data_dir": "pictures"}, "data once"),
    ({"dataset_name": None, "train_data_dir": None}, "data once"),
    ({"num_shards": 0}, "--num_shards"),
    ({"num_rounds": 0}, "--num_rounds"),
    ({"bank_bins": 0}, "--bank_bins"),
    ({"bank_bins": 1001}, "--bank_bins must be at most 1000"),
    ({"aggregate_every": 0}, "--aggregate_every"),
    ({"msr_every": 0}, "--msr_every"),
    ({"taa_num_ops": 0}, "--taa_num_ops"),
    ({"agc_threshold": -0.1}, "--agc_threshold"),
    ({"taa_sharpness": -1.0}, "--taa_sharpness"),
    ({"taa_magnitude": -1.0}, "--taa_magnitude"),
    ({"taa_magnitude": 31.0}, "--taa_magnitude must be at most 30"),
    ({"taa_min_strength": -0.1}, "--taa_min_strength"),
    ({"msr_min_skips": -1}, "--msr_min_skips"),
    ({"steps_per_round": 0}, "--steps_per_round"),
    ({"bank_decay": 1.0}, "--bank_decay must lie in [0, 1)"),
    ({"bank_decay": -0.1}, "--bank_decay must lie in [0, 1)"),
    ({"msr_fraction": 1.0}, "--msr_fraction must lie in [0, 1)"),
    ({"agc": False, "msr": False}, "--taa needs --agc"),
    ({"empty_batch": "step"}, "--empty_batch step is a rule of AGC without TAA"),
    ({"outer_learning_rate": 0.0}, "--outer_learning_rate must be above 0"),
    ({"outer_momentum": 1.0}, "--outer_momentum must lie in [0, 1)"),
    ({"outer_momentum": -0.1}, "--outer_momentum must lie in [0, 1)"),
    ({"agc": False, "taa": False}, "--msr needs --agc"),
    ({"num_shards": 1}, "--num_shards is 1"),
    ({"method": "none", "num_shards": 2}, "--method none is plain"),
    ({"method": "none", "agc": True}, "--method none is plain"),
    ({"method": "none", "msr": True}, "--method none is plain"),
    ({"method": "none", "taa": True}, "--method none is plain"),
    ({"num_train_epochs": 0}, "--num_train_epochs"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps"),
    ({"num_validation_images": 0}, "--num_validation_images"),
    ({"validation_inference_steps": 0}, "--validation_inference_steps"),
    ({"ddp_timeout": 0}, "--ddp_timeout"),
    ({"learning_rate": 0.0}, "--learning_rate"),
    ({"learning_rate": float("nan")}, "--learning_rate"),
    ({"max_grad_norm": 0.0}, "--max_grad_norm"),
    ({"lr_warmup_steps": -1}, "--lr_warmup_steps"),
    ({"adam_weight_decay": -1.0}, "--adam_weight_decay"),
    ({"adam_beta1": 1.0}, "--adam_beta1"),
    ({"adam_beta2": -0.1}, "--adam_beta2"),
    ({"adam_epsilon": -1.0}, "--adam_epsilon"),
    ({"noise_offset": -1.0}, "--noise_offset"),
    ({"checkpointing_rounds": -1}, "--checkpointing_rounds"),
    ({"max_train_steps": 0}, "--max_train_steps"),
    ({"snr_gamma": 0.0}, "--snr_gamma"),
    ({"validation_prompts": ("a cat",), "validation_rounds": 0}, "--validation_rounds"),
    ({"validation_rounds": 1}, "--validation_rounds needs --validation_prompts"),
    ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit"),
    ({"steps_per_round": 1, "max_train_steps": 1}, "give one of them"),
    ({"preset": "paper", "gradient_accumulation_steps": 2}, "--taa_leftovers drop"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=[str(given) for given, _ in MISTAKES])
def test_values_that_cannot_be(given, message):
    """Each rule, in one layer of its own over settings that are sound without it."""
    from_layers(NEEDED)
    with pytest.raises(UserError) as error:
        from_layers(NEEDED, given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"num_shards": 1, "msr": False},
        {"bank_decay": 0.0, "msr_fraction": 0.0, "taa_magnitude": 30.0, "bank_bins": 1000},
        {"preset": "paper", "method": "iet_agc", "gradient_accumulation_steps": 2},
        {"empty_batch": "step", "taa": False, "outer_learning_rate": 1.5, "outer_momentum": 0.0},
        {"checkpointing_rounds": 0, "lr_warmup_steps": 0, "agc_threshold": 0.0},
        {"validation_prompts": ("a cat",), "validation_rounds": 1},
    ],
    ids=str,
)
def test_values_at_the_edge_of_what_can_be(given):
    found = from_layers(NEEDED, given).as_dict()
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    assert expected.items() <= found.items()


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="--pretrained_model_name_or_path"):
        from_layers({"train_data_dir": "pictures"})


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_shards", "four"],
        ["--num_shard", "4"],
        ["--preset", "papers"],
        ["--rank"],
        ["stray"],
    ],
    ids=" ".join,
)
def test_wrong_flags_end_with_status_2_and_one_line(flags, capsys):
    assert train([*FLAGS, *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not said.out


def test_unknown_flag_suggests_the_known_one():
    with pytest.raises(UserError, match="agc_threshold"):
        load([*FLAGS, "--agc_treshold", "0.5"])


def test_help_names_every_setting_at_once_and_without_torch():
    began = time.perf_counter()
    done = run("-X", "importtime", "train_iet_sd.py", "--help")
    assert time.perf_counter() - began < 2
    assert done.returncode == 0
    assert [name for name in FIELDS if f"--{name}" not in done.stdout] == []
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"iet_sd.config", "yaml"} <= imported
    assert not {"torch", "numpy", "diffusers", "transformers", "accelerate"} & imported


def test_wrong_flag_answers_without_torch():
    done = run("-X", "importtime", "train_iet_sd.py", *FLAGS, "--num_shards", "0")
    assert done.returncode == 2
    assert "error: --num_shards must be above 0; got 0." in done.stderr
    assert "Traceback" not in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]


@pytest.mark.parametrize("cls", Config.sections().values())
def test_every_field_has_a_text_under_it(cls):
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        assert docs.get(field.name, "").endswith((".", ")")), field.name


def test_every_field_has_one_name_and_one_flag():
    assert len(FIELDS) == sum(len(dataclasses.fields(cls)) for cls in Config.sections().values())
    flags = build_parser()._option_string_actions
    assert [name for name in FIELDS if f"--{name}" not in flags] == []


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


def test_presets_and_methods_name_settings_of_the_method():
    method = {field.name for field in dataclasses.fields(Config.sections()["method"])}
    for choice in (*METHODS.values(), *PRESETS.values()):
        assert choice.keys() <= method - {"method", "preset"}
    assert len({frozenset(preset) for preset in PRESETS.values()}) == 1
