"""When checkpoints are written and which stay; what a signal does at each moment."""

import os
import signal
from dataclasses import replace

import pytest

from iet_sd.engine import checkpoint
from iet_sd.engine import checkpointer as module
from iet_sd.engine.checkpointer import Checkpointer
from iet_sd.engine.rounds import RoundDone, ShardDone, StepDone
from iet_sd.engine.stopping import Signals
from iet_sd.errors import Stopped, UserError
from tests.compare import equal
from tests.engine.running import RUN, resuming, run, same, weights


def rounds_left(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("check*"))


@pytest.mark.parametrize(
    ("given", "rounds"),
    [
        ({}, [1, 2, 3, 4]),
        ({"checkpointing_rounds": 2}, [2, 4]),
        ({"checkpointing_rounds": 3}, [3, 4]),
        ({"checkpointing_rounds": 9}, [4]),
        ({"checkpointing_rounds": 0}, []),
        ({"checkpoints_total_limit": 2}, [3, 4]),
        ({"checkpointing_rounds": 2, "checkpointing_steps": 1}, [2, 4]),
    ],
    ids=str,
)
def test_which_stay(given, rounds, trainer_for, settings, tmp_path):
    run(settings(**RUN, **given), tmp_path, trainer_for)
    assert rounds_left(tmp_path) == rounds
    assert not list(tmp_path.rglob("process-*"))
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_goes_on_and_is_to_write_no_checkpoint_writes_none(
    elsewhere, trainer_for, settings, tmp_path
):
    """From what was done within a round, to the same end."""
    config, first = settings(**RUN, checkpointing_steps=1), tmp_path / "first"
    expected = weights(run(config, tmp_path / "whole", trainer_for)[0])
    run(config, first, trainer_for, stop_at=3)
    before, folder = set(first.rglob("*")), tmp_path / "second" if elsewhere else first
    name = str(first / "checkpoint-0") if elsewhere else "latest"
    trainer, _ = run(resuming(config, name, checkpointing_rounds=0), folder, trainer_for)
    assert equal(weights(trainer), expected)
    assert set(first.rglob("*")) == before
    assert rounds_left(folder) == ([] if elsewhere else [0])


@pytest.mark.parametrize(("steps", "base"), [(6, 3), (7, 2), (13, 3), (19, 0)])
def test_a_round_between_is_saved_once_so_many_steps_are_not(
    steps, base, trainer_for, settings, tmp_path
):
    """Rounds of 6 steps, of which the fourth is to be saved; killed in it."""
    rounds = {"num_rounds": 5, "agc_threshold": 0.0}  # else a skipped batch takes a step more
    config = settings(**RUN | rounds, checkpointing_rounds=4, checkpointing_steps=steps)
    run(config, tmp_path, trainer_for, stop_at=28)
    assert rounds_left(tmp_path) == [base]


@pytest.fixture
def started(trainer_for, settings, tmp_path):
    """A trainer, its state and checkpointer, ready for the first step; under signals."""

    def make(signals, **given):
        config = settings(**RUN | given)
        config = replace(config, training=replace(config.training, output_dir=str(tmp_path)))
        trainer, state = trainer_for(config)
        checkpointer = Checkpointer(config.training, trainer, state, same(config, trainer), signals)
        checkpointer.begin(None)
        return config, trainer, state, checkpointer

    return make


def until(kind, trainer, state, checkpointer):
    """Train to the first event of a kind, which is not saved yet."""
    for event in trainer.run(state):
        if isinstance(event, kind):
            return event
        checkpointer.after(event)
    raise AssertionError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_a_step_is_obeyed_when_the_step_is_saved(number, started, tmp_path):
    before = signal.getsignal(number)
    with Signals() as signals:
        _, *parts, checkpointer = started(signals)
        event = until(StepDone, *parts, checkpointer)
        os.kill(os.getpid(), number)  # and nothing happens
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher has ended too
        name = signal.Signals(number).name
        with pytest.raises(Stopped, match=rf"{name}\. What was done is saved: go on") as stop:
            checkpointer.after(event)
    assert stop.value.number == number
    assert signal.getsignal(number) == before
    assert (tmp_path / "checkpoint-0" / "process-0-of-1" / "shard-0-step-1" / "state.json").exists()


def test_a_signal_while_waiting_for_others_is_obeyed_at_once(started):
    with Signals() as signals:
        _, trainer, state, checkpointer = started(signals)
        events = trainer.run(state)
        for event in events:
            checkpointer.after(event)
            if isinstance(event, ShardDone) and event.shard == 1:
                break
        with pytest.raises(Stopped, match="What was done is saved"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_going_on_where_all_is_done_already_is_obeyed_at_once(
    started, trainer_for, tmp_path
):
    """There is no end of a shard to come: it waits for others, or draws."""
    with Signals() as signals:
        config, trainer, state, checkpointer = started(signals)
        for event in trainer.run(state):
            checkpointer.after(event)
            if isinstance(event, ShardDone) and event.shard == 1:
                break
    trainer, state = trainer_for(config)
    found = checkpoint.find(tmp_path, "latest")
    with Signals() as signals:
        config = replace(config.training, output_dir=str(tmp_path))
        checkpointer = Checkpointer(config, trainer, state, checkpointer.identity, signals)
        checkpointer.load(found)
        checkpointer.begin(found)
        assert len(state.progress.done) == 2
        with pytest.raises(Stopped, match="What was done is saved"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_others_are_waited_for_before_a_save_is_obeyed_at_once(started, monkeypatch):
    with Signals() as signals:
        _, trainer, state, checkpointer = started(signals)
        event = until(RoundDone, trainer, state, checkpointer)
        monkeypatch.setattr(module, "wait", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="What was done is saved"):
            checkpointer.after(event)


@pytest.mark.parametrize("told", [True, False])
def test_the_end_of_another_process_in_a_save_is_the_signal_s_if_one_came(
    told, started, monkeypatch
):
    def ended():
        if told:
            os.kill(os.getpid(), signal.SIGINT)
        raise UserError("Another process of this run has ended.")

    with Signals() as signals:
        _, trainer, state, checkpointer = started(signals)
        event = until(RoundDone, trainer, state, checkpointer)
        monkeypatch.setattr(checkpointer, "_save_round", ended)
        with pytest.raises(Stopped if told else UserError) as error:
            checkpointer.after(event)
    if told:
        assert str(error.value).startswith("Stopped by SIGINT. What was done is saved")
        assert error.value.__context__ is None, "else the command line tells of that"


def test_a_signal_while_the_round_is_saved_is_obeyed_after(started, monkeypatch, tmp_path):
    with Signals() as signals:
        _, trainer, state, checkpointer = started(signals)
        event = until(RoundDone, trainer, state, checkpointer)
        save = checkpointer._save_round

        def told_to_stop():
            os.kill(os.getpid(), signal.SIGTERM)
            save()

        monkeypatch.setattr(checkpointer, "_save_round", told_to_stop)
        with pytest.raises(Stopped, match="What was done is saved"):
            checkpointer.after(event)
    assert rounds_left(tmp_path) == [1]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"checkpointing_rounds": 0}, "No checkpoint was written, as --checkpointing_rounds 0"),
        ({"checkpointing_rounds": 2}, "Steps since the last checkpoint are lost: go on with"),
    ],
    ids=str,
)
def test_what_cannot_be_saved_is_said(given, kept, started):
    with Signals() as signals:
        _, trainer, state, checkpointer = started(signals, **given)
        for event in trainer.run(state):
            if state.round == 1 and isinstance(event, StepDone):
                break
            checkpointer.after(event)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match=kept):
            checkpointer.after(event)


def test_after_the_last_round_a_signal_is_obeyed_at_once(started):
    with Signals() as signals:
        _, trainer, state, checkpointer = started(signals, num_rounds=1)
        for event in trainer.run(state):
            checkpointer.after(event)
        with pytest.raises(Stopped, match="What was done is saved"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_by_a_signal_equals_never_stopped(started, trainer_for, tmp_path):
    with Signals() as signals:
        config, trainer, state, checkpointer = started(signals)
        with pytest.raises(Stopped):  # noqa: PT012
            for number, event in enumerate(trainer.run(state)):
                if number == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                checkpointer.after(event)
    trainer, _ = run(resuming(config), tmp_path, trainer_for)
    whole, _ = run(config, tmp_path / "whole", trainer_for)
    assert equal(weights(trainer), weights(whole))
