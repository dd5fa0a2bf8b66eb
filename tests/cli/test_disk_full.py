"""A full disk: one line that says what to do, the last good checkpoint whole, nothing left over."""

import errno
import os
import shutil
import subprocess

import diffusers
import pytest
from safetensors import SafetensorError

from iet_sd.cli.common import status_of
from iet_sd.cli.train import train
from iet_sd.engine import caching, checkpoint
from tests.launching import ROOT, Launched, finish


def raising(error):
    def command(*_, **__):
        raise error

    return command


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.ENOSPC, "No space left"),
        OSError(errno.EDQUOT, "Quota"),
        OSError(errno.EPERM, "Not permitted"),
    ],
    ids=str,
)
def test_it_is_one_line_with_the_way_on(error, capsys):
    assert status_of(raising(error), "Make room.") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(". Make room.")


@pytest.mark.parametrize("error", [SafetensorError("invalid header"), OSError(errno.EIO, "Broken")])
def test_what_is_no_full_disk_is_not_called_one(error):
    with pytest.raises(type(error)):
        status_of(raising(error), "Make room.")


@pytest.mark.parametrize("place", ["a round's checkpoint", "within a round", "the result"])
def test_a_run_that_meets_it_keeps_the_last_checkpoint(place, argv, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    save_file, saves = checkpoint.save_file, []

    def full(tensors, path):
        saves.append(path)
        if ("process" in str(path)) == (place == "within a round") and "checkpoint-0" not in str(
            path.parent.name
        ):
            path.write_bytes(b"half of")
            raise FULL
        save_file(tensors, path)

    if place == "the result":
        monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_lora_weights", raising(FULL))
    else:
        monkeypatch.setattr(checkpoint, "save_file", full)
    lora = argv(train_mode="lora", checkpointing_steps=1)
    assert train(lora) == 1
    said = capsys.readouterr().err
    assert "No space left on device (os error 28). Checkpoints written before are whole: " in said
    assert "Traceback" not in said
    assert not list(output.rglob("*partial*"))
    assert not list(output.glob("*.safetensors"))
    monkeypatch.undo()
    found = checkpoint.find(output, "latest")
    assert found.round == (2 if place == "the result" else 0)
    assert train([*lora, "--resume_from_checkpoint", "latest"]) == 0
    assert (output / "pytorch_lora_weights.safetensors").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a given size."""
    mounted = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.name != "posix" or os.geteuid() or shutil.which("mount") is None:
            pytest.skip("needs root to mount a small file system")
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("may not mount here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "processes",
    [0, pytest.param(2, marks=pytest.mark.slow)],
    ids=["one process", "two processes"],
)
def test_on_a_disk_that_is_really_full(processes, argv, small_disk):
    """Room for some checkpoints and not for all; in two processes, either may meet its end."""
    output = small_disk("12m")
    flags = argv(output_dir=output, num_rounds=9)
    full = Launched(flags, processes)
    full.processes()
    assert full.wait() != 0
    assert "os error 28). Checkpoints written before are whole" in full.output()
    assert f'File "{ROOT}' not in full.output(), "a traceback of ours"
    assert not list(output.rglob("*partial*"))
    rounds = sorted(path.name for path in output.glob("checkpoint-*"))
    assert len(rounds) > 1
    assert f"checkpoint-{checkpoint.find(output, 'latest').round}" == rounds[-1]
    for name in rounds[:-1]:
        shutil.rmtree(output / name)
    again = ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "1"]
    finish([*flags, *again], processes)


@pytest.mark.parametrize(
    "processes",
    [0, pytest.param(2, marks=pytest.mark.slow)],
    ids=["one process", "two processes"],
)
def test_a_cache_that_the_disk_has_no_room_for_stops_no_run(
    processes, argv, small_disk, tmp_path, capsys
):
    cache = small_disk("8k")
    flags = argv(cache_dir=cache, center_crop="")
    said = f"captions are encoded in every visit: {cache / 'iet_sd' / 'texts-'}"
    assert train([*flags, "--dry_run"]) == 0
    assert said in capsys.readouterr().out
    run = Launched(flags, processes)
    assert run.wait() == 0, run.output()
    assert said in run.output()
    assert not list(cache.rglob("texts-*"))
    others = argv(cache_dir=cache, center_crop="", output_dir=tmp_path / "other", cache="on")
    assert train(others) == 2
    error = capsys.readouterr().err
    assert "has room for 0.00 GiB and 0.00 GiB are to be written. Give a --cache_dir" in error


def test_a_disk_that_is_full_while_a_cache_is_written(argv, small_disk, capsys, monkeypatch):
    """As by others: there are no checkpoints yet, and it is not the output that lacks room."""
    cache = small_disk("8k")
    monkeypatch.setattr(caching, "_SHARE", 1000)
    assert train(argv(cache_dir=cache)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {cache / 'iet_sd' / 'texts-'}")
    assert "No space left on device" in error
    assert "--cache off" in error
    assert "Checkpoints" not in error
    assert not list(cache.rglob("*partial*"))
