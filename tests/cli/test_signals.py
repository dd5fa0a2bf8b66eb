"""Told to stop, through the command line: one line, status 128 + n, and nothing lost."""

import json
import os
import signal
import sys

import pytest

from iet_sd import reporting
from iet_sd.cli import train as module
from iet_sd.cli.train import train
from iet_sd.engine.rounds import Trainer
from iet_sd.models import loading
from tests.launching import Launched

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
    [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL)],
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
