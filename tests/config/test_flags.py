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
