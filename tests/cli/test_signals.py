"""Told to stop, through the command line: one line, status 128 + n, and nothing lost."""

import json
import os
import signal
import subprocess
import sys

import pytest
from accelerate import Accelerator

from iet_sd import reporting
from iet_sd.cli import train as module
from iet_sd.cli.common import status_of
from iet_sd.cli.train import train
from iet_sd.engine import collectives
from iet_sd.engine.rounds import Trainer
from iet_sd.errors import UserError
from iet_sd.models import loading
from tests.launching import ROOT, Launched

SAVED = "What was done is saved: go on with --resume_from_checkpoint latest."


def told_to_stop(function, number):
    """``function``, during which the signal comes."""

    def called(*args, **kwargs):
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize(
    ("place", "name", "number", "said"),
    [
        (loading, "load_components", signal.SIGTERM, "Stopped by SIGTERM."),
        (Trainer, "_step", signal.SIGINT, f"Stopped by SIGINT. {SAVED}"),
        (Trainer, "_step", signal.SIGTERM, f"Stopped by SIGTERM. {SAVED}"),
        (reporting, "save_result", signal.SIGTERM, f"Stopped by SIGTERM. {SAVED}"),
    ],
    ids=["loading", "Ctrl-C in a step", "in a step", "saving the result"],
)
def test_a_signal_is_one_line_and_its_status(place, name, number, said, argv, monkeypatch, capsys):
    before = signal.getsignal(number)
    monkeypatch.setattr(place, name, told_to_stop(getattr(place, name), number))
    assert train(argv()) == 128 + number
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == said
    assert "Traceback" not in printed.err + printed.out
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    if SAVED in said:
        assert train(argv(resume_from_checkpoint="latest")) == 0


def test_a_signal_during_the_way_out_of_an_error_does_not_hide_it(argv, monkeypatch, capsys):
    """A launcher ends all processes when one has ended, also those that clean up after it."""

    def mistaken(*_):
        raise UserError("Another process of this run has ended.")

    monkeypatch.setattr(collectives, "gather", mistaken)
    ending = told_to_stop(Accelerator.end_training, signal.SIGTERM)
    monkeypatch.setattr(Accelerator, "end_training", ending)
    assert train(argv()) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "error: Another process of this run has ended."
    assert "Stopped" not in printed.err + printed.out


def test_a_second_ctrl_c_is_one_line_too(argv, tmp_path, monkeypatch, capsys):
    twice = told_to_stop(told_to_stop(Trainer._step, signal.SIGINT), signal.SIGINT)
    monkeypatch.setattr(Trainer, "_step", twice)
    assert train(argv()) == 128 + signal.SIGINT
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "Stopped by SIGINT at once."
    assert "Traceback" not in printed.err + printed.out
    assert not list((tmp_path / "output").rglob("*partial*"))


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP of another kind shows other things")
def test_threads_that_wait_leave_the_cores_to_others():
    """Said before torch is loaded, as OpenMP itself tells."""
    program = (
        "import importlib\nfrom iet_sd.cli import main, train\n"
        "from iet_sd.cli.common import status_of\n"
        "status_of(lambda: importlib.import_module('torch'), '')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "TRUE"
    run = [sys.executable, "-c", program]
    said = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said


def test_how_threads_wait_is_the_user_s_choice(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert status_of(lambda: None, "") == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_no_checkpoint_no_promise(argv, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "_step", told_to_stop(Trainer._step, signal.SIGTERM))
    assert train(argv(checkpointing_rounds=0)) == 128 + signal.SIGTERM
    assert "No checkpoint was written, as --checkpointing_rounds 0 says." in capsys.readouterr().err


def test_nothing_is_caught_once_it_has_ended(argv):
    assert module.train(["--help_me"]) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        (2, signal.SIGKILL),
    ],
    ids=["one process", "two processes", "two processes, the launcher killed"],
)
def test_the_end_of_accelerate_launch_ends_in_a_grace_save(processes, number, argv, tmp_path):
    """Nothing else would save: the next save by steps is far away."""
    run = Launched(argv(steps_per_round=3000), processes)
    run.until(lambda: "Round 1 shard" in run.output())
    assert len(run.processes()) > processes
    run.launcher.send_signal(number)
    run.wait()
    assert run.output().count(f"Stopped by SIGTERM. {SAVED}") == processes, run.output()
    saved = list((tmp_path / "output" / "checkpoint-0").glob("process-*/*/state.json"))
    assert len(saved) == processes
    assert all(json.loads(path.read_text())["counts"]["steps"] > 0 for path in saved)
    assert not list((tmp_path / "output").rglob("*partial*"))
