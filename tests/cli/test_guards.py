"""What stops a run in the middle leaves a checkpoint that it goes on from."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file

from iet_sd.cli.train import train
from iet_sd.data.dataset import TrainingImages
from iet_sd.engine import checkpoint
from iet_sd.engine.rounds import Trainer
from iet_sd.engine.store import FOLDER
from tests.compare import equal

MODES = [{}, {"train_mode": "lora", "rank": 2}]


def result(folder):
    (path,) = [*folder.glob("unet/*.safetensors"), *folder.glob("pytorch_lora*.safetensors")]
    return load_file(path)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_round(number, act, monkeypatch):
    """Have ``act`` done at the beginning of a round."""
    run_round = Trainer.run_round

    def acting(self, state):
        if state.round + 1 == number:
            act()
        return run_round(self, state)

    monkeypatch.setattr(Trainer, "run_round", acting)


@pytest.mark.parametrize("mode", MODES, ids=["full", "lora"])
def test_a_bad_image_stops_the_run_which_goes_on_without_its_batches(
    mode, argv, tmp_path, monkeypatch, capsys
):
    """As if it had left them out from the beginning."""
    example, poisoned = TrainingImages.example, []

    def read(self, visit, *args):
        found = example(self, visit, *args)
        if visit.index in poisoned:
            found["pixel_values"][:] = math.nan
        return found

    monkeypatch.setattr(TrainingImages, "example", read)
    in_round(2, lambda: poisoned.append(5), monkeypatch)
    given = {"steps_per_round": 5, **mode}
    assert train(argv(**given, output_dir=tmp_path / "whole", on_nonfinite="skip_batch")) == 0

    poisoned.clear()
    assert train(argv(**given)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "The loss is not finite in round 2, shard" in line
    assert "05.png (t=" in line
    found = checkpoint.find(tmp_path / "output", "latest")
    assert found.round == 1
    resumed = argv(**given, resume_from_checkpoint="latest", on_nonfinite="skip_batch")
    assert train(resumed) == 0
    assert equal(result(tmp_path / "output"), result(tmp_path / "whole"))
    counts = [line["nonfinite"] for line in metrics(tmp_path / "output") if line["kind"] == "round"]
    assert counts[0] == 0
    assert counts[1] > 0


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_an_image_that_goes_or_changes_stops_the_run_which_goes_on_when_it_is_back(
    harm, argv, images, tmp_path, monkeypatch, capsys
):
    assert train(argv(steps_per_round=5)) == 0
    data = shutil.copytree(images, tmp_path / "data")
    picture, kept = data / "05.png", (data / "05.png").read_bytes()
    act = picture.unlink if harm == "gone" else lambda: shutil.copyfile(data / "06.png", picture)
    given = {"steps_per_round": 5, "train_data_dir": data, "output_dir": tmp_path / "broken"}
    with monkeypatch.context() as patched:
        in_round(2, act, patched)
        assert train(argv(**given)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    reason = "no such file" if harm == "gone" else "not the file that it was before"
    assert f"05.png: {reason}" in line
    picture.write_bytes(kept)
    assert train(argv(**given, resume_from_checkpoint="latest")) == 0
    assert equal(result(tmp_path / "broken"), result(tmp_path / "output"))


def test_proxies_on_disk_leave_nothing_and_go_on_from_a_run_in_memory(argv, tmp_path):
    given = {"num_rounds": 3, "steps_per_round": 3}
    assert train(argv(**given)) == 0
    whole, broken = tmp_path / "output", tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-1", broken / "checkpoint-1")
    given |= {"output_dir": broken, "proxy_store": "disk"}
    (broken / FOLDER).mkdir()
    (broken / FOLDER / ".tmp4vLq8E").write_text("of a write that was killed")
    assert train(argv(**given, resume_from_checkpoint="latest")) == 0
    assert equal(result(broken), result(whole))
    assert {p.name for p in broken.iterdir()} == {p.name for p in whole.iterdir()}
    assert train(argv(**given, overwrite_output_dir="")) == 0
    assert equal(result(broken), result(whole))
    assert {p.name for p in broken.iterdir()} == {p.name for p in whole.iterdir()}
