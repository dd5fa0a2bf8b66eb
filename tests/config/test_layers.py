"""Which layer wins: a default, which is diffusers' where it has one, the file, or a flag."""

import pytest

from iet_sd.arguments import from_layers
from iet_sd.config.hub import SECRETS
from tests.config.needed import FIELDS, NEEDED
from tests.diffusers_flags import FULL, LORA

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
