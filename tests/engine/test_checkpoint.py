"""Stopped and resumed equals never stopped, wherever it was stopped and wherever it goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from iet_sd.engine import checkpoint, sealed
from iet_sd.engine.rounds import RoundDone, ShardDone
from iet_sd.errors import UserError
from tests.compare import equal
from tests.engine.running import RUN, flip, resuming, run, timeless, weights


@pytest.fixture
def loaded(trainer_for):
    """What a run that goes on from the newest checkpoint in a folder finds there."""

    def load(config, folder, process="0-of-1"):
        trainer, state = trainer_for(config)
        found = checkpoint.find(folder, "latest")
        checkpoint.load(found, state, found.identity)
        checkpoint.load_within_round(found.folder, trainer, state, process)
        return state

    return load


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "corrected"},
        {"preset": "paper", "train_batch_size": 3},
        {"train_mode": "lora", "lora_dropout": 0.1, "lora_aggregation": "product"},
        {"outer_momentum": 0.9, "proxy_optimizer": "average", "aggregate_every": 1},
        {"train_mode": "lora", "use_dora": True, "train_text_encoder": True, "text_encoder_lr": 1},
    ],
    ids=["corrected", "paper", "lora", "outer", "text encoder"],
)
def test_resumed_equals_never_stopped(given, trainer_for, settings, tmp_path):
    """Killed again and again: after a few more events each time, until it gets to the end."""
    config = settings(**RUN, **given, checkpointing_steps=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = weights(run(config, whole, trainer_for)[0])

    run(config, broken, trainer_for, stop_at=3)
    for stop_at in (4, 5, 3, 9, 7):
        run(resuming(config), broken, trainer_for, stop_at)
    trainer, state = run(resuming(config), broken, trainer_for)
    assert state.round == 4
    assert equal(weights(trainer), expected)
    assert timeless(broken / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    one, other = (folder / "checkpoint-4" for folder in (whole, broken))
    assert (one / "proxy-0.json").read_bytes() == (other / "proxy-0.json").read_bytes()
    for path in one.glob("*.safetensors"):
        assert equal(load_file(path), load_file(other / path.name)), path.name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_nothing_of_a_checkpoint_is_held_open(loaded, trainer_for, settings, tmp_path):
    """So that it can be deleted when a newer one is there, on NFS too."""
    config = settings(**RUN, checkpointing_steps=1, use_ema=True)
    run(config, tmp_path, trainer_for, stop_at=3)
    state = loaded(config, tmp_path)
    assert state.progress.counts.steps > 0
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_killed_before_every_save_and_every_time_goes_on_exactly(trainer_for, settings, tmp_path):
    """Each run is killed before its second event is saved: so each event is lost once."""
    short = RUN | {"num_rounds": 2, "steps_per_round": 2, "checkpointing_steps": 1}
    config = settings(**short)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = weights(run(config, whole, trainer_for)[0])
    events = 2 * (2 * (2 + 1) + 1)
    run(config, broken, trainer_for, stop_at=2, saves=False)
    for number in range(events - 2):
        run(resuming(config), broken, trainer_for, stop_at=2, saves=False)
        # Whatever the file is like, a run that goes on writes it from the checkpoint.
        text = (broken / "metrics.jsonl").read_text()
        (broken / "metrics.jsonl").write_text(text[: -20 * (number % 3)] if number % 3 else text)
    trainer, _ = run(resuming(config), broken, trainer_for)
    assert equal(weights(trainer), expected)
    assert timeless(broken / "metrics.jsonl") == timeless(whole / "metrics.jsonl")


def test_going_on_from_an_older_checkpoint_does_the_later_rounds_again(
    trainer_for, settings, tmp_path
):
    config = settings(**RUN)
    expected = weights(run(config, tmp_path, trainer_for)[0])
    older = resuming(config, "checkpoint-2", checkpoints_total_limit=1)
    trainer, _ = run(older, tmp_path, trainer_for)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert equal(weights(trainer), expected)


def test_going_on_elsewhere_leaves_the_first_run_as_it_is(trainer_for, settings, tmp_path):
    """With what the first run did after its checkpoint."""
    config = settings(**RUN, checkpointing_steps=1)
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    run(config, first, trainer_for, stop_at=15)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    elsewhere = resuming(config, str(first / "checkpoint-1"))
    _, state = run(elsewhere, second, trainer_for, stop_at=1)
    assert [event.shard for event in state.progress.done] == [0]
    trainer, _ = run(resuming(config), second, trainer_for)
    assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert equal(weights(trainer), weights(run(config, whole, trainer_for)[0]))
    assert timeless(second / "metrics.jsonl") == timeless(whole / "metrics.jsonl")


def test_steps_within_a_round_are_not_done_again(trainer_for, settings, tmp_path, loaded):
    config = settings(**RUN, checkpointing_steps=2)
    run(config, tmp_path, trainer_for, stop_at=6)  # 3 steps, the shard's end, 2 steps
    progress = loaded(config, tmp_path).progress
    assert [event.shard for event in progress.done] == [0]
    # Saved after 2 steps, at the shard's end, and after the fourth step; the fifth was lost.
    assert (progress.shard, progress.counts.steps) == (1, 1)
    within = tmp_path / "checkpoint-0" / "process-0-of-1"
    assert {p.name for p in within.iterdir()} == {"shard-0-done", "shard-1-step-1"}


def test_a_finished_shard_is_not_lost_while_the_process_waits(
    trainer_for, settings, tmp_path, loaded
):
    config = settings(**RUN)  # which saves every 500 steps otherwise
    _, ran = run(config, tmp_path, trainer_for, stop_at=8)  # both shards, not the round
    state = loaded(config, tmp_path)
    assert state.progress.shard is None
    assert [event.shard for event in state.progress.done] == [0, 1]
    assert equal({"skips": state.progress.new_skips_N}, {"skips": ran.progress.new_skips_N})
    # Nothing is trained again, so the next event is the round's.
    _, state = run(resuming(config), tmp_path, trainer_for, stop_at=1)
    assert state.round == 1
    assert isinstance(state.history[-1], RoundDone)


def test_seconds_go_on(trainer_for, settings, tmp_path, loaded):
    config = settings(**RUN, checkpointing_steps=1)
    run(config, tmp_path, trainer_for, stop_at=5)
    state = loaded(config, tmp_path)
    done, spent = state.progress.done[0].seconds, state.progress.seconds
    _, state = run(resuming(config), tmp_path, trainer_for, stop_at=4)
    event = state.history[0]
    assert event.shards[0].seconds == done
    assert event.shards[1].seconds > spent
    assert event.seconds >= sum(shard.seconds for shard in event.shards)


def test_another_number_of_processes_goes_on_from_the_round(
    trainer_for, settings, tmp_path, loaded
):
    config = settings(**RUN, checkpointing_steps=2)
    run(config, tmp_path, trainer_for, stop_at=3)
    assert loaded(config, tmp_path).progress
    assert loaded(config, tmp_path, process="0-of-2").progress is None


@pytest.mark.parametrize("shard", [0, 1])
def test_a_damaged_save_within_a_round_is_named_and_its_steps_done_again(
    shard, trainer_for, settings, tmp_path, loaded, caplog
):
    config = settings(**RUN, checkpointing_steps=2)
    run(config, tmp_path, trainer_for, stop_at=6)
    within = tmp_path / "checkpoint-0" / "process-0-of-1"
    (folder,) = within.glob(f"shard-{shard}-*")
    flip(folder / "skips.safetensors")
    progress = loaded(config, tmp_path).progress
    assert f"{folder} is damaged: skips.safetensors" in caplog.text
    # Of the other shard, the first stays and the second is done again after it.
    done = [event.shard for event in progress.done] if progress else []
    assert done == ([0] if shard else [])
    trainer, _ = run(resuming(config), tmp_path, trainer_for)
    expected = run(config, tmp_path / "whole", trainer_for)[0]
    assert equal(weights(trainer), weights(expected))


def test_every_file_is_read_once_to_see_whether_it_is_whole(
    trainer_for, settings, tmp_path, monkeypatch
):
    config = settings(**RUN)
    run(config, tmp_path, trainer_for, stop_at=18)
    read, checksum = [], sealed._checksum
    monkeypatch.setattr(sealed, "_checksum", lambda path: read.append(path) or checksum(path))
    trainer, state = trainer_for(config)
    found = checkpoint.find(tmp_path, "latest")
    checkpoint.load(found, state, found.identity)
    checkpoint.load_within_round(found.folder, trainer, state, "0-of-1")
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    assert sorted(read) == sorted(path for path in files if path.name != "state.json")


def test_a_failed_write_on_any_process_leaves_the_last_checkpoint(
    trainer_for, settings, tmp_path, monkeypatch
):
    config = settings(**RUN)
    trainer, state = run(config, tmp_path, trainer_for, stop_at=18)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    state.round = 3
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, state, {}, 0, 1)
    state.round, state.progress = 2, trainer.no_progress(state)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_within_round(tmp_path / "checkpoint-2", state, 0, "0-of-1")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not list(tmp_path.rglob("*partial*"))


def test_nothing_is_pickled(trainer_for, settings, tmp_path):
    run(settings(**RUN, checkpointing_steps=1), tmp_path, trainer_for, stop_at=12)
    files = [path for path in tmp_path.glob("checkpoint-*/**/*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_what_is_named_and_not_there(trainer_for, settings, tmp_path):
    run(settings(**RUN), tmp_path, trainer_for, stop_at=18)
    assert checkpoint.find(tmp_path, "latest").folder.name == "checkpoint-2"
    assert checkpoint.find(tmp_path, "checkpoint-1").folder.name == "checkpoint-1"
    assert checkpoint.find(tmp_path, str(tmp_path / "checkpoint-1")).round == 1
    with pytest.raises(UserError, match=r"not a checkpoint folder.*checkpoint-1, checkpoint-2"):
        checkpoint.find(tmp_path, "checkpoint-7")
    assert checkpoint.find(tmp_path / "elsewhere", "latest") is None
    assert checkpoint.find(tmp_path, None) is None


def test_events_come_back_from_json_as_they_were(trainer_for, settings, tmp_path, loaded):
    config = settings(**RUN, train_mode="lora")
    _, state = run(config, tmp_path, trainer_for, stop_at=18)
    history = loaded(config, tmp_path).history
    assert history == state.history
    assert isinstance(history[0].shards[0], ShardDone)
    assert [event.lora_gap is not None for event in history] == [False, True]
    assert json.loads((tmp_path / "checkpoint-1" / "history.json").read_text())[0]["round"] == 1


def test_a_seed_goes_with_the_checkpoint(trainer_for, settings, tmp_path):
    config = settings(**RUN)
    run(replace(config, training=replace(config.training, seed=7)), tmp_path, trainer_for, 9)
    assert checkpoint.find(tmp_path, "latest").identity["seed"] == 7
