"""Stopped and resumed equals never stopped, and a checkpoint that is not right is refused."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from iet_sd.engine import checkpoint
from iet_sd.engine.checkpointer import Checkpointer
from iet_sd.engine.rounds import RoundDone
from iet_sd.engine.tracking import MetricsFile
from iet_sd.errors import Stopped, UserError
from tests.compare import equal

# Every loss below the running mean is skipped, so that there is something to remember.
RUN = {
    "num_shards": 2,
    "num_rounds": 4,
    "steps_per_round": 3,
    "lr_scheduler": "cosine",
    "agc_threshold": 1.0,
    "bank_bins": 1,
}


def run(config, folder, trainer_for, stop_at=None):
    """Train as the command line does, saving every 2 steps; ``stop_at``: killed after an event."""
    config = replace(config, training=replace(config.training, output_dir=str(folder)))
    trainer, state = trainer_for(config)
    identity = checkpoint.identity(config, trainer.steps_per_round, ["a"])
    checkpointer = Checkpointer(config.training, trainer, state, identity, lambda: None)
    checkpointer.start()
    metrics = MetricsFile(folder / "metrics.jsonl", state.round)
    for number, event in enumerate(trainer.run(state), 1):
        if isinstance(event, RoundDone):
            metrics.add(event)
        checkpointer.after(event)
        if number == stop_at:
            return trainer, state
    return trainer, state


def resuming(config):
    return replace(config, training=replace(config.training, resume_from_checkpoint="latest"))


def without_time(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in lines
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "corrected"},
        {"preset": "paper", "train_batch_size": 3},
        {"train_mode": "lora", "lora_dropout": 0.1, "lora_aggregation": "product"},
    ],
    ids=["corrected", "paper", "lora"],
)
def test_resumed_equals_never_stopped(given, trainer_for, settings, tmp_path):
    """Killed again and again: after a few more events each time, until it gets to the end."""
    config = settings(**RUN, **given, checkpointing_steps=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    trainer, _ = run(config, whole, trainer_for)
    expected = {k: p.detach().clone() for k, p in trainer.parameters.items()}

    run(config, broken, trainer_for, stop_at=3)
    for stop_at in (4, 5, 3, 9, 7):
        run(resuming(config), broken, trainer_for, stop_at)
    trainer, state = run(resuming(config), broken, trainer_for)
    assert state.round == 4
    assert equal({k: p.detach() for k, p in trainer.parameters.items()}, expected)
    assert without_time(broken / "metrics.jsonl") == without_time(whole / "metrics.jsonl")
    for name in ("proxy-0.json", "proxy-1.safetensors", "samples.safetensors"):
        one, other = ((f / "checkpoint-4" / name).read_bytes() for f in (whole, broken))
        assert one == other, name


def test_going_on_from_an_older_checkpoint_does_the_later_rounds_again(
    trainer_for, settings, tmp_path
):
    config = settings(**RUN)
    trainer, _ = run(config, tmp_path, trainer_for)
    expected = {k: p.detach().clone() for k, p in trainer.parameters.items()}
    older = replace(
        config.training, resume_from_checkpoint="checkpoint-2", checkpoints_total_limit=1
    )
    trainer, _ = run(replace(config, training=older), tmp_path, trainer_for)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert equal({k: p.detach() for k, p in trainer.parameters.items()}, expected)


def test_going_on_elsewhere_leaves_the_first_run_as_it_is(trainer_for, settings, tmp_path):
    config = settings(**RUN, checkpointing_steps=1)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    run(config, first, trainer_for, stop_at=12)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    other = replace(config.training, resume_from_checkpoint=str(first / "checkpoint-1"))
    run(replace(config, training=other), second, trainer_for)
    assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    whole = tmp_path / "whole"
    whole.mkdir()
    run(config, whole, trainer_for)
    assert without_time(second / "metrics.jsonl") == without_time(whole / "metrics.jsonl")


def test_steps_within_a_round_are_not_done_again(trainer_for, settings, tmp_path):
    config = settings(**RUN, checkpointing_steps=2)
    run(config, tmp_path, trainer_for, stop_at=6)  # 3 steps, the shard's end, 2 steps
    trainer, state = trainer_for(config)
    base = checkpoint.find(tmp_path, "latest")
    progress = checkpoint.load_within_round(base, state, "0-of-1", trainer.no_progress(state))
    assert [event.shard for event in progress.done] == [0]
    # Saved after 2 and 4 steps; the fifth was lost.
    assert (progress.shard, progress.counts.steps) == (1, 1)
    assert [p.name for p in (base / "process-0-of-1").iterdir()] == ["step-4"]


def test_another_number_of_processes_goes_on_from_the_round(trainer_for, settings, tmp_path):
    config = settings(**RUN, checkpointing_steps=2)
    run(config, tmp_path, trainer_for, stop_at=3)
    trainer, state = trainer_for(config)
    base = checkpoint.find(tmp_path, "latest")
    fresh = trainer.no_progress(state)
    assert checkpoint.load_within_round(base, state, "0-of-2", fresh) is None


def test_a_signal_ends_the_step_and_saves_it(trainer_for, settings, tmp_path):
    config = settings(**RUN)
    config = replace(config, training=replace(config.training, output_dir=str(tmp_path)))
    trainer, state = trainer_for(config)
    identity = checkpoint.identity(config, trainer.steps_per_round, ["a"])
    checkpointer = Checkpointer(config.training, trainer, state, identity, lambda: None)
    checkpointer.start()
    with checkpointer.stopping_on_signals():
        event = next(trainer.run(state))
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match=r"SIGTERM\. What was done is saved"):
            checkpointer.after(event)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (tmp_path / "checkpoint-0" / "process-0-of-1" / "step-1" / "state.json").exists()


@pytest.fixture
def saved(trainer_for, settings, tmp_path):
    """A run stopped in its third round."""
    config = settings(**RUN)
    trainer, state = run(config, tmp_path, trainer_for, stop_at=18)
    assert state.round == 2
    return config, trainer, state, tmp_path


def test_what_is_refused(saved, settings, trainer_for):
    _, trainer, _, folder = saved
    newest = checkpoint.find(folder, "latest")
    assert newest.name == "checkpoint-2"
    assert checkpoint.find(folder, "checkpoint-1").name == "checkpoint-1"
    with pytest.raises(UserError, match=r"not a checkpoint folder.*checkpoint-1, checkpoint-2"):
        checkpoint.find(folder, "checkpoint-7")
    assert checkpoint.find(folder / "elsewhere", "latest") is None

    other = settings(**RUN | {"lr_scheduler": "constant"})
    identity = checkpoint.identity(other, trainer.steps_per_round, ["b"])
    with pytest.raises(UserError, match=r"lr_scheduler: 'cosine' then, 'constant' now; samples"):
        checkpoint.load(newest, trainer.start(torch.zeros(16)), identity)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "weights.safetensors"), "weights.safetensors"),
        (lambda folder: flip(folder / "proxy-1.safetensors"), "proxy-1.safetensors"),
        (lambda folder: (folder / "proxy-0.json").write_text("{"), "proxy-0.json"),
        (lambda folder: (folder / "samples.safetensors").unlink(), "samples.safetensors"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json"),
    ],
    ids=["flipped byte", "flipped moment", "truncated", "missing", "manifest"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, damage, message, caplog):
    config, trainer, _, folder = saved
    newest = folder / "checkpoint-2"
    damage(newest)
    assert checkpoint.find(folder, "latest").name == "checkpoint-1"
    assert f"{newest} is damaged" in caplog.text
    identity = checkpoint.identity(config, trainer.steps_per_round, ["a"])
    with pytest.raises(UserError, match=message):
        checkpoint.load(newest, trainer.start(torch.zeros(16)), identity)
    assert newest.exists()


def test_a_damaged_save_within_a_round_is_named_and_its_steps_done_again(
    trainer_for, settings, tmp_path, caplog
):
    config = settings(**RUN, checkpointing_steps=2)
    run(config, tmp_path, trainer_for, stop_at=3)
    base = checkpoint.find(tmp_path, "latest")
    flip(base / "process-0-of-1" / "step-2" / "skips.safetensors")
    trainer, state = trainer_for(config)
    fresh = trainer.no_progress(state)
    assert checkpoint.load_within_round(base, state, "0-of-1", fresh) is None
    assert "step-2 is damaged: skips.safetensors" in caplog.text
    run(resuming(config), tmp_path, trainer_for, stop_at=2)
    progress = checkpoint.load_within_round(base, state, "0-of-1", trainer.no_progress(state))
    assert progress.counts.steps == 2


def test_old_checkpoints_go_and_a_failed_write_leaves_nothing(saved, monkeypatch):
    _, trainer, state, folder = saved
    identity = checkpoint.identity(trainer.config, trainer.steps_per_round, ["a"])
    state.round = 3
    checkpoint.save(folder, state, identity, 2, 0, lambda: None)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]

    def full(*_):
        raise OSError(28, "No space left on device")

    state.round = 4
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, state, identity, 2, 0, lambda: None)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["checkpoint-2", "checkpoint-3", "metrics.jsonl"]


def test_nothing_is_pickled(saved):
    *_, folder = saved
    suffixes = {p.suffix for p in (folder / "checkpoint-2").iterdir()}
    assert suffixes == {".json", ".safetensors"}
