"""A checkpoint that is damaged, or of another run: the right message, and nothing is destroyed."""

import json

import pytest

from iet_sd.engine import checkpoint
from iet_sd.engine.identity import identity
from iet_sd.errors import UserError
from tests.engine.running import RUN, flip, same


@pytest.fixture
def saved(trainer_for, settings, tmp_path):
    """Checkpoints after rounds 1 and 2, with something done after each."""
    config = settings(**RUN)
    trainer, state = trainer_for(config)
    state.progress = trainer.no_progress(state)
    next(trainer.train_shard(state, 0))
    for state.round in (1, 2):
        folder = checkpoint.save(tmp_path, state, same(config, trainer), 0, 1)
        checkpoint.save_within_round(folder, state, 0, "0-of-1")
    return config, trainer


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path):
    """A value of the manifest, which no checksum of a file would tell."""
    path.write_text(path.read_text().replace('"round": 2', '"round": 3'))


DAMAGES = {
    "truncated weights": ("weights.safetensors", truncate),
    "truncated schedule": ("proxy-0.json", truncate),
    "empty": ("proxy-1.safetensors", lambda path: path.write_bytes(b"")),
    "flipped bit of a weight": ("weights.safetensors", flip),
    "flipped bit of a moment": ("proxy-1.safetensors", flip),
    "flipped bit of the history": ("history.json", flip),
    "file missing": ("samples.safetensors", lambda path: path.unlink()),
    "flipped bit of the manifest": ("state.json", flip),
    "value of the manifest": ("state.json", edit),
    "manifest missing": ("state.json", lambda path: path.unlink()),
    "manifest not JSON": ("state.json", lambda path: path.write_text("{")),
    "manifest not text": ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "manifest of another kind": ("state.json", lambda path: path.write_text("[1, 2]")),
    "manifest empty": ("state.json", lambda path: path.write_text("")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_it_is_named_and_the_one_before_it_used(name, damage, saved, tmp_path, caplog):
    newest = tmp_path / "checkpoint-2"
    damage(newest / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert checkpoint.find(tmp_path, "latest").round == 1
    assert f"{newest} is damaged: " in caplog.text
    assert name in caplog.text
    with pytest.raises(UserError, match=f"checkpoint-2 is damaged: .*{name}"):
        checkpoint.find(tmp_path, "checkpoint-2")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("proxy-0.safetensors", flip),
        ("proxy-0.json", truncate),
        ("skips.safetensors", lambda path: path.unlink()),
        ("state.json", flip),
        ("state.json", lambda path: path.unlink()),
    ],
)
def test_a_save_within_a_round_is_named_and_done_without(
    name, damage, saved, tmp_path, caplog, trainer_for
):
    config, trainer = saved
    folder = tmp_path / "checkpoint-2" / "process-0-of-1" / "shard-0-step-1"
    damage(folder / name)
    found = checkpoint.find(tmp_path, "latest")
    state = trainer_for(config)[1]
    checkpoint.load(found, state, found.identity)
    checkpoint.load_within_round(found.folder, trainer, state, "0-of-1")
    assert state.progress is None
    assert f"{folder} is damaged" in caplog.text
    assert folder.exists()


def test_if_all_are_damaged_nothing_starts(saved, tmp_path):
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number}" / "state.json").unlink()
    with pytest.raises(
        UserError, match=r"every checkpoint in .* is damaged.*--overwrite_output_dir and without"
    ):
        checkpoint.find(tmp_path, "latest")
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


OTHERS = {
    "setting": ({"lr_scheduler": "constant"}, {}, "lr_scheduler: 'cosine' then, 'constant' now"),
    "two settings": (
        {"learning_rate": 1e-4, "taa": False},
        {},
        "learning_rate: 0.001 then, 0.0001 now; taa: True then, False now",
    ),
    "K": ({"num_shards": 3}, {}, "num_shards: 2 then, 3 now"),
    "length": ({}, {"steps": 4}, "steps_per_round: 3 then, 4 now"),
    "seed": ({"seed": 1}, {}, "seed: 0 then, 1 now"),
    "data": ({}, {"samples": ["another"]}, "data: '1 samples with SHA-256 .*' then"),
    "model": ({}, {"model": "another"}, "model: 'files with SHA-256 model' then, 'files with"),
    "kind of training": ({"train_mode": "lora"}, {}, "train_mode: 'full' then, 'lora' now"),
}


@pytest.mark.parametrize(("given", "also", "message"), OTHERS.values(), ids=OTHERS)
def test_one_of_another_run_is_refused(given, also, message, saved, settings, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parts = {"steps": 3, "model": "model", "samples": ["a sample"]} | also
    mine = identity(settings(**RUN | given), parts["steps"], parts["model"], parts["samples"])
    found = checkpoint.find(tmp_path, "latest")
    with pytest.raises(UserError, match=message) as refusal:
        checkpoint.load(found, None, mine)  # refused before any state is touched
    assert str(found.folder) in str(refusal.value)
    assert json.loads((found.folder / "state.json").read_text())["round"] == 2
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


FREE = {
    "output_dir": "elsewhere",
    "cache_dir": None,
    "checkpointing_rounds": 3,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "report_to": "none",
    "dataloader_num_workers": 2,
    "validation_prompts": ("a cat",),
    "ddp_timeout": 5,
    # What these come to is compared instead.
    "train_data_dir": "the/same/data",
    "pretrained_model_name_or_path": "the/same/model",
    "max_train_samples": 16,
    "caption_column": "caption",
}


@pytest.mark.parametrize("name", FREE)
def test_what_may_differ(name, saved, settings, tmp_path, trainer_for):
    config, trainer = saved
    found = checkpoint.find(tmp_path, "latest")
    other = settings(**RUN | {name: FREE[name]})
    checkpoint.load(found, trainer_for(config)[1], same(other, trainer))
