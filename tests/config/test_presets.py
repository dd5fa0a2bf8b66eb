"""Presets and methods: what of them is in force beside what the file and the flags say."""

import dataclasses

import pytest
import yaml

from iet_sd.config import Config
from iet_sd.presets import METHODS, PRESETS


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
    assert loaded("method: iet\nnum_shards: 8", "--method", "iet_agc")["num_shards"] == 8
    found = loaded("preset: paper\nbank_bins: 7\nmsr_fraction: 0.1", "--method", "iet_agc")
    assert (found["bank_bins"], found["msr_fraction"]) == (7, 0.1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("then", METHODS)
def test_all_settings_of_a_run_are_a_start_for_another_method(loaded, first, then, preset):
    """``training_config.yaml`` writes out what method and preset stand for: it goes with them."""
    written = loaded("", "--method", first, "--preset", preset, "--num_rounds", "3")
    text = yaml.safe_dump(written)
    wanted = loaded("", "--method", then, "--preset", preset, "--num_rounds", "3")
    assert loaded(text, "--method", then) == wanted
    assert loaded(text) == written


def test_presets_and_methods_name_settings_of_the_method():
    method = {field.name for field in dataclasses.fields(Config.sections()["method"])}
    for choice in (*METHODS.values(), *PRESETS.values()):
        assert choice.keys() <= method - {"method", "preset"}
    assert len({frozenset(preset) for preset in PRESETS.values()}) == 1
