"""Stopped and resumed equals never stopped, and a checkpoint that is not right is refused."""

import json

import pytest
import torch

from iet_sd.engine import checkpoint
from iet_sd.engine.rounds import RoundDone, ShardDone
from iet_sd.engine.tracking import MetricsFile
from iet_sd.errors import UserError
from tests.compare import equal

RUN = {"num_shards": 2, "num_rounds": 4, "steps_per_round": 3, "lr_scheduler": "cosine"}


def train_and_save(trainer, state, folder, rounds=None):
    """Train, with a checkpoint a round; stops after ``rounds`` rounds as if killed."""
    metrics = MetricsFile(folder / "metrics.jsonl", state.round)
    identity = checkpoint.identity(trainer.config, trainer.steps_per_round, ["a"])
    for event in trainer.run(state):
        if isinstance(event, RoundDone):
            metrics.add(event)
            checkpoint.save(folder, state, identity, None, 0, lambda: None)
            if event.round == rounds:
                return
        elif isinstance(event, ShardDone) and rounds and event.round == rounds + 1:
            return


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
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_never_stopped(given, stop, trainer_for, settings, tmp_path):
    config = settings(**RUN, **given)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    trainer, state = trainer_for(config)
    train_and_save(trainer, state, whole)
    expected = {k: p.detach().clone() for k, p in trainer.parameters.items()}

    trainer, state = trainer_for(config)
    train_and_save(trainer, state, broken, rounds=stop)
    trainer, state = trainer_for(config)
    identity = checkpoint.identity(config, trainer.steps_per_round, ["a"])
    checkpoint.load(checkpoint.find(broken, "latest"), state, identity)
    assert state.round == stop
    train_and_save(trainer, state, broken)
    assert equal({k: p.detach() for k, p in trainer.parameters.items()}, expected)
    assert without_time(broken / "metrics.jsonl") == without_time(whole / "metrics.jsonl")
    last = [json.loads((f / "checkpoint-4" / "proxy-0.json").read_text()) for f in (whole, broken)]
    assert last[0] == last[1]


@pytest.fixture
def saved(trainer_for, settings, tmp_path):
    config = settings(**RUN)
    trainer, state = trainer_for(config)
    train_and_save(trainer, state, tmp_path, rounds=2)
    return config, trainer, state, tmp_path


def test_what_is_refused(saved, settings, trainer_for):
    config, trainer, _, folder = saved
    newest = checkpoint.find(folder, "latest")
    assert newest.name == "checkpoint-2"
    assert checkpoint.find(folder, "checkpoint-1").name == "checkpoint-1"
    with pytest.raises(UserError, match=r"not a checkpoint folder.*checkpoint-1, checkpoint-2"):
        checkpoint.find(folder, "checkpoint-7")
    with pytest.raises(UserError, match="no checkpoint-"):
        checkpoint.find(folder / "elsewhere", "latest")

    other = settings(**RUN | {"lr_scheduler": "constant"})
    identity = checkpoint.identity(other, trainer.steps_per_round, ["b"])
    with pytest.raises(UserError, match=r"lr_scheduler: 'cosine' then, 'constant' now; sample_ids"):
        checkpoint.load(newest, trainer.start(torch.zeros(16)), identity)

    identity = checkpoint.identity(config, trainer.steps_per_round, ["a"])
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"damaged: weights.safetensors"):
        checkpoint.load(newest, trainer.start(torch.zeros(16)), identity)


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
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
        "metrics.jsonl",
    ]


def test_nothing_is_pickled(saved):
    *_, folder = saved
    suffixes = {p.suffix for p in (folder / "checkpoint-2").iterdir()}
    assert suffixes == {".json", ".safetensors"}
