"""Held-out images: where they may lie, and what is said where they do not."""

import pytest
from datasets import DatasetDict, load_dataset

from iet_sd.config import DataConfig
from iet_sd.data.sources import load_source
from iet_sd.errors import UserError
from iet_sd.evaluation.heldout import load_heldout
from tests.data.reading import png, reds, table


@pytest.fixture
def settings(tmp_path):
    """Settings of training images in a parquet file, and of held-out images elsewhere."""
    table(4).to_parquet(tmp_path / "train.parquet")

    def make(**given):
        place = {"train_data_dir": str(tmp_path / "train.parquet")}
        return DataConfig(**place | {"cache_dir": str(tmp_path / "cache")} | given)

    return make


def found(data):
    return reds(load_heldout(data, load_source(data)))


def error_of(data):
    with pytest.raises(UserError) as error:
        load_heldout(data, load_source(data))
    return str(error.value)


@pytest.mark.parametrize("split", ["test", "train[2:]"])
def test_a_split_that_was_saved(split, settings, tmp_path):
    """It is called as it was when it was loaded."""
    table(4, first=7).to_parquet(tmp_path / "all.parquet")
    files = {name: str(tmp_path / "all.parquet") for name in ("train", "test")}
    kept = {"cache_dir": str(tmp_path / "theirs")}
    rows = load_dataset("parquet", data_files=files, split=split, **kept)
    rows.save_to_disk(tmp_path / "heldout")
    expected = [7, 8, 9, 10] if split == "test" else [9, 10]
    assert found(settings(heldout_data_dir=str(tmp_path / "heldout"))) == expected


def test_a_set_of_one_split_and_of_several(settings, tmp_path):
    both = {"validation": table(2, first=5), "test": table(2, first=7)}
    DatasetDict({"test": both["test"]}).save_to_disk(tmp_path / "one")
    assert found(settings(heldout_data_dir=str(tmp_path / "one"))) == [7, 8]
    DatasetDict(both).save_to_disk(tmp_path / "both")
    message = error_of(settings(heldout_data_dir=str(tmp_path / "both")))
    assert f"--heldout_data_dir {tmp_path / 'both'}: expected a single split" in message
    assert "found ['validation', 'test']. Give what holds one of them alone" in message
    assert found(settings(heldout_data_dir=str(tmp_path / "both" / "test"))) == [7, 8]


def test_a_folder_of_one_split(settings, tmp_path):
    images = tmp_path / "heldout" / "test"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(png(9)["bytes"])
    (images / "a.txt").write_text("number 9")
    # Whatever the split that is trained on.
    for given in ({}, {"dataset_split": None}):
        assert found(settings(heldout_data_dir=str(tmp_path / "heldout"), **given)) == [9]


def test_split_of_the_training_data_by_its_own_flag(settings):
    message = error_of(settings(heldout_split="tset"))
    assert message.startswith("--heldout_split tset: ")
    assert "has no such split, only ['train']" in message
