"""What an earlier run has left in --output_dir: what is refused, what goes away, and what stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

from iet_sd.arguments import from_layers
from iet_sd.cli import output_dir
from iet_sd.cli.output_dir import make_way, open_checkpoint, take_output_dir
from iet_sd.engine.checkpoint import Checkpoint
from iet_sd.engine.stopping import Signals
from iet_sd.errors import Stopped, UserError

RUN = [
    "model_index.json",
    "pytorch_lora_weights.safetensors",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
    "metrics.jsonl",
    "training_config.yaml",
    "README.md",
    "sample_grid.png",
    "validation-2.png",
    "validation-10.png",
    "checkpoint-2/state.json",
    "checkpoint-10/process-0-of-1/shard-0-done/state.json",
    ".checkpoint-11.partial/proxy-0.safetensors",
    ".partial/unet/config.json",
    ".hub/model_index.json",
    "logs/iet-sd-fine-tune/events.out.tfevents.1",
]
# Of use to the run alone that wrote it, which was killed.
KILLED = [
    "waiting-proxies/5.safetensors",
    "waiting-proxies/.tmpAbCdEf",
    ".metrics.jsonl.0123abcd.partial",
]
OTHERS = [
    "notes.txt",
    "checkpoint-notes.txt",
    "validation-set/1.png",
    "logs/of-another-project/events.out.tfevents.1",
    "evaluation/report.html",
    "unets/config.json",
]


@pytest.fixture
def config(tmp_path):
    def make(**given):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "data").mkdir(exist_ok=True)
        local = {
            "pretrained_model_name_or_path": str(tmp_path / "model"),
            "train_data_dir": str(tmp_path / "data"),
            "output_dir": str(tmp_path / "output"),
        }
        return from_layers(local, given)

    return make


@pytest.fixture
def output(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / "output" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        return tmp_path / "output"

    return make


def take(config):
    """Have the folder for a moment."""
    with ExitStack() as at_end:
        take_output_dir(config, at_end)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_that_a_run_wrote_goes_and_nothing_else(config, output):
    folder = output(*RUN, *KILLED, *OTHERS)
    make_way(config(), None)
    assert names(folder) == {*RUN, *OTHERS}, "without being told to"
    make_way(config(overwrite_output_dir=True), None)
    assert names(folder) == set(OTHERS)
    assert not (folder / "unet").exists()


def test_what_a_killed_run_has_no_use_for_goes_in_any_case(config, output):
    """Also where the run goes on from a checkpoint of it, which nothing else may be taken from."""
    folder = output(*RUN, *KILLED)
    found = Checkpoint(folder / "checkpoint-2", 2, {})
    for overwrite in (False, True):
        make_way(config(overwrite_output_dir=overwrite), found)
        assert names(folder) == set(RUN)


@pytest.mark.parametrize("logging_dir", [".", "..", "../shared"])
def test_logs_that_are_not_this_run_s_alone_stay(logging_dir, config, output):
    folder = output("model_index.json", "iet-sd-fine-tune/events", "../shared/other/events")
    make_way(config(overwrite_output_dir=True, logging_dir=logging_dir), None)
    assert (folder / "../shared/other/events").exists()
    assert (folder / "iet-sd-fine-tune/events").exists() == (logging_dir != ".")


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "pytorch_lora_weights.safetensors", "metrics.jsonl", "checkpoint-1/x"],
)
def test_what_a_run_has_left_is_not_written_over(name, config, output):
    output(name)
    with pytest.raises(UserError, match="holds a model or an earlier run"):
        open_checkpoint(config())
    assert open_checkpoint(config(overwrite_output_dir=True)) is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_run_has_written_stays_whatever_its_name(overwrite, config, output):
    """As the README of a project, or a folder called best."""
    folder = output("README.md", "best/notes.txt", "training_config.yaml", "of-others.txt")
    (folder / "training_config.yaml").write_text("their: settings\n")
    said = "holds README.md, best, training_config.yaml, which no run has written"
    with pytest.raises(UserError, match=said):
        open_checkpoint(config(overwrite_output_dir=overwrite))
    # Of a run that was killed before it wrote more than its settings.
    (folder / "training_config.yaml").write_text("num_shards: 4\n")
    assert open_checkpoint(config(overwrite_output_dir=overwrite)) is None


def test_a_home_is_expanded(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config(output_dir="~/run", resume_from_checkpoint="~/run/checkpoint-1").training
    there = tmp_path / "run"
    assert (found.output_dir, found.resume_from_checkpoint) == (str(there), f"{there}/checkpoint-1")


def test_a_result_is_not_written_over_by_going_on_from_nothing(config, output):
    """As ``latest`` is also given to start a job, but not to replace a finished model."""
    output("metrics.jsonl", "training_config.yaml")
    assert open_checkpoint(config(resume_from_checkpoint="latest")) is None
    output("model_index.json")
    with pytest.raises(UserError, match="holds a model"):
        open_checkpoint(config(resume_from_checkpoint="latest"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_result_does_not_go_where_the_inputs_are(overwrite, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, what in {"model": "model", "./data": "training data"}.items():
        with pytest.raises(UserError, match=f"is the folder of the {what} to start from"):
            take(config(output_dir=name, overwrite_output_dir=overwrite))
    written = {"pretrained_vae_model_name_or_path": "result/vae", "output_dir": "result"}
    with pytest.raises(UserError, match="result/vae, the VAE to start from, is what a run writes"):
        take(config(**written, overwrite_output_dir=overwrite))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        take(config(output_dir="file", overwrite_output_dir=overwrite))
    assert not (tmp_path / "result").exists()
    assert not list(tmp_path.rglob(".lock"))


@pytest.mark.parametrize("name", ["me/cats", "me/cats/run"])
def test_a_name_on_the_hub_does_not_become_a_folder(name, config, tmp_path, monkeypatch):
    """It would be found instead of the model: by the load of this run, and by one that goes on."""
    monkeypatch.chdir(tmp_path)
    model = {"pretrained_model_name_or_path": "me/cats"}
    with pytest.raises(UserError, match="taken for the model to start from, me/cats on the Hub"):
        take(config(**model, output_dir=name))
    assert not (tmp_path / "me").exists()
    take(config(**model, output_dir="me/dogs"))
    assert open_checkpoint(config(**model, output_dir="me/dogs")) is None


def test_a_link_goes_and_what_it_leads_to_stays(config, output, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("")
    folder = output("model_index.json")
    (folder / "unet").symlink_to(elsewhere)
    make_way(config(overwrite_output_dir=True), None)
    assert names(folder) == set()
    assert names(elsewhere) == {"config.json"}


def test_a_dry_run_asks_nothing_of_the_folder(config, output, tmp_path):
    output(*RUN[:3])
    settings = config()
    dry = replace(settings, training=replace(settings.training, dry_run=True))
    with ExitStack() as at_end:
        take_output_dir(dry, at_end)
        assert names(tmp_path / "output") == set(RUN[:3])
    assert open_checkpoint(dry) is None


# As a run does it, and without the seconds that its imports take.
HOLDING = """
import os, sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(output):
    """Another process that has the output folder."""
    lock = output("notes.txt") / ".lock"
    run = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "ready\n"
    yield run
    run.kill()
    run.communicate()


def test_two_runs_in_one_folder(other, config, tmp_path, monkeypatch, caplog):
    """The second waits, says who has it, and gets it even if the first was killed."""
    caplog.set_level("INFO", "iet_sd")
    monkeypatch.setattr(output_dir, "_PATIENCE", 0.3)
    for _ in range(2):  # it is still known after one has tried
        with pytest.raises(UserError, match=rf"in use by another run \(process {other.pid}\)"):
            take(config())
    assert "waiting for another run" in caplog.text
    take(config(output_dir=str(tmp_path / "elsewhere")))
    monkeypatch.setattr(output_dir, "_PATIENCE", 10)
    threading.Timer(0.3, other.kill).start()
    began = time.monotonic()
    take(config())
    assert 0.2 < time.monotonic() - began < 5
    assert names(tmp_path / "output") == {"notes.txt"}


def test_a_wait_for_another_run_ends_by_a_signal(other, config):
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with Signals(), pytest.raises(Stopped):
        take(config())


def test_what_a_run_takes_is_as_before_when_it_ends(config, output):
    folder = output("notes.txt")
    with ExitStack() as at_end:
        take_output_dir(config(), at_end)
        assert names(folder) == {"notes.txt", ".lock"}
        assert (folder / ".lock").read_text() == str(os.getpid())
        make_way(config(overwrite_output_dir=True), None)
        assert names(folder) == {"notes.txt", ".lock"}
    assert names(folder) == {"notes.txt"}


def test_a_disk_without_locks_is_said_and_used(config, monkeypatch, caplog):
    def none(*_, **__):
        raise NotImplementedError("flock is not there")

    monkeypatch.setattr(output_dir.FileLock, "acquire", none)
    take(config())
    assert "on a disk without locks (flock is not there)" in caplog.text
