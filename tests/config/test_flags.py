"""Flags: a wrong one is answered at once and in one line, and the help has every setting."""

import dataclasses
import subprocess
import sys
import time

import pytest

from iet_sd.arguments import build_parser, field_docs, load
from iet_sd.cli.train import train
from iet_sd.config import Config
from iet_sd.errors import UserError
from tests.config.needed import FIELDS, FLAGS
from tests.launching import ROOT


def run(*arguments):
    """``train_iet_sd.py`` in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


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


def test_a_flag_with_dashes_is_told_the_one_with_lines():
    with pytest.raises(UserError, match=r"unknown flag --dry-run\. Did you mean --dry_run"):
        load([*FLAGS, "--dry-run"])


def test_a_word_that_belongs_to_no_flag_is_not_repeated():
    """It may be a secret, and is often the value of a flag that takes none."""
    with pytest.raises(UserError, match=r"value of no flag.*--no-NAME") as error:
        load([*FLAGS, "--msr", "hf_secret"])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["train_data_dir", "output_dir", "cache_dir", "hub_token"])
def test_an_empty_value_is_no_name_of_the_current_folder(name):
    with pytest.raises(UserError, match=f"--{name} is empty.*variable of the shell"):
        load([*FLAGS, f"--{name}", ""])
    assert load([*FLAGS, "--caption_prefix", ""]).data.caption_prefix == ""


def test_the_help_says_what_method_and_preset_do_to_other_settings():
    text = " ".join(build_parser().format_help().split())
    assert "both only fill in values of the other fields" in text
    assert "Defaults below are those of iet_agc_plus and corrected." in text


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
