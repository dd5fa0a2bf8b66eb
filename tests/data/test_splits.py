"""Splits of what is on disk: folders named so, and sets of a single one."""

import pytest

from iet_sd.data.sources import load_source
from tests.data.reading import error_of, reds, table


def test_image_named_train_does_not_make_a_split(folder, config):
    assert len(load_source(config(folder(["a.png", "train.png", "test.png"]))).dataset) == 3


def test_folders_of_splits(folder, config):
    root = folder(["train/a.png", "train/x/b.png", "val/c.png"])
    assert load_source(config(root)).sample_ids == ("train/a.png", "train/x/b.png")
    held_out = load_source(config(root, dataset_split="validation"))
    assert held_out.sample_ids == ("val/c.png",)
    message = error_of(config(root, dataset_split="test"))
    assert "['train', 'validation']" in message


def test_single_split_of_any_name(folder, config, tmp_path):
    root = folder(["test/a.png", "test/b.png"])
    assert load_source(config(root, dataset_split=None)).sample_ids == ("test/a.png", "test/b.png")
    (tables := tmp_path / "tables").mkdir()
    table(2, first=4).to_parquet(tables / "test-00000-of-00001.parquet")
    assert reds(load_source(config(tables, dataset_split=None))) == [4, 5]


@pytest.mark.parametrize("beside", ["preview.png", "samples/x.png"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_lies_beside_folders_of_splits(folder, config, beside, split):
    root = folder(["Train/a.png", "test/b.png", beside])
    settings = {"dataset_split": split, "on_missing_caption": "skip"}
    message = error_of(config(root, **settings))
    shown = "samples/" if "/" in beside else beside
    assert f"{root}: folders named as splits, Train, test, lie beside {shown}. " in message
    own = {"train": "Train", "test": "test"}[split]
    assert f"name a folder itself, as by --train_data_dir {root / own}, or rename" in message
    (root / beside).unlink()
    rows = [row for row in (root / "metadata.jsonl").read_text().splitlines() if shown not in row]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    assert len(load_source(config(root, **settings)).sample_ids) == 1


def test_class_with_the_name_of_a_split(folder, config):
    root = folder(["bus/a.png", "train/b.png"])
    assert "rename folders that are no splits" in error_of(config(root))
