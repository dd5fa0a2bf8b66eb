"""Going on through the command line: what is the same run, what is another, what of it remains."""

import json
import os
import shutil
import signal

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iet_sd.cli.train import train
from iet_sd.engine import caching, sealed
from iet_sd.engine.rounds import Trainer
from iet_sd.models import layout, loading
from tests.cli.test_output_dir import names
from tests.compare import equal
from tests.engine.running import flip, timeless
from tests.launching import finish


def unet(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def stopped(argv, tmp_path, monkeypatch):
    """A run told to stop in its n-th step; returns its output folder."""

    def stop(number=6, **given):
        step, steps = Trainer._step, []

        def counting(*args):
            steps.append(1)
            if len(steps) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_step", counting)
            assert train(argv(**given)) == 128 + signal.SIGTERM
        return tmp_path / "output"

    return stop


def test_the_same_model_and_data_at_another_place(
    stopped, argv, pipelines, images, tmp_path, monkeypatch
):
    """Copied, and by a relative path: what is compared is what they hold."""
    whole = tmp_path / "whole"
    assert train(argv(output_dir=whole)) == 0
    output = stopped()
    shutil.copytree(pipelines["sd1"], tmp_path / "model")
    shutil.copytree(images, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    moved = {"pretrained_model_name_or_path": "./model", "train_data_dir": "data/"}
    assert train(argv(**moved, resume_from_checkpoint="latest")) == 0
    assert equal(unet(output), unet(whole))
    assert timeless(output / "metrics.jsonl") == timeless(whole / "metrics.jsonl")


@pytest.mark.parametrize("changed", ["model", "image", "caption"])
def test_another_model_or_data_of_the_same_name_is_refused(
    changed, stopped, argv, pipelines, images, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(pipelines["sd1"], tmp_path / "model")
    data = shutil.copytree(images, tmp_path / "data")
    places = {"pretrained_model_name_or_path": model, "train_data_dir": data}
    output = stopped(**places)
    if changed == "model":
        # One bit of a weight.
        flip(model / "unet" / "diffusion_pytorch_model.safetensors")
    elif changed == "image":
        shutil.copyfile(data / "01.png", data / "02.png")
    else:
        rows = (data / "metadata.jsonl").read_text()
        (data / "metadata.jsonl").write_text(rows.replace("dog 7", "dog 8"))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    # Before what would take long: of data before the weights are loaded, of a model before images
    # are encoded.
    monkeypatch.setattr(caching, "cached_images", None)
    if changed != "model":
        monkeypatch.setattr(loading, "load_components", None)
    assert train(argv(**places, resume_from_checkpoint="latest")) == 2
    said = capsys.readouterr().err
    assert "was made with other settings, model or data" in said
    assert f"{'model: ' if changed == 'model' else 'data: '}'" in said
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_a_checkpoint_is_read_once(stopped, argv, monkeypatch):
    """It and nothing older: what is no longer needed is not looked at."""
    output = stopped(num_rounds=3)
    read, checksum = [], sealed._checksum
    monkeypatch.setattr(sealed, "_checksum", lambda path: read.append(path) or checksum(path))
    monkeypatch.setattr(Trainer, "run", lambda *_: iter(()))
    assert train(argv(num_rounds=3, resume_from_checkpoint="latest")) == 0
    newest = sorted(output.glob("checkpoint-*"))[-1]
    assert len(read) == len(set(read))
    assert {path.parent for path in read if "process" not in str(path)} == {newest}


@pytest.mark.slow
def test_two_processes_read_it_once_and_agree(argv, tmp_path):
    """The second is told what the first has found, here that the newest is damaged."""
    flags = argv(num_rounds=3)
    finish(flags, processes=2)
    output = tmp_path / "output"
    expected = unet(output)
    (output / "checkpoint-3" / "state.json").unlink()
    said = finish([*flags, "--resume_from_checkpoint", "latest"], processes=2)
    assert said.count("checkpoint-3 is damaged: its state.json is missing") == 1
    assert "going on after round 2" in said
    assert equal(unet(output), expected)


def test_settings_that_are_written_start_a_run_anew(stopped, argv, tmp_path):
    output = stopped()
    assert train(argv(resume_from_checkpoint="latest")) == 0
    written = yaml.safe_load((output / "training_config.yaml").read_text())
    assert written["resume_from_checkpoint"] is None
    again = ["--config", str(output / "training_config.yaml"), "--output_dir"]
    assert train([*again, str(tmp_path / "again")]) == 0
    assert equal(unet(tmp_path / "again"), unet(output))


def test_another_run_replaces_all_of_the_one_before(argv, tmp_path, capsys):
    output = tmp_path / "output"
    prompts = ["--validation_prompts", "a cat", "--validation_inference_steps", "2"]
    full = [*argv(num_rounds=3, report_to="tensorboard"), *prompts, "--validation_rounds", "1"]
    assert train(full) == 0
    (output / "notes.txt").write_text("mine")
    before = names(output)
    lora = argv(train_mode="lora", num_rounds=1)
    assert train(lora) == 2
    assert names(output) == before
    # Not before the new run is sure to start: here its data is not there.
    overwrite = [*lora, "--overwrite_output_dir"]
    assert train([*overwrite, "--train_data_dir", "nowhere"]) == 2
    assert names(output) == before
    assert train(overwrite) == 0
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "checkpoint-1",
        "logs",
        "metrics.jsonl",
        "notes.txt",
        "pytorch_lora_weights.safetensors",
        "training_config.yaml",
    }
    assert not list((output / "logs").rglob("*tfevents*"))


def test_the_model_to_start_from_is_never_replaced(argv, pipelines, tmp_path, capsys):
    model = shutil.copytree(pipelines["sd1"], tmp_path / "output")
    before = names(model)
    given = {"pretrained_model_name_or_path": model, "overwrite_output_dir": ""}
    assert train(argv(**given)) == 2
    assert "is the folder of the model to start from" in capsys.readouterr().err
    assert names(model) == before
    assert layout.INDEX in before


@pytest.mark.parametrize("number", [3, 9], ids=["in the first round", "in the second"])
def test_curves_go_on_where_they_were(number, stopped, argv, tmp_path):
    """Stopped, then killed some steps later: what is done again is not there twice."""
    given = {"report_to": "tensorboard", "steps_per_round": 3, "checkpointing_steps": 100}
    output = stopped(number, **given)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for path in output.glob("checkpoint-*"):
        shutil.copytree(path, checkpoints / path.name)
    again = given | {"resume_from_checkpoint": "latest"}
    assert train(argv(**again)) == 0
    # As if it had not come so far: back to the checkpoints from before.
    for path in output.glob("checkpoint-*"):
        shutil.rmtree(path)
    for path in checkpoints.iterdir():
        shutil.copytree(path, output / path.name)
    assert train(argv(**again)) == 0
    events = EventAccumulator(str(output / "logs" / "iet-sd-fine-tune")).Reload()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    total = sum(line["steps"] for line in lines if line["kind"] == "round")
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, total + 1))
    ends = [event.step for event in events.Scalars("round/loss")]
    assert ends == [lines[2]["steps"], total]
